"""What is in this dataset?

    python -m data_prep.show DATASET                        totals by source, lengths
    python -m data_prep.show DATASET histogram=lengths.png  and the lengths as a picture
    python -m data_prep.show DATASET document=41            one document, decoded
    python -m data_prep.show DATASET search='Turing test'   documents that hold a text
    python -m data_prep.show DATASET row=7                  a packed row; what is learned in colour
    python -m data_prep.show DATASET row=7 pictures=seen    and its pictures: seen/row-7-0.png

DATASET is a local folder with a manifest.json; OUT of data_prep/tokenize.py stands for OUT/train.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import MISSING

from data_prep.tokens.browse import (
    document_lengths,
    plot_lengths,
    read_document,
    read_pictures,
    read_row,
    search,
    tokenizer_of,
)
from pipeline import cli
from pipeline.data.manifest import Manifest
from pipeline.data.pictures import gathered
from pipeline.errors import ConfigError
from pipeline.files import whole_file
from pipeline.redaction import redact


@dataclass
class ShowConfig:
    """Settings of data_prep.show."""

    dataset: str = MISSING
    """Folder of the dataset."""
    document: int | None = None
    """Print this document, counted from 0 in the order of the shards."""
    row: int | None = None
    """Print this packed row, counted from 0; what is learned is green, or between ⟦ and ⟧ where the
    output is no terminal.
    """
    pictures: str | None = None
    """Folder that the pictures of the document or row are written into, as png files; null: none
    are.
    """
    search: str | None = None
    """Print the documents that hold this text, letter for letter."""
    limit: int = 10
    """Stop a search after so many documents."""
    max_chars: int = 2000
    """Print so many characters of a document; 0: all."""
    histogram: str | None = None
    """File that the histogram of document lengths is drawn into, such as lengths.png; null: none is
    drawn.
    """


def main(cfg: ShowConfig) -> None:
    """Print what was asked for.

    Raises:
        DataError: no dataset there.
        ConfigError: no document or row of this number.
    """
    folder = Path(cfg.dataset)
    if not (folder / "manifest.json").exists() and (folder / "train").is_dir():
        folder = folder / "train"
    manifest = Manifest.load(folder)
    if cfg.pictures is not None and (cfg.row is None) == (cfg.document is None):
        raise ConfigError("pictures= is of one document= or one row=.")
    if cfg.row is not None:
        _print_row(manifest, cfg.row, cfg.pictures)
    elif cfg.document is not None:
        _print_document(manifest, cfg.document, max_chars=cfg.max_chars)
        if cfg.pictures is not None:
            images = read_pictures(manifest, cfg.document)
            _write_pictures(images, Path(cfg.pictures), f"document-{cfg.document}")
    elif cfg.search is not None:
        _print_matches(manifest, cfg)
    else:
        _print_totals(manifest, cfg)


def _print_totals(manifest: Manifest, cfg: ShowConfig) -> None:
    """Identity, tokenizer, a line a source, and the lengths of documents."""
    facts = manifest.tokenizer
    print(redact(f"{manifest.folder}   identity {manifest.identity[:16]}"))
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
            f"{tokens:>19,}{tokens / max(manifest.tokens, 1):>8.1%}"
            f"{tokens / max(documents, 1):>12,.0f}"
        )
    if manifest.row_tokens is not None:
        print(
            f"packed in {manifest.tokens // manifest.row_tokens:,} rows of {manifest.row_tokens:,} "
            "tokens; what is left of a row counts as one more document"
        )
    lengths = document_lengths(manifest)
    if len(lengths):
        points = np.percentile(lengths, [0, 5, 25, 50, 75, 95, 100], method="nearest").tolist()
        names = ("min", "5 %", "25 %", "median", "75 %", "95 %", "max")
        print(
            "\ntokens a document: " + ", ".join(f"{name} {p:,}" for name, p in zip(names, points))
        )
        if cfg.histogram:
            plot_lengths(lengths, manifest, Path(cfg.histogram))
            print(f"histogram: {cfg.histogram}")


def _print_row(manifest: Manifest, number: int, folder: str | None) -> None:
    """Each dialogue of a packed row, with what is learned marked; its padding as a number."""
    tokenizer = tokenizer_of(manifest)
    begin, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    documents = read_row(manifest, number)
    print(f"--- row {number}: {len(documents)} documents")
    if folder is not None:
        images = [d.images for d in documents if d.images is not None]
        _write_pictures(np.concatenate(images) if images else None, Path(folder), f"row-{number}")
    for place, (tokens, loss, *_) in enumerate(documents):
        if not loss.any():
            print(f"--- {place}: {len(tokens)} tokens of padding")
            continue
        print(f"--- {place}: {len(tokens)} tokens, {int(loss.sum())} of them learned")
        if manifest.pictures is not None:
            keep = gathered(tokens, manifest.pictures)
            tokens, loss = tokens[keep], loss[keep]
        edges = [0, *(np.flatnonzero(np.diff(loss)) + 1).tolist(), len(tokens)]
        for a, b in zip(edges, edges[1:]):
            text = tokenizer.decode(tokens[a:b])
            print(f"{begin}{text}{end}" if loss[a] else text, end="")
        print()


def _print_document(manifest: Manifest, number: int, *, max_chars: int) -> None:
    """One document, a picture as one placeholder."""
    ids = shown = read_document(manifest, number)
    if manifest.pictures is not None:
        shown = ids[gathered(ids, manifest.pictures)]
    # Text ends with EOD, which is none; a dialogue is shown with all of its marks.
    text = tokenizer_of(manifest).decode(shown if manifest.row_tokens else ids[:-1])
    cut = len(text) > max_chars > 0
    print(
        f"--- document {number}: {len(ids):,} tokens, {len(text):,} characters"
        + (f", first {max_chars:,}" * cut)
    )
    print(text[:max_chars] if cut else text)


def _write_pictures(images: np.ndarray | None, folder: Path, stem: str) -> None:
    """(n, 3, size, size) uint8 as folder/stem-0.png and so on."""
    import PIL.Image

    if images is None:
        raise ConfigError("pictures=: this dataset has none; it was prepared without image_size.")
    for number, image in enumerate(images):
        path = folder / f"{stem}-{number}.png"
        with whole_file(path, durable=False) as file:
            PIL.Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
        print(f"picture: {path}")


def _print_matches(manifest: Manifest, cfg: ShowConfig) -> None:
    """The documents that hold the text, up to the limit."""
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
