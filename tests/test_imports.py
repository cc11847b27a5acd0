"""Who may import whom: ARCHITECTURE in the README, read from the source with ast."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("data_prep/**/*.py")])

# library -> files that may import it
FENCES = {
    "hydra": ["pipeline/cli.py"],
    "deepspeed": ["pipeline/engine.py", "pipeline/engine_*.py"],
    "megatron": [
        "pipeline/distributed.py",
        "pipeline/cpu_shim.py",
        "pipeline/model/layers.py",
        "pipeline/model/parallel.py",
    ],
    "wandb": ["pipeline/metrics.py"],
}
# what data_prep may take from pipeline
SHARED = {
    "pipeline",
    "pipeline.cli",
    "pipeline.data",
    "pipeline.data.shard_format",
    "pipeline.data.tokenizer",
    "pipeline.errors",
    "pipeline.log",
}
ENTRY_POINTS = ["pipeline/train.py"]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


def imports(path: Path, *, at_top_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it or only when it is itself imported."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    skipped = _deferred(tree) if at_top_only else set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


def _deferred(tree: ast.AST) -> set[ast.AST]:
    """Nodes inside functions and `if TYPE_CHECKING` blocks."""
    deferred: set[ast.AST] = set()
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if is_function or is_typing:
            deferred |= set(ast.walk(node)) - {node}
    return deferred


@pytest.mark.parametrize("library", FENCES)
def test_library_is_imported_only_behind_its_fence(library):
    """A library that changes, or is missing, must touch one file."""
    outside = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(module.split(".")[0] == library for module in imports(path))
        and not any(path.match(str(ROOT / allowed)) for allowed in FENCES[library])
    ]
    assert outside == []


def test_data_prep_takes_only_the_shared_modules_of_the_pipeline():
    """Data is prepared on machines that train nothing."""
    for path in SOURCES:
        if path.is_relative_to(ROOT / "data_prep"):
            own = {module for module in imports(path) if module.split(".")[0] == "pipeline"}
            assert own <= SHARED, path


def test_data_prep_needs_no_torch():
    """Neither itself nor through what it takes from the pipeline."""
    for name, path in MODULES.items():
        if name.startswith("data_prep") or name in SHARED:
            assert not {"torch", "megatron", "deepspeed"} & {module.split(".")[0] for module in imports(path)}, path


def test_model_and_data_do_not_know_each_other():
    """Either can be replaced alone."""
    for name, path in MODULES.items():
        for one, other in (("pipeline.model", "pipeline.data"), ("pipeline.data", "pipeline.model")):
            if name.startswith(one):
                assert not [module for module in imports(path) if module.startswith(other)], path


def test_pipeline_does_not_import_data_prep():
    """Training needs shards, not what made them."""
    for name, path in MODULES.items():
        if name.startswith("pipeline"):
            assert not [module for module in imports(path) if module.startswith("data_prep")], path


def test_there_is_no_import_cycle():
    """Reading order exists: whatever a file uses can be read before it."""
    graph = {name: {m for m in imports(path) if m in MODULES and m != name} for name, path in MODULES.items()}
    for package in [name for name, path in MODULES.items() if path.name == "__init__.py"]:
        graph.pop(package)
    for needs in graph.values():
        needs.intersection_update(graph)
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_entry_point_imports_no_torch_before_the_config_is_checked(entry):
    """--help and a misspelt key answer at once."""
    seen: set[str] = set()
    waiting = [name_of(ROOT / entry)]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        found = imports(MODULES[name], at_top_only=True)
        assert not {"torch", "hydra", "wandb", "deepspeed"} & {module.split(".")[0] for module in found}, name
        waiting += [module for module in found if module in MODULES]


def test_no_file_is_longer_than_a_sitting():
    """One person reads the project in a day."""
    long = {str(path.relative_to(ROOT)): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 420}
    assert long == {}
