"""How our parameters are spelt elsewhere: a rule for each, and what all families share.

Our qkv rows are [group][queries of the group, key, value][head_dim], theirs three matrices; our
gated fc1 is [gate; up], theirs two matrices. Rotary positions are rotate-half in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve

if TYPE_CHECKING:
    from torch import Tensor

Split = Callable[["Tensor"], "list[Tensor]"]
Join = Callable[["list[Tensor]"], "Tensor"]


@dataclass(frozen=True)
class Rule:
    """How one of our parameters is spelt."""

    name: str
    """Canonical name."""
    theirs: tuple[str, ...]
    split: Split = lambda whole: [whole]
    """Our tensor to theirs."""
    join: Join = lambda parts: parts[0]
    """Theirs to ours."""


@dataclass(frozen=True)
class Mapping:
    """A transformers class that computes a model of ours."""

    architecture: str
    config: dict[str, Any]
    rules: list[Rule]
    zeros: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Tensors the class has and we have not: biases, which are 0."""
    idle: dict[str, tuple[tuple[int, ...], float]] = field(default_factory=dict)
    """Tensors the class has and computes nothing with that we look at: shape, and what is written.
    """

    @property
    def is_transposed(self) -> bool:
        """Whether its linears are GPT-2's Conv1D, which hold their weights transposed."""
        return self.architecture == "GPT2LMHeadModel"


def has_bias(model: ModelConfig, layer: str) -> bool:
    """Whether a layer of ours, by the end of its canonical name, has a bias."""
    return resolve(model).qkv_bias if layer.endswith("qkv") else model.bias


def tie(model: ModelConfig) -> dict[str, bool]:
    """Their setting for a head that is the word embedding."""
    return {"tie_word_embeddings": model.tied_embeddings}


def head_rules(model: ModelConfig) -> list[Rule]:
    """The head's rule, unless it is the word embedding."""
    return [] if model.tied_embeddings else [Rule("head.weight", ("lm_head.weight",))]


def concatenate(parts: list[Tensor]) -> Tensor:
    """Parts along their first dimension."""
    import torch

    return torch.cat(parts)


def split_and_join_qkv(model: ModelConfig) -> tuple[Split, Join]:
    """(our rows [group][queries, key, value][head_dim] to [q, k, v], and back).

    For weights (rows, hidden_size) and biases (rows,).
    """
    sizes = resolve(model)
    groups, width = sizes.num_query_groups, sizes.head_dim
    queries = model.num_attention_heads // groups

    def split(whole: Tensor) -> list[Tensor]:
        grouped = whole.reshape(groups, queries + 2, width, *whole.shape[1:])
        return [
            part.reshape(-1, *whole.shape[1:])
            for part in (grouped[:, :queries], grouped[:, queries], grouped[:, -1])
        ]

    def join(parts: list[Tensor]) -> Tensor:
        rest = parts[0].shape[1:]
        grouped = [part.reshape(groups, -1, width, *rest).transpose(0, 1) for part in parts]
        return concatenate(grouped).transpose(0, 1).reshape(-1, *rest)

    return split, join
