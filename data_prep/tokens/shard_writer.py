"""Token ids to shard tars, a block at a time: memory does not depend on a shard's size.

    add(ids, starts) -> block of block_tokens -> its tar members -> part file; a new part every
                        shard_tokens
    close() -> [Part(...)], from which finalize.py makes shards

A part has its final bytes; only its name changes when it becomes a shard.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.data import shard_format as fmt
from pipeline.data.dataset_files import map_block
from pipeline.data.pictures import picture_rows, picture_starts
from pipeline.errors import DataError
from pipeline.files import whole_file
from pipeline.shapes import COUNT, misfits

# Of a part in a marker; blocks are many, and judged when the index is made of them.
PART = {
    "name": str,
    "key": COUNT,
    "source": str,
    "tokens": COUNT,
    "documents": COUNT,
    "bytes": COUNT,
    "sha256": str,
    "blocks": list,
    "inputs": [str],
    "images_per_row?": COUNT,
}
PICTURES = ("image_size", "patch_size", "image_token_id")  # of job.json, where there are any
PARTS_PER_KEY_RANGE = 1000  # key of a part: unit * 1000 + number of the part in its unit


@dataclass
class Part:
    """One finished tar: what the manifest and the index will say of it."""

    name: str
    """File name in the folder of parts."""
    key: int
    source: str
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    sha256: str = ""
    blocks: list[list[int]] = field(default_factory=list)
    """One row a block, in the order of the layout's index_dtype."""
    inputs: list[str] = field(default_factory=list)
    """Id of the first document that starts in the part, and of the last."""
    images_per_row: int = 0
    """Pictures of the row that has most."""

    @classmethod
    def of(cls, row: dict[str, Any]) -> Part:
        """The part that `as_json` told of.

        Raises:
            DataError: it was not this program that did.
        """
        problem = next(misfits(row, PART), "")
        if not problem and not re.fullmatch(r"\w[\w-]*\.tar", row["name"]):
            problem = f"name is {row['name']!r}"
        if problem:
            raise DataError(f"a marker of the job tells of no part: {problem}. Start it anew.")
        return cls(**{field.name: row[field.name] for field in fields(cls) if field.name in row})

    def as_json(self) -> dict[str, Any]:
        """For a marker."""
        return asdict(self)


def layout_of(facts: dict[str, Any]) -> fmt.ShardLayout:
    """Of the shards that a job makes, by its job.json."""
    dtype = fmt.token_dtype(facts["tokenizer"]["vocab_size"])
    pictures = fmt.Pictures(*(facts[key] for key in PICTURES)) if PICTURES[0] in facts else None
    return fmt.ShardLayout(dtype, facts.get("row_tokens"), pictures)


class PartWriter:
    """Writes the parts of one unit and split.

    Used as a context manager: left with an error, the part that was being written is removed.
    """

    def __init__(
        self, folder: Path, *, stem: str, key: int, source: str, layout: fmt.ShardLayout
    ) -> None:
        """Write into `folder` files named <stem>-000.tar and so on.

        Args:
            folder: on the file system of the dataset.
            stem: unique in the folder, the same whenever the unit is done again.
            key: of the first part; the following ones count up, up to PARTS_PER_KEY_RANGE.
            source: label.
            layout: of the blocks.
        """
        self._folder, self._stem, self._key, self._source, self._layout = (
            folder,
            stem,
            key,
            source,
            layout,
        )
        self._block = np.empty(layout.block_tokens, layout.dtype)
        self._loss = np.zeros(layout.block_tokens if layout.row_tokens else 0, fmt.LOSS_DTYPE)
        self._filled = 0
        self._starts: list[np.ndarray] = []
        self._images: list[np.ndarray] = []
        self._parts: list[Part] = []
        self._file: BinaryIO | None = None
        self._open_file = ExitStack()
        self._digest = hashlib.sha256()

    def __enter__(self) -> PartWriter:
        """Nothing is written yet."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove the part that is not finished, if an error ended the block."""
        self._open_file.__exit__(*error)

    def add(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        ids: Sequence[str] = (),
        loss: np.ndarray | None = None,
        images: np.ndarray | None = None,
    ) -> None:
        """Append tokens.

        Args:
            tokens: (n,) ids, end-of-document ids among them.
            starts: ascending places in `tokens` where documents start.
            ids: of the documents that start here, for provenance; none: not known.
            loss: (n,) uint8, of packed rows: 1 where the token is to be predicted.
            images: (pictures, 3, image_size, image_size) uint8 of the placeholders in `tokens`,
                which then are whole rows.
        """
        done, size = 0, len(self._block)
        pictures = self._layout.pictures
        places = picture_starts(tokens, pictures) if pictures is not None else None
        while done < len(tokens):
            take = min(len(tokens) - done, size - self._filled)
            self._block[self._filled : self._filled + take] = tokens[done : done + take]
            if loss is not None:
                self._loss[self._filled : self._filled + take] = loss[done : done + take]
            if images is not None and places is not None:
                first, last = np.searchsorted(places, (done, done + take))
                self._images.append(images[first:last])
            low, high = np.searchsorted(starts, (done, done + take))
            self._starts.append((starts[low:high] - done + self._filled).astype(fmt.DOCS_DTYPE))
            self._filled += take
            done += take
            if len(ids) and high > low:
                part = self._part()
                part.inputs = [part.inputs[0] if part.inputs else ids[low], ids[high - 1]]
            if self._filled == size:
                self._write_block()

    def close(self) -> list[Part]:
        """Finish the last part; all parts in order, none for no tokens."""
        if self._filled:
            self._write_block()
        if self._file is not None:
            self._finish_part()
        return self._parts

    def _part(self) -> Part:
        if self._file is None:
            number = len(self._parts)
            assert number < PARTS_PER_KEY_RANGE, "a unit of more than 32 Gi tokens"
            part = Part(f"{self._stem}-{number:03d}.tar", self._key + number, self._source)
            self._file = self._open_file.enter_context(whole_file(self._folder / part.name))
            self._digest = hashlib.sha256()
            self._parts.append(part)
        return self._parts[-1]

    def _write_block(self) -> None:
        """The filled block becomes members of the tar and a row of the index."""
        part = self._part()
        tokens, starts = self._block[: self._filled], np.concatenate(self._starts)
        arrays = {"tokens": tokens, "docs": starts, "loss": self._loss[: self._filled]}
        if self._layout.pictures is not None:
            arrays["images"] = self._gather_images(part, tokens)
        places = {}
        for member in self._layout.members:
            name = fmt.member_name(part.key, len(part.blocks), member.kind)
            places[member.kind] = self._write_member(part, name, arrays[member.kind])
        lengths = {kind: len(array) for kind, array in arrays.items()}
        part.blocks.append(self._layout.index_row(lengths, places))
        part.tokens += len(tokens)
        part.documents += len(starts)
        self._filled, self._starts, self._images = 0, [], []
        if part.tokens == self._layout.shard_tokens:
            self._finish_part()

    def _gather_images(self, part: Part, tokens: np.ndarray) -> np.ndarray:
        """(pictures, 3, image_size, image_size) uint8 of the block; the part's most a row grows."""
        pictures, row_tokens = self._layout.pictures, self._layout.row_tokens
        assert pictures is not None and row_tokens is not None
        rows = picture_rows(tokens, pictures, row_tokens)
        part.images_per_row = max(part.images_per_row, int(np.bincount(rows).max(initial=0)))
        images = np.concatenate([np.empty((0, *pictures.shape), fmt.PIXEL_DTYPE), *self._images])
        assert len(images) == len(rows), "a picture for each run of placeholders"
        return images

    def _write_member(self, part: Part, name: str, array: np.ndarray) -> tuple[int, int]:
        """(place of the array in the tar, its crc32)."""
        content = array.reshape(-1).view(np.uint8).data
        size = fmt.NPY_HEADER_BYTES + len(content)
        offset = part.bytes + fmt.TAR_BLOCK + fmt.NPY_HEADER_BYTES
        header = fmt.npy_header(array.dtype, len(array), array.shape[1:])
        self._write(part, fmt.tar_header(name, size) + header)
        self._write(part, content)
        self._write(part, bytes(-size % fmt.TAR_BLOCK))
        return offset, zlib.crc32(content)

    def _write(self, part: Part, content: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(content)
        self._digest.update(content)
        part.bytes += len(content)

    def _finish_part(self) -> None:
        part = self._parts[-1]
        self._write(part, bytes(2 * fmt.TAR_BLOCK))
        part.sha256 = self._digest.hexdigest()
        self._file = None
        self._open_file.close()  # flushes to disk and renames


def copy_parts(
    sources: list[Path],
    parts: list[Part],
    target: Path,
    *,
    layout: fmt.ShardLayout,
    scratch: Path,
) -> Part:
    """Write the tokens of several parts into one at `target`; their files stay.

    Args:
        sources: their files.
        parts: what is known of them; the new part has the key of the first.
        target: final place of the new tar.
        layout: of all of them.
        scratch: folder, on the same file system, where the new tar grows.
    """
    first = parts[0]
    stem = f"joined-{os.getpid()}-{first.key}"
    with PartWriter(
        scratch, stem=stem, key=first.key, source=first.source, layout=layout
    ) as writer:
        for path, part in zip(sources, parts):
            for block in map_part(path, part, layout):
                writer.add(block.tokens, block.starts, loss=block.loss, images=block.images)
        (merged,) = writer.close()
    os.replace(scratch / merged.name, target)
    ids = [i for part in parts for i in part.inputs]
    merged.inputs = [ids[0], ids[-1]] if ids else []
    merged.name = target.name
    return merged


def map_part(path: Path, part: Part, layout: fmt.ShardLayout) -> Iterator[fmt.Block]:
    """The blocks of a part whose file is at `path`, mapped."""
    for row in part.blocks:
        yield map_block(str(path), np.array([tuple(row)], layout.index_dtype)[0], layout)
