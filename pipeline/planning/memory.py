"""What the ranks of each pipeline stage must hold, before they are asked to.

    Job --memory_of_stages--> a StageMemory of each pipeline rank: bytes by cause, and the moment

Parts that never exist together are not added: of the moments at which memory may be at its peak
(the loss, a block going backwards, the embedding's gradient), each stage's worst counts. Counted,
not fitted; within 5 % of the tensors that a rehearsal of the engine holds
(tests/planning/test_rehearsed_memory.py). Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.config.choices import Position, Precision, Recompute
from pipeline.config.parameter_names import linear_shapes
from pipeline.config.stages import sends_gradients_first
from pipeline.log import in_units
from pipeline.planning.job import Job, Stage
from pipeline.planning.kept import (
    backward_bytes,
    block_bytes,
    encoder_bytes,
    hidden_bytes,
    late_bytes,
    loss_bytes,
    recomputed_block_bytes,
    weight_gradient_bytes,
    whole_hidden_bytes,
)

GIB = 2**30
# Bytes of element-wise optimizer state per parameter, fp32.
ADAMW_BYTES, MUON_BYTES = 8, 4
# What torch's allocator cannot give out again, of what it holds: some 3 % where blocks have few
# sizes, as here. With CUDA's context, kernels and NCCL's buffers: 1.5 GiB. Neither is measured yet.
FRAGMENTATION = 0.03
CONTEXT_BYTES = 1.5 * GIB
# Numbers that DeepSpeed's stages 2 and 3 reduce at a time (engine/deepspeed/settings.py).
BUCKET_NUMBERS = 40_000_000
PARTS = ("weights", "gradients", "optimizer", "activations", "temporaries")


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of a pipeline stage at its peak."""

    stage: int
    weights: float
    """That the model computes with."""
    gradients: float
    """Sums of a step."""
    optimizer: float
    """fp32 copy of the weights, and moments."""
    activations: float
    """Kept for the backward pass, of all micro-batches in flight."""
    temporaries: float
    """At the moment that decides the peak."""
    moment: str
    """Which that is: loss, backward, embedding or pictures."""

    @property
    def tensors(self) -> float:
        """All of them together: what a rehearsal of the engine counts."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def overhead(self) -> float:
        """What the allocator, CUDA and NCCL take besides."""
        return FRAGMENTATION * self.tensors + CONTEXT_BYTES

    @property
    def total(self) -> float:
        """What the device must have."""
        return self.tensors + self.overhead

    def __str__(self) -> str:
        """Such as `41.2 GiB: weights 12.1 GiB, gradients 12.1 GiB, optimizer 9.0 GiB, ...`."""
        parts = ", ".join(f"{part} {in_units(getattr(self, part))}" for part in PARTS)
        return f"{in_units(self.total)}: {parts}, allocator and CUDA {in_units(self.overhead)}"


def memory_of_stages(job: Job) -> list[StageMemory]:
    """Of each pipeline rank, first to last."""
    return [_memory_of(job, stage) for stage in job.stages]


def most_loaded(stages: Sequence[StageMemory]) -> StageMemory:
    """The stage that decides whether the run fits."""
    return max(stages, key=lambda memory: memory.total)


def _memory_of(job: Job, stage: Stage) -> StageMemory:
    """At the moment that needs most on this stage."""
    weights, gradients, optimizer = _states(job, stage)
    activations, temporaries, moment = max(_moments(job, stage), key=lambda m: m[0] + m[1])
    return StageMemory(
        stage=stage.rank,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        temporaries=temporaries,
        moment=moment,
    )


def _states(job: Job, stage: Stage) -> tuple[float, float, float]:
    """Bytes of weights, gradient sums and optimizer state.

    Stage 0 updates the weights themselves; the others keep an fp32 copy of the part they own.
    """
    zero, shards, copies = job.shape.zero_stage, job.shape.sizes.replicas, job.copies(stage)
    state = stage.trained * ADAMW_BYTES - stage.by_muon * (ADAMW_BYTES - MUON_BYTES)
    copy = stage.trained * 4 if zero > 0 else 0.0
    weights = stage.parameters * job.width / (shards if zero == 3 else 1)
    gradients = stage.trained * 4 / (copies if zero >= 2 else 1)
    if job.training.precision is not Precision.bf16 and zero == 1:
        # DeepSpeed's stage 1 beside its BF16_Optimizer sums in the model's own gradients.
        gradients = stage.trained * job.width
    optimizer = (state + copy) / (copies if zero > 0 else 1)
    return weights, gradients, 0.0 if job.parallel.offload_optimizer else optimizer


def _moments(job: Job, stage: Stage) -> list[tuple[float, float, str]]:
    """(activations, temporaries, name) of the moments at which memory may be at its peak."""
    one = _activations(job, stage)
    flight = job.micro_batches_in_flight(stage)
    block = block_bytes(job)
    is_again = job.training.recompute is Recompute.full and stage.reached_layers > 0
    standing = _standing(job, stage)
    buckets = _bucket_bytes(job, stage) if job.shape.zero_stage >= 2 else 0.0
    head = job.table * job.width if stage.has_head else 0.0
    # A tied weight's gradient waits for the embedding's; another is added to the sums at once.
    waits = head if stage.has_embedding and job.model.tied_embeddings else 0.0
    pictures = encoder_bytes(job) if stage.has_embedding else 0.0
    moments = []
    if stage.has_head:
        moments.append((flight * one, loss_bytes(job) + standing, "loss"))
    if stage.reached_layers:
        again = block - recomputed_block_bytes(job) if is_again else 0.0
        behind = max(waits, head) if stage.has_head else 0.0
        used = backward_bytes(job) + again + behind + standing + buckets
        moments.append((flight * one + _late_growth(job, stage), used, "backward"))
    if stage.has_embedding:
        table = weight_gradient_bytes(job, job.table) + waits
        used = table + hidden_bytes(job) + standing + buckets
        if job.shape.zero_stage == 2:
            used += _large_gradient_bytes(job, stage) + waits  # two gradients, and their sum
        moments.append(((flight - 1) * one, used, "embedding"))
    if stage.has_embedding and job.encoder is not None and job.trains_encoder:
        used = _encoder_backward_bytes(job, job.encoder) + waits + standing + buckets
        moments.append(((flight - 1) * one + pictures, used, "pictures"))
    return moments


def _late_growth(job: Job, stage: Stage) -> float:
    """By how much the blocks of a micro-batch grow before the first of them goes backwards.

    Behind it wait all others' products, where the stage sends its input's gradient first: every
    stage but the first (engine/deepspeed/gradient_first.py), of DualPipeV half a rank's blocks.
    """
    training = job.training
    sends = job.shape.sizes.pipeline > 1 and (job.is_dual or stage.rank > 0) and job.trains_all
    if not (sends and sends_gradients_first(job.model, training.precision, training.recompute)):
        return 0.0
    layers = stage.reached_layers / (2 if job.is_dual else 1)
    return max(0.0, layers - 1) * max(0.0, late_bytes(job) - block_bytes(job))


def _encoder_backward_bytes(job: Job, encoder: Job) -> float:
    """Temporaries while a block of the picture encoder goes backwards.

    Autograd takes what was computed last first: the encoder goes before the word embedding, for
    which the gradient of what entered the GPT's blocks waits meanwhile, and is gone when that one's
    gradient is there. (Both at once were 7.7 % too much on a first stage that keeps everything.)
    """
    used = backward_bytes(encoder) + whole_hidden_bytes(job)
    if job.training.recompute is Recompute.full:
        used += block_bytes(encoder) - recomputed_block_bytes(encoder)
    return used


def _standing(job: Job, stage: Stage) -> float:
    """Buffers that are there whenever the stage computes.

    A pipeline receives into one buffer; its last stage keeps of the micro-batch before what it
    received, the norm's output and that one's gradient (DeepSpeed frees neither). DualPipeV's rank
    with the loss holds the gradients that the loss has computed for two micro-batches a rank: as
    rehearsed with two ranks and three. Of ZeRO-3: the gathered weights of two blocks.
    """
    standing, pipeline = 0.0, job.shape.sizes.pipeline
    if pipeline > 1:
        standing += hidden_bytes(job) * (4 if stage.has_head else 1)
    if job.is_dual and stage.has_head:
        standing += 2 * pipeline * (job.table * job.width + hidden_bytes(job))
    if job.training.precision is not Precision.bf16 and job.shape.zero_stage == 1:
        standing += _bucket_bytes(job, stage)
    if job.shape.zero_stage == 3 and stage.layers:
        standing += 2 * stage.parameters / stage.layers * job.width
    if job.model.position is Position.rope and stage.layers:  # cosines and sines, of all blocks
        standing += 2 * job.shape.seq_len * job.sizes.head_dim * job.width
    return standing


def _bucket_bytes(job: Job, stage: Stage) -> float:
    """Of ZeRO: two buckets of gradients, one filled while the other is reduced.

    Not at stage 1 where sums are reduced in place (engine/deepspeed/reduction.py): in bf16, and
    without a pipeline in fp32.
    """
    is_plain = job.shape.sizes.pipeline == 1 and not job.parallel.offload_optimizer
    sums_in_place = {Precision.bf16, Precision.fp32} if is_plain else {Precision.bf16}
    in_place = job.shape.zero_stage == 1 and job.training.precision in sums_in_place
    if job.shape.zero_stage == 0 or in_place or job.shape.sizes.replicas == 1:
        return 0.0
    return 2 * min(BUCKET_NUMBERS, stage.trained) * job.width


def _large_gradient_bytes(job: Job, stage: Stage) -> float:
    """Of ZeRO-2: gradients of this rank's part that no bucket holds, at the end of a backward pass.

    As rehearsed: they wait there (gpt3-13b, recomputed: 8 GiB of 132).
    """
    if not job.trains_all:
        return 0.0
    linears = linear_shapes(replace(job.model, num_layers=1)).values()
    sizes = [math.prod(shape) / job.shape.sizes.tensor for shape in linears]
    large = sum(size for size in sizes if size > BUCKET_NUMBERS)
    return stage.layers * large * job.width / job.shape.sizes.replicas


def _activations(job: Job, stage: Stage) -> float:
    """Bytes that a micro-batch keeps on a stage until its backward pass.

    The blocks that the backward pass reaches, the stage's last output, and what entered it: a
    pipeline keeps the received tensor beside the copy that the first block reads. Of a recomputed
    stage every n-th block keeps its input only.
    """
    layers = stage.reached_layers
    again = 0
    if job.training.recompute is Recompute.full:
        again = math.ceil(layers / job.training.recompute_every)
    kept = again * recomputed_block_bytes(job) + (layers - again) * block_bytes(job)
    ends = 1 + (1 if stage.rank and job.shape.sizes.pipeline > 1 else 0)
    kept += encoder_bytes(job) if stage.has_embedding else 0.0
    return kept + ends * hidden_bytes(job)
