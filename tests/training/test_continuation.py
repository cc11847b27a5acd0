"""A start that does not fit its run folder is refused, by preflight alike, and leaves no trace."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline import cli, preflight
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import CheckpointRecord
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.data.datasets import open_datasets
from pipeline.data.sampler import Sampler
from pipeline.errors import MachineError, PipelineError
from pipeline.training import continuation, startup
from tests.support.llama_folder import SETTINGS as LLAMA_SETTINGS
from tests.support.llama_folder import write_llama
from tests.support.records import write_record
from tests.support.slurm_cluster import REPO
from tests.support.token_dataset import write_dataset
from tests.support.waiting import HANG_S

SETTINGS = [
    "name=a", "model=tiny", "training.seq_len=64", "training.total_steps=20", "training.global_batch_size=8",
    "training.micro_batch_size=2", "schedule.warmup_steps=2", "tracking=local",
]  # fmt: skip


SEEING = ["model.vision.num_layers=2", "model.vision.image_size=32"]


def compose(folder: Path, *changes: str) -> PretrainConfig:
    where = [f"data.path={folder}/data", f"runs_dir={folder}/runs"]
    return cli.compose(PretrainConfig, [*where, *SETTINGS, *changes], config="pretrain")


def write_data(folder: Path, *, stride: int = 1) -> None:
    for split, size in (("train", 8192), ("validation", 512)):
        write_dataset(folder / split, [np.arange(size) * stride % 61], vocab_size=64)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with data, other data, and a run that has done five steps."""
    write_data(tmp_path / "data")
    write_data(tmp_path / "other", stride=3)
    cfg = compose(tmp_path)
    datasets = open_datasets(cfg.data.train, cfg=cfg.data, cache_dir=tmp_path / "cache")
    sampler = Sampler(cfg.data, datasets, seq_len=64, seed=cfg.seed)
    _, position = sampler.advance(sampler.start(), 40)
    record = CheckpointRecord(
        state={"step": 5}, config=cli.to_dict(cfg), loader=sampler.state(position), step=5, optimizer="adamw",
        optimizer_step=5, loss_scale=None, vocab_size=64, layout={}, versions={}, saved_at="now",
    )  # fmt: skip
    checkpoint = tmp_path / "runs" / "a" / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "tokenizer.json").write_bytes(
        (tmp_path / "data/train/tokenizer.json").read_bytes()
    )
    write_record(checkpoint, record.to_json())
    return tmp_path


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


REFUSALS = [
    (["model.hidden_size=32"], "another model (model.hidden_size: "),
    (["seed=7"], "the checkpoint was made with other data: seed"),
    (["training.seq_len=32"], "the checkpoint was made with other data: seq_len"),
    (["data.path={}/other"], "is not in the checkpoint"),
    (["training.total_steps=4"], "has done 5 steps, and training.total_steps is 4"),
    (["checkpoint.resume=false"], "holds checkpoints up to step 5, and checkpoint.resume=false"),
]


@pytest.mark.parametrize(
    "changes, message", REFUSALS, ids=[c[0].split("=")[0] for c, _ in REFUSALS]
)
def test_a_start_that_does_not_fit_is_refused_without_a_trace(run: Path, changes, message):
    """config.yaml used to be overwritten, and W&B told, before ranks met the difference in a restore."""
    before = files(run)
    changes = [change.format(run) for change in changes]
    with pytest.raises(PipelineError) as caught:
        startup.check(compose(run, *changes), world_size=1)
    assert message in str(caught.value)
    settings = [f"data.path={run}/data", f"runs_dir={run}/runs", *SETTINGS, *changes]
    with pytest.raises(MachineError) as found:
        preflight.main(cli.compose(preflight.PreflightConfig, settings, config="pretrain"))
    assert message in str(found.value)
    assert files(run) == before


def test_the_same_settings_go_on(run: Path):
    """Also with a learning rate, dropout or dataset weight that was edited, and to a later end."""
    before = files(run)
    startup.check(compose(run), world_size=2)
    startup.check(
        compose(run, "optimizer.lr=0.1", "model.hidden_dropout=0.1", "training.total_steps=500"),
        world_size=1,
    )
    startup.check(
        compose(run, "data.path=" + f"{run}/other", "data.allow_dataset_change=true"), world_size=1
    )
    assert files(run) == before


def test_all_differences_are_named_at_once(run: Path):
    with pytest.raises(PipelineError) as caught:
        startup.check(
            compose(run, "seed=7", "model.hidden_size=32", "training.total_steps=4"), world_size=1
        )
    for part in ("model.hidden_size", "seed", "training.total_steps"):
        assert part in str(caught.value)


def test_another_optimizer_is_refused(run: Path):
    path = run / "runs/a/checkpoints/step-00000005/checkpoint.json"
    record = dataclasses.replace(CheckpointRecord.from_json(path.read_text()), optimizer="adagrad")
    write_record(path.parent, record.to_json())
    with pytest.raises(PipelineError, match="was trained with optimizer.name=adagrad"):
        startup.check(compose(run), world_size=1)


def test_a_flipped_bit_of_the_newest_record_is_damage_and_not_another_run(run: Path):
    """Each change leaves a record that can be read; the start goes on, and restore takes the checkpoint before."""
    path = run / "runs/a/checkpoints/step-00000005/checkpoint.json"
    shutil.copytree(path.parent, path.parent.with_name("step-00000009"))
    path = path.parent.with_name("step-00000009") / path.name
    whole = path.read_text()
    for old, new in [('"seed": 1', '"seed": 3'), ('"optimizer": "adamw"', '"optimizer": "adamv"'), ('"hidden_size": ', '"hidden_size": 9')]:  # fmt: skip
        assert old in whole
        path.write_text(whole.replace(old, new))
        startup.check(compose(run), world_size=1)
    path.write_text(whole)
    path.with_name("tokenizer.json").write_text("{]")
    startup.check(compose(run), world_size=1)


def test_only_damaged_checkpoints_do_not_begin_again_in_silence(run: Path):
    """After restore has set the last one aside, the same command would begin at step 0."""
    folders.set_aside(run / "runs/a/checkpoints/step-00000005")
    with pytest.raises(
        PipelineError, match="holds only damaged checkpoints .damaged-step-00000005"
    ):
        startup.check(compose(run), world_size=1)


def test_damaged_checkpoints_of_the_fallback_count_too(run: Path, tmp_path: Path):
    place = tmp_path / "fallback/a/checkpoints"
    place.parent.mkdir(parents=True)
    (run / "runs/a/checkpoints").rename(place)
    folders.set_aside(place / "step-00000005")
    with pytest.raises(PipelineError, match="holds only damaged checkpoints"):
        startup.check(compose(run, f"checkpoint.fallback_dir={tmp_path}/fallback"), world_size=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ("checkpoint.init_from={}/nowhere", "nowhere is no folder"),
        ("checkpoint.init_from={}/runs/a", "model.hidden_size="),
    ],
)
def test_weights_to_start_from_are_looked_at_before_anything_starts(run: Path, change, message):
    before = files(run)
    with pytest.raises(PipelineError) as caught:
        startup.check(
            compose(run, "name=b", "model.hidden_size=32", change.format(run)), world_size=1
        )
    assert message in str(caught.value)
    assert files(run) == before


@pytest.mark.parametrize(
    "change",
    [
        "model.activation=gelu",
        "model.bias=false",
        "model.norm_eps=1e-6",
        "model.tied_embeddings=false",
        "model.init=mup",
        "model.max_seq_len=128",
        "model.vocab_size=128",
    ],
)
def test_weights_of_a_model_that_computes_otherwise_are_refused(run: Path, change: str):
    """No shape shows most of these: the run went on with other numbers than the weights were made for."""
    init = f"checkpoint.init_from={run}/runs/a"
    with pytest.raises(PipelineError, match=f"holds another model.*{change.split('=')[0]}="):
        startup.check(compose(run, "name=b", init, change), world_size=1)
    startup.check(compose(run, "name=b", init, "model.hidden_dropout=0.1"), world_size=1)


def test_positions_of_a_checkpoint_may_be_stretched_and_that_is_said(run: Path, caplog):
    """So a run goes on with longer sequences."""
    path = run / "runs/a/checkpoints/step-00000005/checkpoint.json"
    record = CheckpointRecord.from_json(path.read_text())
    model = record.config["model"] | {"position": "rope"}
    record = dataclasses.replace(record, config=record.config | {"model": model})
    write_record(path.parent, record.to_json())
    words = ["name=b", f"checkpoint.init_from={run}/runs/a", "model.position=rope"]
    startup.check(compose(run, *words, "model.max_seq_len=1024"), world_size=1)
    assert "rope_theta" not in caplog.text
    startup.check(compose(run, *words, "model.rope_theta=5e5"), world_size=1)
    assert "was trained with another model.rope_theta (10000.0 there)" in caplog.text


def test_the_base_of_an_adapter_is_looked_for_before_anything_starts(run: Path):
    """Every rank met its absence after config.yaml was written."""
    path = run / "runs/a/checkpoints/step-00000005/checkpoint.json"
    base = {"path": f"{run}/gone", "sha256": "0" * 64}
    record = dataclasses.replace(CheckpointRecord.from_json(path.read_text()), base=base)
    write_record(path.parent, record.to_json())
    with pytest.raises(PipelineError, match="base of this adapter is not in .*gone"):
        startup.check(compose(run, "name=b", f"checkpoint.init_from={run}/runs/a"), world_size=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.rope_theta=1e4", "set model.rope_theta=500000.0"),
        ("model.init=mup", "set model.init=scaled"),
        ("model.vocab_size=128", "set model.vocab_size=64"),
        ("model.norm_eps=1e-6", "set model.norm_eps=1e-05"),
        (None, "has no tensor model.norm.weight"),
    ],
)
def test_a_hugging_face_folder_is_compared_whole_before_anything_starts(
    run: Path, change: str | None, message: str
):
    """Ranks refused it, with the folder claimed and config.yaml written; muP nobody did."""
    folder = write_llama(run / "hf")
    shutil.copy(next((run / "data").rglob("tokenizer.json")), folder)
    words = ["name=b", f"checkpoint.init_from={folder}", *LLAMA_SETTINGS]
    startup.check(compose(run, *words), world_size=1)
    if change is None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors")
    before = files(run)
    with pytest.raises(PipelineError, match=message):
        startup.check(compose(run, *words, *([change] if change else [])), world_size=1)
    assert files(run) == before


def test_the_checks_of_a_folder_and_of_weights_need_no_torch(run: Path):
    """They run on a login node, and before any rank has spent a minute on imports."""
    program = (
        "import sys; from pipeline import cli; from pipeline.training import startup\n"
        "from pipeline.config.pretrain import PretrainConfig\n"
        "for words in (sys.argv[1:], [*sys.argv[1:-1], sys.argv[-1], 'name=b']):\n"
        "    startup.check(cli.compose(PretrainConfig, words, config='pretrain'), world_size=1)\n"
        "assert 'torch' not in sys.modules\n"
    )
    where = [f"data.path={run}/data", f"runs_dir={run}/runs"]
    command = [
        sys.executable,
        "-c",
        program,
        *where,
        *SETTINGS,
        f"checkpoint.init_from={run}/runs/a",
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    assert not (run / "runs" / "b").exists()


def test_frozen_weights_must_come_from_somewhere(tmp_path: Path) -> None:
    """Frozen at random numbers, a model learns little and says nothing about it."""
    write_data(tmp_path / "data")
    cfg = compose(tmp_path, "finetune=lora")
    with pytest.raises(PipelineError, match="leaves parameters frozen.* Set checkpoint.init_from"):
        startup.check(cfg, world_size=1)


def test_an_adapter_to_start_from_is_looked_at_before_anything_starts(run: Path) -> None:
    """Minutes later on every rank it would end in the same words."""
    weights, before = f"checkpoint.init_from={run}/runs/a", files(run)
    lora = ["name=b", "finetune=lora"]
    for words, said in (
        ([*lora, "checkpoint.init_adapter=nowhere", weights], "nowhere is no folder of peft"),
        (["name=b", "checkpoint.init_adapter=nowhere"], "Set checkpoint.init_from to the folder"),
    ):
        with pytest.raises(PipelineError, match=said):
            startup.check(compose(run, *words), world_size=1)
    assert files(run) == before


def test_a_tower_is_the_start_of_an_encoder_and_of_one_only(run: Path) -> None:
    """Else it would have no effect, or take over what init_from brought."""
    before = files(run)
    tower = [f"checkpoint.init_tower={run}/siglip", "name=b"]
    for words, said in (
        (tower, "model.vision.num_layers is 0: there is none"),
        ([*tower, "checkpoint.init_from=x", *SEEING], "another: leave one out"),
        ([*tower, *SEEING], "siglip"),
    ):
        cfg = compose(run, *words)
        shape = derive(cfg, world_size=1, tokenizer_vocab_size=64)
        with pytest.raises(PipelineError, match=said):
            continuation.check(cfg, shape, run / "runs/b")
    assert files(run) == before


def test_a_run_that_trained_all_does_not_go_on_with_a_part(run: Path) -> None:
    """Its optimizer state is of other parameters."""
    cfg = compose(
        run,
        "finetune=last-layers",
        "model.tied_embeddings=false",
        f"checkpoint.init_from={run}/runs/a",
    )
    with pytest.raises(
        PipelineError, match=r"trains other parameters \(finetune.train: \['\*'\] there"
    ):
        startup.check(cfg, world_size=1)
