"""Translators against torch's own optimizer, at any layout, and their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.choices import Precision
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.config.model import ModelConfig
from pipeline.config.training import ParallelConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.probing.request import check_translators, translator_shapes
from tests.support.exported import EXPORTED, save_models, tokenizer_file
from tests.support.layouts import SEQ_LEN, VOCAB, reset_parallel_state
from tests.support.ranks import run_on_ranks
from tests.support.token_dataset import write_dataset
from tests.support.unwritten import with_nan_memory

MODELS, MEASURED, STEPS = ("gpt2", "qwen3"), 6, 5
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [dict(pipeline_parallel_size=2), dict(zero_stage=3)],
    4: [dict(tensor_parallel_size=2, pipeline_parallel_size=2, sequence_parallel=True)],
}
FAST: list[dict[str, Any]] = [dict(tensor_parallel_size=2, sequence_parallel=True)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each model, and held-out data whose windows behind the measured are two steps."""
    root = tmp_path_factory.mktemp("tuned")
    tokenizer = tokenizer_file(root)
    run_on_ranks(save_models, 1, {name: EXPORTED[name] for name in MODELS}, root, tokenizer)
    rows = np.random.default_rng(0).integers(0, VOCAB, (SEQ_LEN * (MEASURED + 64) + 1))
    write_dataset(root / "data", [rows], vocab_size=VOCAB, tokenizer=tokenizer.read_bytes())
    return root


def trained(layouts: list[dict[str, Any]], root: Path) -> list[Any]:
    """By layout and model: findings of a probe that trains a lens, and of one that reads it."""
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.probe import ProbeConfig, look_into
    from pipeline.probing.tuned_lens import TunedLens

    ranks, answers, histories = ranks_from_environment(), [], []
    train = TunedLens.train

    def remembering(self: TunedLens, *args: Any, **kwargs: Any) -> list[float]:
        histories.append(train(self, *args, **kwargs))
        return histories[-1]

    TunedLens.train = remembering
    for number, layout in enumerate(layouts):
        for name in MODELS:
            common: dict[str, Any] = dict(
                checkpoint=str(root / name), precision=Precision.fp32, micro_batch_size=13,
                data=DataConfig(validation=[DatasetConfig(path=str(root / "data"))]),
                parallel=ParallelConfig(**layout), sequences=MEASURED, seq_len=SEQ_LEN,
            )  # fmt: skip
            output = root / f"{name}-{ranks.world_size}-{number}"
            pair = []
            file = str(output / "tuned_lens.safetensors")
            for more in (dict(train_lens=STEPS, output=str(output)), dict(tuned_lens=file)):
                pair.append(look_into(ProbeConfig(**common, **more), ranks))
                reset_parallel_state()
            tensors = {name: t.numpy() for name, t in load_file(file).items()}
            answers.append((pair, tensors, histories[-1]))
    TunedLens.train = train
    return answers


def expected(root: Path) -> list[Any]:
    """By model: translators trained by torch's SGD on transformers' logits, and their losses."""
    import warnings

    import torch.nn.functional as F

    from pipeline.checkpoint import folder as folders
    from pipeline.huggingface.writer import DType, export
    from tests.support.probed import Theirs, losses_of

    warnings.simplefilter("ignore")  # transformers warns about its own future
    rows = torch.from_numpy(
        np.random.default_rng(0).integers(0, VOCAB, SEQ_LEN * (MEASURED + 64) + 1)
    )
    tokens, labels = rows[:-1].view(-1, SEQ_LEN), rows[1:].view(-1, SEQ_LEN)
    answers = []
    for name in MODELS:
        export(folders.find(root / name), root / "exported" / name, dtype=DType.fp32)
        theirs = Theirs(root / "exported" / name)
        theirs.model.requires_grad_(False)
        size = theirs.unembedding.shape[1]
        lens = [torch.nn.Linear(size, size) for _ in theirs.blocks[:-1]]
        for linear in lens:
            torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
        optimizers = [
            torch.optim.SGD(t.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=1e-3) for t in lens
        ]  # fmt: skip
        history = []
        for step in range(STEPS):
            apart = []
            first = MEASURED + step % 2 * 32
            seen = theirs.run(tokens[first : first + 32])
            target = seen["logits"].log_softmax(-1)
            for linear, optimizer, hidden in zip(lens, optimizers, seen["after"]):
                optimizer.param_groups[0]["lr"] = 1 - step / STEPS
                optimizer.zero_grad()
                said = theirs.logits(hidden + linear(hidden)).log_softmax(-1)
                loss = F.kl_div(
                    said.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean"
                )
                loss.backward()
                apart.append(float(loss.detach()))
                torch.nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
                optimizer.step()
            history.append(sum(apart) / len(apart))
        with torch.no_grad():
            after = theirs.run(tokens[:MEASURED])["after"]
            said = [theirs.logits(h + t(h)) for h, t in zip(after, lens)] + [
                theirs.logits(after[-1])
            ]
            losses = [float(losses_of(s, labels[:MEASURED]).mean()) for s in said]
        tensors = {
            f"layers.{i}.{n}": v.detach().numpy()
            for i, t in enumerate(lens)
            for n, v in t.named_parameters()
        }
        answers.append((losses, tensors, history))
    return answers


@pytest.fixture(scope="module")
def wanted(root: Path) -> list[Any]:
    return run_on_ranks(expected, 1, root)[0]


def compare(layouts: list[dict[str, Any]], ranks: list[Any], wanted: list[Any]) -> None:
    """Losses by block and translators, divergences as every rank knows them, and that the file gives what training gave."""
    cases = [(layout, i) for layout in layouts for i in range(len(MODELS))]
    for ((first, again), tensors, history), (layout, i) in zip(ranks, cases, strict=True):
        losses, theirs, apart = wanted[i]
        np.testing.assert_allclose(history, apart, rtol=1e-4, atol=1e-5, err_msg=str(layout))
        assert tensors.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(
                tensors[name], value, rtol=1e-4, atol=1e-5, err_msg=f"{layout} {name}"
            )
        np.testing.assert_allclose(
            first["averages"]["tuned_loss"], losses, atol=1e-5, err_msg=str(layout)
        )
        assert again == first
        assert first["averages"]["tuned_loss"][-1] == first["averages"]["lens_loss"][-1]
        assert first["text"]["tuned"]["ids"][-1] == first["text"]["lens"]["ids"][-1]
        assert first["text"]["tuned"]["losses"][0] != first["text"]["lens"]["losses"][0]


def test_translators_equal_those_that_torch_trains_on_transformers(
    root: Path, wanted: list[Any]
) -> None:
    """Vocabulary in parts, sequences in parts; and the file holds them. Once in five runs the gradient was NaN: that of
    the hidden is 0 times the rows of the vocabulary's padding, which no checkpoint fills."""
    for ranks in run_on_ranks(with_nan_memory, 2, trained, FAST, root):
        compare(FAST, ranks, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_translators_are_the_same_at_every_layout(
    world_size: int, root: Path, wanted: list[Any]
) -> None:
    """Also where copies of the model share a step's sequences unevenly."""
    layouts = LAYOUTS[world_size]
    for ranks in run_on_ranks(with_nan_memory, world_size, trained, layouts, root):
        compare(layouts, ranks, wanted)


def test_translators_of_another_model_are_refused(tmp_path: Path) -> None:
    """Their shapes fit by chance only where the models are alike."""
    model = ModelConfig(name="a", num_layers=3, hidden_size=8, num_attention_heads=1)
    tensors = {name: torch.zeros(shape) for name, shape in translator_shapes(model).items()}
    path = tmp_path / "lens.safetensors"
    save_file(tensors, path)
    check_translators(path, model)
    for other in (
        {name: tensors[name] for name in list(tensors)[:2]},
        {name: value.half() for name, value in tensors.items()},
    ):
        save_file(other, path)
        with pytest.raises(
            CheckpointError, match=r"those of this model are 4 of fp32.*train_lens=250"
        ):
            check_translators(path, model)
    path.write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_translators(path, model)


def short(root: Path) -> str:
    """What is said where all held-out sequences are measured."""
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.probe import ProbeConfig, look_into

    cfg = ProbeConfig(
        checkpoint=str(root / "gpt2"), train_lens=2, sequences=60, seq_len=SEQ_LEN,
        data=DataConfig(validation=[DatasetConfig(path=str(root / "data"))]),
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        look_into(cfg, ranks_from_environment())
    return str(error.value)


def test_a_lens_is_not_trained_on_what_is_measured(root: Path) -> None:
    [said] = run_on_ranks(short, 1, root)
    assert (
        "needs 32 held-out sequences behind the 60 that are measured, and the datasets have [10]"
        in said
    )
