"""How long an optimizer step takes, by cause: a roofline with few constants.

    Job, Device --step_time--> StepTime: seconds of matrix products, attention, ... , in sum

Work and traffic are counted; how near a device comes to its peak is in conf/devices/, and what no
datasheet says in the constants below. docs/plan.md has every published run that this was compared
with, and says which of them a constant was fitted on. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

from pipeline.config.choices import Recompute
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import VisionConfig
from pipeline.config.stages import sends_gradients_first
from pipeline.planning.communication import (
    between_stages_seconds,
    context_parallel_seconds,
    data_parallel_seconds,
    expert_parallel_seconds,
    tensor_parallel_seconds,
)
from pipeline.planning.devices import MEMORY_SHARE, Device
from pipeline.planning.flops import flops_per_token
from pipeline.planning.job import Job
from pipeline.planning.update_time import update_seconds

# A matrix product with a side of this many rows runs at 1 / sqrt(2) of the share of a large one.
SHORT_SIDE = 160.0
# How often the element-wise work of a block reads or writes (tokens, H) forward and backward:
# norms, residual sums, activation, rotation, as separate kernels.
PASSES = 60.0
# Of a step, what nothing here explains: stragglers, data, jitter.
UNEXPLAINED = 0.04
# Backward over forward of flash attention: five products instead of two.
ATTENTION_BACKWARD = 2.5
# Kernels of a block, forward and backward, and what the host takes to launch one: Python and
# autograd. Not measured on a device.
LAUNCHES_FORWARD, LAUNCHES_BACKWARD, LAUNCH_S = 20, 40, 5e-6
# The same of each expert, one after another (model/experts.py); counted, of a gated one.
EXPERT_FORWARD, EXPERT_BACKWARD = 7, 13
# Bytes each score costs where attention is not fused: written, masked, normalised, dropped out and
# read, in both directions.
SCORE_BYTES = 42


@dataclass(frozen=True)
class Practice:
    """How a step is run, where published runs differ from ours."""

    chunks_per_stage: int = 1
    """Interleaved schedule: a rank's pieces of the pipeline (arXiv:2104.04473)."""
    fused_attention: bool = True
    gradient_first: bool = True
    """Stages send their input's gradient before they compute those of their weights
    (engine/deepspeed/gradient_first.py).
    """


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by cause."""

    matrices: float
    """Products with weights, the output head and the whole picture encoder included."""
    attention: float
    """Scores and context."""
    element_wise: float
    """Norms, residual sums, activations: bound by memory."""
    recomputed: float
    """What the backward pass computes again."""
    tensor_parallel: float
    context_parallel: float
    """Heads against tokens, around attention."""
    expert_parallel: float
    """Tokens on their way to experts on other ranks and back."""
    bubble: float
    """Ranks of the pipeline that wait for the first and the last micro-batch."""
    between_stages: float
    data_parallel: float
    """Reductions and gathers that no computation hides."""
    optimizer: float
    launches: float
    """Device time lost while the host launches small kernels."""
    unexplained: float

    @property
    def total(self) -> float:
        """The step."""
        return sum(self.by_cause.values())

    @property
    def by_cause(self) -> dict[str, float]:
        """Cause, in words, to seconds; as written above."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name.replace("_", " "): getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Block:
    """Seconds of one block and micro-batch."""

    matrices: float
    """Forward."""
    attention: float
    """Forward."""
    element_wise: float
    """Forward."""
    products_back: float
    """Products of the backward pass over those of the forward pass: 2 where all is trained."""
    again: float
    """Recomputed."""
    tensor_parallel: float
    context_parallel: float
    expert_parallel: float
    launches: float

    @property
    def backward(self) -> float:
        """The backward pass, without what it recomputes."""
        products = self.products_back * self.matrices
        return products + ATTENTION_BACKWARD * self.attention + 2 * self.element_wise

    @property
    def total(self) -> float:
        """Forward and backward."""
        forward = self.matrices + self.attention + self.element_wise
        sent = self.tensor_parallel + self.context_parallel + self.expert_parallel
        return forward + self.backward + self.again + sent + self.launches


def step_time(job: Job, device: Device, practice: Practice = Practice()) -> StepTime:
    """Seconds of a step once every ramp has ended, on the slowest stage of the pipeline."""
    pipeline, m = job.shape.sizes.pipeline, job.num_micro_batches
    block, head = _block(job, device, practice), _head_seconds(job, device)
    pictures = _picture_seconds(job, device)
    stage = max(
        job.stages,
        key=lambda s: s.layers * block.total + s.has_head * head + s.has_embedding * pictures,
    )
    layers = job.model.num_layers / pipeline if practice.chunks_per_stage > 1 else stage.layers
    ends = stage.has_head * head + stage.has_embedding * pictures
    per_pass = layers * block.total + ends
    waited = per_pass - layers * _late_seconds(job, block, practice)
    bubble = (pipeline - 1) * waited / practice.chunks_per_stage * (0.5 if job.is_dual else 1.0)
    seconds = StepTime(
        matrices=m * (layers * (1 + block.products_back) * block.matrices + ends),
        attention=m * layers * (1 + ATTENTION_BACKWARD) * block.attention,
        element_wise=m * layers * 3 * block.element_wise,
        recomputed=m * layers * block.again,
        tensor_parallel=m * layers * block.tensor_parallel,
        context_parallel=m * layers * block.context_parallel,
        expert_parallel=m * layers * block.expert_parallel,
        bubble=bubble,
        between_stages=between_stages_seconds(job, device, chunks=practice.chunks_per_stage),
        data_parallel=data_parallel_seconds(job, device, stage, hides=layers * block.backward),
        optimizer=update_seconds(job, device, stage),
        launches=m * layers * block.launches,
        unexplained=0.0,
    )
    return replace(seconds, unexplained=UNEXPLAINED * seconds.total)


def _picture_seconds(job: Job, device: Device) -> float:
    """The picture encoder on a micro-batch, forward and backward; its projector is left out.

    A frozen one goes forward only.
    """
    if job.encoder is None:
        return 0.0
    block = _block(job.encoder, device, Practice())
    forward = block.matrices + block.attention + block.element_wise
    return job.encoder.model.num_layers * (block.total if job.trains_encoder else forward)


def _share_of_peak(device: Device, *sides: float) -> float:
    """Of a matrix product with these sides, in share of the peak: short sides fill no tiles."""
    share = device.matrix_share
    for side in sides:
        share *= (side / (side + SHORT_SIDE)) ** 0.5
    return share


def _block(job: Job, device: Device, practice: Practice) -> _Block:
    """Of one block and micro-batch on one rank.

    Element-wise work on hidden states is split by sequence parallelism, that on the inner width and
    the heads by tensor parallelism: 0.35 and 0.65 of it in a GPT-3 block.
    """
    model, tensor, h = job.model, job.shape.sizes.tensor, job.model.hidden_size
    tokens, seq_len = job.micro_tokens, job.shape.seq_len
    matrices = _product_seconds(job, device)
    scores = tokens * seq_len * model.num_attention_heads / tensor  # half of them is masked
    flops = 4 * scores * job.sizes.head_dim / 2
    attention = flops / (device.peak * device.attention_share)
    memory = device.memory_gb_s * 1e9 * MEMORY_SHARE
    split = 0.35 / job.sequence_ranks + 0.65 / tensor
    moved = PASSES * job.width * tokens * h * split
    if not practice.fused_attention:
        moved += SCORE_BYTES * scores
    element_wise = moved / memory / 3
    forward = matrices + attention + element_wise
    again = 0.0
    if job.training.recompute is Recompute.full:
        again = forward / job.training.recompute_every
    elif job.training.recompute is Recompute.selective:
        again = attention + (SCORE_BYTES * scores / memory / 3) * (not practice.fused_attention)
    block = _Block(
        matrices=matrices,
        attention=attention,
        element_wise=element_wise,
        products_back=_products_back(job),
        again=again,
        tensor_parallel=tensor_parallel_seconds(job, device),
        context_parallel=context_parallel_seconds(job, device),
        expert_parallel=expert_parallel_seconds(job, device),
        launches=0.0,
    )
    sent = block.tensor_parallel + block.context_parallel + block.expert_parallel
    device_s = block.total - sent
    experts = model.moe.num_experts / job.shape.sizes.expert
    forward_launches = LAUNCHES_FORWARD + experts * EXPERT_FORWARD
    backward_launches = LAUNCHES_BACKWARD + experts * EXPERT_BACKWARD
    host_s = LAUNCH_S * (forward_launches * (2 if again else 1) + backward_launches)
    return replace(block, launches=max(0.0, host_s - device_s))


def _products_back(job: Job) -> float:
    """Products of the backward pass over those of the forward pass.

    Two where all is trained; a frozen matrix has no gradient, and below the first trained block
    nothing goes backwards (flops.flops_per_token), which is spread over all blocks here.
    """
    if job.trains_all:
        return 2.0
    model, nothing = job.model, {"vocab_size": 0, "seq_len": 0}
    whole = flops_per_token(model, FinetuneConfig(), **nothing)
    return 3 * flops_per_token(model, job.finetune, **nothing) / whole - 1


def _late_seconds(job: Job, block: _Block, practice: Practice) -> float:
    """Of a block's backward pass, what no other stage waits for: its weights' gradients.

    With forward, input's and weights' gradients a second each, a pipeline of p stages then idles
    2 (p - 1) seconds of a step instead of 3 (p - 1) under 1F1B, p - 1 under DualPipeV.
    """
    training = job.training
    may_be = sends_gradients_first(job.model, training.precision, training.recompute)
    if not (practice.gradient_first and may_be):
        return 0.0
    return max(0.0, block.products_back - 1) * block.matrices


def _product_seconds(job: Job, device: Device) -> float:
    """Of a block's products with weights, forward, of a micro-batch on a rank.

    Each expert multiplies the tokens that are sent to it, taken to be as many as to the next: 256
    rows at a time of 4,096 tokens that 128 experts share by eights.
    """
    moe, sizes, h = job.model.moe, job.shape.sizes, job.model.hidden_size
    tokens, inner = job.micro_tokens, job.sizes.ffn_hidden_size
    narrow = (h if moe.num_experts else min(h, inner)) / sizes.tensor
    at_peak = tokens / sizes.tensor / device.peak
    of_experts = moe.top_k * 2 * job.sizes.num_mlp_matrices * h * inner if moe.num_experts else 0
    seconds = (_product_flops(job) - of_experts) / _share_of_peak(device, narrow, h, tokens)
    if of_experts:
        is_spread = sizes.expert > 1
        rows = tokens * moe.top_k / moe.num_experts
        rows *= sizes.expert / job.sequence_ranks if is_spread else 1
        narrow = min(h, inner) / (1 if is_spread else sizes.tensor)
        seconds += of_experts / _share_of_peak(device, narrow, h, rows)
    return seconds * at_peak


def _product_flops(job: Job) -> float:
    """Operations of one token in a block's products, forward: a third of what all of them cost."""
    one = replace(job.model, num_layers=1, vision=VisionConfig())
    return flops_per_token(one, FinetuneConfig(), vocab_size=0, seq_len=0) / 3


def _head_seconds(job: Job, device: Device) -> float:
    """Output projection and loss of a micro-batch: three products, and passes over the logits."""
    tensor, tokens = job.shape.sizes.tensor, job.micro_tokens
    columns = job.shape.padded_vocab_size / tensor
    products = 3 * tokens * 2 * columns * job.model.hidden_size
    memory = device.memory_gb_s * 1e9 * MEMORY_SHARE
    return products / (device.peak * device.matrix_share) + tokens * columns * 24 / memory
