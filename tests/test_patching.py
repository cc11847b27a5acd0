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
# What is written to objects of others than self: of our own classes, in the first row, or what their
# authors mean to be written. reason -> file in pipeline/ -> how it is written there.
WRITTEN = {
    "an object of ours": {
        "data/reader.py": ["windows.num_corrupt"],
        "distributed/lean_megatron.py": ["vars(jit)['jit_fuser']"],
        "engine/own_runs.py": ["setattr(seeing, name)", "setattr(own, name)"],
        "inference/samplers.py": ["other.cfg"],
        "model/decoder.py": ["memory.length"],
        "model/experts.py": ["part.tally"],
        "model/tensor_parallel.py": ["linear.is_float8"],
        "probing/passage.py": ["here.before", "here.after", "here.attended", "here.mlp", "here.context"],
        "rehearsal/one_rank.py": ["watch.group_names"],
        "tracking/history.py": ["history.facts", "history.steps", "history.heads", "history.lens", "history.final"],
        "training/continuation.py": ["problems.found"],
        "training/trainer.py": [
            "self.state.skipped_steps", "self.state.samples_seen", "self.state.restarts", "self.engine.private.salt",
        ],
    },
    "a mark on a parameter, under names of ours and of those who look for it": {
        "model/lora.py": ["vars(whole)['has_partial_gradient']"],
        "model/partition.py": ["vars(parameter).update()"],
        "model/tensor_parallel.py": ["vars(parameter)['has_partial_gradient']"],
    },
    "a tensor's memory": {"engine/deepspeed/slots.py": ["held.data"]},
    "a parameter's gradient, to which autograd then adds": {
        "engine/deepspeed/fp32_sums.py": ["parameter.grad"],
    },
    "what torch's optimizers take so, from its GradScaler": {
        "engine/engine.py": ["optimizer.grad_scale", "optimizer.found_inf"],
    },
    "has just been read under this name": {
        "files.py": ["error.filename"],
        "distributed/megatron_on_cpu.py": ["setattr(dispatcher, name)"],
        "engine/forward_only.py": ["part.training"],
        "inference/samplers.py": ["self.model.generation_config"],
        "inference/upstream.py": ["self.server.config.app"],
        "presets.py": ["store.repo"],
    },
    "refuses a name that it has not": {"distributed/shared_gloo.py": ["setattr(options, name)"]},
    "put back, behind the door": {
        "engine/deepspeed/changes.py": ["vars(accelerator).pop()"],
    },
    "of the standard library, which documents it": {
        "cli.py": ["sys.excepthook"],
        "log.py": ["logger.propagate", "sys.stdout", "sys.stderr"],
        "probing/dump.py": ["info.size"],
        "rehearsal/one_rank.py": ["sys.stdout"],
    },
    "a process that pretends to have a device; refuses a name that is not there": {
        "rehearsal/fake_cuda.py": ["setattr(owner, name)", "parameter.data", "parameter.fake_device", "vars_of_fakes.constant"],
        "rehearsal/one_rank.py": ["mock.patch()", "mock.patch.object()"],
    },
    "put back once a module is loaded": {"engine/deepspeed/environment.py": ["mock.patch.object()"]},
    "the door": {"patching.py": ["setattr(owner, change.name)", "delattr(owner, change.name)"]},
}  # fmt: skip


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


def test_a_change_for_two_reasons_is_left_out_for_one() -> None:
    """Each has its proof, which the other would turn red as well."""
    patching.leave_out(f"{__name__}.Foreign.wait: it waits")
    for why, expected in (("it waits", "waited"), ("it copies", "went on")):
        item = Foreign()
        patching.replace(item, "wait", lambda: "went on", **{**WHY, "why": why})
        assert item.wait() == expected
    assert len(patching.changes()) == 2


def test_a_missing_name_is_supplied_and_an_existing_one_kept(library: types.ModuleType) -> None:
    patching.supply(library, "wait", None, **WHY)
    patching.supply(library, "gemm", None, **WHY)
    assert library.wait() == "waited" and library.gemm is None
    patching.leave_out("gemm")
    assert not hasattr(library, "gemm")


def written_attributes(source: str) -> Iterator[str]:
    """Attributes of others than self that a file assigns or deletes, in every spelling.

    Autograd's ctx is there to be written on.
    """
    for node in ast.walk(ast.parse(source)):
        is_written = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        if isinstance(node, ast.Attribute) and is_written:
            if ast.unparse(node.value) not in ("self", "ctx"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Subscript) and is_written:
            if re.search(r"^vars\(|\.__dict__$", ast.unparse(node.value)):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in ("setattr", "delattr"):
                yield f"{function}({', '.join(map(ast.unparse, node.args[:2]))})"
            elif re.search(r"^(mock\.)?patch(\.|$)|__(set|del)attr__$", function) or re.search(
                r"^vars\(.*\)\.(update|pop|setdefault|clear)$", function
            ):
                yield f"{function}()"


def test_every_spelling_of_an_assignment_is_found() -> None:
    assert list(written_attributes("engine.x = 1; self.y = 2; self.engine.z: int = 3")) == [
        "engine.x",
        "self.engine.z",
    ]
    for source, found in {
        "a.x, b = 1, 2": "a.x",
        "a = b.x = 1": "b.x",
        "a.x += 1": "a.x",
        "del a.x": "a.x",
        "for a.x in y: ...": "a.x",
        "with y as a.x: ...": "a.x",
        "vars(a)['x'] = 1": "vars(a)['x']",
        "a.__dict__['x'] = 1": "a.__dict__['x']",
        "vars(a).update(x=1)": "vars(a).update()",
        "setattr(a, 'x', 1)": "setattr(a, 'x')",
        "object.__setattr__(a, 'x', 1)": "object.__setattr__()",
        "mock.patch.object(a, 'x', 1)": "mock.patch.object()",
    }.items():
        assert list(written_attributes(source)) == [found]
    assert not list(written_attributes("ctx.x = 1; y[0] = a.x; vars(a).items(); vars(a)['x']"))


def test_nothing_of_a_library_is_assigned_past_the_door() -> None:
    """Under a name that a release has renamed it would do nothing, and say nothing."""
    found = {
        (str(path.relative_to(ROOT / "pipeline")), name)
        for path in (ROOT / "pipeline").rglob("*.py")
        for name in written_attributes(path.read_text())
    }
    listed = {
        (path, name)
        for files in WRITTEN.values()
        for path, names in files.items()
        for name in names
    }
    assert found - listed == set(), "patching.replace, or a row in WRITTEN that says why not"
    assert listed - found == set(), "take it off the list"


def test_the_page_on_changes_names_every_file_that_makes_one() -> None:
    """Who looks for what is changed reads that table, not the source."""
    making = {
        "/".join(path.parts[-2:])
        for path in (ROOT / "pipeline").rglob("*.py")
        if "from pipeline.patching import" in path.read_text()
    }
    page = (ROOT / "docs/performance.md").read_text()
    assert making - set(re.findall(r"\(`(\w+/\w+\.py)`\)", page)) == set()


def test_every_test_that_a_source_file_names_exists() -> None:
    """A proof that has moved proves nothing."""
    named = {
        (path.name, name)
        for path in (ROOT / "pipeline").rglob("*.py")
        for name in re.findall(r"tests/[a-z_/0-9]*\.py", path.read_text())
    }
    assert named and [pair for pair in sorted(named) if not (ROOT / pair[1]).is_file()] == []
