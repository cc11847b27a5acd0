"""Initial weights that do not depend on the layout.

A parameter is cut into blocks of rows; every block of every canonical name has a generator of its
own, seeded by (seed, name, block). A rank draws only the blocks it holds rows of, so any tensor-,
pipeline- or data-parallel size starts from the same numbers, and a 175B model never exists in one
place.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math

import torch
from torch import Tensor

from pipeline.config.choices import Init
from pipeline.config.model import ModelConfig
from pipeline.model.partition import Partition

ROWS = 256  # rows per generator: small against a shard, large against the cost of seeding

# Projections into the residual stream (Radford et al. 2019: scaled by 1 / sqrt(number of residual
# sums)).
RESIDUAL = ("*.linear_proj.weight", "*.linear_fc2.weight")


def initial_std(name: str, model: ModelConfig) -> float:
    """Standard deviation of a matrix's initial entries.

    scaled: GPT-2. fixed: init_std everywhere. mup: hidden matrices shrink with sqrt(width), the
    head starts at the base model's std (Yang et al. 2022, arXiv:2203.03466, table 8; the logits' 1
    / width is in the loss).
    """
    std = model.init_std
    is_hidden = name.startswith("layers.")
    if model.init is not Init.fixed and any(fnmatch.fnmatch(name, p) for p in RESIDUAL):
        std /= math.sqrt(2.0 * model.num_layers)
    if model.init is Init.mup and is_hidden:
        std *= math.sqrt(model.mup_base_hidden_size / model.hidden_size)
    return std


@torch.no_grad()
def initialize(
    parameter: Tensor, name: str, part: Partition, *, model: ModelConfig, seed: int
) -> None:
    """Fill this rank's shard of a parameter: norms 1, biases 0, matrices normal; padding rows 0.

    Of low-rank matrices B is 0 and A normal, as wide as PEFT's uniform one, by the width of the
    whole input: by that of a shard, the losses would change with tensor_parallel_size.
    """
    parameter.zero_()
    if parameter.dim() == 1:
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        return
    if name.endswith(".lora_b"):
        return
    std = initial_std(name, model)
    if name.endswith(".lora_a"):
        std = 1.0 / math.sqrt(3.0 * part.global_shape[1])
    # A block is drawn whole, in all its columns, and the rank keeps its own rows and columns: which
    # numbers they get must not depend on where another layout would cut.
    for local, whole in part.pieces():
        rows, rest = whole[0], whole[1:]
        for block in range(rows.start // ROWS, math.ceil(rows.stop / ROWS)):
            start, stop = max(rows.start, block * ROWS), min(rows.stop, (block + 1) * ROWS)
            numbers = draw(part.global_shape, name, block, seed=seed)[
                start - block * ROWS : stop - block * ROWS
            ]
            offset = local[0].start + start - rows.start
            target = (slice(offset, offset + stop - start), *local[1:])
            parameter[target] = (std * numbers[(slice(None), *rest)]).to(parameter)


def draw(shape: tuple[int, ...], name: str, block: int, *, seed: int) -> Tensor:
    """Standard normal numbers of a block: (min(ROWS, rows left), *shape[1:]) fp32 on the CPU."""
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(min(ROWS, shape[0] - block * ROWS), *shape[1:], generator=generator)
