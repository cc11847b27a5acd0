"""Documents of WebDataset tars: a sample is a run of files alike up to the first dot.

The sums are closed: a tar without its end mark, with a damaged header, or with something behind its
end is damaged, where Python's tarfile would take it for a short one; a sample whose files lie apart
or that has a file twice is a reject.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from data_prep.sources.inputs import InputConfig
from data_prep.sources.lines import is_twice, parse_json
from data_prep.sources.pictures import SUFFIXES
from data_prep.sources.pieces import Piece
from data_prep.sources.rejects import Damaged, Document, Rejects, accept, field_of
from pipeline.data.picture_files import BadPicture

MOST_PICTURES = 1024  # of a sample
TEXT_MEMBERS = ("txt", "text", "md")  # of a WebDataset sample, before json
_MEMBERS = [*TEXT_MEMBERS, "json"]  # a document is made of the first of these
# As webdataset splits names: github.com/webdataset/webdataset, webdataset/tariterators.py
SAMPLE_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
MOST_HEADER_BYTES, MOST_NAME_CHARACTERS, MOST_GLOBAL_KEYS = 1 << 20, 4096, 100
"""Of what tarfile keeps of a tar beside its files: a header's extension, a name, pax's globals."""
_EXTENSIONS = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
META_NAME = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes, which belong to no sample


@dataclass
class Sample:
    """The files of one sample that may hold text."""

    key: str
    names: set[str] = field(default_factory=set)
    """Extensions of files that may hold text, read or not."""
    members: dict[str, bytes] = field(default_factory=dict)
    """Extension -> content."""
    reason: str = ""
    """Of REASONS, if the sample cannot be used; `detail` says more."""
    detail: str = ""
    shown: set[str] = field(default_factory=set)
    """Extensions of its pictures."""
    pictures: list[bytes | BadPicture] = field(default_factory=list)
    """Content of its pictures, in the order of the tar; or why one was not read."""


def read_tar(
    file: BinaryIO, piece: Piece, source: str, cfg: InputConfig, rejects: Rejects
) -> Iterator[Document]:
    """The documents of the samples."""
    for sample in read_samples(file, piece, cfg, rejects):
        key = sample.key
        if sample.reason:
            rejects.add(sample.reason, piece.path, sample.detail, member=key)
            continue
        value: Any = next((sample.members[n] for n in TEXT_MEMBERS if n in sample.members), ...)
        url: Any = ""
        fields: Iterable[str] = sample.members
        if value is ... and "json" in sample.members:
            content = sample.members["json"]
            try:
                record = parse_json(content)
            except ValueError as error:
                rejects.add("broken_json", piece.path, str(error), member=f"{key}.json")
                continue
            if isinstance(record, dict) and is_twice(content, cfg.text_field):
                rejects.add("ambiguous", piece.path, cfg.text_field, member=f"{key}.json")
                continue
            value = field_of(record, cfg.text_field)
            url = record.get(cfg.url_field) if isinstance(record, dict) else ""
            fields = record if isinstance(record, dict) else ()
        text = accept(value, piece.path, cfg, rejects, fields=fields, member=key)
        if text is not None:
            yield Document(text, f"{piece.name}/{key}", source, url if isinstance(url, str) else "")


def read_samples(
    file: BinaryIO,
    piece: Piece,
    cfg: InputConfig,
    rejects: Rejects,
    *,
    whole: bool = False,
    picture_bytes: int = 0,
) -> Iterator[Sample]:
    """The samples of a tar in order; a key that comes again is a sample that cannot be used.

    Of a sample's files the one that a document is made of is read; `whole`: every one that may hold
    text. `picture_bytes`: its pictures are read, of which none may be larger.

    Keys are remembered by hash, 100 bytes each: two that collide, one in 10^13 pairs of a million
    keys, would be refused, not doubled.
    """
    sample: Sample | None = None
    seen: set[int] = set()
    limit = int(cfg.max_document_mb * 1e6) * 2
    with _headers():
        archive = tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header)  # noqa: SIM115
    for info, key, extension in _named(archive, piece, rejects):
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = Sample(key)
            if hash(key) in seen:
                sample.reason, sample.detail = "ambiguous", "its files do not lie in a row"
            seen.add(hash(key))
        if picture_bytes and extension.rpartition(".")[2] in SUFFIXES:
            if extension in sample.shown:
                sample.reason, sample.detail = "ambiguous", f"two files .{extension}"
            elif len(sample.pictures) <= MOST_PICTURES:  # one more, which says that it is too many
                sample.shown.add(extension)
                sample.pictures.append(_picture(archive, info, sample, picture_bytes, limit))
        if extension not in _MEMBERS or sample.reason == "ambiguous":
            continue
        if extension in sample.names:
            sample.reason, sample.detail = "ambiguous", f"two files .{extension}"
            continue
        sample.names.add(extension)
        is_best = extension == min(sample.names, key=_MEMBERS.index)
        if not (is_best or whole):
            continue
        if not whole:  # a worse one is not needed any more, nor matters how large it was
            sample.members, sample.reason, sample.detail = {}, "", ""
        if info.size > limit:
            sample.reason, sample.detail = "too_large", f"{info.name} has {info.size} bytes"
        else:
            content = archive.extractfile(info)
            assert content is not None, "regular files have content"
            sample.members[extension] = content.read()
    if sample is not None:
        yield sample
    _check_end(archive)


def _picture(
    archive: tarfile.TarFile, info: tarfile.TarInfo, sample: Sample, most: int, most_together: int
) -> bytes | BadPicture:
    """A picture of a sample, or why it is not read: memory holds one sample."""
    together = info.size + sum(len(p) for p in sample.pictures if isinstance(p, bytes))
    if info.size > most or together > most_together or len(sample.pictures) >= MOST_PICTURES:
        detail = f"{info.name} has {info.size} bytes; the sample's pictures {together}"
        return BadPicture("picture_too_large", detail)
    content = archive.extractfile(info)
    assert content is not None, "regular files have content"
    return content.read()


def _named(
    archive: tarfile.TarFile, piece: Piece, rejects: Rejects
) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """(file, key of its sample, extension in lower case) for the files that belong to a sample."""
    while (info := _next(archive)) is not None:
        archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        match = SAMPLE_NAME.fullmatch(info.name)
        if info.isdir() or META_NAME.match(info.name):
            continue
        if not info.isreg():
            # A second name of the same file is a link in the tar: its text is not here.
            detail = f"no file but a link to {info.linkname}" if info.linkname else "no file"
            rejects.add("missing_field", piece.path, detail, member=info.name)
        elif match is None:
            rejects.add(
                "missing_field", piece.path, "a name without an extension", member=info.name
            )
        else:
            yield info, match[1], match[2].lower()


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next file; None at the end mark.

    Raises:
        Damaged: a header that no archiver writes.
    """
    stream: Any = archive.fileobj
    # By hand: tarfile would ask an ended file for each of a million gigabytes that a header tells.
    while archive.firstmember is None and (rest := archive.offset - stream.tell()) > 0:  # type: ignore[attr-defined]
        if not stream.read(min(rest, 1 << 20)):
            raise Damaged("tar: it ends inside a file")
    with _headers():
        info = archive.next()
    if info is not None and len(info.name) > MOST_NAME_CHARACTERS:
        raise Damaged(f"tar: a name of {len(info.name)} characters")
    if len(archive.pax_headers) > MOST_GLOBAL_KEYS:
        raise Damaged(f"tar: {len(archive.pax_headers)} pax headers for the whole archive")
    return info


@contextlib.contextmanager
def _headers() -> Iterator[None]:
    """A block in which tarfile reads headers: what is wrong with one is Damaged.

    It calls itself for each header that extends another, and trusts their numbers.
    """
    try:
        yield
    except (ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise Damaged(f"tar: a header cannot be read ({type(error).__name__})") from error


class _Header(tarfile.TarInfo):
    """A header that is damaged or missing raises; tarfile ends the archive there in silence."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """The header in 512 bytes; EOFHeaderError for the end mark."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            what = "the end mark is missing" if not buf else str(error)
            raise Damaged(f"tar: {what}") from error
        # What it extends the next header by is read whole: gigabytes, if it says so.
        if header.type in _EXTENSIONS and not 0 <= header.size <= MOST_HEADER_BYTES:
            raise Damaged(f"tar: a header's extension of {header.size} bytes")
        return header


def _check_end(archive: tarfile.TarFile) -> None:
    """Behind the end mark are zeros only; a second archive there would be left out in silence."""
    stream: Any = archive.fileobj
    while chunk := stream.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise Damaged(
                "tar: data follows the end mark; tars are joined with `tar --concatenate`"
            )
