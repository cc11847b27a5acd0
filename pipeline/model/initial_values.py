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
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pipeline.config.choices import Init
from pipeline.config.model import ModelConfig
from pipeline.model.partition import Partition, Slices

ROWS = 256  # rows per generator: small against a shard, large against the cost of seeding

Run = tuple[Slices, int, Slices]
"""Place in a rank's tensor, block, place in the block."""

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
        is_of_encoder = name.startswith("vision.")
        std /= math.sqrt(2.0 * (model.vision if is_of_encoder else model).num_layers)
    if model.init is Init.mup and is_hidden:
        std *= math.sqrt(model.mup_base_hidden_size / model.hidden_size)
    return std


@torch.no_grad()
def initialize(
    parameter: Tensor,
    name: str,
    part: Partition,
    *,
    model: ModelConfig,
    seed: int,
    num_threads: int = 1,
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

    def numbers_of(run: Run) -> tuple[Slices, Tensor]:
        target, block, source = run
        return target, std * draw(part.global_shape, name, block, seed=seed)[source]

    # A generator draws 372 M numbers a second on a core: 20 s for 7e9 of them. Each block has its
    # own, so that threads draw the same numbers; they are copied in turn, by the caller.
    with ThreadPoolExecutor(num_threads) as pool:
        drawn: deque[Future[tuple[Slices, Tensor]]] = deque()

        def copy_first() -> None:
            target, numbers = drawn.popleft().result()
            parameter[target] = numbers.to(parameter)

        for run in runs_of_blocks(part):
            drawn.append(pool.submit(numbers_of, run))
            # Threads outrun the one that copies: without a bound a whole fp32 shard piles up.
            if len(drawn) > 2 * num_threads:
                copy_first()
        while drawn:
            copy_first()


def threads_for(local_world_size: int) -> int:
    """Threads that draw a rank's numbers: its share of the cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def runs_of_blocks(part: Partition) -> Iterator[Run]:
    """(where, block, which of its numbers) for all that a rank keeps.

    A block is drawn whole, in all its columns, and the rank keeps its own rows and columns: which
    numbers they get must not depend on where another layout would cut.
    """
    for local, whole in part.pieces():
        rows, rest = whole[0], whole[1:]
        for block in range(rows.start // ROWS, math.ceil(rows.stop / ROWS)):
            start, stop = max(rows.start, block * ROWS), min(rows.stop, (block + 1) * ROWS)
            offset = local[0].start + start - rows.start
            source = slice(start - block * ROWS, stop - block * ROWS)
            yield (slice(offset, offset + stop - start), *local[1:]), block, (source, *rest)


def draw(shape: tuple[int, ...], name: str, block: int, *, seed: int) -> Tensor:
    """Standard normal numbers of a block, fp32 on the CPU."""
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(block_shape(shape, block), generator=generator)


def block_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """Of a block of a parameter of this shape: ROWS rows, in the last one those that are left."""
    return min(ROWS, shape[0] - block * ROWS), *shape[1:]
