"""OUT/pii.json: personal data that data_prep has found in the text of a dataset, and where.

data_prep/tokenize.py pii_max_rate=... writes it; checkpoints carry it; the model card says it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.files import read_file
from pipeline.shapes import COUNT, parse_object

NAME = "pii.json"
KINDS = ("secrets", "emails", "ips", "phones")
OF_SOURCE = {"documents": COUNT, "with_any": COUNT, "found": {str: COUNT}}
"""Of one source: documents, those in which anything was found, things found by kind."""
SHAPE = {"sources": {str: OF_SOURCE}, "datasets_without?": COUNT}
"""`datasets_without`: other datasets of the run, in which nobody looked."""


def parse(raw: bytes) -> dict[str, Any]:
    """The report of a file's bytes.

    Raises:
        DataError: it is none.
    """
    return parse_object(
        raw,
        SHAPE,
        name=NAME,
        error=DataError,
        misfit="is not what data_prep/tokenize.py writes",
    )


def merged(paths: list[Path], *, without: int = 0) -> bytes:
    """The reports of several datasets as one; sources of one name are added up.

    Args:
        paths: of the reports.
        without: datasets of the run that have none.

    Raises:
        DataError: one of them cannot be read.
    """
    total: dict[str, Any] = {}
    for path in paths:
        try:
            add(total, parse(read_file(path))["sources"])
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}.") from None
    return to_json(total, without=without)


def add(total: dict[str, Any], sources: dict[str, Any]) -> None:
    """Add sources of another unit or dataset."""
    for source, row in sources.items():
        into = total.setdefault(source, {"documents": 0, "with_any": 0, "found": {}})
        into["documents"] += row["documents"]
        into["with_any"] += row["with_any"]
        for kind, count in row["found"].items():
            into["found"][kind] = into["found"].get(kind, 0) + count


def to_json(sources: dict[str, Any], *, without: int = 0) -> bytes:
    """The file of all sources; `without`: as in merged."""
    content: dict[str, Any] = {"sources": dict(sorted(sources.items()))}
    if without:
        content["datasets_without"] = without
    return (json.dumps(content, indent=1) + "\n").encode()


def rate(report: dict[str, Any]) -> float:
    """Share of documents in which anything was found."""
    rows = report["sources"].values()
    return sum(row["with_any"] for row in rows) / max(sum(row["documents"] for row in rows), 1)


def summary(report: dict[str, Any]) -> str:
    """The report in a line."""
    rows = list(report["sources"].values())
    documents = sum(row["documents"] for row in rows)
    kinds = ", ".join(
        f"{sum(row['found'].get(kind, 0) for row in rows):,} {kind}" for kind in KINDS
    )
    without = report.get("datasets_without", 0)
    unknown = f"; not looked for in {without} more datasets" if without else ""
    return f"{kinds} left in {rate(report):.3%} of {documents:,} documents{unknown}"
