"""Who may import whom, read from the source with ast: packages by the table below, libraries behind their fences."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("data_prep/**/*.py")])

# From top to bottom. A package may import what stands below it; `a, b` may also know each other, `a | b` may not.
# `commands` are the files directly in the folder, except its leaves.
LAYERS = {
    "pipeline": """
        api
        commands
        rehearsal | scaling | sweeping
        training, inference
        huggingface, tracking
        probing
        evaluation, checkpoint
        engine
        data | model | planning | resilience
        config, distributed
        leaves
    """,
    "data_prep": """
        commands
        cleaning | tokens
        sources
        leaves
    """,
}
LEAVES = {
    "pipeline": {
        "cli",
        "completion",
        "errors",
        "files",
        "help_page",
        "log",
        "patching",
        "presets",
        "redaction",
        "remote",
        "schema",
        "shapes",
        "suggestions",
    },
    "data_prep": {"forking", "jobs"},
}

# library, or a package of ours that stands for one -> places that may import it
FENCES = {
    "hydra": ["pipeline.cli", "pipeline.presets", "pipeline.sweeping.points"],
    "deepspeed": ["pipeline.engine.deepspeed", "pipeline.rehearsal"],
    "pipeline.engine.deepspeed": ["pipeline.engine.deepspeed", "pipeline.training.build"],
    "megatron": ["pipeline.model", "pipeline.distributed", "pipeline.engine.deepspeed.mpu"],
    "wandb": ["pipeline.tracking.wandb_run"],
    "tensorboard": ["pipeline.tracking.tensorboard_run"],
    "transformers": ["pipeline.huggingface", "pipeline.inference"],
    "peft": ["pipeline.huggingface.peft"],
}
# what data_prep may take from pipeline
SHARED = {
    "pipeline",
    "pipeline.cli",
    "pipeline.data",
    "pipeline.data.canary_list",
    "pipeline.data.chat",
    "pipeline.data.dataset_files",
    "pipeline.data.manifest",
    "pipeline.data.picture_files",
    "pipeline.data.pictures",
    "pipeline.data.pii_report",
    "pipeline.data.shard_format",
    "pipeline.data.special_tokens",
    "pipeline.data.tokenizer",
    "pipeline.errors",
    "pipeline.files",
    "pipeline.log",
    "pipeline.redaction",
    "pipeline.remote",
    "pipeline.shapes",
}
# who may take all settings of a run: who parses, judges or wires them; the others get their sections
TAKERS_OF_ALL_SETTINGS = {
    "pipeline.config", "pipeline.planning.job", "pipeline.planning.advice",
    "pipeline.planning.search", "pipeline.planning.page", "pipeline.rehearsal", "pipeline.scaling",
    "pipeline.training",
    "pipeline.train", "pipeline.api", "pipeline.sweep", "pipeline.sweeping.points",
    "pipeline.preflight", "pipeline.plan", "pipeline.order_audit",
}  # fmt: skip
ENTRY_POINTS = [
    "pipeline/train.py", "pipeline/preflight.py", "pipeline/evaluate.py", "pipeline/plan.py",
    "pipeline/probe.py",
]  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


@functools.cache
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


def package_of(module: str) -> str:
    """The row of LAYERS that a module belongs to: its package, `commands`, or `leaves`.

    A package's __main__ is a command: pipeline.checkpoint merges with bases of Hugging Face folders.
    pipeline.api is for Python what the commands are for the terminal, and starts one of them.
    """
    top, *rest = module.split(".")
    if rest and rest[-1] == "__main__":
        return "commands"
    if rest == ["api"]:
        return "api"
    if not rest or rest[0] in LEAVES[top]:
        return "leaves"
    return rest[0] if (ROOT / top / rest[0]).is_dir() else "commands"


def is_allowed(top: str, importer: str, imported: str) -> bool:
    """Whether the table lets package `importer` of `top` import package `imported` of it."""
    rows = [row.strip() for row in LAYERS[top].strip().splitlines()]
    level = {
        name.strip(): number
        for number, row in enumerate(rows)
        for name in row.replace("|", ",").split(",")
    }
    if importer == imported:
        return importer != "commands"
    is_open = "|" not in rows[level[importer]]
    return level[importer] < level[imported] or (level[importer] == level[imported] and is_open)


def wrong_imports(top: str, found: dict[str, set[str]]) -> list[str]:
    """`importer -> imported` for every import inside `top` that the table forbids."""
    return [
        f"{module} -> {other}"
        for module, others in sorted(found.items())
        for other in sorted(others)
        if other.split(".")[0] == top and not is_allowed(top, package_of(module), package_of(other))
    ]


def fence_breaks(library: str, found: dict[str, set[str]]) -> list[str]:
    """Modules that import a library although they stand outside its fence."""
    return [
        module
        for module, others in sorted(found.items())
        if any(f"{other}.".startswith(f"{library}.") for other in others)
        and not any(module == place or module.startswith(f"{place}.") for place in FENCES[library])
    ]


@pytest.mark.parametrize("top", LAYERS)
def test_imports_run_downwards_only(top):
    """A change of one subject touches one package; what stands below never needs what stands above."""
    found = {name: imports(path) for name, path in MODULES.items() if name.split(".")[0] == top}
    assert wrong_imports(top, found) == []


def test_every_package_stands_in_the_table():
    """A new folder must say who may import it."""
    for top, table in LAYERS.items():
        folders = {
            path.name for path in (ROOT / top).iterdir() if path.is_dir() and any(path.glob("*.py"))
        }
        assert folders == set(table.replace(",", " ").replace("|", " ").split()) - {
            "api",
            "commands",
            "leaves",
        }


def test_an_upward_import_and_a_stranger_are_found():
    """The checks can fail: one planted import of each forbidden kind."""
    assert wrong_imports("pipeline", {"pipeline.engine.engine": {"pipeline.checkpoint.tensors"}})
    assert wrong_imports("pipeline", {"pipeline.data.batch": {"pipeline.model.gpt"}})
    assert wrong_imports("pipeline", {"pipeline.train": {"pipeline.evaluate"}})
    assert wrong_imports("data_prep", {"data_prep.sources.inputs": {"data_prep.tokens.encode"}})
    assert not wrong_imports(
        "pipeline", {"pipeline.checkpoint.restore": {"pipeline.engine.engine"}}
    )
    assert not wrong_imports("pipeline", {"pipeline.training.trainer": {"pipeline.errors"}})
    assert fence_breaks("deepspeed", {"pipeline.engine.engine": {"deepspeed.comm"}})
    assert not fence_breaks("deepspeed", {"pipeline.engine.deepspeed.plain": {"deepspeed"}})
    ours = {"pipeline.engine.engine": {"pipeline.engine.deepspeed.runners"}}
    assert fence_breaks("pipeline.engine.deepspeed", ours)


@pytest.mark.parametrize("library", FENCES)
def test_library_is_imported_only_behind_its_fence(library):
    """A library that changes, or is missing, must touch one place."""
    assert fence_breaks(library, {name: imports(path) for name, path in MODULES.items()}) == []


def takers(found: dict[str, set[str]]) -> list[str]:
    """Modules that take all settings of a run although they should take sections."""
    return [
        module
        for module, others in sorted(found.items())
        if "pipeline.config.pretrain" in others
        and not {module, module.rpartition(".")[0]} & TAKERS_OF_ALL_SETTINGS
    ]


def test_who_computes_takes_sections_and_not_all_settings_of_a_run():
    """What a part depends on stands in its signature; an evaluation needs no pretended run."""
    assert takers({name: imports(path) for name, path in MODULES.items()}) == []
    assert takers({"pipeline.engine.engine": {"pipeline.config.pretrain"}})


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
            assert not {"torch", "megatron", "deepspeed"} & {
                module.split(".")[0] for module in imports(path)
            }, path


def test_pipeline_does_not_import_data_prep():
    """Training needs shards, not what made them."""
    for name, path in MODULES.items():
        if name.startswith("pipeline"):
            assert not [module for module in imports(path) if module.startswith("data_prep")], path


def test_there_is_no_import_cycle():
    """Reading order exists: whatever a file uses can be read before it."""
    graph = {
        name: {m for m in imports(path) if m in MODULES and m != name}
        for name, path in MODULES.items()
    }
    for package in [name for name, path in MODULES.items() if path.name == "__init__.py"]:
        graph.pop(package)
    for needs in graph.values():
        needs.intersection_update(graph)
    TopologicalSorter(graph).prepare()


def imported_with(start: str) -> dict[str, set[str]]:
    """Modules of ours that come with one, and what each imports when it is itself imported."""
    found: dict[str, set[str]] = {}
    waiting = [start]
    while waiting:
        if (name := waiting.pop()) not in found:
            found[name] = imports(MODULES[name], at_top_only=True)
            waiting += [module for module in found[name] if module in MODULES]
    return found


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_entry_point_imports_no_torch_before_the_config_is_checked(entry):
    """--help and a misspelt key answer at once."""
    for name, found in imported_with(name_of(ROOT / entry)).items():
        assert not {"torch", "hydra", "wandb", "deepspeed"} & {
            module.split(".")[0] for module in found
        }, name


@pytest.mark.parametrize(
    "start",
    ["pipeline.engine.forward_only", "pipeline.training.initial_weights", "pipeline.engine.engine"],
)
def test_no_deepspeed_comes_with(start):
    """An evaluation took 0.4 s of CPU longer for it; a step is arithmetic, whoever runs it."""
    found = imported_with(start)
    assert fence_breaks("deepspeed", found) == []
    assert [name for name in found if name.startswith("pipeline.engine.deepspeed")] == []


@pytest.mark.slow
def test_an_interpreter_that_has_the_engine_has_no_deepspeed():
    """What the sources say, and what other libraries bring along."""
    code = "import sys, pipeline.engine.engine; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "pipeline.engine.engine" in loaded
    assert [name for name in loaded if "deepspeed" in name.split(".")] == []
