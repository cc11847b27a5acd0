"""The files that a path, a folder, a glob or an address stands for; what exists is never a pattern.

    path -> exists? itself, or the files below it -> else a glob, whose leading folders are literal

A folder that Hugging Face datasets saved is its .arrow files, in the order of its state.json.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from data_prep.sources.kinds import (
    Format,
    describe_suffixes,
    format_of,
    is_pattern,
    is_taken,
)
from pipeline.errors import ConfigError, DataError
from pipeline.files import parse_json, read_file
from pipeline.log import logger
from pipeline.remote import connect, read_small, reason_of

SAVED_DATASET = {"state.json", "dataset_info.json"}  # what datasets.save_to_disk leaves


def list_path(path: str, include: Sequence[str]) -> list[tuple[str, int]]:
    """(path, bytes) of every file that a path stands for, by name.

    Args:
        path: a file, folder, glob, or address that fsspec understands.
        include: suffixes taken from folders; none: every known kind.

    Raises:
        ConfigError: a folder must be named more closely.
        DataError: nothing is there, or it cannot be listed.
    """
    if "://" in path:
        return sorted(_list_remote(path, include))
    if os.path.isdir(path):
        return _walk(path, include)
    if not os.path.exists(path) and is_pattern(path):
        return sorted((p, os.path.getsize(p)) for p in match_files(path))
    try:
        return [(path, os.path.getsize(path))]
    except OSError as error:
        raise DataError(
            f"input {path} is not there: {error.strerror}. Give files, folders or globs."
        ) from error


def match_files(pattern: str) -> list[str]:
    """Local files that match a glob; `a[1]/*.txt` looks into the folder `a[1]` if there is one."""
    folder, rest = split_pattern(pattern)
    escaped = os.path.join(glob.escape(folder), rest) if folder else rest
    return [p for p in glob.glob(escaped, recursive=True) if os.path.isfile(p)]


def split_pattern(pattern: str) -> tuple[str, str]:
    """(leading folders that exist as they are written, the rest); the rest of a path is empty."""
    parts = pattern.split("/")
    for count in range(len(parts), 0, -1):
        folder = "/".join(parts[:count]) or "/"
        if os.path.exists(folder):
            return folder, "/".join(parts[count:])
    return "", pattern


def _walk(folder: str, include: Sequence[str]) -> list[tuple[str, int]]:
    """Files of known kinds below a folder; says how many others were passed over.

    Hidden ones and __pycache__ are left out; so are links to folders, which are counted.
    """
    found: list[tuple[str, int]] = []
    others: list[str] = []
    num_links = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        num_links += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        saved = _saved_files(parent, names, read_file)
        names = [name for name in names if not name.startswith(".")] if saved is None else saved
        for path in (os.path.join(parent, name) for name in names):
            if saved is not None and not os.path.isfile(path):
                raise DataError(f"{path} is missing; {parent}/state.json lists it.")
            if not is_taken(path, include):
                others.append(path)
            elif os.path.isfile(path):
                found.append((path, os.path.getsize(path)))
    passed_over = []
    if others and not include:
        passed_over.append(f"being of no kind that is read: {describe_suffixes(others)}")
    if num_links:
        passed_over.append(f"links to folders: {num_links}")
    if passed_over:
        logger.info(f"{folder}: passed over, {'; '.join(passed_over)}")
    if not include:
        _say_kinds(folder, [path for path, _ in found])
    return sorted(found)


def _say_kinds(folder: str, paths: Sequence[str]) -> None:
    """Warn of texts beside files of records: a README among parquet files is a document, too."""
    texts = [path for path in paths if format_of(path, Format.auto) is Format.text]
    if texts and len(texts) < len(paths):
        logger.warning(
            f"{folder} holds files of records and of text: {describe_suffixes(paths)}. Each text, "
            f"such as {texts[0]}, is one document; include=.suffix takes one kind."
        )


def _saved_files(
    parent: str, names: Sequence[str], read: Callable[[str], bytes]
) -> list[str] | None:
    """Names of the data files of a folder that datasets.save_to_disk wrote; None: it is none.

    Raises:
        ConfigError: the folder holds several splits, or rows that are chosen by an index.
        DataError: state.json is damaged.
    """
    if "dataset_dict.json" in names:
        splits = _json(read, f"{parent}/dataset_dict.json").get("splits", [])
        splits = [str(split) for split in splits] if isinstance(splits, list) else []
        raise ConfigError(
            f"{parent} holds the splits {', '.join(splits)} of a dataset. Name the one to read: "
            f"input={parent}/{splits[0] if splits else 'train'}"
        )
    if not set(names) >= SAVED_DATASET:
        return None
    state = _json(read, f"{parent}/state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ConfigError(
            f"{parent} is a selection of rows from another table. Save it with its own rows: "
            "dataset.flatten_indices().save_to_disk(...)"
        )
    try:
        found = [str(file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{parent}/state.json does not list its data files ({error!r}).") from error
    # Joined to the folder, "/etc/x" would be that file, and "../x" one beside the folder.
    if strange := [name for name in found if name in ("", ".", "..") or re.search("[/\0]", name)]:
        raise DataError(
            f"{parent}/state.json names {strange[0]!r}, which is no file of its folder."
        )
    return found


def _json(read: Callable[[str], bytes], path: str) -> dict[str, Any]:
    """The object in a small JSON file."""
    try:
        content = parse_json(read(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error
    return content if isinstance(content, dict) else {}


def _list_remote(path: str, include: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(address, bytes) of what lies at an address; -1: the server does not say how much."""
    scheme = path.partition("://")[0]
    try:
        fs, place = connect(path)
        if scheme in ("http", "https"):
            yield path, int(fs.info(place).get("size") or -1)
            return
        if fs.isfile(place):
            found = {place: fs.info(place)}
        elif is_pattern(place):
            found = fs.glob(place, detail=True)
        else:
            found = fs.find(place, detail=True)
            found = {
                p: found[p] for p in _known_remote(list(found), include, partial(read_small, fs))
            }
        sizes = {p: int(info["size"]) for p, info in found.items() if info["type"] == "file"}
        # To open a file, fsspec looks through its folder's listing: for 10^5 inputs 10^10 names.
        # Without one it asks the server for the file, as it does in every other process.
        fs.invalidate_cache()
    except (ConfigError, DataError):
        raise
    except Exception as error:  # every fsspec file system raises its own
        raise DataError(f"input {path} cannot be listed: {reason_of(error)}.") from error
    for name, size in sizes.items():
        yield f"{scheme}://{re.sub(rf'^{scheme}://', '', name)}", size


def _known_remote(
    paths: Sequence[str], include: Sequence[str], read: Callable[[str], bytes]
) -> Iterator[str]:
    """What _walk takes, from the names of all files below an address."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition("/")
        folders.setdefault(parent, []).append(name)
    for parent, names in folders.items():
        saved = _saved_files(parent, names, read)
        for name in names if saved is None else saved:
            if is_taken(name, include):
                yield f"{parent}/{name}"
