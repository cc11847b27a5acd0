"""A dataset's manifest and index, read and checked: nothing of a folder is believed before.

    manifest.json --seal, types, ranges--> Manifest --sha256--> index --bounds--> block (mapped)

Both come from wherever the dataset came from. A manifest whose seal does not fit was damaged or
edited; one whose shards lie elsewhere than the format puts them could name any file of this
machine. Only numpy and the standard library.
"""

from __future__ import annotations

import re
import sys
from array import array
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.dataset_files import check_starts, map_block, npy_rows, read_bytes
from pipeline.data.shard_format import (
    BLOCK_TOKENS,
    FORMAT,
    MOST_IMAGE_SIZE,
    PACKED_VERSION,
    PICTURES_VERSION,
    SHARD_COLUMNS,
    SHARDS_PER_FOLDER,
    VERSION,
    Block,
    Chat,
    Pictures,
    ShardLayout,
    TokenizerIdentity,
    is_sealed,
    shard_paths,
    token_dtype,
)
from pipeline.errors import DataError, ShardError
from pipeline.files import parse_json, regular_file, sha256_of


@dataclass(frozen=True, eq=False)
class Manifest:
    """manifest.json of one dataset, shard by shard in columns."""

    folder: str
    identity: str
    """sha256 of manifest.json."""
    dtype: np.dtype
    """Of the tokens: <u2 or <u4."""
    block_tokens: int
    tokenizer: TokenizerIdentity
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of all documents."""
    index_sha256: str
    paths: list[str] = field(repr=False)
    """Of the shards, relative to the folder."""
    shard_tokens: np.ndarray = field(repr=False)
    """(shards,) int64."""
    shard_bytes: np.ndarray = field(repr=False)
    """(shards,) int64, size of the tar."""
    shard_documents: np.ndarray = field(repr=False)
    """(shards,) int64, documents that start in the shard."""
    sha256: list[str] = field(repr=False)
    """Of the tars."""
    sources: list[str] = field(repr=False)
    """Label of each shard."""
    shard_keys: list[int] = field(repr=False)
    """First number in the names of a shard's members; each number occurs once in a dataset."""
    row_tokens: int | None = None
    """Tokens of a packed row (version 2); None: text, whose windows begin anywhere."""
    chat: Chat | None = field(default=None, repr=False)
    """How the dialogues of packed rows became text."""
    pictures: Pictures | None = None
    """How pictures stand in packed rows (version 3); None: there are none."""
    images_per_row_max: int = 0
    """Pictures of the row that has most."""

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """The manifest of a dataset folder: a local path or an address that fsspec understands.

        Raises:
            DataError: no manifest there, not one of ours, of a later version, changed since it was
                sealed, or its values are not those that the format allows.
        """
        path = f"{str(folder).rstrip('/')}/manifest.json"
        raw = read_bytes(path)
        try:
            content = parse_json(b"".join(_without_rows(raw)))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}). Prepare the dataset again.") from error
        return cls._parse(raw, content, folder=str(folder).rstrip("/"))

    @classmethod
    def _parse(cls, raw: bytes, content: Any, *, folder: str) -> Manifest:
        """The manifest in `content`, refused unless it is ours, of this version and unchanged."""
        path = f"{folder}/manifest.json"
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(
                f"{path} is not the manifest of a token dataset: its format is not '{FORMAT}'."
            )
        if content.get("version") not in (VERSION, PACKED_VERSION, PICTURES_VERSION):
            raise DataError(
                f"{path} has version {content.get('version')}; this release reads versions "
                f"{VERSION} to {PICTURES_VERSION}."
            )
        if not is_sealed(raw):
            raise DataError(
                f"{path} has changed since it was written: its checksum does not fit. Copy the "
                "dataset again, or prepare it again."
            )
        try:
            return cls(**_checked(raw, content), folder=folder)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path} is not a manifest as data_prep writes it ({error!r}). Prepare the dataset "
                "again."
            ) from error

    @property
    def num_shards(self) -> int:
        """Number of tars."""
        return len(self.paths)

    @property
    def layout(self) -> ShardLayout:
        """What a block holds."""
        return ShardLayout(self.dtype, self.row_tokens, self.pictures)

    @cached_property
    def block_starts(self) -> np.ndarray:
        """(shards + 1,) int64: shard s has the rows block_starts[s] to block_starts[s + 1]."""
        blocks = -(-self.shard_tokens // self.block_tokens)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])

    @cached_property
    def index(self) -> np.ndarray:
        """(blocks,) of the layout's index_dtype; mapped, not read, when the dataset is local.

        Raises:
            DataError: index.npy is missing, is not the file the manifest names by its sha256, or
                does not have this dataset's number of blocks.
        """
        path = f"{self.folder}/index.npy"
        expected = int(self.block_starts[-1])
        try:
            if "://" in path or not expected:  # an empty file cannot be mapped
                raw: Any = read_bytes(path)
            else:
                raw = np.memmap(regular_file(path), np.uint8, "r")
            index = npy_rows(raw, self.layout.index_dtype)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({error}). Copy or prepare the dataset again."
            ) from error
        if len(index) != expected:
            raise DataError(
                f"{path} holds {len(index)} rows, the manifest asks for {expected} rows of "
                f"{index.dtype.itemsize} bytes. Copy or prepare the dataset again."
            )
        if (found := sha256_of(raw)) != self.index_sha256:
            raise DataError(
                f"{path} has sha256 {found[:12]}, the manifest says {self.index_sha256[:12]}. Copy "
                "or prepare the dataset again."
            )
        return index

    def block_row(self, shard: int, block: int) -> np.void:
        """A block's row of the index.

        Raises:
            ShardError: the row does not fit its shard: another number of tokens, or a place
                outside the tar.
        """
        row = self.index[self.block_starts[shard] + block]
        rest = int(self.shard_tokens[shard]) - block * self.block_tokens
        size = int(self.shard_bytes[shard])
        ends = [
            int(row[f"{member.kind}_offset"]) + int(row[member.length]) * member.item_bytes
            for member in self.layout.members
        ]
        if int(row["num_tokens"]) != min(rest, self.block_tokens) or max(ends) > size:
            raise ShardError(
                f"{self.folder}/index.npy contradicts the manifest: block {block} of "
                f"{self.paths[shard]} has {int(row['num_tokens'])} tokens and ends at byte "
                f"{max(ends)} of {size}. Prepare the dataset again."
            )
        return row

    def map_block(self, shard: int, block: int) -> Block:
        """One block of a local dataset, mapped.

        Raises:
            ShardError: the tar is missing or shorter than the index says, or its documents do not
                begin one after the other.
        """
        path = f"{self.folder}/{self.paths[shard]}"
        found = map_block(path, self.block_row(shard, block), self.layout)
        way_out = f"Check it with `python -m data_prep.verify {self.folder}`."
        check_starts(found.starts, len(found.tokens), f"{path}, block {block}", way_out)
        return found


def _checked(raw: bytes, content: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Manifest but its folder, each of the type and in the range of the format.

    Raises:
        KeyError, TypeError, ValueError: what is missing or wrong.
    """
    tokenizer = content["tokenizer"]
    identity = TokenizerIdentity(
        sha256=_sha256(tokenizer["sha256"]),
        vocab_size=_count(tokenizer["vocab_size"], "vocab_size", least=1, most=2**31),
        eod=_count(tokenizer["eod"], "eod"),
    )
    if identity.eod >= identity.vocab_size:
        raise ValueError(f"eod {identity.eod} is not below vocab_size {identity.vocab_size}")
    if content["dtype"] != token_dtype(identity.vocab_size).str:
        raise ValueError(f"dtype {content['dtype']!r} for a vocab_size of {identity.vocab_size}")
    paths, tokens, sizes, documents, sha256, sources, keys = _columns(raw, content["shards"])
    _check_names(paths)
    _check_hashes(sha256)
    columns = [np.array(values, np.int64) for values in (tokens, sizes, documents)]
    if any(len(column) and int(column.min()) < 0 for column in columns):
        raise ValueError("a shard has a negative size")
    sums = int(columns[0].sum()), int(columns[2].sum())
    if sums != (content["tokens"], content["documents"]):
        raise ValueError(
            f"it contradicts itself: its shards add up to {sums[0]} tokens and {sums[1]} "
            f"documents, its totals are {content['tokens']} and {content['documents']}"
        )
    return {
        "identity": sha256_of(raw),
        "dtype": np.dtype(content["dtype"]),
        "block_tokens": _count(content["block_tokens"], "block_tokens", least=1, most=2**31),
        "tokenizer": identity,
        "tokens": _count(content["tokens"], "tokens"),
        "documents": _count(content["documents"], "documents"),
        "text_bytes": _count(content["text_bytes"], "text_bytes"),
        "index_sha256": _sha256(content["index_sha256"]),
        "paths": paths,
        "shard_tokens": columns[0],
        "shard_bytes": columns[1],
        "shard_documents": columns[2],
        "sha256": sha256,
        "sources": sources,
        "shard_keys": keys.tolist(),
        **_packing(content, identity, columns[0]),
    }


def _check_names(paths: list[Any]) -> None:
    """Only the format's own names: another one could lead to any file of this machine."""
    # Folder by folder: one by one, 300,000 took 0.23 s of CPU, so 0.03.
    for first in range(0, len(paths), SHARDS_PER_FOLDER):
        found = paths[first : first + SHARDS_PER_FOLDER]
        names = shard_paths(first // SHARDS_PER_FOLDER)[: len(found)]
        if found != names:
            at = next(i for i, name in enumerate(names) if found[i] != name)
            raise ValueError(f"shard {first + at} is called {found[at]!r}, not {names[at]!r}")


def _check_hashes(sha256: list[Any]) -> None:
    # Many at once: 0.03 s of CPU for 300,000, and 0.09 one by one.
    for first in range(0, len(sha256), SHARDS_PER_FOLDER):
        some = sha256[first : first + SHARDS_PER_FOLDER]
        if {*map(len, some)} - {64} or "".join(some).encode().translate(None, b"0123456789abcdef"):
            list(map(_sha256, some))  # raises for the first that is none


def _packing(
    content: dict[str, Any], tokenizer: TokenizerIdentity, shard_tokens: np.ndarray
) -> dict[str, Any]:
    """What is said of packed rows, of which shards consist, and of their pictures; or nothing."""
    if content["version"] == VERSION:
        return {}
    row_tokens = _count(content["row_tokens"], "row_tokens", least=2, most=BLOCK_TOKENS)
    if content["block_tokens"] % row_tokens or (shard_tokens % row_tokens).any():
        raise ValueError(f"a block or a shard is not whole rows of {row_tokens} tokens")
    template, end = content["chat_template"], _count(content["end_of_turn"], "end_of_turn")
    if not isinstance(template, str) or end >= tokenizer.vocab_size:
        raise ValueError(f"chat_template is no text, or end_of_turn {end} is no id")
    packing: dict[str, Any] = {"row_tokens": row_tokens, "chat": Chat(template, end)}
    if content["version"] != PICTURES_VERSION:
        return packing
    size = _count(content["image_size"], "image_size", least=1, most=MOST_IMAGE_SIZE)
    patch = _count(content["patch_size"], "patch_size", least=1, most=size)
    # Not 0, the ids of a sample that is left out: they would stand for pictures.
    most = tokenizer.vocab_size - 1
    token = _count(content["image_token_id"], "image_token_id", least=1, most=most)
    pictures = Pictures(size, patch, token)
    most = row_tokens // pictures.num_patches
    slots = _count(content["images_per_row_max"], "images_per_row_max", most=most)
    if size % patch:
        raise ValueError(f"image_size {size} is not a multiple of patch_size {patch}")
    return packing | {"pictures": pictures, "images_per_row_max": slots}


def _count(value: Any, name: str, *, least: int = 0, most: int = 2**62) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, not a whole number from {least} to {most}")
    return value


def _sha256(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{value!r} is not a sha256")
    return value


# The writer puts one row on a line between these. 300,000 rows parsed at once would be 250 MB of
# Python objects; those of 32 KiB stay in a core's cache, which saves a fifth of the time.
_ROWS_BEGIN, _ROWS_END, _PIECE_BYTES = b'"shards": [\n', b"\n ]\n", 1 << 15


def _rows_span(raw: bytes) -> tuple[int, int]:
    """[begin, end) of the rows in a manifest as our writer lays it out; (0, 0) in any other."""
    begin, end = raw.find(_ROWS_BEGIN) + len(_ROWS_BEGIN), raw.rfind(_ROWS_END)
    return (begin, end) if len(_ROWS_BEGIN) <= begin <= end else (0, 0)


def _without_rows(raw: bytes) -> tuple[bytes, bytes]:
    begin, end = _rows_span(raw)
    return raw[:begin], raw[end:]


def _columns(raw: bytes, rows: list[list[Any]]) -> list[Any]:
    """The shards' rows as columns, read a piece of the file at a time unless parsed already."""
    columns: list[Any] = [
        [] if name in ("path", "sha256", "source") else array("q") for name in SHARD_COLUMNS
    ]
    at, end = _rows_span(raw)
    while rows or at < end:
        if not rows:
            stop = raw.find(b"\n", at + _PIECE_BYTES, end)
            stop = end if stop < 0 else stop
            rows = parse_json(b"[" + raw[at:stop].rstrip(b",\n") + b"]")
            at = stop + 1
        for column, values in zip(columns, zip(*rows, strict=True), strict=True):
            column.extend(map(sys.intern, values) if column is columns[5] else values)
        rows = []
    return columns
