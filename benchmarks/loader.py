"""Tokens per second of one data-loading process: ours against what a user would pick instead, on the same tokens.

    python -m benchmarks.loader                            16 shards of 4 Mi tokens, three rounds
    python -m benchmarks.loader --rounds 5 --cpu-s 4       longer

Contenders: ours as the trainer uses it, also with document masks; stock webdataset on the same shards (shuffle 1000);
a random-offset np.memmap reader (nanoGPT's get_batch); megatron.core's GPTDataset with torch's default_collate;
mosaicml-streaming on the same sequences, where it is installed. Each is a process of its own and hands over int64
(tokens, labels) micro-batches of 8 x 2048 from page-cached files. Rounds alternate between the contenders; a read ends
after a fixed CPU time and tokens are counted per CPU second, so that neighbours on the machine distort little (the wall
rate is shown beside it). Start-up is from the first constructor to the first micro-batch, imports not counted; resume
is the same at half an epoch. Last, the order of 300,000 shards (10 trillion tokens; the manifest is made up, no shard is
read): set-up from the manifest's bytes to the first step's addresses, the same at half an epoch, and resident memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

# benchmarks/tokenize.py has the name of a module of the standard library: this folder must not be searched.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

import argparse  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from pipeline.data import shard_format as fmt  # noqa: E402

SEQ_LEN, MICRO_BATCH, VOCAB = 2048, 8, 32768
SHARD_TOKENS, NUM_SHARDS = 1 << 22, 16
MEAN_DOCUMENT = 2300  # tokens
GLOBAL_BATCH = 512  # of our loader: sequences a step; the default of training.global_batch_size
CONTENDERS = ("ours", "ours+masks", "webdataset", "memmap", "gptdataset", "streaming")
Batches = Iterator[Any]


def prepare(folder: Path) -> None:
    """The same random tokens in every contender's format."""
    from tests.support.token_dataset import write_dataset

    rng = np.random.default_rng(0)
    shards = [rng.integers(1, VOCAB, SHARD_TOKENS, dtype=np.uint16) for _ in range(NUM_SHARDS)]
    starts = [
        np.unique(rng.integers(0, SHARD_TOKENS, SHARD_TOKENS // MEAN_DOCUMENT))
        for _ in range(NUM_SHARDS)
    ]
    write_dataset(folder / "ours", shards, starts=starts, block_tokens=1 << 20, vocab_size=VOCAB)
    many_shards(folder, "ours-10k", 10_000)
    many_shards(folder, "ours-300k", 300_000, repeat=8)  # 10 trillion tokens
    np.concatenate(shards).tofile(folder / "tokens.bin")
    with quiet():
        prepare_gptdataset(folder, shards, starts)
        if has_streaming():
            prepare_streaming(folder, shards)


def many_shards(folder: Path, name: str, count: int, repeat: int = 1) -> None:
    """A dataset of `count` shards that are the 16 tars over and over, `repeat` times as long on paper: for start-up."""
    source, target = folder / "ours", folder / name
    manifest = json.loads((source / "manifest.json").read_text())
    target.mkdir()
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    index = np.load(source / "index.npy")
    np.save(target / "index.npy", np.tile(index, count // NUM_SHARDS))
    rows = []
    for number in range(count):
        path, tokens, *rest = manifest["shards"][number % NUM_SHARDS]
        rows.append(json.dumps([fmt.shard_path(number), tokens * repeat, *rest]))
        if repeat == 1:  # shards that are read
            (target / fmt.shard_path(number)).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / path, target / fmt.shard_path(number))
    table = ",\n".join(rows)
    del manifest["shards"]
    for key in ("tokens", "documents", "text_bytes"):
        manifest[key] *= count // NUM_SHARDS
    manifest["tokens"] *= repeat
    manifest["index_sha256"] = hashlib.sha256((target / "index.npy").read_bytes()).hexdigest()
    manifest["checksum"] = fmt.UNSEALED
    # As data_prep/tokens/dataset_writer.py writes it: a row on a line.
    text = json.dumps(manifest, indent=1)[:-2] + f',\n "shards": [\n{table}\n ]\n}}\n'
    (target / "manifest.json").write_bytes(fmt.seal(text.encode()))


def prepare_gptdataset(folder: Path, shards: list[np.ndarray], starts: list[np.ndarray]) -> None:
    """megatron.core's .bin and .idx."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=np.uint16)
    for tokens, begins in zip(shards, starts):
        lengths = np.diff([0, *begins[begins > 0], len(tokens)]).tolist()
        builder.add_document(torch.from_numpy(tokens), lengths)
    builder.finalize(str(folder / "megatron.idx"))


def prepare_streaming(folder: Path, shards: list[np.ndarray]) -> None:
    """MDS shards of seq_len + 1 tokens a sample, as llm-foundry writes them."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mds"), columns={"tokens": "ndarray:uint16"}) as out:
        for tokens in shards:
            for at in range(0, len(tokens) - SEQ_LEN, SEQ_LEN):
                out.write({"tokens": tokens[at : at + SEQ_LEN + 1]})


def has_streaming() -> bool:
    """Whether mosaicml-streaming imports here."""
    return (
        subprocess.run([sys.executable, "-c", "import streaming"], capture_output=True).returncode
        == 0
    )


# ---- contenders: (folder, start) -> micro-batches; start is the share of an epoch that was read before --------------


def ours(folder: Path, start: float, *, masks: bool = False, name: str = "ours") -> Batches:
    """pipeline.data.loader.Loader with its background thread."""
    import torch

    from pipeline.config.data import DataConfig, DatasetConfig
    from pipeline.config.model import ModelConfig
    from pipeline.config.pretrain import PretrainConfig
    from pipeline.config.run_shape import derive
    from pipeline.config.training import TrainingConfig
    from pipeline.data.loader import Loader

    data = DataConfig(
        train=[DatasetConfig(path=str(folder / name))], mask_documents=masks, reset_positions=masks
    )
    model = ModelConfig(
        name="b", num_layers=1, hidden_size=64, num_attention_heads=1, max_seq_len=SEQ_LEN
    )
    training = TrainingConfig(
        total_steps=10**6, global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH
    )
    shape = derive(
        PretrainConfig(name="b", model=model, training=training, data=data),
        world_size=1,
        tokenizer_vocab_size=VOCAB,
    )
    loader = Loader(
        data, shape=shape, seed=1, data_rank=0, device=torch.device("cpu"), cache_dir=folder
    )
    if start:
        loader.skip_samples(int(start * loader.sampler.orders[0].epoch_size))
        loader.restore(loader.state())
    try:
        while True:
            yield from loader.next_step()
    finally:
        loader.close()


def webdataset(folder: Path, start: float) -> Batches:
    """Stock webdataset on our tars; its only way to resume is to read and drop."""
    import io

    import torch
    import webdataset as wds

    shards = sorted(str(path) for path in (folder / "ours/shards").glob("*/*.tar"))

    def windows(source: Batches) -> Batches:
        for sample in source:
            tokens = np.load(io.BytesIO(sample["tokens.npy"]))
            for at in range(0, len(tokens) - SEQ_LEN, SEQ_LEN):
                yield tokens[at : at + SEQ_LEN + 1]

    data = wds.DataPipeline(
        wds.ResampledShards(shards) if not start else wds.SimpleShardList(shards * 2, seed=1),
        wds.tarfile_to_samples(), windows, wds.shuffle(1000),
    )  # fmt: skip
    drop = int(start * NUM_SHARDS * (SHARD_TOKENS // SEQ_LEN))
    group = []
    for number, window in enumerate(data):
        if number < drop:
            continue
        group.append(window)
        if len(group) == MICRO_BATCH:
            ids = torch.from_numpy(np.stack(group).astype(np.int64))
            yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            group = []


def memmap(folder: Path, start: float) -> Batches:
    """NanoGPT's get_batch: random offsets, with replacement; no epochs, its state is a random generator."""
    import torch

    torch.manual_seed(int(start * 1000))
    while True:
        data = np.memmap(
            folder / "tokens.bin", dtype=np.uint16, mode="r"
        )  # anew each time, against a leak in numpy
        places = torch.randint(len(data) - SEQ_LEN, (MICRO_BATCH,))
        x = torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in places])
        y = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in places]
        )
        yield x, y


def gptdataset(folder: Path, start: float) -> Batches:
    """megatron.core's GPTDataset, one epoch and a half of it, with its cached index maps."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from torch.utils.data import default_collate

    class Tokenizer:
        eod, pad, vocab_size, unique_identifiers = 0, 0, VOCAB, {"class": "benchmark"}

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=SEQ_LEN, split="1", path_to_cache=str(folder / "cache"), tokenizer=Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    indexed = IndexedDataset(str(folder / "megatron"), mmap=True)
    epoch = NUM_SHARDS * SHARD_TOKENS // SEQ_LEN
    documents = np.arange(indexed.document_indices.shape[0] - 1, dtype=np.int32)
    data = GPTDataset(
        indexed, str(folder / "megatron"), documents, epoch * 3 // 2, Split.train, config
    )
    at = int(start * epoch)
    while True:
        yield default_collate([data[(at + i) % len(data)] for i in range(MICRO_BATCH)])
        at += MICRO_BATCH


def streaming(folder: Path, start: float) -> Batches:
    """Mosaicml's StreamingDataset, py1e shuffling, in its own DataLoader."""
    import torch
    from streaming import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(
        local=str(folder / "mds"), shuffle=True, shuffle_algo="py1e", shuffle_seed=1, batch_size=MICRO_BATCH,
        predownload=1000,
    )  # fmt: skip
    loader = StreamingDataLoader(data, batch_size=MICRO_BATCH, num_workers=0)
    if start:
        seen = int(start * data.num_samples)
        data.load_state_dict({**data.state_dict(0, False), "epoch": 0, "sample_in_epoch": seen})
    while True:
        for batch in loader:
            ids = batch["tokens"].to(torch.int64)
            yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def scale(folder: Path) -> dict[str, float]:
    """Set-up and resume of a dataset of 300,000 shards, in a process that imports no torch."""
    from pipeline.config.data import DataConfig, DatasetConfig
    from pipeline.data.datasets import open_datasets
    from pipeline.data.sampler import Sampler

    cfg = DataConfig(train=[DatasetConfig(path=str(folder / "ours-300k"))], lanes=128, window=32)
    began = time.perf_counter()
    datasets = open_datasets(cfg.train, cfg=cfg, cache_dir=folder)
    sampler = Sampler(cfg, datasets, seq_len=SEQ_LEN, seed=1)
    sampler.addresses(sampler.advance(sampler.start(), GLOBAL_BATCH)[0])
    setup = time.perf_counter() - began
    began = time.perf_counter()
    half = sampler.skip(sampler.start(), sampler.orders[0].epoch_size // 2)
    sampler.addresses(sampler.advance(half, GLOBAL_BATCH)[0])
    resume = time.perf_counter() - began
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return {
        "setup": setup * 1e3,
        "resume": resume * 1e3,
        "peak_mib": peak,
        "tokens": float(datasets[0].manifest.tokens),
    }


def contender(name: str) -> Callable[..., Batches]:
    """The function that makes a contender's micro-batches."""
    if name == "ours+masks":
        return lambda folder, start: ours(folder, start, masks=True)
    if name == "ours-10k":
        return lambda folder, start: ours(folder, start, name="ours-10k")
    return {
        "ours": ours,
        "webdataset": webdataset,
        "memmap": memmap,
        "gptdataset": gptdataset,
        "streaming": streaming,
    }[name]


# ---- measuring ----------------------------------------------------------------------------------------------------


def measure(name: str, folder: Path, cpu_s: float) -> dict[str, float]:
    """One round of one contender in this process."""
    make = contender(name)
    with quiet():
        next(make(folder, 0.0))  # imports, kernels, page cache
        began = time.process_time()
        batches = make(folder, 0.0)
        next(batches)
        startup = time.process_time() - began
        began = time.process_time()
        next(make(folder, 0.5))
        resume = time.process_time() - began
        for _ in range(4 * GLOBAL_BATCH // MICRO_BATCH):  # what was read ahead is not counted
            next(batches)
        wall, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.process_time() - cpu < cpu_s:
            for _ in range(GLOBAL_BATCH // MICRO_BATCH):
                next(batches)
            count += GLOBAL_BATCH * SEQ_LEN
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "cpu_rate": count / cpu / 1e6,
        "wall_rate": count / wall / 1e6,
        "startup": startup * 1e3,
        "resume": resume * 1e3,
    }


def quiet() -> Any:
    """Without the warnings of other people's libraries."""
    import contextlib

    stack = contextlib.ExitStack()
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    stack.enter_context(contextlib.redirect_stdout(sys.stderr))
    return stack


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cpu-s", type=float, default=1.5, help="CPU seconds a contender reads in each round"
    )
    parser.add_argument("--contenders", nargs="*", default=CONTENDERS)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, folder = args.one[0], Path(args.one[1])
        print(json.dumps(scale(folder) if name == "scale" else measure(name, folder, args.cpu_s)))
        return
    names = [n for n in [*args.contenders, "ours-10k"] if n != "streaming" or has_streaming()]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                rounds[name].append(in_process(name, folder, args.cpu_s))
        large = [in_process("scale", folder, 0.0) for _ in range(args.rounds)]
    print(
        f"{NUM_SHARDS} shards x {SHARD_TOKENS >> 20} Mi tokens, seq_len {SEQ_LEN}, micro-batch {MICRO_BATCH},"
    )
    print(
        f"median of {args.rounds} rounds (lowest-highest); load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores\n"
    )
    print("| contender | Mtok per CPU s | Mtok/s wall | ours is | start-up ms | resume ms |")
    print("|---|---|---|---|---|---|")
    for name, found in rounds.items():
        middle = {key: statistics.median(r[key] for r in found) for key in found[0]}
        spread = (
            f"({min(r['cpu_rate'] for r in found):.0f}-{max(r['cpu_rate'] for r in found):.0f})"
        )
        ratio = statistics.median(
            o["cpu_rate"] / r["cpu_rate"] for o, r in zip(rounds["ours"], found)
        )
        print(
            f"| {name} | {middle['cpu_rate']:.1f} {spread} | {middle['wall_rate']:.1f} | {ratio:.1f}x | "
            f"{middle['startup']:.1f} | {middle['resume']:.1f} |"
        )
    middle = {key: statistics.median(r[key] for r in large) for key in large[0]}
    print(
        f"\n300,000 shards, {middle['tokens'] / 1e12:.1f} trillion tokens: set-up {middle['setup']:.0f} ms, resume at half "
        f"an epoch {middle['resume']:.1f} ms, peak resident memory {middle['peak_mib']:.0f} MiB"
    )


def in_process(name: str, folder: str, cpu_s: float) -> dict[str, float]:
    """measure() in a process of its own, with one thread a library."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.loader",
        "--cpu-s",
        str(cpu_s),
        "--one",
        name,
        folder,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
