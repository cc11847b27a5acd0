"""How a file is read, by its suffix; what has no known suffix is not read at all.

A table, a picture or an archive that is read as text would end up in the model, thousands of
documents long, and nobody would be told.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from enum import Enum

from pipeline.errors import ConfigError

Format = Enum("Format", ["auto", "jsonl", "text", "parquet", "arrow", "tar"])
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FORMATS = {
    ".jsonl": Format.jsonl,
    ".ndjson": Format.jsonl,
    ".json": Format.jsonl,  # C4's and Dolma's *.json.gz; sources/lines.py refuses one big value
    ".parquet": Format.parquet,
    ".arrow": Format.arrow,
    ".tar": Format.tar,
    ".tgz": Format.tar,
}
TEXT_SUFFIXES = tuple(
    ".txt .text .md .rst .tex .html .htm .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .cuh .rs .go .java"
    " .kt .scala .js .jsx .ts .tsx .rb .php .pl .lua .r .jl .hs .ml .ex .erl .swift .m .cs .fs .sh"
    " .sql .css .yaml .yml .toml .cfg .ini".split()
)
SEEKING = (Format.parquet, Format.arrow)  # read from their end: compressed inside, never outside


def format_of(path: str, chosen: Format) -> Format | None:
    """How a file is read; None: it is of no kind that is known.

    Args:
        path: local, or an address.
        chosen: the setting `format`; auto goes by the suffix.
    """
    if chosen is not Format.auto:
        return chosen
    suffix = suffix_of(path)
    kind = FORMATS.get(suffix, Format.text if suffix in TEXT_SUFFIXES else None)
    return None if kind in SEEKING and is_compressed(path) else kind


def name_of(path: str) -> str:
    """The path in lower case; of a web address without its query. Local names may hold a `?`."""
    return (path.split("?")[0] if path.startswith("http") and "://" in path else path).lower()


def is_compressed(path: str) -> bool:
    """The file is decompressed as a whole when it is read."""
    return name_of(path).endswith(COMPRESSIONS)


def suffix_of(path: str) -> str:
    """Last suffix in lower case, without that of a compression; empty: none."""
    stem, suffix = os.path.splitext(name_of(path))
    return os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def is_taken(path: str, include: Sequence[str]) -> bool:
    """Whether a file is taken from a folder.

    Args:
        path: of the file.
        include: suffixes; none: every kind that is known.
    """
    if not include:
        return format_of(path, Format.auto) is not None
    name = name_of(path)
    bare = os.path.splitext(name)[0] if is_compressed(path) else name
    return name.endswith(tuple(include)) or bare.endswith(tuple(include))


def check_known(paths: Sequence[str], chosen: Format) -> None:
    """Refuse an input that holds files of unknown kinds.

    Raises:
        ConfigError: names them, and the ways out.
    """
    unknown = [path for path in paths if format_of(path, chosen) is None]
    if not unknown:
        return
    counts = describe_suffixes(unknown)
    outside = any(FORMATS.get(suffix_of(path)) in SEEKING for path in unknown)
    raise ConfigError(
        f"{unknown[0]} is of no kind that is read as documents; of such files there are {counts}. "
        + ("Parquet and arrow files are compressed inside: decompress them. " if outside else "")
        + "Read are .jsonl, .ndjson and .json lines, .parquet, .arrow, .tar and known kinds of "
        "text. Convert the files to one of them; or leave them out with exclude='*"
        f"{os.path.splitext(unknown[0])[1] or '/' + os.path.basename(unknown[0])}'; or say how "
        "all files of this input are read: format=text (one plain text each), jsonl, parquet, "
        "arrow or tar."
    )


def describe_suffixes(paths: Sequence[str]) -> str:
    """`.csv (3), .png (1)`, the most frequent first."""
    counts = Counter(os.path.splitext(name_of(path))[1] or "no suffix" for path in paths)
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{suffix} ({count})" for suffix, count in most[:8])


def is_pattern(path: str) -> bool:
    """Whether a name has characters of a glob."""
    return re.search(r"[*?\[]", path) is not None
