"""Personal data in the documents that are tokenized, counted by source and kind; the gate on them.

documents of a unit --count_pii--> PiiTally -> marker; all markers -> OUT/pii.json, or the job ends
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources.pii import count_pii
from pipeline.data import pii_report
from pipeline.errors import ConfigError, DataError
from pipeline.files import write_durably
from pipeline.log import logger

CLEAN = "python -m data_prep.clean clean=pii"
"""What takes out all kinds that are counted; other recipes let some of them be."""


@dataclass
class PiiTally:
    """What was found in the documents of one source; fields of pii_report.OF_SOURCE."""

    documents: int = 0
    with_any: int = 0
    found: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> None:
        """Count a document."""
        counts = count_pii(text)
        self.documents += 1
        self.with_any += bool(counts)
        for kind, count in counts.items():
            self.found[kind] = self.found.get(kind, 0) + count


def check_rate(rate: float | None) -> None:
    """Refuse what is no share.

    Raises:
        ConfigError: it is not in [0, 1].
    """
    if rate is not None and not 0 <= rate <= 1:
        raise ConfigError(f"pii_max_rate ({rate}) must be at least 0 and at most 1, or null.")


def report(output: Path, results: Iterable[dict[str, Any]], max_rate: float) -> None:
    """Write OUT/pii.json of all units' markers, then hold the gate.

    Raises:
        DataError: more documents than `max_rate` of them hold personal data.
    """
    sources: dict[str, Any] = {}
    for result in results:
        pii_report.add(sources, result.get("pii", {}))
    raw = pii_report.to_json(sources)
    write_durably(output / pii_report.NAME, raw)
    found = pii_report.parse(raw)
    logger.info(f"{output / pii_report.NAME}: {pii_report.summary(found)}")
    if (rate := pii_report.rate(found)) > max_rate:
        worst = max(sources, key=lambda name: sources[name]["with_any"])
        raise DataError(
            f"{rate:.3%} of the documents hold personal data or secrets, more than "
            f"pii_max_rate={max_rate} ({max_rate:.3%}): {pii_report.summary(found)}; most of them "
            f"in source {worst or 'without a name'!r}. Take them out, `{CLEAN} input=... "
            "output=CLEANED`, and tokenize CLEANED/documents; or raise pii_max_rate, with another "
            "output=..."
        )
