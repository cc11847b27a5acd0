"""The lock, and what tools/supply_chain.py says of an environment."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("supply_chain", ROOT / "tools/supply_chain.py")
assert spec is not None and spec.loader is not None
tool: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def distribution(name: str, version: str = "1", **fields: str) -> Any:
    metadata = Message()
    for key, value in {"Name": name, **fields}.items():
        metadata[key.replace("_", "-")] = value
    return SimpleNamespace(metadata=metadata, version=version)


def test_the_lock_has_the_versions_of_constraints_and_hashes_for_all() -> None:
    """A requirement without a hash would end CI's install; another version than users get would test nothing."""
    constraints = tool.pins((ROOT / "constraints.txt").read_text())
    lock = (ROOT / "requirements.lock").read_text()
    locked = tool.pins(lock)
    assert {name: version for name, version in locked.items() if constraints.get(name) != version and name not in tool.OURS} == {}  # fmt: skip
    assert {name for name, _ in tool.blocks(lock)} == set(locked)
    assert not [name for name in locked if tool.TORCH.fullmatch(name)]


def test_the_lock_has_every_direct_requirement_of_what_ci_installs() -> None:
    """What is missing there would be installed without a hash, and nobody would see it."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in tool.EXTRAS for line in project["optional-dependencies"][extra])]  # fmt: skip
    names = {tool.normal(re.match(r"[A-Za-z0-9._-]+", line)[0]) for line in lines}  # type: ignore[index]
    assert names - set(tool.pins((ROOT / "requirements.lock").read_text())) == {"torch"}


def test_every_set_of_versions_is_tested_with_the_extras_of_ci(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tests skip what is not installed: the oldest and the newest set ran without five extras, and said so nowhere."""
    monkeypatch.setitem(sys.modules, "nox", MagicMock())  # in no environment of ours
    nox = runpy.run_path(str(ROOT / "noxfile.py"))
    installed = re.findall(r'-e "\.\[([^]]*)\]"', (ROOT / "Makefile").read_text())
    assert [",".join(nox["EXTRAS"])] == [extras for extras in installed if "dev" in extras]
    assert tool.EXTRAS == nox["EXTRAS"]
    assert (ROOT / "requirements.lock").read_text().startswith(tool.HEAD)


ALLOWED = ["MIT", "Apache-2.0 AND MIT", "GPL-2.0 OR MIT", "MPL-2.0 AND (Apache-2.0 OR MIT)", "(MIT)", "BSD License", "Apache-2.0 WITH LLVM-exception"]  # fmt: skip
REFUSED = ["", "UNKNOWN", "GPL-3.0-only", "MIT AND GPL-2.0", "MIT AND (GPL-2.0 OR LGPL-2.1)", "AGPL-3.0 OR Proprietary"]  # fmt: skip


@pytest.mark.parametrize("expression", ALLOWED)
def test_licences_that_go_with_apache_pass(expression: str) -> None:
    assert tool.is_allowed(expression)


@pytest.mark.parametrize("expression", REFUSED)
def test_another_licence_does_not_pass(expression: str) -> None:
    """All that are joined by AND bind; of those joined by OR one is enough."""
    assert not tool.is_allowed(expression)


def test_each_thing_that_is_wrong_is_one_line() -> None:
    found = [
        distribution("good", License_Expression="MIT"),
        distribution("Classified_One", Classifier="License :: OSI Approved :: MIT License"),
        distribution("newer", "2", License="MIT"),
        distribution("copyleft", License_Expression="GPL-3.0-only"),
        distribution("pip", "99", License="whatever"),
        distribution("nvidia-cublas", "13", License="NVIDIA Proprietary Software"),
        distribution("torch", "9", License_Expression="BSD-3-Clause"),
    ]
    wrong = tool.problems(found, {"good": "1", "classified-one": "1", "newer": "1", "copyleft": "1"})  # fmt: skip
    assert len(wrong) == 2
    assert wrong[0] == "newer 2 is installed, constraints.txt has 1"
    assert wrong[1].startswith("copyleft 1: licence 'GPL-3.0-only'")
