"""Token ids that others wrote, as documents: Megatron, nanoGPT, llm.c, parquet, arrow.

    path -> ranges (depend on the file alone) -> for each range: arrays of ids, one a document,
            without end-of-document

A file without marks of its own (nanoGPT, llm.c) is cut at the end-of-document id; a range owns the
documents that begin in it, so that ranges can be read by different workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.sources.arrow_checks import check_stream_end
from data_prep.sources.rejects import Damaged, is_damage, out_of_memory
from data_prep.sources.tables import (
    ARROW_FILE_MAGIC,
    check_nothing_follows,
)
from pipeline.errors import DataError, PipelineError

RANGE_TOKENS = 1 << 25
"""Tokens in a range, about; one range is one work unit."""
RANGE_BYTES = 1 << 27
"""The same for columns: stored bytes of row groups, or bytes of record batches."""
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
# Megatron-LM, megatron/core/datasets/indexed_dataset.py, DType
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LLMC_MAGIC, LLMC_HEADER_BYTES = 20240520, 1024  # llm.c dev/data/data_common.py: 256 int32
LLMC_DTYPES = {1: "<u2", 7: "<u4"}  # by version: gpt-2 and llama-3


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """A block that reads a token file, whose damage is a DataError.

    Raises:
        DataError: the file cannot be read, or is not what its name says.
        MachineError: memory ran out.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if problem := out_of_memory(error, path):
            raise problem from error
        if not is_damage(error) and not isinstance(error, OSError | ValueError):
            raise
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DataError(f"{path} cannot be read ({reason}). Mend or remove it.") from error


class TokenFile(Protocol):
    """What the formats have in common."""

    def ranges(self) -> list[tuple[int, int]]:
        """Pieces of work, in order: the file alone decides."""

    def read(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Ids of each document of a range, with or without its end-of-document."""


class MegatronTokens:
    """A .bin with its .idx; a document is what the index calls one, in any number of sequences."""

    def __init__(self, path: Path):
        index = path.with_suffix(".idx")
        if not index.is_file():
            raise DataError(f"{path} needs its index {index.name} beside it.")
        head = np.fromfile(index, np.uint8, 34).tobytes()
        if not head.startswith(MEGATRON_MAGIC) or len(head) < 34:
            raise DataError(f"{index} is not a Megatron index: it does not begin with MMIDIDX.")
        version, code = int.from_bytes(head[9:17], "little"), head[17]
        if version != 1 or code not in MEGATRON_DTYPES:
            raise DataError(
                f"{index} has version {version} and type code {code}; version 1 with integer ids "
                "is known."
            )
        self._path, self._dtype = path, np.dtype(MEGATRON_DTYPES[code])
        self._ends = self._read_index(index, *np.frombuffer(head, "<u8", 2, 18).tolist())

    def _read_index(self, index: Path, num_sequences: int, num_bounds: int) -> np.ndarray:
        """(documents + 1,) int64: document d is the tokens [ends[d], ends[d + 1]) of the .bin.

        Everything the .bin holds must belong to a document, and to one only.
        """
        need = 34 + 12 * num_sequences + 8 * num_bounds
        size = index.stat().st_size
        if size != need:
            raise DataError(
                f"{index} has {size} bytes and announces {need}; it is "
                f"{'truncated' if size < need else 'longer than what is known of the format'}."
            )
        body = np.memmap(index, np.uint8, "r", 34) if size > 34 else np.empty(0, np.uint8)
        lengths = body[: 4 * num_sequences].view("<i4").astype(np.int64)
        starts = body[4 * num_sequences : 12 * num_sequences].view("<i8") // self._dtype.itemsize
        bounds = body[12 * num_sequences :].view("<i8")  # sequence numbers, the last one closes
        ends = np.concatenate(([0], np.cumsum(lengths)))
        if (lengths < 0).any() or not np.array_equal(starts, ends[:-1]):
            raise DataError(f"{index}: sequences do not lie one after the other in {self._path}.")
        num_bytes = self._path.stat().st_size
        if num_bytes != ends[-1] * self._dtype.itemsize:
            raise DataError(
                f"{self._path} has {num_bytes} bytes; its index announces "
                f"{ends[-1] * self._dtype.itemsize}."
            )
        # Megatron-LM asserts the same: what lies behind the last bound would be in no document.
        if not num_bounds or bounds[0] != 0 or bounds[-1] != num_sequences:
            raise DataError(
                f"{index}: its documents are the sequences {bounds[:1].tolist()} to "
                f"{bounds[-1:].tolist()}, but the file has the sequences 0 to {num_sequences}. "
                "Some tokens would belong to no document; write the index anew."
            )
        if (np.diff(bounds) < 0).any():
            raise DataError(f"{index}: its documents do not follow one after the other.")
        return ends[bounds]

    def ranges(self) -> list[tuple[int, int]]:
        """(first document, one after the last)."""
        cuts = np.searchsorted(self._ends, np.arange(0, self._ends[-1], RANGE_TOKENS))
        bounds = np.unique([*cuts, len(self._ends) - 1]).tolist()
        return list(zip(bounds, bounds[1:]))

    def read(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Ids of each document of a range."""
        tokens = np.memmap(self._path, self._dtype, "r")
        for document in range(begin, end):
            yield tokens[self._ends[document] : self._ends[document + 1]]


class FlatTokens:
    """nanoGPT's .bin (bare uint16), or llm.c's (1,024 bytes of header; EOD comes first)."""

    def __init__(self, path: Path, *, eod: int, vocab_size: int):
        head = np.fromfile(path, "<i4", 3)
        is_llmc = len(head) == 3 and head[0] == LLMC_MAGIC
        if is_llmc and int(head[1]) not in LLMC_DTYPES:
            raise DataError(
                f"{path} has llm.c version {head[1]}; versions {sorted(LLMC_DTYPES)} are known."
            )
        dtype = np.dtype(LLMC_DTYPES[int(head[1])] if is_llmc else "<u2")
        # Ids of four bytes, read as two, would be twice as many legal ids: nothing else tells.
        if not is_llmc and vocab_size > 2**16:
            raise DataError(
                f"{path} has no header, so its ids would be uint16; the tokenizer has {vocab_size} "
                "ids, which need more. Give it an index (Megatron .idx) or llm.c's header, or "
                "write the ids to a parquet column."
            )
        if not is_llmc and (width := _wider_ids(path)):
            raise DataError(
                f"{path} has no header, so its ids would be uint16; but of every {width} bytes "
                "only the first two are ever used: it holds ids of that many bytes. Write them "
                "as uint16 (numpy: ids.astype('<u2').tofile(...)), or to a parquet column."
            )
        offset = LLMC_HEADER_BYTES if is_llmc else 0
        size = path.stat().st_size - offset
        if size % dtype.itemsize or size == 0 or is_llmc and size // dtype.itemsize != head[2]:
            raise DataError(
                f"{path} holds {size} bytes of {dtype.itemsize}-byte ids"
                + (
                    f"; its header announces {head[2]} ids."
                    if is_llmc
                    else "; that is no whole number of them."
                )
            )
        self._open: Callable[[], np.ndarray] = lambda: np.memmap(path, dtype, "r", offset)
        self._eod, self._eod_is_in_front = eod, is_llmc
        self._num_tokens = size // dtype.itemsize

    def ranges(self) -> list[tuple[int, int]]:
        """(first token, one after the last); documents may run on into the next range."""
        return [
            (b, min(b + RANGE_TOKENS, self._num_tokens))
            for b in range(0, self._num_tokens, RANGE_TOKENS)
        ]

    def read(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Ids of each document that begins in a range."""
        tokens = self._open()
        ends = (begin + np.flatnonzero(tokens[begin:end] == self._eod)).tolist()
        starts = [stop + 1 for stop in ends]
        if begin == 0 or tokens[begin - 1] == self._eod:
            starts.insert(0, begin)
        else:
            ends = ends[1:]  # the first one ends a document of the range before
        if self._eod_is_in_front and starts[:1] == ends[:1] == [0]:
            starts, ends = starts[1:], ends[1:]
        if starts and starts[-1] < end:
            ends.append(self._next_eod(tokens, end))
        for start, stop in zip(
            starts, ends
        ):  # a document that would start at `end` has no place in ends
            yield tokens[start:stop]

    def _next_eod(self, tokens: np.ndarray, begin: int) -> int:
        """Place of the first end-of-document id from `begin` on, or the end of the file."""
        step = 1 << 16
        while begin < len(tokens):
            found = np.flatnonzero(tokens[begin : begin + step] == self._eod)
            if len(found):
                return begin + int(found[0])
            begin += step
        return len(tokens)


def _wider_ids(path: Path) -> int:
    """4 or 8 where a file of bare ids has nothing but zeros in the upper bytes of each; else 0.

    Read as uint16 it would be twice, or four times, as many ids, all of them legal.
    """
    ids = np.fromfile(path, "<u2", 1 << 20)
    for width in (8, 4):
        step = width // 2
        whole = ids[: len(ids) // step * step].reshape(-1, step)
        # Of real text no other id is 0 sixteen times in a row.
        if len(whole) >= 16 and whole[:, 0].any() and not whole[:, 1:].any():
            return width
    return 0


class ColumnTokens:
    """A column of lists of ids in a parquet or arrow (IPC) file, one row a document."""

    def __init__(self, path: Path, *, column: str):
        self._path, self._column = path, column
        names = self._names()
        if column not in names:
            raise DataError(
                f"{path} has no column '{column}'; it has {', '.join(names)}. Set column=..."
            )
        if names.count(column) > 1:
            raise DataError(
                f"{path} has {names.count(column)} columns '{column}'; which one holds the ids "
                "cannot be told. Rename the others."
            )

    def ranges(self) -> list[tuple[int, int]]:
        """(first row group or record batch, one after the last)."""
        sizes = self._group_bytes()
        ends = np.cumsum(sizes)
        cuts = (
            np.searchsorted(ends, np.arange(RANGE_BYTES, sum(sizes) + RANGE_BYTES, RANGE_BYTES)) + 1
        )
        bounds = np.unique(np.minimum([0, *cuts], len(sizes))).tolist()
        return list(zip(bounds, bounds[1:]))

    def read(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Ids of each row of a range."""
        import pyarrow as pa

        for group in range(begin, end):
            for chunk in self._chunks(group):
                chunk.validate(full=True)  # places outside of the file are read as they are
                kind = chunk.type
                if not (
                    pa.types.is_list(kind) or pa.types.is_large_list(kind)
                ) or not pa.types.is_integer(kind.value_type):
                    raise DataError(
                        f"{self._path}: column '{self._column}' is {kind}, not a list of integers."
                    )
                if (
                    chunk.null_count or chunk.values.null_count
                ):  # a null is no empty list: something went wrong before
                    raise DataError(
                        f"{self._path}: column '{self._column}' has nulls in row group {group}."
                    )
                values = chunk.values.to_numpy()
                offsets = chunk.offsets.to_numpy()
                for start, stop in zip(offsets[:-1], offsets[1:]):
                    yield values[start:stop]

    def _names(self) -> list[str]:
        if self._path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_schema(self._path).names
        return self._arrow().schema.names

    def _group_bytes(self) -> list[int]:
        if self._path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            metadata = pq.read_metadata(self._path)
            return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
        file = self._arrow()
        return [file.get_batch(i).nbytes for i in range(file.num_record_batches)]

    def _chunks(self, group: int) -> Sequence[Any]:
        if self._path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(self._path) as file:
                return file.read_row_group(group, columns=[self._column]).column(0).chunks
        return [self._arrow().get_batch(group).column(self._column)]

    def _arrow(self) -> Any:
        """The IPC file; Hugging Face's .arrow streams have no index: their batches are counted."""
        import pyarrow as pa

        with self._path.open("rb") as file:
            is_file = file.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
            try:
                if not is_file:
                    check_stream_end(file)
                source = pa.memory_map(str(self._path))
                return pa.ipc.open_file(source) if is_file else _StreamAsFile(source)
            except Damaged as error:
                raise DataError(f"{self._path} is damaged: {error}.") from error


class _StreamAsFile:
    """The batches of an arrow stream by number."""

    def __init__(self, source: Any):
        import pyarrow as pa

        stream = pa.ipc.open_stream(source)
        self.schema = stream.schema
        self._batches = list(stream)
        check_nothing_follows(source)
        self.num_record_batches = len(self._batches)

    def get_batch(self, number: int) -> Any:
        """Record batch `number`."""
        return self._batches[number]
