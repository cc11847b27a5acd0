"""The datasets on disk: data_prep writes them, pipeline reads them, and nothing else is shared.

    DATASET/manifest.json                    written last, in one go; its sha256 is the identity
    DATASET/index.npy                        one INDEX_DTYPE row a block, shard by shard
    DATASET/tokenizer.json                   exact copy; its sha256 stands in the manifest
    DATASET/provenance.jsonl                 one line a shard: the inputs it was made of
    DATASET/shards/00000/tok-00000000.tar    1,000 a folder; uncompressed USTAR, SHARD_TOKENS each
        KKKKKKKK-0000.tokens.npy             one block: uint16 (vocab_size <= 65,536) or uint32
        KKKKKKKK-0000.docs.npy               uint32: where in the block documents start
        KKKKKKKK-0000.loss.npy               version 2: uint8, 1 where this token is to be predicted
        KKKKKKKK-0000.images.npy             version 3: uint8 (n, 3, size, size), the rows' pictures

A block's members are one sample of the tar, with the key KKKKKKKK-0000. Every block of a shard but
its last holds exactly block_tokens tokens. Stock `webdataset` reads the tars. Offsets in the index
point at the raw array, past the tar and npy headers, so a block is one np.memmap. Only numpy and
the standard library.

Version 1 is text: a document ends with EOD and may run over blocks and shards; where it runs on it
has no entry in docs. Version 2 is rows of exactly row_tokens tokens, which no block cuts: a row
holds whole documents, and what is left of it is one more, of EOD. A document's first token is
nobody's label. Version 3 is version 2 with pictures: the k-th run of placeholders of a block, each
(image_size / patch_size)^2 ids long and inside one row, stands for its k-th picture, which is there
as pixels: decoders differ between releases, and training needs none.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.files import sha256_of

FORMAT = "gpt-shards"
VERSION = 1
PACKED_VERSION = 2
PICTURES_VERSION = 3
BLOCK_TOKENS = 2**20
PICTURE_BLOCK_BYTES = 2**26
"""Of the pictures of a block, which a writer holds and a reader's first touch sums: 64 MiB."""
SHARD_TOKENS = 2**25
SHARDS_PER_FOLDER = 1000
TAR_BLOCK = 512
NPY_HEADER_BYTES = 128
MOST_IMAGE_SIZE = 4096
DOCS_DTYPE = np.dtype("<u4")
LOSS_DTYPE = np.dtype("u1")
PIXEL_DTYPE = np.dtype("u1")
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
PACKED_INDEX_DTYPE = np.dtype(INDEX_DTYPE.descr + [("loss_offset", "<u8"), ("loss_crc32", "<u4")])
PICTURES_INDEX_DTYPE = np.dtype(
    PACKED_INDEX_DTYPE.descr
    + [("images_offset", "<u8"), ("num_images", "<u4"), ("images_crc32", "<u4")]
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


@dataclass(frozen=True)
class Chat:
    """How dialogues became text; in the manifest of a packed dataset."""

    template: str
    """Jinja, as transformers' chat templates are."""
    end_of_turn: int
    """Id of the token that ends an answer: where generation stops."""


@dataclass(frozen=True)
class Pictures:
    """How pictures stand in the rows of a dataset; in the manifest of one that has them."""

    image_size: int
    """Pixels of a picture's side."""
    patch_size: int
    """Pixels of a patch's side, a divisor of image_size."""
    image_token_id: int
    """Id of a placeholder; a picture has `num_patches` of them in its row."""

    @property
    def num_patches(self) -> int:
        """Placeholders of one picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a picture's pixels: red, green, blue; from the top; from the left."""
        return 3, self.image_size, self.image_size


class Member(NamedTuple):
    """One of a block's arrays."""

    kind: str
    """Part of its name in the tar, and of its columns in the index."""
    dtype: np.dtype
    length: str
    """Column of the index with its number of elements."""
    shape: tuple[int, ...] = ()
    """Of an element."""

    @property
    def item_bytes(self) -> int:
        """Of an element."""
        return self.dtype.itemsize * math.prod(self.shape)


class Block(NamedTuple):
    """The arrays of one block."""

    tokens: np.ndarray
    """(n,) ids."""
    starts: np.ndarray
    """(documents,) uint32: where in `tokens` documents start."""
    loss: np.ndarray | None = None
    """(n,) uint8: 1 where the token is to be predicted; None in version 1: everywhere."""
    images: np.ndarray | None = None
    """(pictures, 3, image_size, image_size) uint8, in the order of their placeholders; None before
    version 3: there are none.
    """


@dataclass(frozen=True)
class ShardLayout:
    """What the blocks of a dataset hold, and how large they are."""

    dtype: np.dtype
    """Of the tokens."""
    row_tokens: int | None = None
    """Tokens of a packed row; None: documents run on."""
    pictures: Pictures | None = None
    """Of packed rows; None: they have none."""

    @property
    def version(self) -> int:
        """Of the format."""
        if self.pictures is not None:
            return PICTURES_VERSION
        return VERSION if self.row_tokens is None else PACKED_VERSION

    @property
    def members(self) -> tuple[Member, ...]:
        """The arrays of a block, in their order in the tar and in the index."""
        text = Member("tokens", self.dtype, "num_tokens"), Member("docs", DOCS_DTYPE, "num_docs")
        if self.row_tokens is None:
            return text
        packed = *text, Member("loss", LOSS_DTYPE, "num_tokens")
        if self.pictures is None:
            return packed
        return *packed, Member("images", PIXEL_DTYPE, "num_images", self.pictures.shape)

    @property
    def index_dtype(self) -> np.dtype:
        """Of a block's row in the index."""
        if self.pictures is not None:
            return PICTURES_INDEX_DTYPE
        return INDEX_DTYPE if self.row_tokens is None else PACKED_INDEX_DTYPE

    @property
    def block_tokens(self) -> int:
        """Tokens of a block that is not a shard's last: as many whole rows as fit."""
        most = BLOCK_TOKENS
        if self.pictures is not None:  # a placeholder stands for one patch of pixels
            most = min(most, PICTURE_BLOCK_BYTES // (3 * self.pictures.patch_size**2))
            most = max(most, self.row_tokens or 1)
        return most - most % (self.row_tokens or 1)

    @property
    def shard_tokens(self) -> int:
        """Tokens of a full shard: whole blocks."""
        return SHARD_TOKENS // BLOCK_TOKENS * self.block_tokens

    @property
    def join_tokens(self) -> int:
        """Neighbouring parts of a dataset are joined up to this size; larger ones are renamed."""
        return (self.shard_tokens if self.pictures else SHARD_TOKENS) // 8

    def index_row(self, lengths: dict[str, int], places: dict[str, tuple[int, int]]) -> list[int]:
        """A block's row of the index.

        Args:
            lengths: kind to elements.
            places: kind to (offset, crc32).
        """
        values = {}
        for member in self.members:
            kind = member.kind
            values[f"{kind}_offset"], values[f"{kind}_crc32"] = places[kind]
            values[member.length] = lengths[kind]
        return [values[name] for name in self.index_dtype.names or ()]


def token_dtype(vocab_size: int) -> np.dtype:
    """Of the token arrays: the smaller of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_path(number: int) -> str:
    """Place of a shard inside its dataset."""
    return f"shards/{number // SHARDS_PER_FOLDER:05d}/tok-{number:08d}.tar"


_TAILS = [shard_path(number)[-7:] for number in range(SHARDS_PER_FOLDER)]


def shard_paths(folder: int) -> list[str]:
    """shard_path of each shard of the folder with this number, eight times as fast."""
    start = shard_path(folder * SHARDS_PER_FOLDER)[:-7]
    return [start + tail for tail in _TAILS]


def member_name(key: int, block: int, kind: str) -> str:
    """Name of one of a block's arrays in the shard with this key.

    The key is not the shard's number: that is known only when all shards are written, and would
    have to be written into them then.
    """
    return f"{key:08d}-{block:04d}.{kind}.npy"


def npy_header(dtype: np.dtype, count: int, shape: tuple[int, ...] = ()) -> bytes:
    """The 128 bytes before an array of `count` elements of `shape` in an npy file of version 1.0.

    Ours and not numpy's, so that the bytes of a shard do not depend on numpy's release.
    """
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {(count, *shape)}, }}"
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
    # In three parts: a blank copy of 300,000 shards' 43 MB costs as much as hashing them.
    whole = memoryview(manifest)
    found = hashlib.sha256(whole[: match.start(1)])
    found.update(UNSEALED.encode())
    found.update(whole[match.end(1) :])
    return found.hexdigest().encode() == match[1]
