"""Dialogues of JSON lines, tables and tars of pictures: messages, or a prompt and its completion.

    Unit -> pieces -> lines or rows -> Talk(messages, tools, where it is from) or a reject

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}      becomes a dialogue of two

A message may carry "learn": false, and whatever else its template reads. With image_size a record
may show pictures (picture_records.py), and tars are read: their samples are pictures with a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from data_prep.sources import picture_records
from data_prep.sources.documents import read_pieces
from data_prep.sources.inputs import InputConfig, Unit
from data_prep.sources.kinds import Format, format_of
from data_prep.sources.lines import parse_json, read_objects
from data_prep.sources.pictures import PictureConfig
from data_prep.sources.pieces import Piece
from data_prep.sources.rejects import Rejects, text_problem
from data_prep.sources.tables import open_table, row_bytes
from data_prep.sources.tars import TEXT_MEMBERS, Sample, read_samples
from pipeline.errors import ConfigError

FIELDS = ("messages", "prompt", "completion", "tools")
KINDS = (Format.jsonl, Format.parquet, Format.arrow)
PICTURE_KINDS = (*KINDS, Format.tar)


@dataclass
class TalkConfig(InputConfig, PictureConfig):
    """How dialogues are read."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Of a record, those that are read."""
        return FIELDS if self.image_size is None else picture_records.FIELDS


Place = dict[str, int | str | None]


class Talk(NamedTuple):
    """One dialogue, as it was written."""

    messages: list[dict[str, Any]]
    tools: Any
    id: str
    """File and place, as of a Document."""
    path: str
    place: Place
    """As Rejects.add takes it."""
    images: list[Any]
    """Bytes, paths or addresses of its pictures, in the order in which it shows them."""


def check_kinds(units: list[Unit], cfg: TalkConfig) -> None:
    """Raise ConfigError unless every file can hold dialogues, and the settings have an effect."""
    if cfg.text_field != InputConfig.text_field or cfg.url_field != InputConfig.url_field:
        raise ConfigError(
            f"text_field ({cfg.text_field}) and url_field ({cfg.url_field}) have no effect here: "
            f"dialogues are read from the fields {', '.join(cfg.fields)}."
        )
    kinds = KINDS if cfg.image_size is None else PICTURE_KINDS
    for piece in (piece for unit in units for piece in unit.pieces):
        kind = format_of(piece.path, cfg.format)
        if kind not in kinds:
            raise ConfigError(
                f"{piece.path}: dialogues are read from jsonl, parquet and arrow files, and with "
                "image_size=... from WebDataset tars of pictures. Leave it out with exclude=, or "
                "convert it."
            )


def read_talks(unit: Unit, cfg: TalkConfig, rejects: Rejects) -> Iterator[Talk]:
    """The dialogues of a unit in order; what is none goes to `rejects`."""
    return read_pieces(unit, cfg, rejects, _READERS)


def _read_lines(
    file: BinaryIO, piece: Piece, _: str, cfg: TalkConfig, rejects: Rejects
) -> Iterator[Talk]:
    """The dialogues of the lines that begin in the piece."""
    for record, place in read_objects(file, piece, cfg, rejects, cfg.fields):
        name = f"{piece.name}@{place['offset']}"
        yield from _accepted(record, name, piece.path, dict(place), cfg, rejects)


def _read_parquet(
    file: BinaryIO, piece: Piece, _: str, cfg: TalkConfig, rejects: Rejects
) -> Iterator[Talk]:
    yield from _read_table(Format.parquet, file, piece, cfg, rejects)


def _read_arrow(
    file: BinaryIO, piece: Piece, _: str, cfg: TalkConfig, rejects: Rejects
) -> Iterator[Talk]:
    yield from _read_table(Format.arrow, file, piece, cfg, rejects)


def _read_tar(
    file: BinaryIO, piece: Piece, _: str, cfg: TalkConfig, rejects: Rejects
) -> Iterator[Talk]:
    """The samples of a tar, each a text and the pictures beside it."""
    most = int(cfg.max_image_mb * 1e6)
    for sample in read_samples(file, piece, cfg, rejects, picture_bytes=most):
        place: Place = {"member": sample.key}
        record: dict[str, Any] = {}
        reason, detail = sample.reason, sample.detail
        if not reason:
            reason, detail, record = _record_of(sample)
        if reason:
            rejects.add(reason, piece.path, detail, **place)
            continue
        name = f"{piece.name}/{sample.key}"
        yield from _accepted(record, name, piece.path, place, cfg, rejects)


def _record_of(sample: Sample) -> tuple[str, str, dict[str, Any]]:
    """(reason, detail, record) of a sample: a caption, or what its json says of its pictures."""
    text = next((sample.members[n] for n in TEXT_MEMBERS if n in sample.members), None)
    if text is not None:
        try:
            return "", "", {"images": sample.pictures, "text": text.decode()}
        except UnicodeDecodeError as error:
            return "invalid_utf8", str(error), {}
    if "json" not in sample.members:
        return "missing_field", f"no .{' nor .'.join(TEXT_MEMBERS)} nor .json", {}
    try:
        record = parse_json(sample.members["json"])
    except ValueError as error:
        return "broken_json", str(error), {}
    if not isinstance(record, dict):
        return "not_an_object", type(record).__name__, {}
    record.pop("image", None)  # the pictures are those of the sample
    return "", "", record | {"images": sample.pictures}


_READERS = {
    Format.jsonl: _read_lines,
    Format.parquet: _read_parquet,
    Format.arrow: _read_arrow,
    Format.tar: _read_tar,
}


def _read_table(
    kind: Format, file: BinaryIO, piece: Piece, cfg: TalkConfig, rejects: Rejects
) -> Iterator[Talk]:
    """The dialogues of a table's rows; a null field of a struct is a field that is not there."""
    names, batches = open_table(kind, file)
    columns = [name for name in cfg.fields if name in names]
    for name in columns:
        if names.count(name) > 1:
            rejects.add("ambiguous", piece.path, f"{names.count(name)} columns are called {name}")
            return
    row = 0
    for batch in batches(columns):
        for number, size in enumerate(row_bytes(batch).tolist()):
            place: Place = {"row": row}
            row += 1
            one = batch.slice(number, 1)
            if size > cfg.max_document_mb * 4e6:  # a character has 4 at most
                rejects.add("too_large", piece.path, f"{size} bytes", **place)
                continue
            try:
                (record,) = one.to_pylist()
            except UnicodeDecodeError as error:
                rejects.add("invalid_utf8", piece.path, str(error), **place)
                continue
            name = f"{piece.name}#{place['row']}"
            yield from _accepted(_without_nulls(record), name, piece.path, place, cfg, rejects)


def _without_nulls(value: Any) -> Any:
    """Nested values without the fields that a table has to have for every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _accepted(
    record: dict[str, Any], name: str, path: str, place: Place, cfg: TalkConfig, rejects: Rejects
) -> Iterator[Talk]:
    """The dialogue of a record, or nothing and a reject."""
    images: list[Any] = []
    if cfg.image_size is not None:
        record, images, reason, detail = picture_records.illustrated(record)
        if reason:
            rejects.add(reason, path, detail, **place)
            return
    messages, problem = _messages_of(record, may_show=cfg.image_size is not None)
    if problem:
        rejects.add("not_a_dialogue", path, problem, **place)
        return
    try:
        texts = list(_texts([messages, record.get("tools")]))
    except RecursionError:
        rejects.add("not_a_dialogue", path, "it is nested too deeply", **place)
        return
    for text in texts:
        reason, detail = text_problem(text)
        if reason:
            rejects.add(reason, path, detail, **place)
            return
    yield Talk(messages, record.get("tools"), name, path, place, images)


def _messages_of(record: dict[str, Any], *, may_show: bool) -> tuple[list[dict[str, Any]], str]:
    """(messages, what is wrong with them) of a record; may_show: a content may be a list."""
    if "messages" not in record:
        missing = [key for key in ("prompt", "completion") if key not in record]
        if missing:
            return [], f"it has no messages, and no {' and no '.join(missing)}"
        roles = {"prompt": "user", "completion": "assistant"}
        record = {"messages": [{"role": role, "content": record[k]} for k, role in roles.items()]}
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        return [], "messages is not a list with something in it"
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            return [], f"message {number} is not an object"
        if not isinstance(message.get("role"), str):
            return [], f"role of message {number} is not a text"
        content = message.get("content")
        if not isinstance(content, str | list if may_show else str):
            hint = "; image_size=... takes lists of texts and pictures"
            return (
                [],
                f"content of message {number} is not a text{hint * (content.__class__ is list)}",
            )
        learn = message.get("learn")
        if learn is not None and (
            not isinstance(learn, bool) or learn and message["role"] != "assistant"
        ):
            return [], f"learn of message {number} must be true or false, and of an assistant's"
    return messages, ""


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and objects, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts(inner)
