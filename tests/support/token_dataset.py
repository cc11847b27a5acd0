"""Datasets for tests: token arrays in, a folder of our format out, its shards and blocks as small as you like."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipeline.data import shard_format as fmt


def write_dataset(
    folder: Path,
    shards: Sequence[np.ndarray],
    *,
    starts: Sequence[np.ndarray] | None = None,
    block_tokens: int = 64,
    vocab_size: int = 60000,
    tokenizer: bytes = b"{}",
    eod: int = 0,
    losses: Sequence[np.ndarray] | None = None,
    row_tokens: int | None = None,
    template: str = "",
    pictures: fmt.Pictures | None = None,
    images: Sequence[np.ndarray] | None = None,
    images_per_row_max: int = 1,
) -> Path:
    """Write one tar a token array; starts: places of each array at which documents begin (default: 0).

    losses, row_tokens: of packed rows, the mask of what is learned and the length of a row. images: of each shard,
    whose placeholders stand in its tokens, or do not.
    """
    layout = fmt.ShardLayout(fmt.token_dtype(vocab_size), row_tokens, pictures)
    dtype = layout.dtype
    starts = starts if starts is not None else [np.zeros(min(1, len(s)), np.int64) for s in shards]
    rows, table = [], []
    for number, (tokens, begins) in enumerate(zip(shards, starts)):
        path = folder / fmt.shard_path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        loss, shown = (None if each is None else each[number] for each in (losses, images))
        tar, index = make_tar(layout, number, tokens, begins, block_tokens, loss, shown)
        table += index
        path.write_bytes(tar)
        digest = hashlib.sha256(tar).hexdigest()
        rows.append([fmt.shard_path(number), len(tokens), len(tar), len(begins), digest, "test", number])  # fmt: skip
    (folder / "tokenizer.json").write_bytes(tokenizer)
    np.save(folder / "index.npy", np.array(table, layout.index_dtype))
    content = {
        "format": fmt.FORMAT,
        "version": layout.version,
        "dtype": dtype.str,
        "block_tokens": block_tokens,
        "tokenizer": {
            "sha256": hashlib.sha256(tokenizer).hexdigest(),
            "vocab_size": vocab_size,
            "eod": eod,
        },
        "tokens": sum(row[1] for row in rows),
        "documents": sum(row[3] for row in rows),
        "text_bytes": 4 * sum(row[1] for row in rows),
        "index_sha256": hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest(),
        "checksum": fmt.UNSEALED,
        "shards": rows,
    }
    if row_tokens is not None:
        content |= {"row_tokens": row_tokens, "chat_template": template, "end_of_turn": 1}
    if pictures is not None:
        content |= asdict(pictures) | {"images_per_row_max": images_per_row_max}
    (folder / "manifest.json").write_bytes(fmt.seal(json.dumps(content).encode()))
    return folder


def make_tar(
    layout: fmt.ShardLayout,
    shard: int,
    tokens: np.ndarray,
    begins: np.ndarray,
    block_tokens: int,
    loss: np.ndarray | None,
    images: np.ndarray | None = None,
) -> tuple[bytes, list[tuple]]:
    """A shard's bytes, and its blocks' rows of the index."""
    tar, table = bytearray(), []
    for block, at in enumerate(range(0, len(tokens), block_tokens)):
        part = np.asarray(tokens[at : at + block_tokens]).astype(layout.dtype)
        docs = np.asarray([b - at for b in begins if at <= b < at + len(part)])
        arrays = {"tokens": part, "docs": docs.astype(fmt.DOCS_DTYPE)}
        if loss is not None:
            arrays["loss"] = loss[at : at + block_tokens].astype(fmt.LOSS_DTYPE)
        if images is not None:
            # Of this block as many as its placeholders are for; the last block has what is left.
            assert layout.pictures is not None
            many = (
                int((part == layout.pictures.image_token_id).sum()) // layout.pictures.num_patches
            )
            many = many if at + block_tokens < len(tokens) else len(images)
            arrays["images"], images = images[:many].astype(fmt.PIXEL_DTYPE), images[many:]
        places = {}
        for kind, array in arrays.items():
            data = fmt.npy_header(array.dtype, len(array), array.shape[1:]) + array.tobytes()
            tar += fmt.tar_header(fmt.member_name(shard, block, kind), len(data))
            places[kind] = len(tar) + fmt.NPY_HEADER_BYTES, zlib.crc32(array.tobytes())
            tar += data + bytes(-len(data) % fmt.TAR_BLOCK)
        lengths = {kind: len(array) for kind, array in arrays.items()}
        table.append(tuple(layout.index_row(lengths, places)))
    return bytes(tar + bytes(2 * fmt.TAR_BLOCK)), table


def counting_shards(sizes: Sequence[int], *, base: int = 0) -> list[np.ndarray]:
    """Token arrays that count on through all shards: any window says where it comes from."""
    first = base + np.concatenate([[0], np.cumsum(sizes)])
    return [np.arange(a, b) for a, b in zip(first[:-1], first[1:])]
