"""Save and resume at any layout; list, verify, show and compare checkpoints.

    python -m pipeline.checkpoint list runs/NAME          every checkpoint: step, tokens, size
    python -m pipeline.checkpoint verify runs/NAME        read every byte and compare its checksum
    python -m pipeline.checkpoint show runs/NAME          what is in it: record, parameters, shapes
    python -m pipeline.checkpoint diff STEP_A STEP_B      largest difference of every parameter
    python -m pipeline.checkpoint merge runs/NAME OUTPUT  an adapter in its base, a whole checkpoint

Save: copy this rank's fragments to host memory (training waits), then, in a background thread,
write the files, sync them, rename the folder, move `latest`, prune. Restore: the newest checkpoint
whose checksums hold is read into the fragments of whatever layout runs now.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline import cli
from pipeline.errors import CheckpointError


@dataclass
class ToolConfig:
    """Look at checkpoints."""

    command: str = "list"
    """list, verify, show, diff, or merge."""
    path: str = "???"
    """A run folder, a checkpoints folder, or one checkpoint."""
    other: str | None = None
    """diff: the second checkpoint; merge: the folder to write."""
    base: str | None = None
    """merge: where the adapter's base is now; null: where it was when it was trained."""


def main(cfg: ToolConfig) -> int:
    """Run one of the tools; exit code 1 when verify finds damage or diff a difference."""
    from pipeline.checkpoint import tools

    commands = {"list": tools.list_all, "verify": tools.verify, "show": tools.show}
    if cfg.command == "diff":
        if cfg.other is None:
            raise CheckpointError(
                "diff compares two checkpoints: "
                "python -m pipeline.checkpoint diff CHECKPOINT_A CHECKPOINT_B."
            )
        return tools.diff(Path(cfg.path), Path(cfg.other))
    if cfg.command == "merge":
        from pipeline.huggingface.merge import merge

        if cfg.other is None:
            raise CheckpointError(
                "merge writes a new folder: python -m pipeline.checkpoint merge runs/NAME OUTPUT."
            )
        return merge(Path(cfg.path), Path(cfg.other), base=Path(cfg.base) if cfg.base else None)
    if cfg.command not in commands:
        raise CheckpointError(
            f"'{cfg.command}' is not a command. "
            f"Commands: {', '.join([*commands, 'diff', 'merge'])}."
        )
    return commands[cfg.command](Path(cfg.path))


if __name__ == "__main__":
    cli.run(main, ToolConfig, config="checkpoint", positional=("command", "path", "other"))
