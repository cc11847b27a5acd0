"""Would this run start? All that is known without a device, in seconds, on the login node.

    python -m pipeline.preflight world_size=128 model=gpt3-6.7b parallel.tensor_parallel_size=8 ...

Takes the settings of pipeline.train, and the number of ranks. All problems are listed, not just the
first; the last line on standard output is the run folder, which launch/pretrain.slurm uses (before
it, where one is set, the run's folder below checkpoint.fallback_dir). Imports no torch.

With shards_only=true nothing else is checked, and nothing is said when all is well: launch scripts
ask so after a rank has been killed, for a shard that shrinks under its reader kills it (SIGBUS).
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline import cli, log
from pipeline.config.choices import WandbMode
from pipeline.config.operation import TrackingConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.distributed.ranks import ranks_from_environment
from pipeline.errors import DataError, MachineError, PipelineError
from pipeline.files import size_of
from pipeline.resilience import ownership

WANDB_TIMEOUT_S = 5.0


@dataclass
class PreflightConfig(PretrainConfig):
    """The settings of a run, and how many ranks it will have."""

    world_size: int = 1
    """Ranks of the planned job: nodes times devices of a node."""
    shards_only: bool = False
    """Only look whether every shard has the size that its manifest says."""


def main(cfg: PreflightConfig) -> None:
    """Run every check; print what was found.

    Raises:
        MachineError: one or more checks failed; all are named.
    """
    from pipeline.checkpoint import folder as folders
    from pipeline.training import startup
    from pipeline.training.in_words import sentences

    if cfg.shards_only:
        check_shards(cfg)
        return
    problems: list[str] = []
    start: startup.Start | None = None
    try:
        start = startup.check(cfg, world_size=cfg.world_size)
        if start.reading.used_up:
            problems.append(start.reading.used_up)
    except PipelineError as error:
        problems.append(str(error))
    checks: tuple[Callable[[PreflightConfig], Iterator[str]], ...] = (
        missing_training_shards,
        missing_devices,
        another_owner,
    )
    problems += [problem for check in checks for problem in check(cfg)]
    reading = start.reading.warnings() if start else []
    for warning in [*reading, *wandb_warnings(cfg.tracking)]:
        log.say("\n".join(log.broken(f"warning: {warning}", log.TERMINAL)))
    if problems:
        raise MachineError("\n".join(problems))
    assert start is not None
    lines = [
        *sentences(start.cfg, start.shape),
        f"the run reads {start.reading}",
        "time, cost and other layouts: python -m pipeline.plan, with the same settings",
    ]
    for line in lines:
        print("\n".join(log.broken(f"preflight: {line}", log.TERMINAL)), file=sys.stderr)
    # Where checkpoints come to lie: the fallback first, the run folder last.
    places = folders.places(Path(cfg.runs_dir) / cfg.name, cfg.checkpoint.fallback_dir)
    for place in reversed(places):
        print(place.parent)


def check_shards(cfg: PretrainConfig) -> None:
    """Raise DataError where a shard has shrunk, grown or gone, also in the cache of remote ones."""
    from pipeline.training.startup import missing_shards

    datasets = [*cfg.data.train, *(cfg.data.validation or [])]
    if problems := [*missing_shards(datasets), *damaged_copies(cfg)]:
        raise DataError(
            "\n".join(problems)
            + "\nA file that shrinks or goes while it is read kills its readers (SIGBUS): never "
            "change a dataset that a run reads. Copy it again, check it with data_prep.verify, and "
            "start the same command again."
        )


def damaged_copies(cfg: PretrainConfig) -> Iterator[str]:
    """Shards in the cache of remote datasets that have another size than their manifest says."""
    from pipeline.data.manifest import Manifest

    cache = Path(cfg.data.cache_dir or Path(cfg.runs_dir) / cfg.name / "cache")
    for folder in sorted(path.parent for path in cache.glob("*/manifest.json")):
        manifest = Manifest.load(str(folder))
        for path, size in zip(manifest.paths, manifest.shard_bytes, strict=True):
            if (found := size_of(folder / str(path))) not in (-1, int(size)):
                yield f"{folder / str(path)} has {found} bytes, {size} expected. Delete it."


def missing_training_shards(cfg: PretrainConfig) -> Iterator[str]:
    """Those of the training data; the start looks for the held-out ones, which are few."""
    from pipeline.training.startup import missing_shards

    yield from missing_shards(cfg.data.train)


def missing_devices(_: PretrainConfig) -> Iterator[str]:
    """In a job that asked for GPUs: fewer on this node than Slurm puts ranks there."""
    asked = os.environ.get("SLURM_GPUS_ON_NODE")
    if not asked:
        return
    ranks = os.environ.get("SLURM_NTASKS_PER_NODE", asked)
    found = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if len(found) < int(ranks):
        node = socket.gethostname()
        yield (
            f"{node} shows {len(found)} GPUs for {ranks} ranks. Leave it out (sbatch "
            f"--exclude={node}), or start as many ranks as it has devices (--ntasks-per-node, "
            "--gres)."
        )


def another_owner(cfg: PretrainConfig) -> Iterator[str]:
    """A run that is in this run's folder now, or in its place in checkpoint.fallback_dir."""
    from pipeline.training import startup

    for folder in startup.run_folders(cfg):
        if found := ownership.problem(folder, node=ranks_from_environment().node):
            yield found


def wandb_warnings(cfg: TrackingConfig) -> Iterator[str]:
    """Why an online run will not reach Weights & Biases; never a reason not to train."""
    is_online = cfg.wandb is WandbMode.online or (
        cfg.wandb is WandbMode.auto and bool(os.environ.get("WANDB_API_KEY"))
    )
    if not is_online:
        return
    address = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=WANDB_TIMEOUT_S).close()
    except OSError as error:
        yield (
            f"Weights & Biases at {address.hostname}:{port} is not reached from "
            f"{socket.gethostname()} ({error}). Training goes on without; set "
            "tracking.wandb=offline and send the run later with `wandb sync`."
        )


if __name__ == "__main__":
    cli.run(main, PreflightConfig, config="pretrain")
