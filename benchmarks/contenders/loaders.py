"""The contenders of benchmarks/loader.py.

Each is (folder, start) -> micro-batches; start is the share of an epoch that was read before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders.loader_data import NUM_SHARDS, SEQ_LEN, SHARD_TOKENS, VOCAB

MICRO_BATCH = 8
GLOBAL_BATCH = 512  # of our loader: sequences a step; the default of training.global_batch_size
NAMES = ("ours", "ours+masks", "webdataset", "memmap", "gptdataset", "streaming")
Batches = Iterator[Any]


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
