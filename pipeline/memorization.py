"""What a model gives away of its training data: exposure, extraction, membership.

    python -m pipeline.memorization runs/NAME
    python -m pipeline.memorization runs/NAME reference=runs/OTHER canaries=OUT/canaries.json

    canaries of the dataset -> how likely they are among secrets that were never planted
    windows the run has read, by its exact order, against held-out ones
        -> continued word for word?  told apart by their loss?

Writes runs/NAME/memorization/CHECKPOINT.json and prints it; docs/privacy.md says what the numbers
mean. One process: the model must fit on one device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import cli, log
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import CheckpointRecord, read_record
from pipeline.checkpoint.seen import Seen
from pipeline.data.canary_list import CANARIES, read_list
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation import memorization_file
from pipeline.files import check_writable
from pipeline.inference.asked_model import tokenizer_of
from pipeline.redaction import redact

if TYPE_CHECKING:
    from pipeline.model.local_model import LocalModel

MOST_LOGITS = 1 << 28


@dataclass
class MemorizationConfig:
    """Settings of pipeline.memorization."""

    checkpoint: str = "???"
    """A run folder (its newest checkpoint) or one checkpoint."""
    canaries: str | None = None
    """The list of canaries; null: canaries.json beside a dataset of the run, where there is one."""
    references: int = 1023
    """Secrets that were never planted, with which each canary is compared: exposure is at most
    log2(references + 1) bits.
    """
    windows: int = 256
    """Windows read, and as many held out, that are compared."""
    prefixes: list[int] = field(default_factory=lambda: [8, 16, 32])
    """Lengths, tokens, of what is given before the continuation is asked for."""
    continuation: int = 32
    """Tokens that must come word for word."""
    min_k_percent: float = 20.0
    """Share of a window's tokens, the unlikeliest ones, that the attack min-k looks at."""
    reference: str | None = None
    """Checkpoint of a model that has not read the data, for the attack that compares with it; null:
    none.
    """
    batch_size: int = 32
    """Texts computed together; of whole windows only as many as have a GiB of logits."""
    seed: int = 0
    """Of what is drawn."""


def main(cfg: MemorizationConfig) -> int:
    """Measure, write, print.

    Raises:
        CheckpointError: no checkpoint, or one that does not say what it has read.
        ConfigError: numbers that measure nothing, or data without a held-out part.
        DataError: data or canaries are missing, or others than they were.
    """
    log.setup()
    folder = folders.find(Path(cfg.checkpoint))
    record = read_record(folder)
    path = memorization_file.place_of(folder)
    check_writable(path, "another copy of the run as checkpoint=")
    seen = _seen(record, folder)
    _check(cfg, seen.seq_len)
    findings = measure(cfg, folder, record, seen)
    memorization_file.write(findings, path)
    print_findings(findings)
    print(redact(f"written: {path}"))
    return 0


def measure(
    cfg: MemorizationConfig, folder: Path, record: CheckpointRecord, seen: Seen
) -> dict[str, Any]:
    """All findings of a checkpoint, in the shape of memorization_file."""
    from pipeline.evaluation.memorization import Audit, canaries_exposed, extraction, membership
    from pipeline.inference.known_windows import known_windows

    # All that can be wrong is looked at before a model is opened.
    listed = _canaries(cfg, seen)
    planted = None if listed is None else (tokenizer_of(folder), *read_list(listed))
    others = None
    if cfg.reference is not None:
        other = folders.find(Path(cfg.reference))
        others = other, read_record(other)
        _check_reference(record, others[1], other)
    windows = known_windows(record, seen, count=cfg.windows, seed=cfg.seed)
    model, audit = _open(folder, record), Audit(cfg.batch_size, cfg.seed)
    reference = None if others is None else _open(*others)
    exposed = None
    if planted is not None:
        tokenizer, template, canaries = planted
        exposed = canaries_exposed(
            model, template, canaries, encode=tokenizer.encode, eod=tokenizer.eod,
            references=cfg.references, audit=audit,
        )  # fmt: skip
    return {
        "step": record.step,
        "canaries": exposed,
        "extraction": extraction(
            model, windows, prefixes=sorted(cfg.prefixes), length=cfg.continuation, audit=audit
        ),
        "continuation": cfg.continuation,
        "windows": {name: len(ids) for name, ids in windows.items()},
        "membership": membership(
            model,
            windows,
            reference=reference,
            percent=cfg.min_k_percent,
            audit=replace(audit, rows=_rows_of_windows(cfg.batch_size, record, seen.seq_len)),
        ),
    }


def _rows_of_windows(batch_size: int, record: CheckpointRecord, seq_len: int) -> int:
    """Windows computed together: 32 of 1,024 tokens and 50,000 columns had 6.6 GB of logits."""
    return max(1, min(batch_size, MOST_LOGITS // (seq_len * record.vocab_size)))


def print_findings(findings: dict[str, Any]) -> None:
    """The findings for people, each beside its value by chance."""
    exposed, windows = findings["canaries"], findings["windows"]
    if exposed is None:
        print("no canaries were planted in the data (docs/privacy.md)")
    else:
        print(f"exposure, bits; chance {exposed['chance']:.2f}, at most {exposed['most']:.2f}")
        for count, row in exposed["repetitions"].items():
            planted = f"planted {count} times" if count != "0" else "never planted"
            print(f"  {planted:<20}{_shown(row)}   ({row['canaries']} canaries)")
    print(
        f"extraction of the next {findings['continuation']} tokens, {windows['read']} windows read "
        f"and {windows['held_out']} held out"
    )
    for row in findings["extraction"]:
        for name, said in (("read", "read"), ("held_out", "held out")):
            rates = row[name]
            print(
                f"  prefix {row['prefix']:>4}  {said:<9} exact {_shown(rates['exact'])}   "
                f"near {_shown(rates['near'])}"
            )
    print("membership; chance: AUC 0.5, true positives at 1 % false ones 0.01")
    for attack, row in findings["membership"].items():
        auc, tpr = row["auc"], row["tpr_at_1_percent_fpr"]
        print(f"  {attack:<10} AUC {_shown(auc)}   true positives {_shown(tpr)}")


def _shown(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _seen(record: CheckpointRecord, folder: Path) -> Seen:
    """What the run has read up to its checkpoint."""
    if not record.loader.get("segments") or "order" not in record.loader:
        raise CheckpointError(
            f"{folder} does not say what its run has read, as it was not written by "
            "pipeline.train. Measure a checkpoint of the run."
        )
    return Seen(record)


def _check(cfg: MemorizationConfig, seq_len: int) -> None:
    """Refuse numbers that measure nothing."""
    counts = {
        "references": cfg.references, "windows": cfg.windows, "continuation": cfg.continuation,
        "batch_size": cfg.batch_size, "prefixes": min(cfg.prefixes, default=0),
    }  # fmt: skip
    if low := [name for name, value in counts.items() if value < 1]:
        raise ConfigError(f"{', '.join(low)} must be at least 1.")
    if not 0 <= cfg.seed < 2**63:
        raise ConfigError(f"seed ({cfg.seed}) must be at least 0, and below 2**63.")
    if not 0 < cfg.min_k_percent <= 100:
        raise ConfigError(f"min_k_percent ({cfg.min_k_percent}) must be above 0, at most 100.")
    if (needed := max(cfg.prefixes) + cfg.continuation) > seq_len + 1:
        raise ConfigError(
            f"the longest prefix and the continuation have {needed} tokens, a window of the run "
            f"{seq_len + 1}. Set prefixes=[8,16] continuation=16, or the like."
        )


def _check_reference(record: CheckpointRecord, other: CheckpointRecord, folder: Path) -> None:
    if record.vocab_size != other.vocab_size:
        raise ConfigError(
            f"the reference {folder} knows {other.vocab_size:,} tokens, the checkpoint "
            f"{record.vocab_size:,}: losses of the same tokens are compared. Give one that was "
            "trained with the same tokenizer."
        )


def _canaries(cfg: MemorizationConfig, seen: Seen) -> Path | None:
    """The list that was named, or the one beside a dataset of the run; None: there is none.

    Raises:
        ConfigError: several datasets have one, and the run's canaries are not those of one list.
    """
    if cfg.canaries is not None:
        return Path(cfg.canaries)
    beside = [d.folder.local.parent / CANARIES for d in seen.sampler.datasets if not d.is_remote]
    found = list(dict.fromkeys(path for path in beside if path.is_file()))
    if len(found) > 1:
        raise ConfigError(
            f"several datasets of the run have canaries, and one list is measured at a time: set "
            f"canaries= to one of {', '.join(map(str, found))}."
        )
    return found[0] if found else None


def _open(folder: Path, record: CheckpointRecord) -> LocalModel:
    """The model of a checkpoint in this process, adapters merged with their base."""
    from pipeline.huggingface.whole_model import open_model
    from pipeline.model.local_model import LocalModel

    if problems := folders.damage(folder):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}.")
    tensors = open_model(folder)
    return LocalModel(record.model(), lambda name: tensors.tensor(f"weights/{name}"))


if __name__ == "__main__":
    cli.run(main, MemorizationConfig, config="memorization", positional=("checkpoint",))
