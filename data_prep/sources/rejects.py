"""What a text must be to become a document, and the account of those that are not.

Nothing is dropped silently: what is not yielded is in the rejects, with the place and one of
REASONS; dialogues and pictures have reasons of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from data_prep.sources.inputs import InputConfig, OnError
from data_prep.sources.pieces import Damaged, printable
from data_prep.sources.text import is_encodable
from pipeline.errors import DataError, MachineError
from pipeline.redaction import redact

MOST_REJECTS = 1_000_000
"""Of one work unit: a GB of memory, and no sign of an input of this kind."""
# Where the errors of parsers are defined; zstandard below 0.24 calls its own module zstd.
PARSERS = {"zlib", "gzip", "igzip", "lzma", "zstandard", "zstd", "tarfile", "pyarrow"}
REASONS = {
    "broken_json": "the line is not JSON",
    "not_json_lines": "the .json file is one value, not an object on each line. Make lines of an "
    "array with `jq -c '.[]'`, or read each file as one text with format=text",
    "not_an_object": "the line is JSON, but not an object",
    "missing_field": "the text field, column or member is not there; text_field=NAME says which is "
    "read",
    "ambiguous": "the text field, column, member or sample is there twice",
    "not_a_string": "the text is null, a number, a list or an object",
    "invalid_utf8": "the text is not UTF-8",
    "lone_surrogate": "the text holds half of a surrogate pair (\\ud800 to \\udfff)",
    "nul": "the text holds U+0000: binary data",
    "too_large": "the document is larger than max_document_mb",
    "empty": "the text has no characters; never fails a job",
    "removed": "remove= names its text; never fails a job",
    "damaged_file": "the file ends too early, or is not what its suffix says; what came before the "
    "damage is kept",
}
WANTED = ("empty", "removed")
"""Reasons that are no fault of the input: they never fail a job, and no ceiling counts them."""
DIALOGUE_REASONS = {
    "not_a_dialogue": "it holds neither messages, each with a role and a text, nor a prompt and a "
    "completion",
    "no_assistant": "no message of the dialogue is the assistant's",
    "nothing_learned": "every answer says learn: false, or is empty",
    "special_token": "the dialogue's own words spell a special token, which would become one",
    "boundary_inside_token": "one token holds the end of the question and the begin of the answer",
    "template_error": "the chat template refuses the dialogue",
    "too_long": "the dialogue is longer than row_tokens; it is never cut",
}
PICTURE_REASONS = {
    "picture_missing": "there is no such file, or it is null or has no bytes",
    "picture_place": "its path leads out of its folder, or its address is not one of image_urls",
    "picture_too_large": "it is larger than max_image_mb or max_image_megapixels",
    "not_a_picture": "its content is no PNG, JPEG or WebP, whatever its name says",
    "damaged_picture": "it ends too early, or cannot be decoded",
    "animated_picture": "it has several frames",
    "pictures_mismatch": "the dialogue has places for another number of pictures",
}


def is_damage(error: Exception) -> bool:
    """Whether the file is to blame, not disk, network or we: parsers' errors, bare OSErrors."""
    package = type(error).__module__.lstrip("_").split(".")[0].split("_")[0]
    is_bare = type(error) is OSError and error.errno is None
    return isinstance(error, EOFError | Damaged) or is_bare or package in PARSERS


def out_of_memory(error: Exception, path: str) -> MachineError | None:
    """What to say if this machine lacks memory, whoever noticed; a good file must not be dropped.

    pyarrow has a MemoryError of its own; zstd's library says it in words.
    """
    if not isinstance(error, MemoryError) and "not enough memory" not in str(error):
        return None
    return MachineError(
        f"{path}: out of memory. Run fewer workers at a time (workers=...), lower max_document_mb, "
        "or give the job more memory; finished units are kept."
    )


@dataclass(frozen=True, slots=True)
class Document:
    """One text, as it goes through data_prep."""

    text: str
    id: str
    """File and place: `crawl/a.jsonl@1234` (byte), `a.parquet#17` (row), `a.tar/0001` (sample), or
    the file.
    """
    source: str
    url: str = ""


@dataclass
class Rejects:
    """What could not be read, under a policy."""

    on_error: OnError
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Lines of rejects.jsonl."""

    def add(self, reason: str, path: str, detail: str = "", **place: int | str | None) -> None:
        """Record one document, or one damaged file.

        Args:
            reason: one of REASONS, DIALOGUE_REASONS or PICTURE_REASONS.
            path: the file.
            detail: what the parser said.
            place: offset (byte, of the decompressed file), line (from 1), row (from 0) or member;
                None: not known.

        Raises:
            DataError: the policy is to fail, and the reason is a fault of the input.
        """
        where = {key: value for key, value in place.items() if value is not None}
        if self.on_error is OnError.fail and reason not in WANTED:
            meaning = (REASONS | DIALOGUE_REASONS | PICTURE_REASONS)[reason]
            spot = ", ".join(f"{key} {value}" for key, value in where.items())
            raise DataError(
                f"{path}{', ' if spot else ''}{spot}: {reason}: "
                f"{meaning}{f' ({detail})' if detail else ''}. Mend the "
                "file and run again, or go on with on_error=quarantine, which lists such "
                "documents."
            )
        if reason not in WANTED and len(self.rows) >= MOST_REJECTS:
            raise DataError(
                f"{path}: more than {MOST_REJECTS:,} documents of one work unit cannot be used, "
                f"the last one is {reason}. Is the input what its suffix says? A smaller "
                "unit_mb=... makes units with fewer."
            )
        short = {key: v[:200] if isinstance(v, str) else v for key, v in where.items()}
        self.rows.append(
            {"file": printable(path), **short, "reason": reason, "detail": redact(detail, {})[:200]}
        )


def field_of(record: Any, name: str) -> Any:
    """Value of a field, dots going into nested objects; `...` where it is missing."""
    if isinstance(record, dict) and name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, dict) or part not in record:
            return ...
        record = record[part]
    return record


def accept(
    value: Any,
    path: str,
    cfg: InputConfig,
    rejects: Rejects,
    *,
    fields: Iterable[str] = (),
    **place: int | str | None,
) -> str | None:
    """The text if it may become a document; else None, and the reason is recorded.

    `fields` are the record's names, said where the text's own is missing.
    """
    if value is ...:
        # Half a surrogate pair, which JSON can spell, is no text that could be written.
        known = ", ".join(islice(fields, 20)).encode(errors="backslashreplace").decode()
        detail = f"no {cfg.text_field}{f'; there are: {known}' if known else ''}"
        rejects.add("missing_field", path, detail, **place)
        return None
    if isinstance(value, bytes):
        if len(value) > cfg.max_document_mb * 4e6:  # no character has more than 4
            rejects.add("too_large", path, f"{len(value)} bytes", **place)
            return None
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            rejects.add("invalid_utf8", path, str(error), **place)
            return None
    if not isinstance(value, str):
        rejects.add("not_a_string", path, type(value).__name__, **place)
        return None
    if not value:
        reason, detail = "empty", ""
    elif len(value) > cfg.max_document_mb * 1e6:
        reason, detail = "too_large", f"{len(value)} characters"
    else:
        reason, detail = text_problem(value)
    if reason:
        rejects.add(reason, path, detail, **place)
        return None
    return str(value)


def text_problem(text: str) -> tuple[str, str]:
    """(reason, detail) why a string is no text; the reason is empty if it is one."""
    if "\0" in text:
        return "nul", f"at character {text.index(chr(0))}"
    if not is_encodable(text):
        return "lone_surrogate", ""
    return "", ""
