"""The rules of the layout: how ranks may share a model; see `rules`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipeline.config.choices import PipelineSchedule, Precision
from pipeline.config.model import ModelConfig
from pipeline.config.parallel_sizes import ParallelSizes
from pipeline.config.training import ParallelConfig


def whole_copies(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """The ranks make whole copies of the model."""
    sizes = ParallelSizes.filling(parallel, world_size=world_size)
    more = ParallelSizes.of(parallel, data=max(0, sizes.data) + 1)
    if sizes.world_size != world_size or world_size < 1:
        yield (
            f"the number of ranks ({world_size}) must be a multiple of "
            "parallel.tensor_parallel_size * parallel.context_parallel_size * "
            "parallel.pipeline_parallel_size "
            f"({sizes.tensor} * {sizes.context} * {sizes.pipeline} = {sizes.ranks_per_part}). "
            f"Start {more.world_size} ranks, or choose sizes that divide {world_size}."
        )


def is_dual(parallel: ParallelConfig) -> bool:
    """Whether each rank of the pipeline trains two stages."""
    return parallel.pipeline_schedule is PipelineSchedule["dualpipev"]


def stages_have_layers(
    model: ModelConfig, parallel: ParallelConfig, *, is_dual: bool
) -> Iterator[str]:
    """Every stage has a layer.

    Args:
        is_dual: two stages on each rank.
    """
    num_layers, pipeline = model.num_layers, parallel.pipeline_parallel_size
    per_rank = 2 if is_dual else 1
    if num_layers < per_rank * pipeline:
        yield (
            f"model.num_layers ({num_layers}) must be at least the number of pipeline stages "
            f"({per_rank * pipeline}{', two per rank with dualpipev' if is_dual else ''}). "
            f"Largest parallel.pipeline_parallel_size that fits: {num_layers // per_rank}."
        )


def sequence_parallel(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Where the sequence may, and where it must be split over tensor-parallel ranks."""
    tensor = parallel.tensor_parallel_size
    if parallel.sequence_parallel and tensor == 1:
        yield (
            "parallel.sequence_parallel=true has no effect with parallel.tensor_parallel_size=1. "
            "Set it false."
        )
    if model.moe.num_experts and tensor > 1 and not parallel.sequence_parallel:
        yield (
            f"experts under parallel.tensor_parallel_size={tensor} need "
            "parallel.sequence_parallel=true: "
            "megatron-core routes each token once, on the rank that holds it."
        )


def experts(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """Experts are whole on the ranks of whole tensor-parallel groups, as many on each."""
    expert, count = parallel.expert_parallel_size, model.moe.num_experts
    name = f"parallel.expert_parallel_size ({expert})"
    if expert > 1 and not count:
        yield f"{name} shares out experts; model.moe.num_experts is 0. Set it 1."
    if expert == 1 or not count:
        return
    sizes = ParallelSizes.filling(parallel, world_size=world_size)
    ranks = sizes.tensor * sizes.replicas
    fitting = [
        e for e in range(sizes.tensor, ranks + 1, sizes.tensor) if not (count % e or ranks % e)
    ]
    if expert not in fitting:
        fitting = sorted({1, *fitting})
        yield (
            f"{name} must be 1, or a multiple of parallel.tensor_parallel_size ({sizes.tensor}) "
            f"that divides both model.moe.num_experts ({count}) and the ranks that share a layer's "
            "tokens (tensor_parallel_size * context_parallel_size * data_parallel_size = "
            f"{ranks}). "
            f"Legal here: {', '.join(map(str, fitting))}."
        )


def heads_are_seen(model: ModelConfig, parallel: ParallelConfig, probe_every: int) -> Iterator[str]:
    """Hooks find queries and keys where Python calls attention, of heads where they were cut."""
    if probe_every > 0 and model.compile:
        yield (
            f"training.probe_every ({probe_every}) needs model.compile=false: a "
            "compiled block calls no hooks. `python -m pipeline.probe runs/NAME curve=true` looks "
            "at the checkpoints afterwards."
        )
    if probe_every > 0 and parallel.context_parallel_size > 1:
        yield (
            f"training.probe_every ({probe_every}) needs parallel.context_parallel_size=1: where "
            "ranks share sequences each attends with other heads. `python -m pipeline.probe "
            "runs/NAME curve=true` looks at the checkpoints afterwards."
        )


def context_parallel(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """In attention every rank has whole sequences of as many heads."""
    tensor, context = parallel.tensor_parallel_size, parallel.context_parallel_size
    heads = model.num_attention_heads
    here = heads // tensor  # where that is no whole number another rule says so
    if not heads % tensor and here % context:
        fits = largest_context(model, parallel, ())
        yield (
            f"model.num_attention_heads / parallel.tensor_parallel_size ({heads} / {tensor} = "
            f"{here}) must be a multiple of parallel.context_parallel_size ({context}): in "
            "attention each rank has whole sequences of some heads. Largest size that fits this "
            f"model: {fits}."
        )


def largest_context(model: ModelConfig, parallel: ParallelConfig, lengths: Iterable[int]) -> int:
    """The largest context_parallel_size that goes with a model's heads and sequences so long."""
    here = model.num_attention_heads // parallel.tensor_parallel_size
    tensor = parallel.tensor_parallel_size if parallel.sequence_parallel else 1
    parts = [here, *(length // tensor for length in lengths)]
    return max(size for size in range(1, here + 1) if not any(part % size for part in parts))


def sequence_splits(parallel: ParallelConfig, name: str, seq_len: int) -> Iterator[str]:
    """Every rank that shares a sequence has as many tokens of it.

    Args:
        name: of the setting that seq_len comes from.
    """
    tensor = parallel.tensor_parallel_size if parallel.sequence_parallel else 1
    ranks = tensor * parallel.context_parallel_size
    if seq_len % ranks:
        words = ["parallel.context_parallel_size"] if parallel.context_parallel_size > 1 else []
        words += ["parallel.tensor_parallel_size"] if tensor > 1 else []
        given = " with parallel.sequence_parallel=true" if tensor > 1 else ""
        yield (
            f"{name} ({seq_len}) must be a multiple of {' * '.join(words)} ({ranks}){given}. "
            f"Set {name}={-(-seq_len // ranks) * ranks}."
        )


# ---- of training ---------------------------------------------------------------------------------


def zero(parallel: ParallelConfig, precision: Precision) -> Iterator[str]:
    """Which layouts and precisions a ZeRO stage goes with."""
    stage, pipeline = parallel.zero_stage, parallel.pipeline_parallel_size
    if stage not in (0, 1, 2, 3):
        yield f"parallel.zero_stage ({stage}) must be 0, 1, 2 or 3."
    elif pipeline > 1 and stage != 1:
        yield (
            f"parallel.zero_stage={stage} does not work with "
            f"parallel.pipeline_parallel_size={pipeline}: DeepSpeed's pipeline keeps whole "
            "gradients across micro-batches (stages 2 and 3 refuse) and clips wrongly at stage 0. "
            "Set parallel.zero_stage=1 or parallel.pipeline_parallel_size=1."
        )
    if stage == 0 and precision is not Precision.fp32:
        yield (
            "parallel.zero_stage=0 works with training.precision=fp32 only: with "
            f"{precision.name} DeepSpeed 0.19 computes a wrong gradient norm under tensor "
            "parallelism. Set parallel.zero_stage=1."
        )
    if parallel.offload_optimizer and stage == 0:
        yield "parallel.offload_optimizer=true needs parallel.zero_stage of 1 to 3."
    if parallel.offload_optimizer and pipeline > 1:
        yield "parallel.offload_optimizer=true needs parallel.pipeline_parallel_size=1."


def experts_train(parallel: ParallelConfig) -> Iterator[str]:
    """What DeepSpeed can train of experts on ranks of their own."""
    expert, tensor = parallel.expert_parallel_size, parallel.tensor_parallel_size
    if parallel.zero_stage == 3 and expert > tensor:
        yield (
            f"parallel.zero_stage=3 works with parallel.expert_parallel_size ({expert}) up to "
            f"parallel.tensor_parallel_size ({tensor}): beyond it data-parallel ranks hold "
            "different experts, which DeepSpeed does not partition. Set parallel.zero_stage=2."
        )
    if parallel.offload_optimizer and expert > 1:
        yield (
            "parallel.offload_optimizer=true needs parallel.expert_parallel_size=1: DeepSpeed "
            "takes the gradient norm of offloaded experts wrongly."
        )


def dual_schedule(parallel: ParallelConfig) -> Iterator[str]:
    """Two stages on a rank need a pipeline."""
    if is_dual(parallel) and parallel.pipeline_parallel_size == 1:
        yield (
            "parallel.pipeline_schedule=dualpipev needs parallel.pipeline_parallel_size of at "
            "least 2."
        )
