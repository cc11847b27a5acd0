"""The shape of the source: who tests what, how long things are, what is explained. Read with ast."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def modules(*tops: str) -> list[Path]:
    return sorted(
        path for top in tops for path in ROOT.glob(f"{top}/**/*.py") if path.name != "__init__.py"
    )


SOURCES = modules("pipeline", "data_prep")
# Measured, not tested module by module (tests/test_benchmarks.py), but read like the rest.
READ = SOURCES + modules("benchmarks")
TESTS = modules("tests")
MAX_FILE_LINES, MAX_FUNCTION_LINES, EXPLAINED_ABOVE_LINES = 350, 60, 10

LAYOUTS = "a part of every step: its test is that all layouts, and plain torch, give the same"
JOB = "a part of one job, whose output is compared byte for byte"
FIELDS = "fields without behaviour: every preset and recipe is composed"
SOURCE = "a kind of source: all kinds give the same documents, and are damaged alike"
REHEARSAL = "a part of a rehearsal, which runs in a process of its own"
SAVED = "a part of saving and resuming: any layout resumes any other"
RUN = "a part of a run from its start to its end"
FOLDER = "a part of an export: logits are compared with those of transformers"
PROBED = "findings of the whole, beside those of transformers"
# What has no test file of its own name: where it is tested, and why there.
TESTED_IN = {
    "data_prep/cleaning/hashing.py": ("cleaning/test_dedup.py", "keys are made to be linked"),
    "data_prep/cleaning/job.py": ("test_clean.py", JOB),
    "data_prep/cleaning/one_pass.py": ("test_clean.py", JOB),
    "data_prep/cleaning/recipes.py": ("test_clean.py", JOB),
    "data_prep/cleaning/report.py": ("test_clean.py", JOB),
    "data_prep/cleaning/stages.py": ("test_clean.py", JOB),
    "data_prep/finalize.py": ("test_tokenize.py", JOB),
    "data_prep/jobs.py": ("test_tokenize.py", JOB),
    "data_prep/sources/dialogues.py": ("test_conversations.py", "what the command reads"),
    "data_prep/sources/kinds.py": ("sources/test_documents.py", SOURCE),
    "data_prep/sources/lines.py": ("sources/test_bad_input.py", SOURCE),
    "data_prep/sources/listing.py": ("sources/test_remote_input.py", SOURCE),
    "data_prep/sources/picture_records.py": ("tokens/test_bad_picture_records.py", SOURCE),
    "data_prep/sources/pieces.py": ("sources/test_bad_input.py", SOURCE),
    "data_prep/sources/records.py": ("sources/test_bad_input.py", SOURCE),
    "data_prep/sources/tars.py": ("sources/test_bad_input.py", SOURCE),
    "data_prep/sources/token_files.py": ("test_import_tokens.py", JOB),
    "data_prep/tokens/browse.py": ("test_show.py", "the command prints what it finds"),
    "data_prep/tokens/check.py": ("test_verify.py", "the command prints what it yields"),
    "data_prep/tokens/conversation_job.py": ("test_conversations.py", JOB),
    "data_prep/tokens/dataset_writer.py": ("test_tokenize.py", JOB),
    "data_prep/tokens/find.py": ("test_trace.py", "the command prints what it finds"),
    "pipeline/huggingface/json_files.py": ("huggingface/test_settings.py", "two lines each"),
    "pipeline/huggingface/other_families.py": ("huggingface/test_settings.py", "a table of words"),
    "pipeline/huggingface/processor.py": ("huggingface/test_llava.py", FOLDER),
    "pipeline/model/vision.py": ("engine/test_pictures.py", LAYOUTS),
    "data_prep/tokens/import_job.py": ("test_import_tokens.py", JOB),
    "data_prep/tokens/split.py": ("test_tokenize.py", JOB),
    "pipeline/checkpoint/__main__.py": ("checkpoint/test_folder.py", SAVED),
    "pipeline/checkpoint/restore.py": ("checkpoint/test_checkpointer.py", SAVED),
    "pipeline/checkpoint/seen.py": ("test_trace.py", "the command that asks what was read"),
    "pipeline/checkpoint/tools.py": ("checkpoint/test_folder.py", SAVED),
    "pipeline/config/choices.py": ("config/test_conf.py", FIELDS),
    "pipeline/config/data.py": ("config/test_conf.py", FIELDS),
    "pipeline/config/data_rules.py": ("config/test_run_shape.py", "derive() keeps the rules"),
    "pipeline/config/evaluation.py": (
        "config/test_run_shape.py",
        "derive_evaluation() is given it",
    ),
    "pipeline/config/layout_rules.py": ("config/test_run_shape.py", "derive() keeps the rules"),
    "pipeline/config/finetune.py": ("config/test_conf.py", FIELDS),
    "pipeline/config/model.py": ("config/test_conf.py", FIELDS),
    "pipeline/config/model_rules.py": ("config/test_run_shape.py", "derive() keeps the rules"),
    "pipeline/config/name_rules.py": ("model/test_lora.py", "derive() keeps the rules"),
    "pipeline/config/operation.py": ("config/test_conf.py", FIELDS),
    "pipeline/config/operation_rules.py": ("config/test_run_shape.py", "derive() keeps the rules"),
    "pipeline/config/parallel_sizes.py": (
        "config/test_run_shape.py",
        "derived with the run's shape",
    ),
    "pipeline/config/pretrain.py": ("config/test_conf.py", FIELDS),
    "pipeline/config/rules.py": ("config/test_run_shape.py", "derive() keeps the rules"),
    "pipeline/config/step_shape.py": ("config/test_run_shape.py", "derived with the run's shape"),
    "pipeline/config/training.py": ("config/test_conf.py", FIELDS),
    "pipeline/data/canary_list.py": ("tokens/test_canaries.py", "the list that data_prep writes"),
    "pipeline/data/pii_report.py": ("tokens/test_pii_tally.py", "the report that data_prep writes"),
    "pipeline/config/privacy_rules.py": ("training/test_privacy.py", "what a private run refuses"),
    "pipeline/huggingface/card_facts.py": ("training/test_privacy.py", "what a card says of it"),
    "pipeline/data/batch.py": ("data/test_loader.py", "what the loader hands out"),
    "pipeline/data/dataset_files.py": ("data/test_manifest.py", "what a manifest leads to"),
    "pipeline/data/datasets.py": ("data/test_loader.py", "what the loader reads"),
    "pipeline/data/reading_plan.py": ("test_preflight.py", "the plan that preflight checks"),
    "pipeline/data/sampler.py": ("data/test_loader.py", "the loader's order and state"),
    "pipeline/data/special_tokens.py": ("data/test_tokenizer.py", "a part of the tokenizer"),
    "pipeline/distributed/layout.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/distributed/megatron_on_cpu.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/engine/counting.py": ("engine/test_forward_only.py", "sums of an evaluation"),
    "pipeline/engine/deepspeed/changes.py": ("engine/test_host_waits.py", "each replaces a wait"),
    "pipeline/engine/deepspeed/environment.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/engine/deepspeed/mpu.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/engine/deepspeed/plain.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/engine/deepspeed/runners.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/engine/deepspeed/settings.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/engine/deepspeed/slots.py": ("checkpoint/test_checkpointer.py", SAVED),
    "pipeline/engine/deepspeed/staged.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/engine/home_ranks.py": ("engine/test_muon.py", "the work it shares out"),
    "pipeline/engine/runner.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/engine/state.py": ("checkpoint/test_checkpointer.py", SAVED),
    "pipeline/engine/weights.py": ("engine/test_forward_only.py", "both holders of weights"),
    "pipeline/huggingface/decoder.py": ("huggingface/test_mapping.py", FOLDER),
    "pipeline/huggingface/gpt2.py": ("huggingface/test_mapping.py", FOLDER),
    "pipeline/huggingface/mixtures.py": ("huggingface/test_mapping.py", FOLDER),
    "pipeline/huggingface/rules.py": ("huggingface/test_mapping.py", FOLDER),
    "pipeline/huggingface/merge.py": ("checkpoint/test_adapters.py", SAVED),
    "pipeline/huggingface/whole_model.py": ("checkpoint/test_adapters.py", SAVED),
    "pipeline/evaluation/memorization_file.py": ("test_memorization.py", "the command writes it"),
    "pipeline/inference/asked_model.py": ("test_evaluate.py", "the command is asked through it"),
    "pipeline/checkpoint/index.py": ("checkpoint/test_tensors.py", "what is read goes by it"),
    "pipeline/model/activations.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/model/architecture.py": ("planning/test_flops.py", "parameters are counted"),
    "pipeline/model/block.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/engine/deepspeed/experts.py": ("model/test_moe.py", "the layer that has them"),
    "pipeline/model/experts.py": ("model/test_moe.py", "the layer that holds them"),
    "pipeline/model/fragments.py": ("checkpoint/test_checkpointer.py", SAVED),
    "pipeline/model/gpt.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/model/local_model.py": ("test_export.py", FOLDER),
    "pipeline/model/megatron_config.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/model/stage_layers.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/model/tensor_parallel.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/planning/communication.py": ("planning/test_step_time.py", "seconds of a step"),
    "pipeline/planning/job.py": ("planning/test_memory.py", "what memory is counted from"),
    "pipeline/planning/kept.py": ("planning/test_memory.py", "what memory is counted from"),
    "pipeline/planning/table.py": ("test_plan.py", "the command prints it"),
    "pipeline/scaling/card.py": ("scaling/test_scaling.py", "the command writes it"),
    "pipeline/node_check.py": ("resilience/test_node_check.py", "the command prints its result"),
    "pipeline/probing/findings.py": ("test_probe.py", "the command writes and prints them"),
    "pipeline/probing/interventions.py": ("probing/test_probe.py", PROBED),
    "pipeline/probing/measures.py": ("probing/test_probe.py", PROBED),
    "pipeline/probing/passage.py": ("probing/test_probe.py", PROBED),
    "pipeline/probing/readout.py": ("probing/test_probe.py", PROBED),
    "pipeline/rehearsal/fake_cuda.py": ("rehearsal/test_dry_run.py", REHEARSAL),
    "pipeline/rehearsal/one_rank.py": ("rehearsal/test_dry_run.py", REHEARSAL),
    "pipeline/rehearsal/watch.py": ("rehearsal/test_dry_run.py", REHEARSAL),
    "pipeline/tracking/tracker.py": ("tracking/test_feed.py", "an interface: who calls it"),
    "pipeline/training/build.py": ("engine/test_equivalence.py", LAYOUTS),
    "pipeline/training/initial_weights.py": ("checkpoint/test_checkpointer.py", SAVED),
    "pipeline/training/run_metrics.py": ("test_train.py", RUN),
    "pipeline/training/state.py": ("test_train.py", RUN),
    "pipeline/training/step_extras.py": ("test_train.py", RUN),
}
# What is longer and should be: tables.
LONG_FUNCTIONS: dict[str, str] = {}
LONG_FILES: dict[str, str] = {}
NOT_EXPLAINED: set[str] = set()


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_file(source: Path) -> Path:
    """tests/<package>/test_<module>.py; the commands' and leaves' directly in tests/."""
    inside = source.relative_to(ROOT / source.relative_to(ROOT).parts[0])
    stem = inside.parent.name if inside.name == "__main__.py" else inside.stem
    return ROOT / "tests" / inside.parent / f"test_{stem}.py"


test_file.__test__ = False  # type: ignore[attr-defined]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_every_module_has_a_test_file_of_its_name_or_stands_in_the_list():
    """Who changes a file finds its tests without a search."""
    without = {name(source) for source in SOURCES if not test_file(source).exists()}
    assert without - set(TESTED_IN) == set(), "write the test file, or say where the test is"
    assert set(TESTED_IN) - without == set(), "take it off the list"


def test_the_list_of_tests_names_files_that_exist():
    assert [test for test, _ in TESTED_IN.values() if not (ROOT / "tests" / test).exists()] == []


def test_no_file_is_longer_than_a_sitting():
    """One person reads the project in a day."""
    long = {
        name(p): n for p in READ + TESTS if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert {path: n for path, n in long.items() if path not in LONG_FILES} == {}
    assert set(LONG_FILES) - set(long) == set(), "take it off the list"


def test_no_function_is_longer_than_a_page():
    """What has no end on the page is several things."""
    long = {
        f"{name(path)}:{node.name}": length(node)
        for path in READ + TESTS
        for node in functions(path)
        if length(node) > MAX_FUNCTION_LINES
    }
    assert {place: n for place, n in long.items() if place not in LONG_FUNCTIONS} == {}
    assert set(LONG_FUNCTIONS) - set(long) == set(), "take it off the list"


def test_a_private_function_of_more_than_ten_lines_is_explained():
    """Public names have docstrings by the linter's rule; the others need one when a glance is not enough."""
    silent = {
        f"{name(path)}:{node.name}"
        for path in READ
        for node in functions(path)
        if node.name.startswith("_")
        and not node.name.startswith("__")
        and length(node) > EXPLAINED_ABOVE_LINES
        and not ast.get_docstring(node)
    }
    assert silent - NOT_EXPLAINED == set()
    assert NOT_EXPLAINED - silent == set(), "take it off the list"


@pytest.mark.parametrize("source", READ, ids=name)
def test_a_module_says_in_its_first_line_what_it_is(source):
    """One sentence on one line: it is what editors and `--help` show."""
    lines = (ast.get_docstring(ast.parse(source.read_text())) or "").splitlines()
    assert lines, "no docstring"
    assert lines[0].endswith((".", "?")) and (len(lines) == 1 or not lines[1].strip()), lines[:2]
