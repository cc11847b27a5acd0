"""What is trained, in numbers, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipeline.config.finetune import FinetuneConfig
from pipeline.config.run_shape import derive
from pipeline.planning.flops import count_parameters, flops_per_token, num_parameters
from pipeline.planning.job import Job
from pipeline.planning.memory import memory_of_stages
from pipeline.planning.trained import (
    first_trained_layer,
    num_low_rank_parameters,
    num_trained_parameters,
    size_on_a_rank,
)
from tests.support.layouts import VOCAB, config

LORA = FinetuneConfig(train=["*.lora_?"], lora_rank=4)
LAST = FinetuneConfig(train=["layers.-1.*", "final_norm.*", "head.*"])
# (in + out) of qkv, proj, fc1, fc2 of "modern": 64 wide, 2 groups, gated 96
WIDTHS = (64 + 128) + (64 + 64) + (64 + 192) + (96 + 64)
BLOCK = 64 * 128 + 64 * 64 + 64 * 192 + 96 * 64


@pytest.mark.parametrize("name", ["gpt2", "modern", "moe", "odd", "mqa", "parallel"])
def test_all_of_a_model_is_what_the_closed_form_counts(name: str) -> None:
    """Two counts of one number: by shapes of names, and by formula."""
    model = config(name).model
    assert num_trained_parameters(model, FinetuneConfig(), 250) == num_parameters(model, 250)


def test_low_rank_matrices_and_last_layers_by_hand() -> None:
    model = config("modern").model
    assert num_trained_parameters(model, LORA, VOCAB) == 4 * 4 * WIDTHS
    assert num_low_rank_parameters(model, LORA) == 4 * 4 * WIDTHS
    norms = 2 * 64 + 2 * 16 + 64
    assert num_trained_parameters(model, LAST, VOCAB) == BLOCK + norms + VOCAB * 64
    assert count_parameters(model, LORA, VOCAB)["num_parameters"] == num_parameters(model, VOCAB)


def test_a_tensor_parallel_rank_holds_one_of_two_matrices_whole() -> None:
    """As measured on the quickstart's model: 41,472 numbers each of 66,560 with two ranks."""
    fc1, fc2 = "layers.0.mlp.linear_fc1", "layers.0.mlp.linear_fc2"
    whole = {f"{fc1}.lora_a": (4, 64), f"{fc2}.lora_b": (64, 4), f"{fc2}.bias": (64,)}
    whole |= {"final_norm.weight": (64,), "embedding.position.weight": (32, 64)}
    split = {f"{fc1}.lora_b": (192, 4), f"{fc2}.lora_a": (4, 96), f"{fc1}.bias": (192,)}
    split |= {f"{fc1}.weight": (192, 64), "head.weight": (256, 64)}
    for shapes, ranks in ((whole, 1), (split, 2)):
        for name, shape in shapes.items():
            assert size_on_a_rank(name, shape, tensor=2) == math.prod(shape) / ranks, name


def test_arithmetic_that_frozen_weights_save() -> None:
    """No gradient of a frozen matrix; below the first trained block nothing goes backwards."""
    model, sizes = config("modern").model, {"vocab_size": VOCAB, "seq_len": 32}
    full = flops_per_token(model, FinetuneConfig(), **sizes)
    head, matrices, square = VOCAB * 64, 4 * BLOCK, 4 * 64 * 32
    assert full == 6 * (matrices + head) + 12 * square
    assert flops_per_token(model, LORA, **sizes) == (
        4 * (matrices + head) + 12 * square + 6 * 16 * WIDTHS
    )
    assert first_trained_layer(model, LAST) == 3
    assert flops_per_token(model, LAST, **sizes) == (
        3 * (2 * BLOCK + square) + 6 * BLOCK + 3 * square + 6 * head
    )
    only_head = FinetuneConfig(train=["head.*"])
    assert first_trained_layer(model, only_head) == 4
    assert flops_per_token(model, only_head, **sizes) == 2 * matrices + 4 * square + 4 * head


def test_memory_of_what_is_trained() -> None:
    """Gradients and optimizer state of the low-rank matrices only; weights of all."""
    cfg = config("modern", zero=1, train="*.lora_?", lora_rank=4)
    shape = derive(cfg, world_size=2, tokenizer_vocab_size=VOCAB)
    (found,), trained = memory_of_stages(Job.of(cfg, shape)), 16 * WIDTHS
    padded = num_parameters(cfg.model, shape.padded_vocab_size)
    assert found.weights == 4 * (padded + trained)
    assert found.gradients == 4 * trained
    assert found.optimizer == 12 * trained / 2
    full, last = replace(cfg, finetune=FinetuneConfig()), replace(cfg, finetune=LAST)
    kept = [memory_of_stages(Job.of(c, shape))[0].activations for c in (last, full)]
    assert kept[0] < kept[1] / 2
