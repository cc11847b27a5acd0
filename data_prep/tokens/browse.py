"""Documents of a dataset, by number, by length and by what they hold.

    manifest -> blocks, mapped -> tokens, document starts -> one document, all lengths, matches

Only local datasets; nothing is read but the blocks that are asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.tokens.rows import Dialogue, documents_of
from pipeline.data.dataset_files import check_ids
from pipeline.data.manifest import Manifest
from pipeline.data.shard_format import Block
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError, ShardError
from pipeline.files import whole_file

# no byte of UTF-8: a text that is searched for never matches across documents
BETWEEN_DOCUMENTS = b"\xff"


def document_lengths(manifest: Manifest) -> np.ndarray:
    """(documents,) int64: tokens of each document, EOD included, in the order of the shards."""
    ends = np.cumsum(manifest.shard_tokens)
    starts = [
        begin
        + block * manifest.block_tokens
        + np.asarray(manifest.map_block(shard, block)[1], np.int64)
        for shard, begin in enumerate((ends - manifest.shard_tokens).tolist())
        for block in range(int(manifest.block_starts[shard + 1] - manifest.block_starts[shard]))
    ]
    return np.diff(np.concatenate([*starts, ends[-1:]])) if starts else np.zeros(0, np.int64)


def tokenizer_of(manifest: Manifest) -> Tokenizer:
    """The dataset's own, with the token that ends its documents."""
    return Tokenizer.from_file(Path(manifest.folder, "tokenizer.json"), eod=manifest.tokenizer.eod)


def read_row(manifest: Manifest, number: int) -> list[Dialogue]:
    """The documents of a packed row, each with the mask of what is learned.

    Raises:
        ConfigError: the dataset is not packed, or has no row of this number.
    """
    size = manifest.row_tokens
    if size is None:
        raise ConfigError(f"row={number}: {manifest.folder} is text, not packed rows.")
    if not 0 <= number < manifest.tokens // size:
        raise ConfigError(
            f"row={number}: this dataset has the rows 0 to {manifest.tokens // size - 1}."
        )
    rows = np.concatenate([[0], np.cumsum(manifest.shard_tokens // size)])
    shard = int(np.searchsorted(rows, number, "right")) - 1
    block, begin = divmod((number - int(rows[shard])) * size, manifest.block_tokens)
    found = manifest.map_block(shard, block)
    documents = zip(found.starts.tolist(), documents_of(found, manifest.layout))
    return [document for start, document in documents if begin <= start < begin + size]


def read_pictures(manifest: Manifest, number: int) -> np.ndarray | None:
    """(n, 3, size, size) uint8, the pictures of a document; None: the dataset has none.

    Raises:
        ConfigError: there is no document of this number.
    """
    if manifest.pictures is None:
        return None
    block, place = _find(manifest, number)
    documents = documents_of(next(blocks(manifest, block)), manifest.layout)
    return next(itertools.islice(documents, place, None)).images


def read_document(manifest: Manifest, number: int) -> np.ndarray:
    """Ids of document `number` of the dataset, with its EOD.

    Raises:
        ConfigError: there is no document of this number.
    """
    row, place = _find(manifest, number)
    parts: list[np.ndarray] = []
    for tokens, docs, *_ in blocks(manifest, row):
        if not parts:
            ends = docs[place + 1 : place + 2].tolist()
            tokens = tokens[int(docs[place]) :]
            ends = [end - int(docs[place]) for end in ends]
        else:
            ends = docs[:1].tolist()
        parts.append(tokens[: ends[0]] if ends else tokens)
        if ends:
            break
    if not parts:
        raise ShardError(
            f"{manifest.folder}/index.npy lists {number - place} documents, the manifest "
            f"{manifest.documents}. Check it with `python -m data_prep.verify {manifest.folder}`."
        )
    return np.concatenate(parts)


def _find(manifest: Manifest, number: int) -> tuple[int, int]:
    """(row of the index, place among its block's documents) of a document.

    Raises:
        ConfigError: there is no document of this number.
    """
    if not 0 <= number < manifest.documents:
        raise ConfigError(
            f"document={number}: this dataset has the documents 0 to {manifest.documents - 1}."
        )
    row = int(
        np.searchsorted(np.cumsum(manifest.index["num_docs"], dtype=np.int64), number, side="right")
    )
    return row, number - int(manifest.index["num_docs"][:row].sum(dtype=np.int64))


def search(manifest: Manifest, text: str) -> Iterator[int]:
    """Numbers of the documents that hold the text."""
    wanted = text.encode()
    tokenizer = tokenizer_of(manifest)
    table = tokenizer.token_bytes[: manifest.tokenizer.vocab_size]
    if manifest.row_tokens is not None:
        yield from _search_rows(manifest, wanted, table)
        return
    table[manifest.tokenizer.eod] = BETWEEN_DOCUMENTS
    lengths = np.array([len(entry) for entry in table])
    offsets = np.cumsum(lengths) - lengths
    letters = np.frombuffer(b"".join(table), np.uint8)
    finished, carried, found = (
        0,
        b"",
        -1,
    )  # documents that ended before `carried`; what may begin a match
    for tokens, *_ in blocks(manifest, 0):
        _check_ids(manifest, tokens, table)
        sizes = lengths[tokens]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        data = carried + letters[np.repeat(offsets[tokens], sizes) + within].tobytes()
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == BETWEEN_DOCUMENTS[0])
        place = data.find(wanted)
        while place >= 0:
            number = finished + int(np.searchsorted(ends, place))
            if number != found:
                yield number
            found = number
            place = data.find(wanted, place + 1)
        carried = data[max(len(data) - len(wanted) + 1, 0) :]
        finished += len(ends) - carried.count(BETWEEN_DOCUMENTS)


def _search_rows(manifest: Manifest, wanted: bytes, table: list[bytes]) -> Iterator[int]:
    """Numbers of the documents of packed rows that hold these bytes; none runs over a block."""
    first = 0
    for tokens, starts, *_ in blocks(manifest, 0):
        _check_ids(manifest, tokens, table)
        bounds = [*starts.tolist(), len(tokens)]
        for number, (begin, end) in enumerate(zip(bounds, bounds[1:]), first):
            if wanted in b"".join([table[i] for i in tokens[begin:end].tolist()]):
                yield number
        first += len(starts)


def _check_ids(manifest: Manifest, tokens: np.ndarray, table: list[bytes]) -> None:
    way_out = f"Check it with `python -m data_prep.verify {manifest.folder}`."
    check_ids(tokens, len(table), f"a block of {manifest.folder}", way_out)


def blocks(manifest: Manifest, first: int) -> Iterator[Block]:
    """The blocks from a row of the index on."""
    for row in range(first, int(manifest.block_starts[-1])):
        shard = int(np.searchsorted(manifest.block_starts, row, side="right")) - 1
        yield manifest.map_block(shard, row - int(manifest.block_starts[shard]))


def plot_lengths(lengths: np.ndarray, manifest: Manifest, path: Path) -> None:
    """Histogram of (documents,) token counts: documents, and the tokens they hold, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    edges = np.geomspace(1, lengths.max() + 1, 60).tolist()
    axes.hist(lengths, edges, color="tab:blue", label="documents")
    name = Path(manifest.folder).name
    title = f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens"
    axes.set(xscale="log", xlabel="tokens a document", ylabel="documents", title=title)
    by_tokens = axes.twinx()
    by_tokens.hist(lengths, edges, weights=lengths, histtype="step", color="tab:orange")
    by_tokens.set_ylabel("tokens", color="tab:orange")
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix.removeprefix(".") or None)
