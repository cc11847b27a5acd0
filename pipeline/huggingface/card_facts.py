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
    if (spent := record.privacy) is not None:
        facts["Differential privacy"] = (
            f"epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g} for {spent['unit']}; each "
            f"was read at most {spent['reads']} times; noise multiplier "
            f"{spent['noise_multiplier']:g}, clipping norm {spent['clip_norm']:g}; of this run "
            "alone: of somebody who is also in the data of a private run that its first weights "
            "came from, epsilons and deltas add up; of one without privacy nothing is promised"
        )
    return facts


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
