"""The datasets on disk: data_prep writes them, pipeline reads them, and nothing else is shared.

    DATASET/manifest.json                    written last, in one go; its sha256 is the identity
    DATASET/index.npy                        one INDEX_DTYPE row a block, shard by shard
    DATASET/tokenizer.json                   exact copy; its sha256 stands in the manifest
    DATASET/provenance.jsonl                 one line a shard: the inputs it was made of
    DATASET/shards/00000/tok-00000000.tar    1,000 a folder; uncompressed USTAR, SHARD_TOKENS each
        KKKKKKKK-0000.tokens.npy             one block: uint16 (vocab_size <= 65,536) or uint32
        KKKKKKKK-0000.docs.npy               uint32: where in the block documents start

A block and its starts are one sample of the tar, with the key KKKKKKKK-0000. Every block of a shard
but its last holds exactly block_tokens tokens. A document ends with EOD and may run over blocks and
shards; where it runs on it has no entry in docs. Stock `webdataset` reads the tars. Offsets in the
index point at the raw array, past the tar and npy headers, so a block is one np.memmap. Only numpy
and the standard library.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from array import array
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError, ShardError
from pipeline.files import sha256_of

FORMAT = "gpt-shards"
VERSION = 1
BLOCK_TOKENS = 2**20
SHARD_TOKENS = 2**25
SHARDS_PER_FOLDER = 1000
TAR_BLOCK = 512
NPY_HEADER_BYTES = 128
DOCS_DTYPE = np.dtype("<u4")
# Offsets are bytes from the start of the tar; crc32 (zlib) is that of the raw array.
INDEX_DTYPE = np.dtype(
    [
        ("tokens_offset", "<u8"),
        ("num_tokens", "<u4"),
        ("tokens_crc32", "<u4"),
        ("docs_offset", "<u8"),
        ("num_docs", "<u4"),
        ("docs_crc32", "<u4"),
    ]
)
SHARD_COLUMNS = ["path", "tokens", "bytes", "documents", "sha256", "source", "key"]


@dataclass(frozen=True)
class TokenizerIdentity:
    """What the manifest says of the tokenizer; the file itself lies beside it."""

    sha256: str
    vocab_size: int
    """One more than the largest id."""
    eod: int
    """Id that ends every document."""


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

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """The manifest of a dataset folder: a local path or an address that fsspec understands.

        Raises:
            DataError: no manifest there, not one of ours, of a later version, or its numbers
                contradict each other.
        """
        path = f"{str(folder).rstrip('/')}/manifest.json"
        raw = read_bytes(path)
        try:
            content = json.loads(b"".join(_without_rows(raw)))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}). Prepare the dataset again.") from error
        return cls._parse(raw, content, folder=str(folder).rstrip("/"))

    @classmethod
    def _parse(cls, raw: bytes, content: Any, *, folder: str) -> Manifest:
        path = f"{folder}/manifest.json"
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(
                f"{path} is not the manifest of a token dataset: its format is not '{FORMAT}'."
            )
        if content.get("version") != VERSION:
            raise DataError(
                f"{path} has version {content.get('version')}; "
                f"this release reads version {VERSION}."
            )
        try:
            paths, tokens, sizes, documents, sha256, sources, shard_keys = _columns(
                raw, content["shards"]
            )
            manifest = cls(
                folder=folder,
                identity=sha256_of(raw),
                dtype=np.dtype(content["dtype"]),
                block_tokens=int(content["block_tokens"]),
                tokenizer=TokenizerIdentity(**content["tokenizer"]),
                tokens=content["tokens"],
                documents=content["documents"],
                text_bytes=content["text_bytes"],
                index_sha256=content["index_sha256"],
                paths=paths,
                shard_tokens=np.array(tokens, np.int64),
                shard_bytes=np.array(sizes, np.int64),
                shard_documents=np.array(documents, np.int64),
                sha256=sha256,
                sources=sources,
                shard_keys=shard_keys.tolist(),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} is incomplete ({error!r}). Prepare the dataset again."
            ) from error
        sums = int(manifest.shard_tokens.sum()), int(manifest.shard_documents.sum())
        if sums != (manifest.tokens, manifest.documents):
            raise DataError(
                f"{path} contradicts itself: its shards add up to {sums[0]} tokens and {sums[1]} "
                f"documents, its totals are {manifest.tokens} and {manifest.documents}. "
                "Prepare the dataset again."
            )
        return manifest

    @property
    def num_shards(self) -> int:
        """Number of tars."""
        return len(self.paths)

    @cached_property
    def block_starts(self) -> np.ndarray:
        """(shards + 1,) int64: shard s has the rows block_starts[s] to block_starts[s + 1]."""
        blocks = -(-self.shard_tokens // self.block_tokens)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])

    @cached_property
    def index(self) -> np.ndarray:
        """(blocks,) INDEX_DTYPE; mapped, not read, when the dataset is local.

        Raises:
            DataError: index.npy is missing or does not have this dataset's number of blocks.
        """
        path = f"{self.folder}/index.npy"
        try:
            if "://" in path:
                import io

                index = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
            else:
                index = np.load(
                    path, mmap_mode="r" if self.num_shards else None, allow_pickle=False
                )
        except (
            Exception
        ) as error:  # numpy parses a damaged header as Python and raises whatever that gives
            raise DataError(
                f"{path} cannot be read ({error}). Copy or prepare the dataset again."
            ) from error
        if index.dtype != INDEX_DTYPE or index.shape != (int(self.block_starts[-1]),):
            raise DataError(
                f"{path} holds {index.shape} rows of {index.dtype}, the manifest asks for "
                f"{int(self.block_starts[-1])} rows of 32 bytes. Copy or prepare the dataset again."
            )
        return index

    def map_block(self, shard: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, document starts) of one block of a local dataset, mapped.

        Raises:
            ShardError: the tar is missing or shorter than the index says.
        """
        row = self.index[self.block_starts[shard] + block]
        return map_block(f"{self.folder}/{self.paths[shard]}", row, self.dtype)


# The writer puts one row on a line between these. 300,000 rows parsed at once would be 250 MB of
# Python objects.
_ROWS_BEGIN, _ROWS_END, _PIECE_BYTES = b'"shards": [\n', b"\n ]\n", 1 << 16


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
            rows = json.loads(b"[" + raw[at:stop].rstrip(b",\n") + b"]")
            at = stop + 1
        for column, values in zip(columns, zip(*rows, strict=True), strict=True):
            column.extend(map(sys.intern, values) if column is columns[5] else values)
        rows = []
    return columns


def map_block(path: str, row: np.void, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(num_tokens,) of dtype and (num_docs,) uint32, mapped from a local tar by its index row.

    Raises:
        ShardError: the tar is missing or shorter than the row says.
    """
    try:
        tokens = np.memmap(path, dtype, "r", int(row["tokens_offset"]), (int(row["num_tokens"]),))
        if not row["num_docs"]:  # an empty map is an error
            return tokens, np.empty(0, DOCS_DTYPE)
        return tokens, np.memmap(
            path, DOCS_DTYPE, "r", int(row["docs_offset"]), (int(row["num_docs"]),)
        )
    except (OSError, ValueError) as error:
        raise ShardError(
            f"{path} is missing or truncated ({error}). Copy or prepare the dataset again."
        ) from error


def token_dtype(vocab_size: int) -> np.dtype:
    """Of the token arrays: the smaller of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_path(number: int) -> str:
    """Place of a shard inside its dataset."""
    return f"shards/{number // SHARDS_PER_FOLDER:05d}/tok-{number:08d}.tar"


def member_names(key: int, block: int) -> tuple[str, str]:
    """Names of a block's two members in the shard with this key.

    The key is not the shard's number: that is known only when all shards are written, and would
    have to be written into them then.
    """
    return f"{key:08d}-{block:04d}.tokens.npy", f"{key:08d}-{block:04d}.docs.npy"


def npy_header(dtype: np.dtype, count: int) -> bytes:
    """The 128 bytes before a one-dimensional array in an npy file of version 1.0.

    Ours and not numpy's, so that the bytes of a shard do not depend on numpy's release.
    """
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    return (
        b"\x93NUMPY\x01\x00"
        + struct.pack("<H", NPY_HEADER_BYTES - 10)
        + text.ljust(117).encode()
        + b"\n"
    )


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member of `size` bytes: USTAR, owner 0, time 0."""
    fields = {
        "name": ("100s", name.encode()),
        "mode": ("8s", b"0000644"),
        "uid": ("8s", b"0000000"),
        "gid": ("8s", b"0000000"),
        "size": ("12s", f"{size:011o}".encode()),
        "mtime": ("12s", b"00000000000"),
        "checksum": ("8s", b" " * 8),  # while it is summed
        "type": ("1s", b"0"),
        "link": ("100s", b""),
        "magic": ("8s", b"ustar\x0000"),
        "owner": ("32s", b""),
        "group": ("32s", b""),
        "major": ("8s", b"0000000"),
        "minor": ("8s", b"0000000"),
        "prefix": ("167s", b""),
    }
    layout = "<" + "".join(code for code, _ in fields.values())
    header = bytearray(struct.pack(layout, *(value for _, value in fields.values())))
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


UNSEALED = "0" * 64
"""Value of the manifest's `checksum` before it is sealed."""


def seal(manifest: bytes) -> bytes:
    """The bytes of a manifest.json; `checksum` is their sha256 while `checksum` was UNSEALED."""
    blank = f'"checksum": "{UNSEALED}"'
    assert manifest.count(blank.encode()) == 1, "the manifest has one unsealed checksum"
    sealed = blank.replace(UNSEALED, sha256_of(manifest))
    return manifest.replace(blank.encode(), sealed.encode())


def is_sealed(manifest: bytes) -> bool:
    """Whether not a byte of a manifest.json has changed since `seal`."""
    match = re.search(rb'"checksum": "([0-9a-f]{64})"', manifest)
    if match is None:
        return False
    blank = manifest[: match.start(1)] + UNSEALED.encode() + manifest[match.end(1) :]
    return sha256_of(blank).encode() == match[1]


def read_bytes(path: str) -> bytes:
    """Content of a file of a dataset, local or at an address that fsspec understands.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if "://" not in path:
            return Path(path).read_bytes()
        import fsspec

        return bytes(fsspec.open(path, "rb").open().read())
    except Exception as error:  # every fsspec file system raises its own
        reason = (
            "there is no such file"
            if isinstance(error, FileNotFoundError)
            else f"{type(error).__name__}: {error}"
        )
        raise DataError(
            f"{path} cannot be read: {reason}. A dataset is a folder that data_prep/tokenize.py "
            "has written; its manifest.json appears when the last piece of work is done."
        ) from error
