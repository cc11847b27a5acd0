"""The same random tokens in the format of every contender of benchmarks/loader.py."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

from pipeline.data import shard_format as fmt

SEQ_LEN, VOCAB = 2048, 32768
SHARD_TOKENS, NUM_SHARDS = 1 << 22, 16
MEAN_DOCUMENT = 2300  # tokens


def prepare(folder: Path) -> None:
    """The same random tokens in every contender's format but mosaicml's, which another Python may have to write."""
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


def prepare_streaming(folder: Path) -> int:
    """MDS shards of seq_len + 1 tokens a sample, as llm-foundry writes them, of what `prepare` left; how many."""
    from streaming import MDSWriter

    samples = 0
    with MDSWriter(out=str(folder / "mds"), columns={"tokens": "ndarray:uint16"}) as out:
        for tokens in np.fromfile(folder / "tokens.bin", np.uint16).reshape(NUM_SHARDS, -1):
            for at in range(0, len(tokens) - SEQ_LEN, SEQ_LEN):
                out.write({"tokens": tokens[at : at + SEQ_LEN + 1]})
                samples += 1
    return samples


def streaming_problem(python: str) -> str:
    """Why a Python cannot import mosaicml-streaming; empty: it can."""
    try:
        done = subprocess.run([python, "-c", "import streaming"], capture_output=True, text=True)
    except OSError as error:
        return f"{python}: {error.strerror}"
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def quiet() -> contextlib.ExitStack:
    """Without the warnings of other people's libraries."""
    stack = contextlib.ExitStack()
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    stack.enter_context(contextlib.redirect_stdout(sys.stderr))
    return stack
