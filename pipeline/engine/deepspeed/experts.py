"""Experts that data-parallel ranks hold different ones of: the three facts DeepSpeed wants of them.

Which parameters they are stands on the parameters (model/partition.py: `allreduce`, `group_name`)
and on their groups (engine/optimizer.py: `moe`, `name`); which ranks hold the same ones, and that
the model has any, is told here. It then partitions and reduces them over those ranks, and divides
by the number of all data-parallel ranks: a rank's experts have seen the tokens of all of them.
"""

from __future__ import annotations

import pipeline.engine.deepspeed.environment  # noqa: F401

# isort: split
from functools import partial

from deepspeed.moe.layer import MoE
from deepspeed.runtime import engine
from deepspeed.utils import groups
from torch import nn

from pipeline.distributed.layout import ParallelLayout
from pipeline.model.experts import MixtureLayer
from pipeline.model.partition import EXPERTS, spans_data
from pipeline.patching import replace


def announce_experts(module: nn.Module, layout: ParallelLayout) -> None:
    """Tell DeepSpeed of this rank's experts, before it takes the module, or that it has none."""
    trained = any(spans_data(p) and p.requires_grad for p in module.parameters())
    change = partial(
        replace,
        upstream="not reported",
        proof="tests/model/test_moe.py::test_expert_parallelism_matches_plain_torch",
    )
    if any(map(spans_data, module.parameters())):
        change(
            groups,
            "_EXPERT_DATA_PARALLEL_GROUP",
            {EXPERTS: layout.expert_data.group},
            why="has groups for layers of its own class only",
        )
    # It looks for a class. Where a rank's experts are frozen it must find none: it would want a
    # group of parameters that has them.
    change(
        engine,
        "MoE",
        MixtureLayer if trained else MoE,
        why="reduces every gradient over all data-parallel ranks, also those of different experts",
    )
