"""What is found before a run touches a device: weights and data must mean the same by an id."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import cli
from pipeline.checkpoint.record import CheckpointRecord
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.data.datasets import DataSummary, describe, open_datasets
from pipeline.data.sampler import Sampler
from pipeline.errors import CheckpointError, DataError, MachineError, PipelineError
from pipeline.evaluate import EvaluateConfig
from pipeline.evaluate import main as evaluate
from pipeline.files import sha256_of
from pipeline.inference.asked_model import evaluation_of
from pipeline.preflight import PreflightConfig, another_owner
from pipeline.training.startup import check, check_same_tokenizer, first_weights, own
from tests.support.corpus import edit_tokenizer, make_tokenizer
from tests.support.llama_folder import LLAMA, LLAMA_NAMES
from tests.support.llama_folder import SETTINGS as LLAMA_SETTINGS
from tests.support.records import write_record
from tests.support.token_dataset import write_dataset


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """A dataset made with make_tokenizer's, whose documents end with id 0."""
    raw = make_tokenizer(tmp_path / "made-with" / "tokenizer.json").read_bytes()
    write_dataset(tmp_path / "data", [np.arange(200)], vocab_size=400, tokenizer=raw)
    one = [DatasetConfig(path=str(tmp_path / "data"))]
    return DataConfig(train=one, validation=list(one))


@pytest.fixture
def summary(data: DataConfig) -> DataSummary:
    return describe(data)


def weights(folder: Path, *, vocab_size: int = 408) -> Path:
    """A Hugging Face folder's config and tokenizer."""
    make_tokenizer(folder / "tokenizer.json", vocab_size=vocab_size)
    (folder / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": 408}))
    return folder


def test_the_same_tokenizer_in_another_spelling_is_accepted(
    summary: DataSummary, tmp_path: Path
) -> None:
    """Exports drop templates and truncation: other bytes, the same ids."""
    folder = weights(tmp_path / "weights")
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit_tokenizer(folder / "tokenizer.json", truncation=truncation)
    check_same_tokenizer(summary, folder)


@pytest.mark.parametrize("kind", ["smaller", "equal in size"])
def test_another_tokenizer_is_refused_by_name(
    kind: str, summary: DataSummary, tmp_path: Path
) -> None:
    """The ids would mean other text, whether or not they fit into the vocabulary."""
    folder = weights(tmp_path / "weights", vocab_size=408 if kind == "equal in size" else 380)
    if kind == "equal in size":
        edit_tokenizer(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(DataError, match="know another tokenizer.*weights/tokenizer.json"):
        check_same_tokenizer(summary, folder)


def test_a_foreign_folder_without_a_tokenizer_is_refused(
    summary: DataSummary, tmp_path: Path
) -> None:
    """Nobody can tell whether the data's ids are its own: trained on, wrong ones make a wrong model."""
    folder = weights(tmp_path / "weights")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"weights has no tokenizer.json.*save_pretrained"):
        check_same_tokenizer(summary, folder)


def test_another_end_of_documents_than_the_checkpoints_is_refused(
    summary: DataSummary, tmp_path: Path
) -> None:
    """A model that learnt to stop at one token would be trained to stop at another."""
    folder = tmp_path / "step-00000001"
    make_tokenizer(folder / "tokenizer.json")
    for eod in (0, 7):
        record = {
            "format": "pretrain-checkpoint", "version": 1, "step": 1, "optimizer": "adamw", "optimizer_step": 1,
            "loss_scale": None, "vocab_size": 400, "layout": {}, "versions": {}, "saved_at": "", "state": {},
            "config": {}, "eod": eod,
        }  # fmt: skip
        write_record(folder, json.dumps(record))
        if eod == 0:
            check_same_tokenizer(summary, folder)
    with pytest.raises(DataError, match="know id 7 as the end of a document, the data has id 0"):
        check_same_tokenizer(summary, folder)
    # what a run that resumes, or one that starts from the other's weights, begins with
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    folder.rename(run_dir / "checkpoints" / "step-00000001")
    cfg = PretrainConfig(name="run")
    assert first_weights(cfg, run_dir) == run_dir / "checkpoints" / "step-00000001"
    assert first_weights(cfg, tmp_path / "new") is None


def test_a_place_for_checkpoints_that_two_runs_share_has_one_owner(tmp_path: Path) -> None:
    """Runs of one name in two folders would take each other's checkpoints for their own."""

    def cfg(runs_dir: str, fallback_dir: str) -> PreflightConfig:
        words = [
            f"runs_dir={tmp_path}/{runs_dir}",
            f"checkpoint.fallback_dir={tmp_path}/{fallback_dir}",
        ]
        return cli.compose(PreflightConfig, [*words, "name=a"], config="pretrain")

    with own(cfg("mine", "other"), node="n"):
        with pytest.raises(MachineError, match=r"other/a is in use by process .*it is running"):
            own(cfg("theirs", "other"), node="n")
        assert [
            str(tmp_path / "other/a") in text for text in another_owner(cfg("theirs", "other"))
        ] == [True]
        with own(cfg("theirs", "elsewhere"), node="n"):
            pass
    with own(cfg("theirs", "other"), node="n"), pytest.raises(MachineError, match="theirs/a is in"):
        own(cfg("theirs", "third"), node="n")
    with own(cfg("same", "same"), node="n"):  # one folder under two settings
        pass


def test_weights_to_start_from_are_looked_for_before_anything_is_built(tmp_path: Path) -> None:
    """Literally: spaces, commas, brackets and equal signs are part of a name."""
    cfg = PretrainConfig(name="run")
    folder = weights(tmp_path / "my, [model]=1 {a}")
    cfg.checkpoint.init_from = str(folder)
    assert first_weights(cfg, tmp_path / "run") == folder
    cfg.checkpoint.init_from = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere"):
        first_weights(cfg, tmp_path / "run")


def test_evaluation_on_data_of_another_tokenizer_is_refused(
    data: DataConfig, tmp_path: Path
) -> None:
    """Its loss would be that of noise; before the model is built."""
    folder = weights(tmp_path / "weights", vocab_size=380)
    with pytest.raises(DataError, match="know another tokenizer"):
        evaluate(EvaluateConfig(checkpoint=str(folder), data=data))


def test_training_on_data_of_another_tokenizer_is_refused_at_the_start(
    data: DataConfig, tmp_path: Path
) -> None:
    """Before any process group forms."""
    words = [
        "name=run", f"runs_dir={tmp_path}", "model.num_layers=2", "model.hidden_size=32",
        "training.total_steps=1", "training.global_batch_size=8", "schedule.warmup_steps=0",
    ]  # fmt: skip
    folder = weights(tmp_path / "weights", vocab_size=380)
    cfg = cli.compose(PretrainConfig, words, config="pretrain")
    cfg.data, cfg.checkpoint.init_from = data, str(folder)
    with pytest.raises(PipelineError, match="know another tokenizer"):
        check(cfg, world_size=1)


def run_words(folder: Path) -> list[str]:
    """A run of the small Llama on the dataset in `folder`."""
    return [
        f"data.path={folder}/data", f"runs_dir={folder}/runs", "name=run", "model=tiny", *LLAMA_SETTINGS,
        "training.total_steps=20", "training.global_batch_size=8", "training.micro_batch_size=2",
        "schedule.warmup_steps=2", "tracking=local",
    ]  # fmt: skip


def write_checkpoint(folder: Path, cfg: PretrainConfig) -> None:
    """What of a checkpoint of that run is read before any tensor."""
    datasets = open_datasets(cfg.data.train, cfg=cfg.data, cache_dir=folder / "cache")
    sampler = Sampler(cfg.data, datasets, seq_len=64, seed=cfg.seed)
    record = CheckpointRecord(
        state={"step": 5}, config=cli.to_dict(cfg), loader=sampler.state(sampler.advance(sampler.start(), 40)[1]),
        step=5, optimizer="adamw", optimizer_step=5, loss_scale=None, vocab_size=408, layout={}, versions={},
        saved_at="now", eod=0,
    )  # fmt: skip
    folder.mkdir(parents=True)
    make_tokenizer(folder / "tokenizer.json")
    write_record(folder, record.to_json())


def write_folder(folder: Path) -> None:
    """Of transformers, of the same model."""
    weights(folder)
    shapes = {name: [408 if n == 64 else n for n in shape] for name, shape in LLAMA_NAMES.items()}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "command, kind",
    [
        ("evaluate", "checkpoint"),
        ("evaluate", "Hugging Face"),
        ("init_from", "checkpoint"),
        ("init_from", "Hugging Face"),
        ("resume", "checkpoint"),
    ],
)
def test_every_command_refuses_another_tokenizer_of_equal_size(
    command: str, kind: str, tmp_path: Path
) -> None:
    """No id is out of range then, and the loss is that of noise: the name and the way out are all there is."""
    raw = make_tokenizer(tmp_path / "tokenizer.json").read_bytes()
    for split in ("train", "validation"):
        write_dataset(tmp_path / "data" / split, [np.arange(4000) % 400], vocab_size=408, tokenizer=raw)  # fmt: skip
    words = run_words(tmp_path)
    folder = tmp_path / ("runs/run/checkpoints/step-00000005" if command == "resume" else "weights")
    if kind == "checkpoint":
        write_checkpoint(folder, cli.compose(PretrainConfig, words, config="pretrain"))
    else:
        write_folder(folder)
    if command == "init_from":
        words.append(f"checkpoint.init_from={folder}")

    def begin() -> None:
        if command == "evaluate":
            data = DataConfig(path=str(tmp_path / "data"))
            evaluation_of(EvaluateConfig(checkpoint=str(folder), data=data))
        else:
            check(cli.compose(PretrainConfig, words, config="pretrain"), world_size=1)

    begin()  # it is the tokenizer that is in the way
    edit_tokenizer(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    if kind == "checkpoint":
        write_record(folder, (folder / "checkpoint.json").read_text())
    ours, theirs = (sha256_of(path)[:12] for path in (tmp_path / "tokenizer.json", folder / "tokenizer.json"))  # fmt: skip
    with pytest.raises(PipelineError) as caught:
        begin()
    assert f"{folder} know another tokenizer (sha256 {theirs}) than the data was made with ({ours})" in str(caught.value)  # fmt: skip
    assert f"tokenizer={folder}/tokenizer.json" in str(caught.value)


def test_datasets_with_other_ends_of_documents_do_not_mix(data: DataConfig, tmp_path: Path) -> None:
    """Masks and positions would follow the first one's end only."""
    raw = (tmp_path / "data" / "tokenizer.json").read_bytes()
    other = tmp_path / "other"
    write_dataset(other, [np.arange(100)], vocab_size=400, tokenizer=raw, eod=7)
    data.train.append(DatasetConfig(path=str(other)))
    with pytest.raises(DataError, match="data.* end with id 0, those of other .* with id 7"):
        describe(data)
