"""The door for changes to foreign code: refuses what would do nothing, lists and undoes the rest."""

from __future__ import annotations

import ast
import gc
import re
import types
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import patching
from pipeline.errors import MachineError

ROOT = Path(__file__).resolve().parents[1]
WHY = {"why": "it waits", "upstream": "not reported", "proof": "tests/test_x.py::test_y"}
# A tensor's memory, and arguments that torch takes as attributes: name -> file.
OWN = {
    "held.data": "slots.py",
    "options._devices": "shared_gloo.py",
    "options._timeout": "shared_gloo.py",
}


class Foreign:
    """A library's class."""

    def wait(self) -> str:
        return "waited"


@pytest.fixture(autouse=True)
def empty_register(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_changes", "_originals"):
        monkeypatch.setattr(patching, name, {})
    monkeypatch.setattr(patching, "_left_out", set())


@pytest.fixture
def library() -> types.ModuleType:
    module = types.ModuleType("numpy.fake")
    vars(module)["wait"] = lambda: "waited"
    return module


def test_a_name_that_a_release_has_renamed_is_refused(library: types.ModuleType) -> None:
    """A plain assignment to it would do nothing and say nothing."""
    with pytest.raises(MachineError) as error:
        patching.replace(library, "wait_for", lambda: "went on", **WHY)
    for part in ("numpy 2", "no numpy.fake.wait_for", "it waits", "pip install -c constraints.txt"):
        assert part in str(error.value)
    assert not hasattr(library, "wait_for") and patching.changes() == []


def test_a_change_is_made_listed_and_undone(library: types.ModuleType) -> None:
    patching.replace(library, "wait", lambda: "went on", **WHY)
    assert library.wait() == "went on"
    assert [change.key for change in patching.changes()] == ["numpy.fake.wait"]
    patching.leave_out("numpy.fake.wait")
    assert library.wait() == "waited"
    patching.replace(library, "wait", lambda: "went on", **WHY)
    assert library.wait() == "waited", "left out for the life of the process"


def test_objects_of_a_class_count_once_and_are_not_kept_alive() -> None:
    """An engine is large."""
    first, second = Foreign(), Foreign()
    for item in (first, second):
        patching.replace(item, "wait", lambda: "went on", **WHY)
    assert (first.wait(), len(patching.changes())) == ("went on", 1)
    gone = weakref.ref(first)
    del first, item
    gc.collect()
    assert gone() is None
    patching.leave_out("wait")
    third = Foreign()
    patching.replace(third, "wait", lambda: "went on", **WHY)
    assert third.wait() == "waited"


def test_a_missing_name_is_supplied_and_an_existing_one_kept(library: types.ModuleType) -> None:
    patching.supply(library, "wait", None, **WHY)
    patching.supply(library, "gemm", None, **WHY)
    assert library.wait() == "waited" and library.gemm is None
    patching.leave_out("gemm")
    assert not hasattr(library, "gemm")


def assigned_attributes(source: str) -> Iterator[str]:
    """Attributes of other objects than self that a file assigns or deletes."""
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        if isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets = [node.target]
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            for part in parts:
                if isinstance(part, ast.Attribute) and ast.unparse(part.value) != "self":
                    yield ast.unparse(part)


def test_nothing_of_a_library_is_assigned_past_the_door() -> None:
    """Where libraries are changed: behind DeepSpeed's fence, and in distributed/."""
    assert list(assigned_attributes("engine.x = 1; self.y = 2; self.engine.z: int = 3")) == [
        "engine.x",
        "self.engine.z",
    ]
    for folder in ("pipeline/engine/deepspeed", "pipeline/distributed"):
        for path in sorted((ROOT / folder).glob("*.py")):
            found = [
                name for name in assigned_attributes(path.read_text()) if OWN.get(name) != path.name
            ]
            assert found == [], path


def test_every_test_that_a_source_file_names_exists() -> None:
    """A proof that has moved proves nothing."""
    named = {
        (path.name, name)
        for path in (ROOT / "pipeline").rglob("*.py")
        for name in re.findall(r"tests/[a-z_/0-9]*\.py", path.read_text())
    }
    assert named and [pair for pair in sorted(named) if not (ROOT / pair[1]).is_file()] == []
