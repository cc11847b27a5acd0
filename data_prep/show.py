"""What is in this dataset?

    python -m data_prep.show DATASET                        totals by source, lengths of documents, histogram
    python -m data_prep.show DATASET document=41            one document, decoded
    python -m data_prep.show DATASET search='Turing test'   documents that hold a text

DATASET is a local folder with a manifest.json; OUT of data_prep/tokenize.py stands for OUT/train.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import MISSING

from pipeline import cli
from pipeline.data.shard_format import Manifest
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError

# no byte of UTF-8: a text that is searched for never matches across documents
BETWEEN_DOCUMENTS = b"\xff"


@dataclass
class ShowConfig:
    """Settings of data_prep.show."""

    dataset: str = MISSING
    """Folder of the dataset."""
    document: int | None = None
    """Print this document, counted from 0 in the order of the shards."""
    search: str | None = None
    """Print the documents that hold this text, letter for letter."""
    limit: int = 10
    """Stop a search after so many documents."""
    max_chars: int = 2000
    """Print so many characters of a document; 0: all."""
    histogram: str | None = "document_lengths.png"
    """Where the histogram of document lengths goes; null: nowhere."""


def main(cfg: ShowConfig) -> None:
    """Print what was asked for.

    Raises:
        DataError: no dataset there.
        ConfigError: no document of this number.
    """
    folder = Path(cfg.dataset)
    if not (folder / "manifest.json").exists() and (folder / "train").is_dir():
        folder = folder / "train"
    manifest = Manifest.load(folder)
    if cfg.document is not None:
        _print_document(manifest, cfg.document, max_chars=cfg.max_chars)
    elif cfg.search is not None:
        _print_matches(manifest, cfg)
    else:
        _print_totals(manifest, cfg)


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


def _tokenizer(manifest: Manifest) -> Tokenizer:
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
    tokenizer = _tokenizer(manifest)
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


def _print_totals(manifest: Manifest, cfg: ShowConfig) -> None:
    facts = manifest.tokenizer
    print(f"{manifest.folder}   identity {manifest.identity[:16]}")
    print(
        f"tokenizer {facts.sha256[:16]}, vocab_size {facts.vocab_size:,}, eod {facts.eod}, ids "
        f"{manifest.dtype.name}"
    )
    print(
        f"text {manifest.text_bytes / 1e6:,.1f} MB, "
        f"{manifest.text_bytes / max(manifest.tokens, 1):.2f} bytes a token"
    )
    print(
        f"\n{'source':<24}{'shards':>9}{'documents':>15}{'tokens':>19}{'share':>8}{'tokens/doc':>12}"
    )
    sources = np.array(manifest.sources)
    for name in [*dict.fromkeys(manifest.sources), None]:
        mine = sources == name if name is not None else np.ones(len(sources), bool)
        tokens, documents = (
            int(manifest.shard_tokens[mine].sum()),
            int(manifest.shard_documents[mine].sum()),
        )
        print(
            f"{'all' if name is None else name:<24}{int(mine.sum()):>9,}{documents:>15,}"
            f"{tokens:>19,}{tokens / max(manifest.tokens, 1):>8.1%}{tokens / max(documents, 1):>12,.0f}"
        )
    lengths = document_lengths(manifest)
    if len(lengths):
        points = np.percentile(lengths, [0, 5, 25, 50, 75, 95, 100], method="nearest").tolist()
        names = ("min", "5 %", "25 %", "median", "75 %", "95 %", "max")
        print(
            "\ntokens a document: " + ", ".join(f"{name} {p:,}" for name, p in zip(names, points))
        )
        if cfg.histogram:
            _plot(lengths, manifest, Path(cfg.histogram))
            print(f"histogram: {cfg.histogram}")


def _plot(lengths: np.ndarray, manifest: Manifest, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    edges = np.geomspace(1, lengths.max() + 1, 60).tolist()
    axes.hist(lengths, edges, color="tab:blue", label="documents")
    axes.set(xscale="log", xlabel="tokens a document", ylabel="documents", title=f"{Path(manifest.folder).name}: "
             f"{manifest.documents:,} documents, {manifest.tokens:,} tokens")  # fmt: skip
    by_tokens = axes.twinx()
    by_tokens.hist(lengths, edges, weights=lengths, histtype="step", color="tab:orange")
    by_tokens.set_ylabel("tokens", color="tab:orange")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _print_document(manifest: Manifest, number: int, *, max_chars: int) -> None:
    ids = read_document(manifest, number)
    text = _tokenizer(manifest).decode(ids[:-1])
    cut = len(text) > max_chars > 0
    print(
        f"--- document {number}: {len(ids):,} tokens, {len(text):,} characters"
        + (f", first {max_chars:,}" * cut)
    )
    print(text[:max_chars] if cut else text)


def _print_matches(manifest: Manifest, cfg: ShowConfig) -> None:
    if not cfg.search:
        raise ConfigError("search= is empty; give the text to look for.")
    count = 0
    for number in search(manifest, cfg.search):
        if count == cfg.limit:
            print(f"... stopped after limit={cfg.limit} documents.")
            return
        count += 1
        _print_document(manifest, number, max_chars=cfg.max_chars)
    print(f"{count} documents hold {cfg.search!r}.")


if __name__ == "__main__":
    cli.run(main, ShowConfig, config="show", positional=["dataset"])
