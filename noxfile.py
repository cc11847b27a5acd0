"""The fast tests on the oldest and on the newest dependencies that pyproject.toml allows.

    pip install nox==2026.10.20 uv==0.13.9   # anywhere; without uv pip does it, minutes slower
    nox                                      # oldest on Python 3.11, newest on 3.11, 3.12, 3.13
    nox -s bridges                           # nnsight's lines of docs/probing.md, on Python 3.12
    nox -s newest-3.13 -- tests -k gloo      # what follows the -- goes to pytest

torch's CUDA build runs on a machine without a GPU too, but fills gigabytes an environment: too
much for .ci/run. Run it before a bound moves; the GitHub workflow does every week.
UV_TORCH_BACKEND=cpu makes uv take torch's CPU build; --envdir puts environments on another disk.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

# What CI installs and tests: `make .venv/dev` owns the list.
EXTRAS = re.findall(r"\[(dev,.*)\]", Path(__file__).with_name("Makefile").read_text())[0].split(",")
SHOWN = ["torch", "deepspeed", "megatron-core", "transformers", "tokenizers", "numpy", "pyarrow"]

nox.options.default_venv_backend = "uv|virtualenv"


# On the oldest Python alone: the oldest releases have no wheels for newer ones (numpy 2.0, 3.13).
@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """Every direct dependency at its lower bound.

    Not `uv --resolution lowest-direct`: where a bound does not go with the others, that takes a
    newer release without a word, and nobody has run the bound. A pin ends in a message.
    """
    project = nox.project.load_toml("pyproject.toml")["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in optional[extra])]
    run_tests(session, *(re.sub(r">=([\w.]+).*", r"==\1", line) for line in lines))


@nox.session(python=["3.11", "3.12", "3.13"])
def newest(session: nox.Session) -> None:
    """What a user gets who installs today, without constraints.txt."""
    run_tests(session)


@nox.session(python="3.12")
def bridges(session: nox.Session) -> None:
    """The test of the library that docs/probing.md hands models to, which CI does not install."""
    session.install("-e", ".[dev,hf,bridges]", env={"DS_BUILD_OPS": "0"})
    session.run("python", "-m", "pytest", "tests/probing/test_nnsight.py", *session.posargs)


def run_tests(session: nox.Session, *pins: str) -> None:
    """Install with `pins`, show the versions, run the fast tests."""
    # DS_BUILD_OPS=0: DeepSpeed compiles operators when they are first used, and needs no torch now.
    session.install("-e", f".[{','.join(EXTRAS)}]", *pins, env={"DS_BUILD_OPS": "0"})
    show = f"from importlib.metadata import version; print({{p: version(p) for p in {SHOWN}}})"
    session.run("python", "-c", show)
    fast = ["-m", "not slow and not slurm and not gpu", "-n", "2", "--dist", "loadfile"]
    session.run("python", "-m", "pytest", *fast, *session.posargs)
