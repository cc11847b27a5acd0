"""Rows of a model card about privacy: personal data found, what the model gives away, epsilon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.record import CheckpointRecord, attachment
from pipeline.data import pii_report
from pipeline.evaluation import memorization_file


def privacy_facts(record: CheckpointRecord, checkpoint: Path | None) -> dict[str, str]:
    """Heading to text, of what is known.

    Args:
        record: of the checkpoint.
        checkpoint: its folder; None: only the record is at hand.
    """
    facts = {}
    if checkpoint is not None:
        raw = attachment(checkpoint, pii_report.NAME)
        facts["Personal data in the training text"] = (
            "not looked for" if raw is None else pii_report.summary(pii_report.parse(raw))
        )
        found = memorization_file.read(memorization_file.place_of(checkpoint))
        facts["Memorization"] = "not measured" if found is None else _memorization(found)
    if said := _spending(record):
        facts["Differential privacy"] = said
    return facts


def _spending(record: CheckpointRecord) -> str:
    """Epsilon of the run and of those that its first weights came from; empty without any."""
    earlier = [
        f"{run['epsilon']:.2f} at delta {run['delta']:g}" for run in record.spent_before or []
    ]
    before = f"on its first weights private runs had spent epsilon {', '.join(earlier)}"
    if (spent := record.privacy) is None:
        return f"{before}; it is itself without privacy for its own data" if earlier else ""
    own = (
        f"epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g} for {spent['unit']}; each "
        f"was read at most {spent['reads']} times; noise multiplier "
        f"{spent['noise_multiplier']:g}, clipping norm {spent['clip_norm']:g}"
    )
    if (both := spent.get("with_earlier")) is None:
        return (
            f"{own}; of this run alone: of somebody who is also in the data of a private run that "
            "its first weights came from, epsilons and deltas add up; of one without privacy "
            "nothing is promised"
        )
    return (
        f"{own}; {before}; whoever is in the data of all of them: epsilon {both['epsilon']:.2f} at "
        f"delta {both['delta']:g} by the accountant over all, {both['epsilons']:.2f} at "
        f"{both['deltas']:g} as the plain sums; of a run without privacy nothing is promised"
    )


def _memorization(found: dict[str, Any]) -> str:
    """The findings of pipeline.memorization in a sentence."""
    parts = []
    if (exposed := found["canaries"]) is not None:
        values = ", ".join(
            f"{row['value']:.1f} bits planted {count} times"
            for count, row in exposed["repetitions"].items()
        )
        parts.append(
            f"exposure of canaries {values} (chance {exposed['chance']:.1f}, most "
            f"{exposed['most']:.1f})"
        )
    last = found["extraction"][-1]
    parts.append(
        f"of windows read {last['read']['exact']['value']:.1%} continue word for word for "
        f"{found['continuation']} tokens after {last['prefix']}, of held-out ones "
        f"{last['held_out']['exact']['value']:.1%}"
    )
    aucs = ", ".join(
        f"{name} {row['auc']['value']:.3f}" for name, row in found["membership"].items()
    )
    parts.append(f"AUC of membership inference: {aucs}")
    return "; ".join(parts)
