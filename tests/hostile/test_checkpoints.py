"""Hostile checkpoints of both versions: every use ends well or in a PipelineError; no traceback, hang, code or file elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import log
from pipeline.checkpoint import __main__ as checkpoint_tool
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.folder import sums_text
from pipeline.checkpoint.record import read_record
from pipeline.config.data import DataConfig
from pipeline.config.operation import ResilienceConfig
from pipeline.data.sampler import Sampler
from pipeline.errors import CheckpointError
from pipeline.files import sha256_of
from tests.support.corpus import make_tokenizer
from tests.support.hostile import Damage, all_of, every, of_file, of_json, try_all, with_content

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
VERSION_1 = ROOT / "tests/checkpoint/version_1/step-00000001"
RECORD = json.loads((ROOT / "tests/checkpoint/checkpoint_v1.json").read_text())
IDENTITY = next(iter(RECORD["loader"]["ledger"]))
SIZES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "max_seq_len": 16}
STEP = "checkpoints/step-00000005"


def record() -> dict[str, Any]:
    """checkpoint.json of a model so small that its tensors can be written here."""
    config = RECORD["config"] | {"model": {"name": "small", **SIZES}}
    return RECORD | {"version": 2, "vocab_size": 300, "config": config}


def checkpoint(folder: Path, content: dict[str, Any] | None = None) -> Path:
    """A run with a checkpoint of the newest version."""
    from pipeline.checkpoint.record import CheckpointRecord
    from pipeline.checkpoint.safetensors_file import write_safetensors
    from pipeline.checkpoint.tensors import index_of
    from pipeline.config.finetune import FinetuneConfig
    from pipeline.config.parameter_names import parameter_shapes

    content = content or record()
    step = folder / STEP
    step.mkdir(parents=True)
    text = json.dumps(content)
    model = CheckpointRecord.from_json(text).model()
    shapes = parameter_shapes(model, FinetuneConfig(), vocab_size=300)
    parts = {f"weights/{name}": shape for name, shape in shapes.items()}
    parts["exp_avg/final_norm.weight"] = shapes["final_norm.weight"]
    whole = [(0, name, shape, (0,) * len(shape), shape) for name, shape in parts.items()]
    keyed = {f"{name}@{','.join('0' * len(shape))}": shape for name, shape in parts.items()}
    values = (torch.zeros(shape) for shape in parts.values())
    write_safetensors(step / "rank-00000.safetensors", keyed, values, torch.float32)
    (step / "tensors.json").write_text(json.dumps(index_of(whole)))
    (step / "checkpoint.json").write_text(text)
    shutil.copy(ROOT / "data_prep/chat/plain.jinja", step / "chat_template.jinja")
    make_tokenizer(step / "tokenizer.json", vocab_size=300)
    seal(step)
    (folder / "checkpoints/latest").write_text("step-00000005\n")
    return folder


def seal(step: Path) -> None:
    """SHA256SUMS of what is there: who damages a file can write its sum too."""
    files = [p for p in step.iterdir() if p.name != folders.SUMS and p.is_file()]
    ordinary = [p for p in files if not p.is_symlink()]
    (step / folders.SUMS).write_text(sums_text({p.name: sha256_of(p) for p in ordinary}))


def sealed(damage: Damage) -> Damage:
    return lambda path: (damage(path), seal(path.parent))[1]


def tool(folder: Path, command: str, **options: Any) -> Any:
    cfg = checkpoint_tool.ToolConfig(command=command, path=str(folder), **options)

    def run() -> None:
        with contextlib.redirect_stdout(log._Visible(sys.stdout)):  # type: ignore[type-var]
            checkpoint_tool.main(cfg)

    return run


def use_record(folder: Path) -> None:
    """What is done before a tensor is read: by the tools, a resumed run, evaluation and init_from."""
    from pipeline import evaluate
    from pipeline.config.choices import Activation
    from pipeline.config.model import ModelConfig
    from pipeline.huggingface.mapping import mapping_for
    from pipeline.huggingface.writer import DType, model_card
    from pipeline.inference import asked_model
    from pipeline.resilience.guard import Guard
    from pipeline.training import continuation
    from pipeline.training.state import TrainState

    step = folder / STEP

    def resume() -> None:
        found = read_record(folders.find(folder))
        TrainState.of(found.state)
        Guard(ResilienceConfig(), loss_scaling=False).restore(found.guard)
        sampler = Sampler(DataConfig(), [_Named()], seq_len=64, seed=1234)  # type: ignore[list-item]
        sampler.identities = [IDENTITY]
        position = sampler.position(found.loader)
        sampler.advance(position, 4)
        found.to_json()

    def asked() -> None:
        cfg = evaluate.EvaluateConfig(checkpoint=str(folder))
        asked_model.held_out_data(cfg, asked_model.model_of(folder)[3])

    def card() -> None:
        found = read_record(step)
        model_card(found, mapping_for(found.model()), DType.bf16)

    model = ModelConfig(name="x", activation=Activation.gelu_tanh, **SIZES)
    all_of(
        tool(folder, "list"),
        tool(folder, "show"),
        resume,
        card,
        lambda: read_record(step).finetune(),
        lambda: continuation.newest_record([folder / "checkpoints"]),
        lambda: continuation._check_initial_weights(folder, model, 300),
        asked,
    )


def use_checkpoint(folder: Path) -> None:
    """The tools, evaluation, generation and export, each in spite of the others."""
    from pipeline import export
    from pipeline.inference.generation import GenerateConfig
    from pipeline.inference.samplers import LocalSampler

    exported = str(folder / "exported")
    all_of(
        *(tool(folder, command) for command in ("list", "show", "verify")),
        tool(folder, "diff", other=str(folder)),
        lambda: read_tensors(folder),
        lambda: folders.prune(folder / "checkpoints", written=5, keep_last=1, keep_every=0),
        lambda: export.main(export.ExportConfig(str(folder), exported, check=False)),
        lambda: LocalSampler(folders.find(folder), GenerateConfig()),
    )


def read_tensors(folder: Path) -> None:
    """Every entry, whole."""
    from pipeline.checkpoint.tensors import CheckpointTensors

    found = CheckpointTensors(folders.find(folder))
    for name in found.names:
        found.tensor(name)


class _Named:
    """A dataset of which only the order is asked."""

    name = path = "train"
    identity, weight, max_epochs = IDENTITY, None, None
    is_remote = is_packed = False
    shard_tokens = np.array([69984])

    class manifest:  # noqa: N801
        tokens = 69984


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_files_of_checkpoints(tmp_path, outside, capsys, stride):
    valid = checkpoint(tmp_path / "valid")

    def cases() -> Iterator[tuple[str, str, Damage]]:
        damages = of_file(outside)
        for path in sorted((valid / STEP).iterdir()):
            if path.name != folders.SUMS:
                for name, damage in damages.items():
                    yield f"{STEP}/{path.name}", name, sealed(damage)
        yield from every([f"{STEP}/{folders.SUMS}", "checkpoints/latest"], damages)

    count = len(of_file(outside))  # of the next file the damages that this one was spared
    chosen = (c for n, c in enumerate(cases()) if (n + n // count * (count + 1)) % stride == 0)
    try_all(valid, use_checkpoint, chosen, least=150 // stride)
    assert "\x1b" not in capsys.readouterr().out, "a record's text commands the terminal"


def test_indices_of_checkpoints(tmp_path, outside, capsys):
    valid = checkpoint(tmp_path / "valid")
    index = json.loads((valid / STEP / "tensors.json").read_text())
    name = "weights/final_norm.weight"
    part = index | {"tensors": {name: index["tensors"][name]}}

    def write(path: Path, content: Any) -> None:
        if isinstance(content, dict) and isinstance(content.get("tensors"), dict):
            content["tensors"] = index["tensors"] | content["tensors"]
        path.write_text(json.dumps(content))
        seal(path.parent)

    def use(folder: Path) -> None:
        all_of(tool(folder, "show"), tool(folder, "verify"), lambda: read_tensors(folder))

    def cases() -> Iterator[tuple[str, str, Damage]]:
        for name, damage in of_json(part, depth=6, write=write):
            yield f"{STEP}/tensors.json", name, damage

    try_all(valid, use, cases(), least=150)


def test_records_of_checkpoints(tmp_path, outside, capsys):
    """Every fourth case, of 15 a field: neighbours have other kinds."""
    valid = checkpoint(tmp_path / "valid")
    content = record()
    few = {"model", "finetune", "optimizer", "name", "seed"}
    content["config"]["finetune"] = {"train": ["*"], "lora_rank": 0}
    content["base"] = {"path": "/nowhere", "sha256": "0"}
    content["end_of_turn"] = 3

    def write(path: Path, changed: Any) -> None:
        path.write_text(json.dumps(changed))
        seal(path.parent)

    def cases() -> Iterator[tuple[str, str, Damage]]:
        for name, damage in of_json(content, write=write):
            if not name.startswith("config.") or name.split(".")[1] in few:
                yield f"{STEP}/checkpoint.json", name, damage
        for target in ("${oc.env:HOME}", "${oc.decode:1}", "${", "???"):
            named = json.loads(json.dumps(content))
            named["config"]["model"]["name"] = target
            damage = sealed(with_content(json.dumps(named).encode()))
            yield f"{STEP}/checkpoint.json", target, damage

    try_all(valid, use_record, islice(cases(), 0, None, 4), least=300)
    assert "\x1b" not in capsys.readouterr().out, "a record's text commands the terminal"


def test_checkpoints_of_version_1(tmp_path, outside, capsys):
    """Their index is a pickle: it is looked at byte for byte, and none of its code may run."""
    valid = tmp_path / "valid"
    shutil.copytree(VERSION_1, valid / "checkpoints" / VERSION_1.name)
    step = f"checkpoints/{VERSION_1.name}/"
    raw = (VERSION_1 / ".metadata").read_bytes()

    def use(folder: Path) -> None:
        uses = (tool(folder, command) for command in ("list", "verify", "show"))
        all_of(lambda: read_tensors(folder), *uses)

    def cases() -> Iterator[tuple[str, str, Damage]]:
        yield from every([step + ".metadata", step + "__0_0.distcp"], of_file(outside))
        for place in range(0, len(raw), 23):
            changed = raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :]
            yield step + ".metadata", f"bit {place}", with_content(changed)

    try_all(valid, use, cases(), least=90)


BASES = ["itself", "/dev/zero", "a\0b", "x" * 5000, "..", "/", "pipes"]


@pytest.mark.parametrize("base", BASES, ids=lambda base: repr(base[:9]))
def test_a_base_is_what_it_was_or_refused(tmp_path, base):
    """An adapter names the place of its base: whatever is there, it must have the same content."""
    from pipeline.checkpoint.agreement import Agreement
    from pipeline.huggingface.whole_model import open_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of megatron-core, when it is first imported
        from pipeline.training.initial_weights import _known_bases

    class Alone(Agreement):
        rank, world_size = 0, 1

        def __init__(self) -> None:
            self.gather = lambda value: [value]  # type: ignore[method-assign]
            self.agree = self.on_main = lambda function: function()  # type: ignore[method-assign]

    content = record() | {"base": {"path": base, "sha256": "0" * 64}}
    step = checkpoint(tmp_path / "adapter", content) / STEP
    if base in ("itself", "pipes"):
        place = step if base == "itself" else tmp_path / "pipes"
        content["base"]["path"] = str(place)
        (step / "checkpoint.json").write_text(json.dumps(content))
        seal(step)
        if base == "pipes":
            place.mkdir()
            (place / "config.json").write_text("{}")
            os.mkfifo(place / "model.safetensors")
    with pytest.raises(CheckpointError):
        open_model(step)
    with pytest.raises(CheckpointError):
        _known_bases(step, Alone())


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_what_a_link_leads_to_is_not_handed_on(tmp_path, outside, name):
    """An export would publish the file of its user that a stranger's checkpoint links to."""
    from pipeline import export

    folder = checkpoint(tmp_path / "valid")
    (folder / STEP / name).unlink()
    (folder / STEP / name).symlink_to(outside)
    seal(folder / STEP)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: .*leads out of its folder"):
        export.main(export.ExportConfig(str(folder), str(tmp_path / "exported"), check=False))
    assert not (tmp_path / "exported" / name).exists()
