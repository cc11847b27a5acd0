"""The decoder that samples is the model that was trained: its logits are those of the trained blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.config.choices import Init, RopeScaling
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.parameter_names import parameter_shapes
from pipeline.model.decoder import Decoder
from tests.support.layouts import MODELS, VOCAB
from tests.support.ranks import run_on_ranks
from tests.support.unwritten import with_nan_memory

CASES: dict[str, dict[str, Any]] = {
    **{name: MODELS[name] for name in ("gpt2", "modern", "gpt1", "parallel", "capped", "odd", "mqa")},
    **{name: MODELS[name] for name in ("moe", "moe-switch", "pictures")},
    "mup": {**MODELS["modern"], "init": Init.mup, "mup_base_hidden_size": 32},
    "linear": {**MODELS["modern"], "rope_scaling": RopeScaling.linear, "rope_scaling_factor": 2.0},
}  # fmt: skip
ROWS = [[5, 9, 200, 3, 17, 8, 90], [7, 11]]
DRAWN = [[4, 60, 61], [12, 13, 2]]


def weights_of(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Of a size at which every part of the model is heard in the logits."""
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(1)
    shapes = parameter_shapes(model, FinetuneConfig(), vocab_size=model.vocab_size)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + 1.0 * name.endswith("norm.weight")
        for name, shape in shapes.items()
    }


def difference(case: str) -> tuple[float, float]:
    """(largest difference, standard deviation) of the logits behind each row and each drawn token."""
    from pipeline.model.local_model import LocalModel

    model = ModelConfig(**{"vocab_size": VOCAB, **CASES[case]})
    weights = weights_of(model)
    decoder, local = (kind(model, weights.__getitem__) for kind in (Decoder, LocalModel))
    logits, memory = decoder.begin(ROWS)
    ours = [logits]
    for tokens in zip(*DRAWN, strict=True):
        ours.append(decoder.read(torch.tensor(tokens)[:, None], memory))
    theirs = [
        local.logits(torch.tensor([row + drawn]))[0, len(row) - 1 :]
        for row, drawn in zip(ROWS, DRAWN, strict=True)
    ]
    found, wanted = torch.stack(ours, dim=1), torch.stack(theirs)
    return float((found - wanted).abs().max()), float(wanted.std())


def all_cases() -> dict[str, tuple[float, float]]:
    return {case: difference(case) for case in CASES}


def test_logits_are_those_of_the_trained_blocks_token_by_token() -> None:
    """Of every kind of model; rows of different lengths in one batch, each as if it were alone."""
    found = run_on_ranks(with_nan_memory, 1, all_cases)[0]
    assert [*found] == [*CASES]
    for case, (largest, deviation) in found.items():
        assert largest < 1e-4 * deviation, (case, largest, deviation)


def test_a_row_is_not_heard_by_another_one_nor_by_its_padding() -> None:
    """Whatever stands beside it, and whatever id fills it up."""
    model = replace(ModelConfig(**MODELS["modern"]), vocab_size=VOCAB)
    decoder = Decoder(model, weights_of(model).__getitem__)
    alone, _ = decoder.begin([ROWS[1]])
    beside, memory = decoder.begin(ROWS)
    assert beside[1] == pytest.approx(alone[0], abs=1e-4)
    assert memory.padding.tolist() == [0, 5] and memory.length == 7
