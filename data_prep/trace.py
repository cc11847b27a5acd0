"""Where do these documents lie in a dataset? The first step of taking them out of a model.

    python -m data_prep.trace DATASET input=remove.jsonl places=places.json
    python -m pipeline.trace runs/NAME places=places.json       which steps have used them

`input=` is read as data_prep/tokenize.py reads it, and a document is found where the dataset has
the same ids: give the text that was tokenized, after cleaning. DATASET is a local folder with a
manifest.json; OUT of data_prep/tokenize.py stands for OUT/train. docs/privacy.md has the whole way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import MISSING

from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, find_units
from data_prep.sources.rejects import WANTED, Document, Rejects
from data_prep.tokens.browse import tokenizer_of
from data_prep.tokens.encode import Encoder
from data_prep.tokens.find import Place, Wanted, find
from pipeline import cli
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError, DataError
from pipeline.files import check_writable, write_durably
from pipeline.redaction import redact

SHOWN = 20  # places on the terminal; all of them are in the file


@dataclass
class TraceConfig(InputConfig):
    """Settings of data_prep.trace."""

    dataset: str = MISSING
    """Folder of the dataset."""
    places: str | None = None
    """File for what is found, as JSON for pipeline.trace; null: none."""


def main(cfg: TraceConfig) -> int:
    """Print shard and tokens of each document that is found; 1 if one is not there, or not read.

    Raises:
        DataError: no dataset there, or an input that cannot be read.
        ConfigError: the dataset is packed rows.
    """
    folder = Path(cfg.dataset)
    if cfg.places:  # a pass over the dataset comes before it is written
        check_writable(Path(cfg.places), "places=")
    if not (folder / "manifest.json").exists() and (folder / "train").is_dir():
        folder = folder / "train"
    manifest = Manifest.load(folder)
    if manifest.row_tokens is not None:
        raise ConfigError(
            f"{folder} is packed rows of dialogues, and documents of text are traced. Find a "
            f"dialogue with `python -m data_prep.show {folder} search=TEXT`."
        )
    asked: list[str] = []
    rejects = Rejects(cfg.on_error)
    wanted = Wanted(_asked_for(cfg, asked, rejects), Encoder(tokenizer_of(manifest)), manifest)
    unread = [row for row in rejects.rows if row["reason"] not in WANTED]
    if not asked:
        raise DataError(f"input={cfg.input}: there is no document in it, so none is looked for.")
    found = list(find(manifest, wanted))
    there = {place.given for place in found}
    absent = sorted(set(wanted.given.values()) - there)
    for place in found[:SHOWN]:
        print(redact(_line(manifest, place)))
    if len(found) > SHOWN:
        print(f"... and {len(found) - SHOWN:,} more")
    print(
        f"{len(there):,} of {len(wanted.given):,} documents are in {redact(str(folder))}, in "
        f"{len(found):,} places"
    )
    for given in absent[:SHOWN]:
        print(redact(f"not found: {given}"))
    for row in unread[:SHOWN]:
        print(redact(f"not looked for, as it cannot be read: {json.dumps(row)}"))
    if len(unread) > SHOWN:
        print(f"... and {len(unread) - SHOWN:,} more")
    if cfg.places:
        _write(Path(cfg.places), manifest, found, absent)
    return 1 if absent or unread else 0


def _asked_for(cfg: TraceConfig, asked: list[str], rejects: Rejects) -> Iterator[Document]:
    """The documents to look for; their names go to `asked`."""
    for unit in find_units(cfg):
        for document in read_documents(unit, cfg, rejects):
            asked.append(document.id)
            yield document


def _line(manifest: Manifest, place: Place) -> str:
    where = ", ".join(
        f"{manifest.paths[s.shard]} tokens {s.begin:,} to {s.end - 1:,}" for s in place.spans
    )
    return f"{place.given}: document {place.document:,}, {where}"


def _write(path: Path, manifest: Manifest, found: list[Place], absent: list[str]) -> None:
    """The places as JSON: names of files only, none of their text."""
    content = {
        "format": "document places",
        "dataset": manifest.identity,
        "places": [asdict(place) for place in found],
        "not_found": absent,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    print(redact(f"written: {path}"))


if __name__ == "__main__":
    cli.run(main, TraceConfig, config="trace", positional=["dataset"])
