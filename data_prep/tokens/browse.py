"""Documents of a dataset, by number, by length and by what they hold.

    manifest -> blocks, mapped -> tokens, document starts -> one document, all lengths, matches

Only local datasets; nothing is read but the blocks that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.data.manifest import Manifest
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError

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


def read_document(manifest: Manifest, number: int) -> np.ndarray:
    """Ids of document `number` of the dataset, with its EOD.

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
    before = int(manifest.index["num_docs"][:row].sum(dtype=np.int64))
    parts: list[np.ndarray] = []
    for tokens, docs in _blocks(manifest, row):
        if not parts:
            place = number - before
            ends = docs[place + 1 : place + 2].tolist()
            tokens = tokens[int(docs[place]) :]
            ends = [end - int(docs[place]) for end in ends]
        else:
            ends = docs[:1].tolist()
        parts.append(tokens[: ends[0]] if ends else tokens)
        if ends:
            break
    return np.concatenate(parts)


def search(manifest: Manifest, text: str) -> Iterator[int]:
    """Numbers of the documents that hold the text."""
    wanted = text.encode()
    tokenizer = tokenizer_of(manifest)
    table = tokenizer.token_bytes[: manifest.tokenizer.vocab_size]
    table[manifest.tokenizer.eod] = BETWEEN_DOCUMENTS
    lengths = np.array([len(entry) for entry in table])
    offsets = np.cumsum(lengths) - lengths
    letters = np.frombuffer(b"".join(table), np.uint8)
    finished, carried, found = (
        0,
        b"",
        -1,
    )  # documents that ended before `carried`; what may begin a match
    for tokens, _ in _blocks(manifest, 0):
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


def _blocks(manifest: Manifest, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, document starts) of the blocks from a row of the index on."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
