"""Documents of parquet and arrow files: a row is a document, its text a column or a struct's field.

The sums are closed: a table that holds other rows than it announces, or a stream of batches without
its end mark, is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from data_prep.sources.arrow_checks import check_nothing_follows, check_places, check_stream_end
from data_prep.sources.inputs import InputConfig
from data_prep.sources.kinds import Format
from data_prep.sources.pieces import Piece
from data_prep.sources.rejects import Damaged, Document, Rejects, accept

ROWS_PER_BATCH, BYTES_PER_BATCH = 256, 1 << 26
MOST_DEFLATION = 100
"""Ratio of a column's decompressed to its stored bytes; text has up to 20."""
MOST_SIZE = 1 << 36
"""Counted of one value: the sum of 10^8 of them, shared over and over, is still an int64."""
MOST_VALUES = 1 << 22
"""Of the lists of a row group, beyond 8 a stored byte: places are stored as runs of any length."""
_NEXT_INT32, _DICTIONARY_PAGE = 0x15, 2
ARROW_FILE_MAGIC = b"ARROW1"


def read_parquet(
    file: BinaryIO, piece: Piece, source: str, cfg: InputConfig, rejects: Rejects
) -> Iterator[Document]:
    """The documents of a parquet file."""
    yield from _read_table(Format.parquet, file, piece, source, cfg, rejects)


def read_arrow(
    file: BinaryIO, piece: Piece, source: str, cfg: InputConfig, rejects: Rejects
) -> Iterator[Document]:
    """The documents of an arrow file, or of an arrow stream such as Hugging Face datasets write."""
    yield from _read_table(Format.arrow, file, piece, source, cfg, rejects)


def _read_table(
    kind: Format, file: BinaryIO, piece: Piece, source: str, cfg: InputConfig, rejects: Rejects
) -> Iterator[Document]:
    """The rows whose text may be a document."""
    names, batches = open_table(kind, file)
    root = cfg.text_field if cfg.text_field in names else cfg.text_field.split(".")[0]
    if root not in names:
        rejects.add("missing_field", piece.path, f"no column {root}; columns: {', '.join(names)}")
        return
    if names.count(root) > 1:
        rejects.add("ambiguous", piece.path, f"{names.count(root)} columns are called {root}")
        return
    inner = cfg.text_field.removeprefix(root).lstrip(".")
    has_url = names.count(cfg.url_field) == 1 and cfg.url_field != root
    row = 0
    columns = [root, cfg.url_field] if has_url else [root]
    for batch in (part for whole in batches(columns) for part in slices(whole)):
        urls = _column(batch.column(cfg.url_field), "") if has_url else [None] * batch.num_rows
        for value, url in zip(_column(batch.column(root), inner), urls):
            text = accept(value, piece.path, cfg, rejects, row=row)
            if text is not None:
                known = url.decode(errors="replace") if isinstance(url, bytes) else ""
                yield Document(text, f"{piece.name}#{row}", source, known)
            row += 1


def open_table(kind: Format, file: BinaryIO) -> tuple[list[str], Any]:
    """(names of the columns, a function from names to record batches) of a file that can seek."""
    return _open_parquet(file) if kind is Format.parquet else _open_arrow(file)


def _open_parquet(file: BinaryIO) -> tuple[list[str], Any]:
    """Columns and batches of a parquet file; its footer says how many rows there must be."""
    import pyarrow.parquet as pq

    # A buffer: else a column of a row group is read whole before its first row.
    parquet = pq.ParquetFile(file, buffer_size=1 << 20)

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        rows = 0
        for numbers, count, shared in _runs(file, parquet, columns):
            known = {"metadata": parquet.metadata, "read_dictionary": shared}
            reader = pq.ParquetFile(file, buffer_size=1 << 20, **known) if shared else parquet
            for batch in reader.iter_batches(count, row_groups=numbers, columns=list(columns)):
                rows += batch.num_rows
                yield batch
        if rows != parquet.metadata.num_rows:
            raise Damaged(f"{rows} rows were read of {parquet.metadata.num_rows}")

    return parquet.schema_arrow.names, batches


def _runs(
    file: BinaryIO, parquet: Any, columns: Sequence[str]
) -> Iterator[tuple[list[int], int, list[str]]]:
    """(row groups that are read at once, rows at a time, lists that are read as dictionaries).

    To begin takes pyarrow 0.3 ms, whatever follows: small row groups are begun together.
    """
    run: list[int] = []
    size = 0
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        chunks = _chunks(group, columns)
        count = _rows_at_a_time(file, group, chunks)
        shared = _shared_lists(file, parquet.schema, chunks)
        is_small, size = count == ROWS_PER_BATCH and not shared, size + group.total_byte_size
        if run and not (is_small and size <= BYTES_PER_BATCH and len(run) < ROWS_PER_BATCH):
            yield run, ROWS_PER_BATCH, []
            run, size = [], group.total_byte_size
        if is_small:
            run.append(number)
        else:
            yield [number], count, shared
            size = 0
    if run:
        yield run, ROWS_PER_BATCH, []


def _chunks(group: Any, columns: Sequence[str]) -> dict[int, Any]:
    """Number -> chunk of a row group that is read for these columns."""
    chunks = {number: group.column(number) for number in range(group.num_columns)}
    # A dot may be part of a column's name.
    return {
        number: chunk
        for number, chunk in chunks.items()
        if any(f"{chunk.path_in_schema}.".startswith(f"{column}.") for column in columns)
    }


def _shared_lists(file: BinaryIO, schema: Any, chunks: dict[int, Any]) -> list[str]:
    """Paths of lists whose values may be a large one over and over: they are read as dictionaries.

    A row of such a list has the bytes of all its values when it is decoded, but stores a place in
    the dictionary for each, or how often one place follows. So how large it is must be known first.

    Raises:
        Damaged: a list of more values than a file of texts can have, or too large to be decoded.
    """
    shared = []
    stored = sum(chunk.total_compressed_size for chunk in chunks.values())
    for number, chunk in chunks.items():
        if not schema.column(number).max_repetition_level:
            continue  # a row has one value
        if chunk.num_values > max(MOST_VALUES, 8 * stored):
            raise Damaged(f"{chunk.path_in_schema}: {chunk.num_values} values in {stored} bytes")
        if chunk.num_values * _dictionary_bytes(file, chunk) > BYTES_PER_BATCH:
            if chunk.physical_type == "BYTE_ARRAY":
                shared.append(chunk.path_in_schema)
            elif chunk.num_values * schema.column(number).length > MOST_DEFLATION * stored:
                raise Damaged(f"{chunk.path_in_schema}: a list repeats a large value")
    return shared


def _rows_at_a_time(file: BinaryIO, group: Any, chunks: dict[int, Any]) -> int:
    """Rows of a row group that are about BYTES_PER_BATCH; at most 256.

    A footer tells how large rows are on average. That is no bound where a few are a thousand times
    as large, which compresses like no text, nor where rows share a large value.
    """
    wanted = chunks.values()
    size = sum(chunk.total_uncompressed_size for chunk in wanted)
    stored = sum(chunk.total_compressed_size for chunk in wanted)
    if size > max(BYTES_PER_BATCH, MOST_DEFLATION * stored):
        return 1
    count = BYTES_PER_BATCH * group.num_rows // max(size, 1)
    shared = max((_dictionary_bytes(file, chunk) for chunk in wanted), default=0)
    return max(1, min(ROWS_PER_BATCH, count, BYTES_PER_BATCH // max(shared, 1)))


def _dictionary_bytes(file: BinaryIO, chunk: Any) -> int:
    """Bytes of the values that rows of a column chunk share, of which no row has more; 0: none.

    Its first page says it, in thrift's compact protocol: kind of page, bytes when decompressed.
    Source: parquet-format, PageHeader.
    """
    begin = chunk.data_page_offset
    if chunk.has_dictionary_page:
        begin = min(begin, chunk.dictionary_page_offset)
    file.seek(begin)
    head = iter(file.read(24))
    numbers = []
    for _ in range(2):
        if next(head, 0) != _NEXT_INT32:
            return BYTES_PER_BATCH  # nobody knows: a row at a time
        value, shift, byte = 0, 0, 128
        while byte & 128:
            byte = next(head, 0)
            value, shift = value | (byte & 127) << shift, shift + 7
        numbers.append(value >> 1)
    return numbers[1] if numbers[0] == _DICTIONARY_PAGE else 0


def slices(batch: Any) -> Iterator[Any]:
    """A record batch in parts of up to 256 rows and BYTES_PER_BATCH: as objects they are larger."""
    ends = np.cumsum(row_bytes(batch))
    begin = 0
    while begin < batch.num_rows:
        most = BYTES_PER_BATCH + (ends[begin - 1] if begin else 0)
        count = int(np.searchsorted(ends, most, side="right")) - begin
        yield batch.slice(begin, count := max(1, min(count, ROWS_PER_BATCH)))
        begin += count


def row_bytes(batch: Any) -> np.ndarray:
    """(rows,) int64: bytes of each row of a record batch; what rows share counts in each of them.

    An array's nbytes counts a value once to which a dictionary, or views, lead any number of rows.
    """
    return sum((_sizes(column) for column in batch.columns), np.zeros(batch.num_rows, np.int64))


def _sizes(array: Any) -> np.ndarray:
    """(values,) int64: bytes of each value of an arrow array whose places are right."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, is_ = array.type, pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _sizes(array.storage)
    if is_.is_dictionary(kind):
        places = array.indices.cast(pa.int64()).fill_null(len(array.dictionary)).to_numpy()
        sizes = np.append(_sizes(array.dictionary), 0)[places]
    elif is_.is_run_end_encoded(kind):
        rows = np.arange(array.offset, array.offset + len(array))
        runs = np.searchsorted(array.run_ends.to_numpy(), rows, side="right")
        sizes = _sizes(array.values)[runs]
    elif is_.is_struct(kind):
        fields = (_sizes(array.field(number)) for number in range(kind.num_fields))
        sizes = sum(fields, np.zeros(len(array), np.int64))
    elif is_.is_union(kind):  # a bound: each as large as the largest
        most = [_sizes(array.field(i)).max(initial=0) for i in range(kind.num_fields)]
        sizes = np.full(len(array), max(most, default=0))
    elif is_.is_list(kind) or is_.is_large_list(kind) or is_.is_map(kind):
        ends = np.append(0, np.cumsum(_sizes(array.values)))
        sizes = np.diff(ends[array.offsets.to_numpy()])
    elif is_.is_list_view(kind) or is_.is_large_list_view(kind):
        ends = np.append(0, np.cumsum(_sizes(array.values)))
        begins = array.offsets.to_numpy().astype(np.int64)
        stops = begins + array.sizes.to_numpy()
        # A null's places may be anywhere.
        sizes = ends.take(stops, mode="clip") - ends.take(begins, mode="clip")
    elif is_.is_fixed_size_list(kind):
        begin, stop = (kind.list_size * n for n in (array.offset, array.offset + len(array)))
        sizes = _sizes(array.values)[begin:stop].reshape(len(array), kind.list_size).sum(1)
    elif is_.is_string_view(kind) or is_.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1] or b"", "<i4").reshape(-1, 4)  # length first
        sizes = views[array.offset : array.offset + len(array), 0].astype(np.int64)
    elif is_.is_null(kind) or is_.is_boolean(kind):
        sizes = np.ones(len(array), np.int64)
    elif is_.is_primitive(kind) or is_.is_decimal(kind) or is_.is_fixed_size_binary(kind):
        sizes = np.full(len(array), kind.bit_width // 8)
    else:
        sizes = pc.binary_length(array).fill_null(0).to_numpy().astype(np.int64)
    return np.clip(sizes, 0, MOST_SIZE)


def _open_arrow(file: BinaryIO) -> tuple[list[str], Any]:
    """Columns and batches of an arrow file or stream."""
    import pyarrow as pa

    is_file = file.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
    if not is_file:
        check_stream_end(file)
    file.seek(0)
    reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        parts = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        )
        for batch in parts:
            chosen = batch.select(list(columns))
            for column in chosen.columns:
                check_places(column)
            yield chosen
        if not is_file:
            check_nothing_follows(file)

    return reader.schema.names, batches


def _column(column: Any, inner: str) -> list[Any]:
    """Values of a column as bytes: one that is not UTF-8 does not take the others with it.

    Nested ones are empty, as they are no text: decoded, a list may be of any size.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in inner.split(".") if inner else []:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(name) < 0:
            return [...] * len(column)
        column = pc.struct_field(column, name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type):
        empty: Any = {} if pa.types.is_struct(column.type) else []
        return [empty if is_there else None for is_there in column.is_valid().to_pylist()]
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if any(is_kind(column.type) for is_kind in kinds):
        column = column.cast(pa.large_binary())
    return list(column.to_pylist())
