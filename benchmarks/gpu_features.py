"""Every kind of run for a few steps on the device and on the CPU: does it run there, and are the losses those of the CPU?

    python benchmarks/gpu_features.py                   all, twelve at a time
    python benchmarks/gpu_features.py --only experts lora

Losses of a run in fp32 must agree to 0.1 %, in 16 bits to 1 %, in float8 to 5 %: after four steps a wrong kernel, mask or
reduction is further off. What compiles, offloads or multiplies in float8 on the device does not on the CPU beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

# benchmarks/tokenize.py has the name of a module of the standard library: this folder must not be searched.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

import argparse  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import subprocess  # noqa: E402
import tarfile  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from concurrent.futures import Future, ThreadPoolExecutor, as_completed  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402

RUN = (
    "tracking=local", "training.global_batch_size=8", "training.micro_batch_size=4", "training.total_steps=4",
    "training.eval_every=0", "training.eval_sequences=16", "tracking.log_every=1", "schedule.warmup_steps=1",
    "checkpoint.save_every=0", "optimizer.lr=3e-3",
)  # fmt: skip
TINY = ("model=tiny", "training.seq_len=64")
MODERN = (
    *TINY, "model.position=rope", "model.normalization=rmsnorm", "model.activation=swiglu", "model.bias=false",
    "model.num_query_groups=2", "model.qk_norm=true", "model.ffn_hidden_size=256",
)  # fmt: skip
FP32, BF16, FP16 = (f"training.precision={name}" for name in ("fp32", "bf16", "fp16"))
OFF = {FP32: 1e-3, BF16: 1e-2, FP16: 1e-2}
COMPILE = "model.compile=true"


@dataclass(frozen=True)
class Feature:
    """A kind of run."""

    settings: tuple[str, ...]
    on_device: tuple[str, ...] = ()
    """Settings of the device's run only."""
    off: float | None = None
    """Relative difference of losses that passes; None: by precision."""
    data: str = "text"
    after: str | None = None
    """Starts from the weights of this one's run on the CPU."""

    @property
    def most(self) -> float:
        """Largest relative difference that passes."""
        return self.off or next(OFF[word] for word in self.settings if word in OFF)


FEATURES = {
    "modern fp32": Feature((*MODERN, FP32)),  # first: others start from it
    "gpt-2 fp32": Feature((*TINY, FP32)),
    "gpt-2 bf16": Feature((*TINY, BF16)),
    "gpt-2 fp16": Feature((*TINY, FP16)),
    "modern bf16": Feature((*MODERN, BF16)),
    "compiled bf16": Feature((*MODERN, BF16), (COMPILE,)),
    "compiled gpt-2": Feature((*TINY, BF16, "model.z_loss_coeff=1e-3"), (COMPILE,)),
    "compiled, recomputed": Feature((*MODERN, BF16), (COMPILE, "training.recompute=full")),
    "documents fp32": Feature((*MODERN, FP32, "data=documents")),
    "documents bf16": Feature((*MODERN, BF16, "data=documents")),
    "documents compiled": Feature((*MODERN, BF16, "data=documents"), (COMPILE,)),
    "recomputed": Feature((*TINY, BF16), ("training.recompute=full",)),
    "recomputed attention": Feature((*TINY, BF16), ("training.recompute=selective",)),
    "zero 0": Feature((*MODERN, FP32), ("parallel.zero_stage=0",)),
    "zero 2": Feature((*MODERN, BF16), ("parallel.zero_stage=2",)),
    "zero 3": Feature((*MODERN, BF16), ("parallel.zero_stage=3",)),
    "experts fp32": Feature((*MODERN, FP32, "model.moe.num_experts=4")),
    "experts bf16": Feature((*MODERN, BF16, "model.moe.num_experts=4")),
    "muon": Feature((*MODERN, BF16, "optimizer=muon", "optimizer.lr=1e-3")),
    "muP": Feature((*MODERN, FP32, "model.init=mup", "model.mup_base_hidden_size=64")),
    "float8": Feature((*MODERN, BF16), ("training.fp8=rowwise",), off=5e-2),
    "post-norm": Feature((*TINY, FP32, "model.norm_placement=post")),
    "parallel residual, softcap": Feature(
        (*TINY, FP32, "model.parallel_residual=true", "model.num_query_groups=1", "model.logit_softcap=10")
    ),
    "pictures fp32": Feature(("model=caption", "training.seq_len=256", FP32), data="pictures"),
    "pictures bf16": Feature(("model=caption", "training.seq_len=256", BF16), data="pictures"),
    "lora": Feature((*MODERN, FP32, "finetune=lora"), after="modern fp32"),
    "last layers": Feature((*MODERN, BF16, "finetune.train=[layers.-1.*,final_norm.*]"), after="modern fp32"),
    # Last: DeepSpeed compiles its optimizer first.
    "offloaded": Feature((*MODERN, BF16), ("parallel.offload_optimizer=true",)),
}  # fmt: skip


def call(*words: str, on_cpu: bool = False, limit_s: float = 240) -> str:
    """What a program of ours printed.

    Raises:
        RuntimeError: it failed; the last line that it said of an error.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=limit_s
    )  # fmt: skip
    if done.returncode:
        print(f"== {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}", flush=True)
        said = [line for line in (done.stderr + done.stdout).splitlines() if "rror" in line]
        raise RuntimeError((said or ["?"])[-1][:200])
    return done.stdout


def make_data(work: Path) -> None:
    """Text of the standard library and pictures with a name each, tokenized by our own tools."""
    library = Path(json.__file__).resolve().parents[1] / "asyncio"
    corpus, tokenizer = (f"input=stdlib={library}", "include=.py"), work / "tokenizer.json"
    call("-m", "data_prep.train_tokenizer", *corpus, f"output={tokenizer}", "vocab_size=512")
    call("data_prep/tokenize.py", *corpus, f"output={work / 'text'}", f"tokenizer={tokenizer}", "validation_fraction=0.1")  # fmt: skip
    from PIL import Image

    draw = random.Random(0)
    with tarfile.open(work / "pictures.tar", "w") as archive:
        for number in range(400):
            out = io.BytesIO()
            Image.frombytes("RGB", (32, 32), draw.randbytes(3 * 32 * 32)).save(out, "PNG")
            for suffix, content in (("png", out.getvalue()), ("txt", f"number {number}".encode())):
                member = tarfile.TarInfo(f"{number:03}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    call(
        "-m", "data_prep.conversations", f"input={work / 'pictures.tar'}", f"output={work / 'pictures'}", f"tokenizer={tokenizer}",
        "template=launch/letter.jinja", "row_tokens=256", "image_size=32", "patch_size=8", "validation_fraction=0.1",
    )  # fmt: skip


def losses(work: Path, name: str, *, on_cpu: bool) -> list[float]:
    """Training losses of a feature's run."""
    feature = FEATURES[name]
    folder = f"{'cpu' if on_cpu else 'device'}-{list(FEATURES).index(name)}"
    words = [*RUN, *feature.settings, f"name={folder}", f"runs_dir={work / 'runs'}", f"data.path={work / feature.data}"]  # fmt: skip
    words += [] if on_cpu else feature.on_device
    if feature.after:
        words += [f"checkpoint.init_from={work / 'runs' / f'cpu-{list(FEATURES).index(feature.after)}'}"]  # fmt: skip
    call("-m", "pipeline.train", *words, on_cpu=on_cpu)
    rows = map(json.loads, (work / "runs" / folder / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def compare(here: Future[list[float]], there: Future[list[float]], name: str) -> tuple[str, str]:
    """(verdict, what was seen) of a feature: losses on the CPU and on the device."""
    try:
        wanted, got = here.result(), there.result()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return "failed", str(error)[-200:]
    apart = max(abs(a / b - 1) for a, b in zip(got, wanted, strict=True))
    return ("same" if apart <= FEATURES[name].most else "other"), f"{apart:.1e}"


def compare_text(work: Path) -> tuple[str, str]:
    """(verdict, what was seen) of greedy text from the first feature's checkpoint."""
    words = ("-m", "pipeline.generate", str(work / "runs" / "cpu-0"), "prompt=import", "max_new_tokens=20", "temperature=0")  # fmt: skip
    try:
        here, there = call(*words, on_cpu=True), call(*words)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return "failed", str(error)[-200:]
    return ("same" if here == there else "other"), repr(there[-40:])


def main() -> None:
    """Compare, print a line a feature and a summary; exit code 1 when something is not the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--processes", type=int, default=12, help="runs at a time")
    options = parser.parse_args()
    began, first = time.monotonic(), next(iter(FEATURES))
    waiting = [name for name in options.only if FEATURES[name].after]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.processes) as pool:
        work = Path(folder)
        make_data(work)
        here: dict[Feature, Future[list[float]]] = {}
        there: dict[str, Future[list[float]]] = {}

        def start(name: str) -> None:
            like = replace(FEATURES[name], on_device=(), off=None)  # one run on the CPU for many
            here[like] = here.get(like) or pool.submit(losses, work, name, on_cpu=True)
            there[name] = pool.submit(losses, work, name, on_cpu=False)

        for name in dict.fromkeys([first] * bool(waiting) + options.only):
            if name not in waiting:
                start(name)
        if waiting:
            here[FEATURES[first]].exception()  # has ended
        for name in waiting:
            start(name)
        text = pool.submit(compare_text, work) if waiting else None
        verdicts: dict[str, tuple[str, str]] = {}

        def note(name: str, verdict: str, seen: str) -> None:
            verdicts[name] = verdict, seen
            print(f"{verdict:7}{name}: {seen}", flush=True)  # at once: the end may not be reached

        for run in as_completed(there.values()):
            name = next(name for name, one in there.items() if one is run)
            note(name, *compare(here[replace(FEATURES[name], on_device=(), off=None)], run, name))
        if text:
            note("text", *text.result())
    bad = {name: seen for name, (verdict, seen) in verdicts.items() if verdict != "same"}
    print(json.dumps({"same": len(verdicts) - len(bad), "not": bad, "s": round(time.monotonic() - began)}))  # fmt: skip
    sys.exit(int(bool(bad)))


if __name__ == "__main__":
    main()
