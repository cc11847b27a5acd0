"""Speed of data_prep/tokenize.py beside its peers, from jsonl on disk to token files on disk.

    python benchmarks/tokenize.py                     # 300 MB of text found on this machine, 2 workers
    python benchmarks/tokenize.py megatron=PATH megatron_python=PYTHON   # a checkout of Megatron-LM: its two scripts too
    python benchmarks/tokenize.py only=ours,hf rounds=1

Every engine runs as its own process on a small and a large file, in turn, `rounds` times. Printed, of the fastest
round: MB/s of the whole process on the large file, marginal MB/s (difference of sizes by difference of times: without
start-up), tokens/s, CPU seconds and their marginal MB/s (what a busy machine distorts less), and peak memory of all its
processes together (PSS).
"""

import os.path
import sys

# This file's name is the standard library's too; see data_prep/tokenize.py.
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:] = [ROOT] + [
    p for p in sys.path if os.path.abspath(p or ".") != os.path.dirname(os.path.abspath(__file__))
]

import json  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

from benchmarks.contenders.texts import lines_of, make_corpus, tokens_per_byte  # noqa: E402
from pipeline import cli  # noqa: E402
from pipeline.errors import ConfigError, DataError  # noqa: E402


@dataclass
class BenchConfig:
    """Settings of benchmarks/tokenize.py."""

    work: str = os.path.join(tempfile.gettempdir(), "tokenize-bench")
    """Folder for the corpus (kept, used again) and the outputs (removed)."""
    size_mb: int = 300
    """Text of the large file, MB."""
    small_mb: int = 40
    """Text of the small file; slow engines take it as their large one, and a tenth of it as their small one."""
    workers: int = 2
    rounds: int = 2
    vocab_size: int = 32768
    only: str = ""
    """Engines, separated by commas; empty: all that can run here."""
    megatron: str = ""
    """A checkout of Megatron-LM."""
    megatron_python: str = ""
    """The Python that has what Megatron-LM wants (its main branch: Python 3.12 and triton); empty: this one."""
    child: str = ""
    """For this script itself: the peer to run in this process, hf or tiktoken."""
    input: str = ""
    """For this script itself."""


ONE_DOCUMENT_MB = 64
SLOW = ("hf", "datatrove", "megatron", "ours_hf")
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    folder, pattern, tokenizer, output, workers = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[JsonlReader(folder, glob_pattern=pattern + "/*.jsonl"),
                  DocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>")],
        tasks=int(workers), workers=int(workers), logging_dir=output + "/logs").run()
"""


def main(cfg: BenchConfig) -> None:
    """Make the corpus, run the engines, print the table."""
    if cfg.child:
        run_peer(cfg)
        return
    work = Path(cfg.work)
    sizes = {"large": cfg.size_mb, "small": cfg.small_mb, "tiny": max(cfg.small_mb // 10, 1)}
    for name, size in sizes.items():
        make_corpus(work, name, size, parts=cfg.workers)
    tokenizer = work / f"tokenizer-{cfg.vocab_size}.json"
    if not tokenizer.exists():
        words = [f"input={work}/small.jsonl", f"output={tokenizer}", f"vocab_size={cfg.vocab_size}"]
        subprocess.run(
            [sys.executable, "-m", "data_prep.train_tokenizer", *words], cwd=ROOT, check=True
        )
    engines = [
        e for e in commands(cfg, work, "x", tokenizer) if not cfg.only or e in cfg.only.split(",")
    ]
    if not engines:
        raise ConfigError(
            f"only={cfg.only} names none of: {', '.join(commands(cfg, work, 'x', tokenizer))}."
        )
    best: dict[tuple[str, str], tuple[float, float, float]] = {}
    for _ in range(cfg.rounds):
        for engine in engines:  # alternating, so that a busy minute does not hit one engine alone
            for size in ("tiny", "small") if engine in SLOW else ("small", "large"):
                shutil.rmtree(work / "out", ignore_errors=True)
                (work / "out").mkdir()
                command = commands(cfg, work, size, tokenizer)[engine]
                found = measure(command, path=path_of(cfg, engine))
                best[engine, size] = min(found, best.get((engine, size), found))
                print(f"  {engine} {size}: %.2f s, CPU %.2f s, %.0f MB" % found, file=sys.stderr)
    shutil.rmtree(work / "out", ignore_errors=True)
    report(cfg, work, engines, best, tokenizer)
    if "ours" in engines:
        one_document(cfg, work, tokenizer)


def one_document(cfg: BenchConfig, work: Path, tokenizer: Path) -> None:
    """Print the marginal speed of one worker on one huge document, and on the same text as it was found."""
    make_corpus(work, "many", ONE_DOCUMENT_MB, parts=1)
    with (work / "many.jsonl").open() as file:
        text = "".join(json.loads(line)["text"] for line in file)
    (work / "one.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    size = (
        len(text.encode()) - json.loads((work / "tiny.facts.json").read_text())["text_mb"] * 1e6
    ) / 1e6
    seconds: dict[str, float] = {}
    for _ in range(cfg.rounds):
        for name in ("tiny", "many", "one"):
            shutil.rmtree(work / "out", ignore_errors=True)
            command = [*commands(cfg, work, name, tokenizer)["ours"][:-1], "workers=1"]
            seconds[name] = min(measure(command)[0], seconds.get(name, float("inf")))
    shutil.rmtree(work / "out", ignore_errors=True)
    many, one = (size / (seconds[name] - seconds["tiny"]) for name in ("many", "one"))
    print(
        f"one document of {ONE_DOCUMENT_MB} MB: {one:.0f} MB/s; the same text in {lines_of(work, 'many')} documents: "
        f"{many:.0f} MB/s (one worker, marginal): {one / many:.2f}"
    )


def report(cfg: BenchConfig, work: Path, engines: list[str], best: dict, tokenizer: Path) -> None:
    """Print one row an engine."""
    facts = {
        name: json.loads((work / f"{name}.facts.json").read_text())
        for name in ("large", "small", "tiny")
    }
    from pipeline.data.tokenizer import Tokenizer

    ratio = tokens_per_byte(work / "tiny.jsonl", Tokenizer.from_file(tokenizer))
    print(
        f"{facts['large']['text_mb']:.0f} MB of text, {facts['large']['documents']} documents, {cfg.workers} workers"
    )
    heads = (
        ("on", 8),
        ("wall s", 9),
        ("MB/s", 8),
        ("marginal", 10),
        ("Mtok/s", 8),
        ("CPU s", 8),
        ("CPU marg.", 11),
    )
    heads += ("peak MB", 9), ("on small", 10)
    print(f"{'engine':<14}" + "".join(f"{head:>{width}}" for head, width in heads))
    for engine in engines:
        low, high = ("tiny", "small") if engine in SLOW else ("small", "large")
        seconds, cpu, peak = best[engine, high]
        size, less = facts[high]["text_mb"], facts[low]["text_mb"]
        marginal, cpu_marginal = (
            (size - less) / max(now - before, 1e-9)
            for now, before in zip((seconds, cpu), best[engine, low])
        )
        print(
            f"{engine:<14}{size:>5.0f} MB{seconds:>9.2f}{size / seconds:>8.1f}{marginal:>10.1f}"
            f"{size * ratio / seconds:>8.2f}{cpu:>8.2f}{cpu_marginal:>11.1f}{peak:>9.0f}{best[engine, 'small'][0]:>8.2f} s"
        )


def commands(cfg: BenchConfig, work: Path, size: str, tokenizer: Path) -> dict[str, list[str]]:
    """Command line of each engine that can run here."""
    source, out, python = f"{work}/{size}.jsonl", f"{work}/out", sys.executable
    ours = [python, "data_prep/tokenize.py", f"input={source}", f"output={out}/ours", f"tokenizer={tokenizer}",
            f"workers={cfg.workers}"]  # fmt: skip
    peer = [
        python,
        "benchmarks/tokenize.py",
        f"work={work}",
        f"workers={cfg.workers}",
        f"vocab_size={cfg.vocab_size}",
    ]
    table = {
        "ours": ours,
        "ours_tiktoken": [*ours, "encoder=tiktoken"],
        "ours_hf": [*ours, "encoder=hf"],
        "tiktoken": [*peer, "child=tiktoken", f"input={source}"],
        "hf": [*peer, "child=hf", f"input={source}"],
    }
    if is_installed("datatrove"):
        words = [str(work), f"{size}.parts", str(tokenizer), f"{out}/datatrove", str(cfg.workers)]
        table["datatrove"] = [python, f"{work}/datatrove_run.py", *words]
        work.mkdir(parents=True, exist_ok=True)
        (work / "datatrove_run.py").write_text(DATATROVE)
    if cfg.megatron:
        theirs, scripts = cfg.megatron_python or python, f"{cfg.megatron}/tools"
        common = ["--input", source, "--output-prefix", f"{out}/megatron", "--tokenizer-type", "HuggingFaceTokenizer",
                  "--tokenizer-model", str(hugging_face_folder(tokenizer)), "--append-eod"]  # fmt: skip
        # The fast script is one process whose threads gigatoken starts: it knows no --workers.
        slow = ["--workers", str(cfg.workers)]
        table["megatron"] = [theirs, f"{scripts}/preprocess_data.py", *common, *slow]
        table["megatron_fast"] = [theirs, f"{scripts}/preprocess_data_fast.py", *common, "--use-gigatoken"]  # fmt: skip
    return table


def path_of(cfg: BenchConfig, engine: str) -> str:
    """Where an engine imports from first: a checkout's scripts want its megatron.core, not an installed one."""
    return cfg.megatron if engine.startswith("megatron") else ROOT


def hugging_face_folder(tokenizer: Path) -> Path:
    """The tokenizer as transformers' AutoTokenizer takes it."""
    folder = tokenizer.with_suffix(".hf")
    if tokenizer.exists() and not folder.exists():
        folder.mkdir()
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


def run_peer(cfg: BenchConfig) -> None:
    """A plain program on the peer's library: lines -> texts -> ids -> one uint16 file a worker."""
    from multiprocessing import get_context

    work = Path(cfg.work)
    size = Path(cfg.input).stat().st_size
    bounds = [size * i // cfg.workers for i in range(cfg.workers + 1)]
    jobs = [(cfg.child, cfg.input, low, high, str(work / f"tokenizer-{cfg.vocab_size}.json"), f"{work}/out/peer-{i}.bin")
            for i, (low, high) in enumerate(zip(bounds, bounds[1:]))]  # fmt: skip
    with get_context("fork").Pool(cfg.workers) as pool:
        pool.starmap(peer_worker, jobs)


def peer_worker(engine: str, path: str, low: int, high: int, tokenizer: str, output: str) -> None:
    """One byte range of the file through Hugging Face tokenizers or tiktoken, in batches of 2 MB."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import numpy as np
    import orjson

    from data_prep.tokens import encode
    from pipeline.data.tokenizer import Tokenizer

    loaded = Tokenizer.from_file(tokenizer)
    ids_of = {"hf": encode._hf, "tiktoken": encode._tiktoken}[engine](loaded)
    with open(path, "rb") as source, open(output, "wb") as target:
        if low:
            source.seek(low - 1)
            source.readline()
        while source.tell() < high:
            texts, size = [], 0
            while size < 2e6 and source.tell() < high and (line := source.readline()):
                texts.append(orjson.loads(line)["text"])
                size += len(line)
            ids, lengths = ids_of(texts)
            with_eod = np.insert(ids, np.cumsum(lengths), loaded.eod)
            target.write(with_eod.astype(np.uint16).tobytes())


def measure(command: list[str], *, path: str = ROOT) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak PSS in MB) of the process and its children, which import from `path` first."""
    import psutil

    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = psutil.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": path}
        )
        peak, finished, cpu = 0.0, None, {}
        while finished is None:
            try:
                finished = process.wait(0.05)
            except psutil.TimeoutExpired:
                found = [usage(p) for p in [process, *process.children(recursive=True)]]
                peak = max(peak, sum(pss for _, _, pss in found))
                cpu |= {pid: seconds for pid, seconds, _ in found if seconds}
        seconds = time.perf_counter() - start
        if finished:
            log.seek(0)
            raise DataError(
                f"{' '.join(command)} ended with {finished}:\n{log.read().decode()[-2000:]}"
            )
    return seconds, sum(cpu.values()), peak


def usage(process) -> tuple[int, float, float]:
    """(pid, CPU seconds, proportional set size in MB); zeros for a process that has just ended."""
    import psutil

    try:
        times = process.cpu_times()
        return process.pid, times.user + times.system, process.memory_full_info().pss / 1e6
    except psutil.Error:
        return process.pid, 0.0, 0.0


def is_installed(name: str) -> bool:
    """A package can be imported, without importing it."""
    from importlib.util import find_spec

    return find_spec(name) is not None


if __name__ == "__main__":
    cli.run(main, BenchConfig, config="bench_tokenize")
