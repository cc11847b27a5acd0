"""Time and memory of what is many or huge: each case at growing sizes, and the power with which it grows.

    python benchmarks/load.py                                  all cases, small sizes (minutes)
    python benchmarks/load.py --cases files --sizes 5000 50000  one case, sizes of your own
    python benchmarks/load.py --full                           the sizes of FULL (hours)

    files      tiny jsonl files, tokenized          document   MB of text in one document, tokenized
    rows       parquet rows in row groups of 1      s3         inputs on an S3 server (moto), tokenized
    shards     shards of one dataset, a run's plan  datasets   datasets of one mixture, a run's plan

Each size runs in a process of its own, one worker; the peak is of the largest process, the time that of all cores. The exponent of the last two
sizes is log(time ratio) / log(size ratio), after the time of the empty case (start-up) is taken off: above 1 is superlinear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]
SMALL = {
    "files": (250, 1000), "document": (4, 16), "rows": (2500, 10_000), "s3": (50, 200), "shards": (50, 200),
    "datasets": (25, 100),
}  # fmt: skip
FULL = {
    "files": (5000, 50_000), "document": (100, 1000), "rows": (100_000, 1_000_000), "s3": (1000, 10_000),
    "shards": (500, 2000), "datasets": (125, 500),
}  # fmt: skip
TEXT = "The quick brown fox number {} jumps over the lazy dog, and then it jumps back again. "


def tokenize(folder: Path, pattern: str, *, max_document_mb: int = 64) -> list[str]:
    """The command that tokenizes what `pattern` names."""
    return [
        sys.executable, "-m", "data_prep.tokenize", f"input={pattern}", f"output={folder}/out", f"tokenizer={folder}/tokenizer.json",
        "workers=1", f"max_document_mb={max_document_mb}",
    ]  # fmt: skip


def make_files(folder: Path, size: int) -> list[str]:
    (folder / "in").mkdir()
    for number in range(size):
        (folder / "in" / f"{number:06d}.jsonl").write_text(json.dumps({"text": TEXT.format(number)}) + "\n")  # fmt: skip
    return tokenize(folder, f"{folder}/in/*.jsonl")


def make_document(folder: Path, size: int) -> list[str]:
    count = size * 1_000_000 // len(TEXT)
    with (folder / "one.jsonl").open("w") as file:
        file.write('{"text": "')
        for number in range(count):
            file.write(TEXT.format(number))
        file.write('"}\n')
    return tokenize(folder, f"{folder}/one.jsonl", max_document_mb=2 * size + 1)


def make_rows(folder: Path, size: int) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": [TEXT.format(number) for number in range(size)]})
    pq.write_table(table, folder / "rows.parquet", row_group_size=1)
    return tokenize(folder, f"{folder}/rows.parquet")


def make_s3(folder: Path, size: int) -> list[str]:
    """The server lives in the measured command's parent."""
    return [sys.executable, __file__, "--s3", str(folder), str(size)]


def cpu_seconds() -> float:
    """Of all children that have ended, on all cores: what others do on the machine hardly counts."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def peak_mib() -> float:
    """Of the largest child that has ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def tokenize_from_s3(folder: Path, size: int) -> None:
    """Serve `size` objects and tokenize them; the server's own work does not count."""
    import boto3

    from tests.support.s3_server import s3_server

    with s3_server() as address:
        client = boto3.client("s3", endpoint_url=address)
        client.create_bucket(Bucket="load")
        for number in range(size):
            body = json.dumps({"text": TEXT.format(number)}).encode() + b"\n"
            client.put_object(Bucket="load", Key=f"in/{number:06d}.jsonl", Body=body)
        before = cpu_seconds()
        subprocess.run(tokenize(folder, "s3://load/in/*.jsonl"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        print("MEASURED", cpu_seconds() - before, peak_mib(), flush=True)


def dataset(folder: Path, shards: int, *, base: int) -> Path:
    import numpy as np

    from tests.support.token_dataset import write_dataset

    rng = np.random.default_rng(base)
    tokens = [rng.integers(1, 64, 1024) for _ in range(shards)]
    return write_dataset(folder, tokens, block_tokens=1024, vocab_size=64)


def plan(*settings: str) -> list[str]:
    """The command that plans a run of these data, as every start does."""
    run = ["world_size=1", "name=load", "model=tiny", "model.max_seq_len=64", "training.total_steps=1000"]  # fmt: skip
    batch = ["training.global_batch_size=8", "training.micro_batch_size=8", "training.precision=fp32", "tracking.wandb=disabled"]  # fmt: skip
    return [sys.executable, "-m", "pipeline.preflight", *run, *batch, "data.validation=[]", *settings]  # fmt: skip


def make_shards(folder: Path, size: int) -> list[str]:
    path = dataset(folder / "data" / "train", size, base=0)
    return plan(f"data.path={path.parent}", f"runs_dir={folder}")


def make_datasets(folder: Path, size: int) -> list[str]:
    paths = [dataset(folder / f"d{number}", 2, base=number) for number in range(size)]
    mixture = ",".join(f"{{path: {path}, name: d{number}, weight: {1 + number % 7}}}" for number, path in enumerate(paths))  # fmt: skip
    return plan(f"data.train=[{mixture}]", f"runs_dir={folder}")


CASES: dict[str, Callable[[Path, int], list[str]]] = {
    "files": make_files, "document": make_document, "rows": make_rows, "s3": make_s3, "shards": make_shards,
    "datasets": make_datasets,
}  # fmt: skip
UNITS = {"document": "MB"}


def measure(case: str, size: int, work: Path) -> tuple[float, float]:
    """(CPU seconds, peak MiB) of a case at a size, in a process that measures its children."""
    folder = work / f"{case}-{size}"
    folder.mkdir(parents=True)
    from tests.support.corpus import make_tokenizer

    make_tokenizer(folder / "tokenizer.json")
    command = CASES[case](folder, size)
    before = cpu_seconds()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    seconds = cpu_seconds() - before
    if done.returncode:
        raise SystemExit(f"{case} {size} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    shutil.rmtree(folder)
    for line in done.stdout.splitlines():
        if line.startswith("MEASURED "):  # by the command itself, without what it needs around
            seconds, peak = map(float, line.split()[1:])
            return seconds, peak
    return seconds, peak_mib()


def measured_apart(case: str, size: int, work: str) -> tuple[float, float]:
    """`measure` in a process of its own, as the peak of children never falls."""
    words = [sys.executable, __file__, "--one", case, str(size), work]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def report(case: str, sizes: tuple[int, ...], work: str) -> None:
    """A line a size, the exponents behind the first."""
    empty, _ = measured_apart(case, 1, work)
    before: tuple[int, float] | None = None
    for size in sizes:
        seconds, peak = measured_apart(case, size, work)
        exponent = "-"
        if before and seconds > empty and before[1] > empty:
            power = math.log((seconds - empty) / (before[1] - empty)) / math.log(size / before[0])
            exponent = f"{power:.2f}"
        print(f"| {case} | {size:,} {UNITS.get(case, '')} | {seconds:.1f} | {seconds - empty:.1f} | {exponent} | {peak:.0f} |", flush=True)  # fmt: skip
        before = (size, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--sizes", nargs="+", type=int, help="of one case")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--folder", help="where inputs and outputs lie; default: a temporary one")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--s3", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case, size, work = options.one
        print(*measure(case, int(size), Path(work)))
        return
    if options.s3:
        tokenize_from_s3(Path(options.s3[0]), int(options.s3[1]))
        return
    print("| case | size | CPU seconds | without start-up | exponent | peak MiB |\n|---|---|---|---|---|---|")  # fmt: skip
    for case in options.cases:
        sizes = tuple(options.sizes or (FULL if options.full else SMALL)[case])
        with tempfile.TemporaryDirectory(dir=options.folder) as work:
            report(case, sizes, work)


if __name__ == "__main__":
    main()
