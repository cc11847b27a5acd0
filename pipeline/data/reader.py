"""Token windows out of mapped shards; the first touch of a block checks it.

    (dataset, shard, sequence) --open, map--> shard --check once--> block
                               --slice--> (n, seq_len + 1) ids

A shard is mapped, never read whole: the page cache is the only copy, shared by all ranks of a node.
Size is checked when a shard is opened, crc32 when a block is first touched; errors name shard,
place and the command that verifies.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32  # 5 times zlib's speed: checking costs less than reading

from pipeline.data.dataset_files import check_ids, check_pictures, check_starts
from pipeline.data.datasets import Dataset
from pipeline.data.mixture import Ints
from pipeline.data.shard_format import DOCS_DTYPE, LOSS_DTYPE, PIXEL_DTYPE, Block
from pipeline.errors import DataError, ShardError
from pipeline.files import regular_file
from pipeline.log import logger

_NONE = np.empty(0, np.int64)
# mapped at a time in one process; far below the usual limit of 1,024 files or 65,530 maps
MAX_OPEN_SHARDS = 512


@dataclass
class Windows:
    """Some sequences of full length."""

    ids: np.ndarray
    """(n, seq_len + 1) token ids in the type they have on disk; 0 where there is no token."""
    num_labels: Ints
    """(n,) labels that exist: fewer than seq_len past the end of a shard, none in corrupt
    blocks.
    """
    starts: list[np.ndarray] | None
    """For each sequence the places in [0, seq_len) where a document begins, ascending; None: not
    asked for.
    """
    num_corrupt: int
    """Sequences that were left out because their block is damaged."""
    loss: np.ndarray | None = None
    """(n, seq_len) uint8, of packed rows: 1 where the token is to be predicted; None: everywhere.
    """
    images: np.ndarray | None = None
    """(n, slots, 3, image_size, image_size) uint8: a row's pictures in the order of their
    placeholders, then blank ones; None: no dataset has pictures.
    """


@dataclass
class _Shard:
    """One mapped shard."""

    path: Path
    data: mmap.mmap
    blocks: dict[int, Block] = field(default_factory=dict)  # checked
    pictures: dict[int, Ints] = field(default_factory=dict)
    """Block -> (rows + 1,): row r of it has the pictures [r] to [r + 1]."""


class Reader:
    """Windows of seq_len + 1 tokens from datasets that share a tokenizer, all packed or none.

    A packed row has no label after its last token.
    """

    def __init__(
        self, datasets: Sequence[Dataset], *, seq_len: int, skip_corrupt: bool = False
    ) -> None:
        self.datasets, self.seq_len, self.skip_corrupt = list(datasets), seq_len, skip_corrupt
        check_rows(self.datasets, seq_len)
        manifests = [dataset.manifest for dataset in self.datasets]
        self._block_tokens = np.array([manifest.block_tokens for manifest in manifests])
        self._open: OrderedDict[tuple[int, int], _Shard] = OrderedDict()
        self._failed: dict[tuple[int, int], ShardError] = {}  # shards that cannot be opened
        self._reported: set[str] = set()
        self.pictures = next((m.pictures for m in manifests if m.pictures is not None), None)
        # At least one, so that a picture encoder runs on every rank whatever its rows hold.
        self.slots = max(1, *(m.images_per_row_max for m in manifests)) if self.pictures else 0

    @property
    def placeholder(self) -> int | None:
        """Id of the tokens that stand for patches; None: no dataset has pictures."""
        return None if self.pictures is None else self.pictures.image_token_id

    @property
    def is_packed(self) -> bool:
        """Whether the windows are packed rows."""
        return self.datasets[0].is_packed

    @property
    def eod(self) -> int:
        """Id of the token that ends a document."""
        return self.datasets[0].manifest.tokenizer.eod

    def gather(
        self, source: Ints, shard: Ints, sequence: Ints, *, documents: bool = False
    ) -> Windows:
        """The windows at these places, (n,) each; a window past the end of its shard is padded.

        Raises:
            ShardError: a shard is missing, truncated or corrupt, unless skip_corrupt.
        """
        windows = self.blank(
            len(source), documents=documents, make=np.empty
        )  # every row is filled below
        block, offset = np.divmod(sequence * self.seq_len, self._block_tokens[source])
        for row, place in enumerate(
            zip(source.tolist(), shard.tolist(), block.tolist(), offset.tolist())
        ):
            try:
                self._read(windows, row, *place)
            except ShardError as error:
                if not self.skip_corrupt:
                    raise
                if str(error) not in self._reported:
                    self._reported.add(str(error))
                    logger.warning("left out (data.on_corrupt=skip): %s", error)
                windows.ids[row], windows.num_labels[row] = 0, 0
                if windows.loss is not None:
                    windows.loss[row] = 0
                if windows.images is not None:
                    windows.images[row] = 0
                windows.num_corrupt += 1
        return windows

    def blank(
        self, count: int, *, documents: bool = False, make: Callable[..., np.ndarray] = np.zeros
    ) -> Windows:
        """Windows of zeros that read nothing."""
        images = None
        if self.pictures is not None:
            images = make((count, self.slots, *self.pictures.shape), dtype=PIXEL_DTYPE)
        return Windows(
            ids=make((count, self.seq_len + 1), dtype=self.datasets[0].manifest.dtype),
            num_labels=np.full(count, self.seq_len),
            starts=[_NONE] * count if documents else None,
            num_corrupt=0,
            loss=make((count, self.seq_len), dtype=LOSS_DTYPE) if self.is_packed else None,
            images=images,
        )

    def _read(
        self, windows: Windows, row: int, source: int, shard: int, block: int, offset: int
    ) -> None:
        """Fill one row; a window may run over block borders, never past its shard."""
        tokens, documents, loss, images = self._block(source, shard, block)
        stop = offset + self.seq_len
        if windows.loss is not None:  # a packed row, which lies in one block
            assert loss is not None and stop <= len(tokens)
            windows.ids[row, :-1], windows.ids[row, -1] = tokens[offset:stop], 0
            windows.loss[row], windows.num_labels[row] = loss[offset:stop], self.seq_len - 1
            if windows.starts is not None:
                first, last = documents.searchsorted(np.array((offset, stop), DOCS_DTYPE))
                windows.starts[row] = documents[first:last].astype(np.int64) - offset
            if windows.images is not None:
                count = 0
                if images is not None:
                    place = offset // self.seq_len
                    begin, end = self._open[source, shard].pictures[block][place : place + 2]
                    count = end - begin
                    windows.images[row, :count] = images[begin:end]
                windows.images[row, count:] = 0
            return
        if stop < len(tokens):  # nearly always: the window lies in one block
            windows.ids[row] = tokens[offset : stop + 1]
            if windows.starts is not None:
                first, last = documents.searchsorted(np.array((offset, stop), DOCS_DTYPE))
                windows.starts[row] = documents[first:last].astype(np.int64) - offset
            return
        # Over a block's end: the label of the last token is the next block's first, so seq_len + 1
        # tokens are gathered, while documents are counted in the first seq_len only.
        at, starts = 0, []
        while at <= self.seq_len and offset < len(tokens):
            part = tokens[offset : offset + self.seq_len + 1 - at]
            windows.ids[row, at : at + len(part)] = part
            places = documents.astype(np.int64) - offset
            starts.append(places[(places >= 0) & (places < self.seq_len - at)] + at)
            at, block, offset = at + len(part), block + 1, 0
            tokens, documents, *_ = self._block(source, shard, block)
        windows.ids[row, at:] = 0
        windows.num_labels[row] = max(at - 1, 0)
        if windows.starts is not None:
            windows.starts[row] = np.concatenate([_NONE, *starts])

    def _block(self, source: int, shard: int, block: int) -> Block:
        """A block's arrays, empty past the shard's end.

        The longest open map makes room.
        """
        opened = self._open.get((source, shard))
        if opened is None:
            opened = self._open[source, shard] = self._map(source, shard)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        found = opened.blocks.get(block)
        if found is None:
            found = opened.blocks[block] = self._check(opened, source, shard, block)
        return found

    def _map(self, source: int, shard: int) -> _Shard:
        """The shard, mapped; a failure is kept and raised again.

        Otherwise on_corrupt=skip would pay for it at every sequence of the shard: eight tries with
        growing pauses where it is remote.
        """
        if (source, shard) in self._failed:
            raise self._failed[source, shard]
        dataset = self.datasets[source]
        expected = int(dataset.manifest.shard_bytes[shard])
        try:
            path = dataset.shard_path(shard)
            with open(regular_file(path, inside=dataset.folder.local), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected:
                    raise ShardError(
                        f"{path} has {size} bytes, the manifest says {expected}: it is truncated "
                        "or another file. " + _way_out(dataset)
                    )
                return _Shard(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            failure = ShardError(
                f"{path} cannot be read ({error.strerror or error}). {_way_out(dataset)}"
            )
        except ShardError as error:
            failure = error
        self._failed[source, shard] = failure
        raise failure

    def _check(self, opened: _Shard, source: int, shard: int, block: int) -> Block:
        """The arrays of a block that is touched for the first time.

        Raises:
            ShardError: the crc32 is not that of the index; or an id is not the tokenizer's, or a
                document begins outside the block: crc32 says that bytes arrived as they were
                written, not that they were written well.
        """
        dataset = self.datasets[source]
        manifest = dataset.manifest
        at = manifest.block_starts[shard] + block
        if at >= manifest.block_starts[shard + 1]:
            empty = (np.empty((0, *m.shape), m.dtype) for m in manifest.layout.members)
            return Block(*empty)
        row, views = manifest.block_row(shard, block), []
        place, way_out = f"{opened.path}, block {block}", _way_out(dataset)
        for kind, dtype, count, shape in manifest.layout.members:
            offset = int(row[f"{kind}_offset"])
            elements = int(row[count]) * math.prod(shape)
            view = np.frombuffer(opened.data, dtype, elements, offset)
            if (found := crc32(view)) != row[f"{kind}_crc32"]:
                raise ShardError(
                    f"{place}: the {kind} at byte {offset} are corrupt (crc32 {found:08x}, the "
                    f"index has {int(row[f'{kind}_crc32']):08x}). {way_out}"
                )
            views.append(view.reshape(-1, *shape))
        found_block = Block(*views)
        tokens, starts, _, images = found_block
        check_ids(tokens, manifest.tokenizer.vocab_size, place, way_out)
        check_starts(starts, len(tokens), place, way_out)
        if self.pictures is not None:
            num_images = 0 if images is None else len(images)
            rows = check_pictures(tokens, num_images, self.pictures, self.seq_len, place, way_out)
            bounds = np.arange(len(tokens) // self.seq_len + 1)
            opened.pictures[block] = np.searchsorted(rows, bounds)
        return found_block


def check_rows(datasets: Sequence[Dataset], seq_len: int) -> None:
    """Raise DataError unless packed rows are as long as the sequences."""
    for dataset in datasets:
        row_tokens = dataset.manifest.row_tokens
        if row_tokens not in (None, seq_len):
            raise DataError(
                f"dataset {dataset.name} ({dataset.path}) is rows of {row_tokens} tokens, and "
                f"sequences have {seq_len}. Set training.seq_len={row_tokens} (seq_len= in "
                "pipeline.evaluate), or prepare it again with "
                f"row_tokens={seq_len}."
            )


def _way_out(dataset: Dataset) -> str:
    return (
        f"Check the whole dataset with `python -m data_prep.verify {dataset.path}` and copy what "
        "is damaged again, or set data.on_corrupt=skip to train without it."
    )
