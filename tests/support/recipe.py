"""Recipes for this machine (launch/*.sh), in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def copy_repository(folder: Path) -> None:
    """What a recipe needs, without the data and runs of this one."""
    for name in ("conf", "data_prep", "launch", "pipeline"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def run_recipe(
    folder: Path, name: str, *settings: str, timeout_s: float = 900
) -> subprocess.CompletedProcess[str]:
    """launch/<name>.sh of the copy, with this test's Python."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    command = [str(folder / "launch" / f"{name}.sh"), *settings]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def programs(output: str) -> list[str]:
    """What a recipe ran, by its own account, in order."""
    commands = re.findall(r"^\$ (.+)", output, re.MULTILINE)
    found = [re.search(r"(?:-m |data_prep/|launch/)([\w.]+)", command) for command in commands]
    return [match[1] for match in found if match]
