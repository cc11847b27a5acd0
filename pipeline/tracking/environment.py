"""Where and with what a process runs: git commit, versions, machine, job, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Where and with what this process runs: git commit, versions, machine, job, command."""
    libraries = ("deepspeed", "megatron-core", "webdataset", "numpy")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        # torch's own word names the build (+cu130); its metadata may not.
        "versions": {"torch": torch.__version__} | versions,
        "host": socket.gethostname(),
        "num_cpus": os.cpu_count(),
        "num_local_devices": torch.cuda.device_count(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "command": sys.argv,
    }


def git_commit() -> str | None:
    """Commit of this source tree, with "-dirty" where files differ; None outside a repository."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
