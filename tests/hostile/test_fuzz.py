"""Whatever bytes a file has, its parser gives a value or a PipelineError."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cleaning.report import SHAPE as REPORT
from data_prep.jobs import read_own
from data_prep.tokens.dataset_writer import JOB
from data_prep.tokens.shard_writer import Part
from pipeline.checkpoint import dcp
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.adapters import recorded_base
from pipeline.checkpoint.index import read_index
from pipeline.checkpoint.record import read_record
from pipeline.data.chat import ChatTemplate
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import PipelineError
from pipeline.evaluation.answers import read_questions
from pipeline.files import sha256_of
from pipeline.huggingface.settings import read_model_config
from pipeline.huggingface.tensor_files import weight_files
from pipeline.resilience import goodput, ownership
from pipeline.tracking.history import History
from tests.hostile.test_checkpoints import STEP, VERSION_1, checkpoint, record
from tests.hostile.test_datasets import dataset, write_manifest
from tests.hostile.test_hugging_face import INDEX, LLAMA
from tests.hostile.test_run_folders import run_folder
from tests.support.hostile import WRONG

PART = {"name": "a.tar", "key": 0, "source": "x", "tokens": 1, "documents": 1, "bytes": 9, "sha256": "",
        "blocks": [], "inputs": ["a"]}  # fmt: skip
TALK = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "group": "g",
}
COUNTS = dict.fromkeys(
    ("documents_in", "documents_out", "documents_changed", "bytes_in", "bytes_out"), 1
)
JSON = st.recursive(
    st.sampled_from(list(WRONG.values())) | st.text(max_size=9) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)  # fmt: skip


def bytes_like(valid: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes; any JSON; the valid file with a piece replaced; its object with another value somewhere."""
    place = st.integers(0, len(valid))
    spliced = st.builds(
        lambda a, b, new: valid[: min(a, b)] + new + valid[max(a, b) :],
        place,
        place,
        st.binary(max_size=9),
    )
    near = st.builds(
        lambda a, new: valid[:a] + new + valid[a + len(new) :],
        place,
        st.binary(min_size=1, max_size=2),
    )
    kinds = [
        st.binary(max_size=200),
        st.builds(lambda v: json.dumps(v).encode(), JSON),
        spliced,
        near,
    ]
    try:
        content = json.loads(valid)
    except ValueError:
        return st.one_of(kinds)
    keys = st.sampled_from(sorted(content))
    changed = st.builds(lambda key, value: json.dumps(content | {key: value}).encode(), keys, JSON)
    return st.one_of(*kinds, changed)


def template_of(folder: Path) -> ChatTemplate:
    source = (folder / "chat_template.jinja").read_bytes().decode(errors="replace")
    return ChatTemplate(source, Tokenizer.from_file(folder))


def open_sealed(folder: Path) -> None:
    """A dataset whose manifest its author has sealed, with the index that he wrote."""
    path, index = folder / "manifest.json", folder / "index.npy"
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        if index.exists():
            content["index_sha256"] = sha256_of(index)
        write_manifest(path, content)
    manifest = Manifest.load(folder)
    for shard in range(min(manifest.num_shards, 3)):
        manifest.block_row(shard, 0)


# file -> the parser of a folder that holds it; VALID has its content where no valid folder has one
PARSERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint.json": lambda folder: recorded_base(read_record(folder)),
    "tensors.json": lambda folder: read_index(folder / "tensors.json"),
    "SHA256SUMS": folders.read_sums,
    ".metadata": dcp.open_version_1,
    "tokenizer.json": Tokenizer.from_file,
    "chat_template.jinja": template_of,
    "manifest.json": open_sealed,
    "index.npy": open_sealed,
    "metrics.jsonl": History.load,
    "evaluation.json": History.load,
    "owner/00000001.json": lambda folder: ownership._owner(folder / "owner"),
    "logs/attempts/0000.json": lambda folder: goodput._read(folder / "logs/attempts/0000.json"),
    "job.json": lambda folder: read_own(folder / "job.json", JOB),
    "report.json": lambda folder: read_own(folder / "report.json", REPORT),
    "part.json": lambda folder: Part.of(read_own(folder / "part.json", dict)),
    "config.json": read_model_config,
    "model.safetensors.index.json": weight_files,
    "talk.jsonl": lambda folder: read_questions(folder / "talk.jsonl"),
}
VALID = {
    "job.json": {
        "units": 1,
        "validation_fraction": 0.1,
        "tokenizer": {"sha256": "", "vocab_size": 9, "eod": 0},
    },
    "report.json": {"steps": {"a": COUNTS}, "dropped": {}},
    "part.json": PART,
    "config.json": LLAMA,
    "model.safetensors.index.json": INDEX,
    "talk.jsonl": TALK,
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each of the files, which in life lie in many."""
    folder = tmp_path_factory.mktemp("fuzz") / "valid"
    dataset(folder)
    run_folder(folder)
    step = checkpoint(folder, record() | {"base": {"path": "x", "sha256": "y"}}) / STEP
    shutil.copytree(step, folder, dirs_exist_ok=True)
    shutil.copy(VERSION_1 / ".metadata", folder)
    for name, content in VALID.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", PARSERS)
def test_any_bytes_are_read_or_refused(valid, name):
    """And the valid ones are read: nothing else is refused here."""
    path, parse = valid / name, PARSERS[name]
    content = path.read_bytes()

    @settings(deadline=None, max_examples=30, database=None)
    @given(bytes_like(content))
    def read(changed: bytes) -> None:
        path.write_bytes(changed)
        with contextlib.suppress(PipelineError):
            parse(valid)

    parse(valid)
    before = (valid / "manifest.json").read_bytes()
    try:
        read()
    finally:
        path.write_bytes(content)
        if name != "manifest.json":
            (valid / "manifest.json").write_bytes(before)
