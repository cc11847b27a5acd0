"""What a private run owes: its secret key, noise that is never used twice, the epsilon it spends.

runs/NAME/dp_noise.key --every rank--> noise          (never in a checkpoint)
what the steps follow from, as before? -> the salt of the checkpoint, else a new one
order of the data -> how often a sequence was read, at most -> epsilon, in every checkpoint
checkpoint.init_from -> what private runs had spent before -> epsilon of all together
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.agreement import Agreement
from pipeline.checkpoint.record import CheckpointRecord, read_record
from pipeline.config.finetune import PrivacyConfig
from pipeline.config.operation import CheckpointConfig
from pipeline.distributed.layout import ParallelLayout
from pipeline.errors import CheckpointError
from pipeline.files import create_durably, read_file
from pipeline.log import logger

KEY_FILE = "dp_noise.key"
KEY_BYTES = 32
USES = ("noise_multiplier", "reads")
"""What an accountant asks of a run."""
STEPS_FOLLOW_FROM = ("seed", "data", "model", "training", "optimizer", "schedule", "finetune")
"""Settings with which a step of a checkpoint's run would be another one than it was."""
ELSEWHERE = {
    "training": {"micro_batch_size", "recompute", "recompute_every", "eval_every", "eval_sequences"}
    | {"probe_every", "sample_every", "profile_steps", "gc_every"},
    "data": {"validation", "prefetch_steps", "cache_dir", "cache_size_gib"},
}
"""Those of them with which a step is the same: they move it elsewhere, or look at the model."""


def noise_key(run_dir: Path, layout: ParallelLayout) -> str:
    """The run's secret, made when it begins; the same on all ranks. Collective.

    Not the seed, which stands in every config and model card: with it the noise could be taken off.
    """
    found: list[Any] = [None]
    if layout.ranks.is_main:
        try:
            found[0] = _own_key(run_dir / KEY_FILE)
        except OSError as error:
            found[0] = CheckpointError(f"{run_dir / KEY_FILE} cannot be used: {error}.")
    dist.broadcast_object_list(found, src=0, group=layout.host_group)
    if isinstance(found[0], CheckpointError):
        raise found[0]
    return str(found[0])


def noise_salt(
    record: CheckpointRecord | None, config: dict[str, Any], layout: ParallelLayout
) -> str:
    """Which of the key's noises a run adds; the same on all ranks. Collective.

    A run that goes on as it was makes its steps once more with the noise they had: who sees both
    learns nothing new. With another learning rate, or from the start again, they are other steps,
    and the same noise on both would be gone from their difference. So steps that a kill took before
    a checkpoint held them count once in epsilon: made again they are the same release.

    Args:
        record: of the checkpoint that the run goes on from; None: it begins.
        config: of the run, as a checkpoint has it.
    """
    if record is not None and record.privacy is not None:
        names = STEPS_FOLLOW_FROM
        is_same = all(_decisive(record.config, name) == _decisive(config, name) for name in names)
        if is_same and (salt := record.privacy.get("salt")):
            return str(salt)
    found = [secrets.token_hex(16)]
    dist.broadcast_object_list(found, src=0, group=layout.host_group)
    return found[0]


def _decisive(config: dict[str, Any], name: str) -> Any:
    """A setting, or those of a section that a step depends on."""
    section = config.get(name)
    if not isinstance(section, dict):
        return section
    return {key: section[key] for key in section.keys() - ELSEWHERE.get(name, set())}


def _own_key(path: Path) -> str:
    """The key of a file, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    create_durably(path, secrets.token_hex(KEY_BYTES).encode(), mode=0o600)
    key = read_file(path).decode("ascii", "replace")
    if len(key) != 2 * KEY_BYTES:
        raise OSError(f"it holds {len(key)} characters, not {2 * KEY_BYTES}: it is no key")
    return key


def spent(
    dp: PrivacyConfig, *, reads: int, seq_len: int, salt: str, earlier: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What a checkpoint says of the privacy of the sequences it was trained on; JSON-able.

    Args:
        reads: how often a sequence was read, at most.
        seq_len: tokens of a sequence.
        salt: of the noise.
        earlier: of `earlier_private_runs`.
    """
    own = {
        "epsilon": epsilon(dp.noise_multiplier, reads, dp.delta),
        "delta": dp.delta,
        "clip_norm": dp.clip_norm,
        "noise_multiplier": dp.noise_multiplier,
        "reads": reads,
        "salt": salt,
        "unit": f"one sequence of {seq_len} tokens, left out or not",
    }
    if not earlier:
        return own
    runs = [*earlier, own]
    uses = [(run["noise_multiplier"], run["reads"]) for run in runs]
    together = {
        "epsilon": composed(uses, dp.delta),
        "delta": dp.delta,
        "epsilons": sum(run["epsilon"] for run in runs),
        "deltas": sum(run["delta"] for run in runs),
    }
    return own | {"with_earlier": together}


def epsilon(noise_multiplier: float, reads: int, delta: float) -> float:
    """Epsilon of a Gaussian mechanism applied `reads` times, by Opacus's RDP accountant.

    Nothing is gained from sampling: that holds where each step draws its sequences by chance, each
    alone (Poisson), and here they come in a shuffled order, each once an epoch (Chua et al. 2024,
    arXiv:2403.17673). A sequence is in `reads` steps; the others do not depend on it.
    """
    return composed([(noise_multiplier, reads)], delta)


def composed(uses: Sequence[tuple[float, int]], delta: float) -> float:
    """Epsilon of Gaussian mechanisms (noise multiplier, how often), one after the other.

    Each may depend on what those before it gave away (Mironov 2017, arXiv:1702.07476).
    """
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    counted = [(noise, 1.0, reads) for noise, reads in uses if reads]
    # Not assigned: under a name that a release has renamed nothing would be counted, epsilon 0.
    accountant.history.extend(counted)
    return float(accountant.get_epsilon(delta)) if counted else 0.0


def earlier_private_runs(
    cfg: CheckpointConfig, record: CheckpointRecord | None, layout: ParallelLayout
) -> list[dict[str, Any]]:
    """What private runs have spent on the first weights of this run. Collective.

    Their noise is what a composition needs; a run without privacy in between carries it on. Said at
    the start, once.

    Args:
        record: of the checkpoint that the run goes on from; None: it begins.

    Raises:
        CheckpointError: a checkpoint says of them what cannot be.
    """

    def found() -> list[dict[str, Any]]:
        if record is not None:
            return record.spent_before or []
        given = [Path(path) for path in (cfg.init_from, cfg.init_adapter) if path]
        ours = [path for path in given if not _says_it_in_words(path)]
        return [run for path in ours for run in _spent_on(folders.find(path))]

    runs = Agreement(layout.host_group).on_main(found)
    if runs and record is None and layout.ranks.is_main:
        numbers = ", ".join(f"epsilon {run['epsilon']:.2f} at {run['delta']:g}" for run in runs)
        logger.info(
            "the first weights come from private runs (%s): what they have spent and what this one "
            "spends add up, for whoever is in the data of both (docs/privacy.md)",
            numbers,
        )
    return runs


def _spent_on(checkpoint: Path) -> list[dict[str, Any]]:
    """Of the private runs that a checkpoint comes from, its own the last."""
    record = read_record(checkpoint)
    runs = [*(record.spent_before or []), *([record.privacy] if record.privacy else [])]
    kept = [{key: run[key] for key in ("epsilon", "delta", *USES)} for run in runs]
    if any(not 0 < run["noise_multiplier"] < math.inf for run in kept):
        raise CheckpointError(f"{checkpoint} is damaged: it tells of a private run without noise.")
    return kept


def _says_it_in_words(folder: Path) -> bool:
    """Whether this is a Hugging Face folder, whose card alone knows; what it says is logged."""
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return False
    with contextlib.suppress(OSError):
        card = read_file(folder / "README.md", most=1 << 20).decode("utf-8", "replace")
        for row in re.findall(r"^\| Differential privacy \| (.*) \|$", card, re.MULTILINE):
            logger.info(
                "the card of %s says of privacy: %s. What this run spends adds to that, and its "
                "checkpoints do not count it: begin with the checkpoint instead of the export",
                folder, row,
            )  # fmt: skip
    return True


def check_same(dp: PrivacyConfig, record: CheckpointRecord) -> None:
    """Refuse to go on with other noise than a checkpoint was made with.

    Raises:
        CheckpointError: epsilon would be that of neither.
    """
    before = record.finetune().dp
    if (before.clip_norm, before.noise_multiplier) != (dp.clip_norm, dp.noise_multiplier):
        raise CheckpointError(
            f"the run so far was made with finetune.dp.clip_norm={before.clip_norm} "
            f"noise_multiplier={before.noise_multiplier}, and now they are {dp.clip_norm} and "
            f"{dp.noise_multiplier}: its epsilon would be that of neither. Restore them, or begin "
            "again under another name=..."
        )
