"""The legal layouts of a run on so many devices, the fastest first.

    PretrainConfig --layouts--> what `derive` lets through --Plan--> what fits, by tokens/s

What is legal is asked of the rules of a run (config/rules.py), and of nothing else. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from pipeline.config.choices import PipelineSchedule, Recompute
from pipeline.config.model import ModelConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.config.step_shape import full_seq_len
from pipeline.config.vision import RowPictures
from pipeline.errors import ConfigError
from pipeline.planning.devices import Device
from pipeline.planning.job import Job
from pipeline.planning.plan import Plan

ONE_FORWARD_ONE_BACKWARD = PipelineSchedule["1f1b"]
# Tokens of a sequence that a rank has at least in a search: shorter ones need not be shared, and
# there are many layouts already.
LEAST_RUN = 4096


@dataclass(frozen=True)
class Layout:
    """A way to run the same steps, as one writes it, and what it would give."""

    settings: str
    """Overrides; empty: as the settings are."""
    plan: Plan


def search(
    cfg: PretrainConfig,
    device: Device,
    *,
    world_size: int,
    vocab_size: int,
    row_tokens: int | None = None,
    pictures: RowPictures | None = None,
) -> tuple[list[Layout], int]:
    """The layouts that fit, fastest first, and how many are legal; as it is set is one of them.

    Args:
        cfg: the run; its own layout need not be legal.
        device: of which there are `world_size`.
        vocab_size: of the tokenizer.
        row_tokens: of packed data; None: they are text, or not known.
        pictures: of the data; None: they are not known.
    """
    legal = [
        Layout(_difference(cfg, changed), Plan(Job.of(changed, shape), device))
        for changed in [cfg, *layouts(cfg, world_size=world_size, per_node=device.per_node)]
        if (
            shape := legal_shape(
                changed,
                world_size=world_size,
                vocab_size=vocab_size,
                row_tokens=row_tokens,
                pictures=pictures,
            )
        )
    ]
    fitting = [layout for layout in legal if layout.plan.fits]
    return sorted(fitting, key=lambda layout: -layout.plan.tokens_per_s), len(legal)


def layouts(cfg: PretrainConfig, *, world_size: int, per_node: int) -> Iterator[PretrainConfig]:
    """Every other layout of so many ranks that may be legal.

    Tensor parallelism stays within a node and takes sequence parallelism along, which splits what
    it leaves whole; ranks share sequences that are long; selective recompute is left out, for it
    saves nothing where attention is fused.
    """
    training = cfg.training
    tensors = [2**n for n in range(16) if 2**n <= min(per_node, world_size)]
    stages = [n for n in range(1, cfg.model.num_layers + 1) if world_size % n == 0]
    micro = [2**n for n in range(6) if 2**n <= training.global_batch_size]
    again = (Recompute.none, Recompute.full)
    for tensor, context, pipeline, size, recompute in product(
        tensors, contexts(cfg), stages, micro, again
    ):
        if world_size % (tensor * context * pipeline):
            continue
        experts = expert_sizes(cfg.model, tensor=tensor, ranks=world_size // pipeline)
        is_staged = pipeline > 1
        ways = (
            [(1, schedule) for schedule in PipelineSchedule]
            if is_staged
            else [(zero, ONE_FORWARD_ONE_BACKWARD) for zero in (1, 2, 3)]
        )
        for (zero, schedule), expert in product(ways, experts):
            parallel = replace(
                cfg.parallel,
                tensor_parallel_size=tensor,
                expert_parallel_size=expert,
                sequence_parallel=tensor > 1,
                context_parallel_size=context,
                pipeline_parallel_size=pipeline,
                pipeline_schedule=schedule,
                zero_stage=zero,
            )
            changed_training = replace(
                training, micro_batch_size=size, recompute=recompute, recompute_every=1
            )
            changed = replace(cfg, parallel=parallel, training=changed_training)
            if changed.parallel != cfg.parallel or changed.training != cfg.training:
                yield changed


def expert_sizes(model: ModelConfig, *, tensor: int, ranks: int) -> list[int]:
    """Ranks that may share a layer's experts, of those that share its tokens."""
    count = model.moe.num_experts
    spread = range(tensor, min(count, ranks) + 1, tensor)
    return [1] + [n for n in spread if n > 1 and count % n == 0 and ranks % n == 0]


def contexts(cfg: PretrainConfig) -> list[int]:
    """Numbers of ranks that may share a sequence of this run."""
    most = max(1, full_seq_len(cfg) // LEAST_RUN, cfg.parallel.context_parallel_size)
    sizes = (2**n for n in range(16))
    return [size for size in sizes if size <= min(most, cfg.model.num_attention_heads)]


def legal_shape(
    cfg: PretrainConfig,
    *,
    world_size: int,
    vocab_size: int,
    row_tokens: int | None = None,
    pictures: RowPictures | None = None,
) -> RunShape | None:
    """The derived numbers of a run; None: a rule forbids it.

    Args:
        row_tokens, pictures: as search; who changes a legal run, and no length of it, needs none.
    """
    try:
        return derive(
            cfg,
            world_size=world_size,
            tokenizer_vocab_size=vocab_size,
            row_tokens=row_tokens,
            pictures=pictures,
        )
    except ConfigError:
        return None


def _difference(cfg: PretrainConfig, changed: PretrainConfig) -> str:
    """The overrides that turn one into the other."""
    words = []
    for section in ("parallel", "training"):
        before, after = vars(getattr(cfg, section)), vars(getattr(changed, section))
        for key, value in after.items():
            if value != before[key]:
                text = getattr(value, "name", str(value).lower())
                words.append(f"{section}.{key}={text}")
    return " ".join(words)
