"""What the forward pass keeps for the backward pass, in bytes of one rank and one micro-batch.

    Job --> bytes a block keeps, bytes a recomputed block keeps, bytes of the loss at its peak

Counted from the tensors that autograd holds, not fitted; tests/planning/test_rehearsed_memory.py
compares them with a rehearsal of the real engine. H hidden, F inner width of the MLP, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.choices import Normalization, Position, Precision, Recompute
from pipeline.planning.job import Job

# fp32 logits of one chunk on a device: model/loss.py's CHUNK_BYTES["cuda"], which needs torch; a
# test compares the two.
LOSS_CHUNK_BYTES = 512 * 2**20
STATISTIC = 4  # bytes of an fp32 mean, reciprocal deviation or log-sum-exp


def hidden_bytes(job: Job) -> float:
    """Of a micro-batch's hidden states (B, S, H) on a rank."""
    return job.micro_tokens * job.width * job.model.hidden_size / job.sequence_ranks


def whole_hidden_bytes(job: Job) -> float:
    """The same before sequence parallelism has split them, or after it has gathered them."""
    return job.micro_tokens * job.width * job.model.hidden_size


def block_bytes(job: Job) -> float:
    """What a block keeps: its input, the residual sum, norms' outputs, attention and MLP.

    A GPT-3 block keeps 16 H numbers a token: the 34 bytes of H of Korthikanti et al. 2022
    (arXiv:2205.05198, section 4) less 2 of dropout masks; flash attention keeps no scores.
    """
    model = job.model
    sums = 1 if model.parallel_residual else 2  # block input, and the sum between its halves
    statistics = 2 * _statistics(job) * STATISTIC / job.sequence_ranks
    masks = 0.0
    if model.hidden_dropout:
        masks = 2 * model.hidden_size / job.sequence_ranks  # a byte each, behind both halves
    per_token = statistics + masks
    kept = (2 + sums) * hidden_bytes(job) + job.micro_tokens * per_token
    return kept + _attention_bytes(job) + _mlp_bytes(job)


def _statistics(job: Job) -> int:
    """Numbers that a norm keeps of each vector: mean and deviation, or the deviation alone."""
    return 2 if job.model.normalization is Normalization.layernorm else 1


def _attention_bytes(job: Job) -> float:
    """Queries, keys, values and the context, and what turned and normalised copies stay alive.

    The values keep the whole projection alive, of which they are a view. Where several query heads
    share a key, the queries are copied out of it, and in fp32 keys and values are repeated for each
    of them (model/attention.py); rotation makes new queries and keys; norms of heads keep their
    input. Where ranks share sequences, keys and values may stand several times, and the context
    twice: whole sequences of some heads, and all heads of a run.
    """
    model, sizes = job.model, job.sizes
    heads, width = model.num_attention_heads, sizes.head_dim
    groups = sizes.num_query_groups * job.key_copies
    numbers = (heads + 2 * groups) * width + heads * width
    if job.shape.sizes.context > 1:
        numbers += heads * width
    if heads > groups:
        numbers += heads * width
    if heads > groups and job.width == 4:
        numbers += 2 * heads * width
    if model.position is Position.rope or model.qk_norm:
        numbers += (heads + groups) * width
    statistics = float(heads)  # log-sum-exp of each query
    if model.qk_norm:
        statistics += _statistics(job) * (heads + groups)
    per_token = numbers * job.width + statistics * STATISTIC
    return job.micro_tokens * per_token / job.shape.sizes.tensor


def _mlp_bytes(job: Job) -> float:
    """Inner tensors: before and after the activation; gated: gate and up, its half, the product.

    A mixture keeps those of top_k experts, once more weighted by what the router gives the token,
    and the tokens sorted by expert, which ranks that split every expert have whole sequences of.
    """
    model, moe, tensor = job.model, job.model.moe, job.shape.sizes.tensor
    copies = 4 if job.sizes.is_gated else 2
    if not moe.num_experts:
        return job.micro_tokens * job.width * job.sizes.ffn_hidden_size * copies / tensor
    numbers = moe.top_k * job.sizes.ffn_hidden_size * (copies + 1) / tensor
    numbers += moe.shared_expert_ffn_hidden_size * copies / tensor
    ranks = job.sequence_ranks if job.shape.sizes.expert > 1 else 1
    numbers += moe.top_k * model.hidden_size / ranks
    return job.micro_tokens * job.width * numbers


def late_bytes(job: Job) -> float:
    """What a dense block keeps behind its backward pass, until its weights' gradients are computed.

    Of every linear its input and its output's gradient, where a stage sends its input's gradient
    first (model/linear.py). On one tensor-parallel rank no more than the block kept before; under
    sequence parallelism two of the gradients are of whole sequences: 276 MiB where a block of
    gpt3-175b kept 192 (micro-batch 2, TP 8).
    """
    sizes, tensor = job.sizes, job.shape.sizes.tensor
    context = job.model.num_attention_heads * sizes.head_dim
    numbers = 2 * context + 2 * sizes.num_query_groups * sizes.head_dim
    if not job.model.moe.num_experts:
        numbers += (1 + _gates(job)) * sizes.ffn_hidden_size
    split = job.micro_tokens * job.width * numbers / tensor
    return split + 2 * hidden_bytes(job) + 2 * whole_hidden_bytes(job)


def recomputed_block_bytes(job: Job) -> float:
    """What a block keeps that is computed again: its input."""
    return hidden_bytes(job)


def encoder_bytes(job: Job) -> float:
    """What the picture encoder keeps of a micro-batch: patches, blocks, both linears' inputs.

    A frozen one keeps the projector's inputs only.
    """
    encoder, vision = job.encoder, job.model.vision
    if encoder is None or job.sizes.vision is None:
        return 0.0
    projector = encoder.micro_tokens * job.width * (vision.hidden_size + 3 * job.model.hidden_size)
    if not job.trains_encoder:
        return projector
    again, layers = 0, vision.num_layers
    if job.training.recompute is Recompute.full:
        again = math.ceil(layers / job.training.recompute_every)
    blocks = again * recomputed_block_bytes(encoder) + (layers - again) * block_bytes(encoder)
    return blocks + projector + encoder.micro_tokens * job.width * job.sizes.vision.patch_numbers


def backward_bytes(job: Job) -> float:
    """Temporaries while a block goes backwards, beside what it kept.

    The gradient of its output lives until the residual sum. Ungated: the gradient of the inner
    width, and that of the second matrix's weight beside it. Gated: the product's gradient, then
    gate's and up's, and their concatenation, when two kept tensors are gone: twice the inner width.
    Under sequence parallelism the output's gradient is gathered first.
    """
    tensor, inner = job.shape.sizes.tensor, job.sizes.ffn_hidden_size
    experts = job.model.moe.top_k if job.model.moe.num_experts else 1
    of_inner = job.micro_tokens * job.width * inner * experts / tensor
    # Experts on ranks of their own are whole there.
    cuts = 1 if job.shape.sizes.expert > 1 else tensor
    one = inner * job.model.hidden_size / cuts
    of_weight, of_first = weight_gradient_bytes(job, one), 0.0
    if _has_grouped_experts(job):
        # One product makes the gradients of all experts of a rank, of the second matrices, then,
        # when the inner tensors are gone, of the first.
        others = (job.model.moe.num_experts / job.shape.sizes.expert - 1) * one * job.width
        of_first = (others + of_weight) * _gates(job) - of_inner
        of_weight += others
    gathered = whole_hidden_bytes(job) if job.sequence_ranks > 1 else 0.0
    inner_bytes = max(of_inner + of_weight, of_inner * _gates(job), of_first)
    return hidden_bytes(job) + gathered + inner_bytes


def _has_grouped_experts(job: Job) -> bool:
    """Whether a rank's experts are one product (model/grouped.py): bf16, as ZeRO 1, 2 lay them."""
    is_bf16 = job.training.precision is Precision.bf16
    return bool(job.model.moe.num_experts) and is_bf16 and job.shape.zero_stage in (1, 2)


def weight_gradient_bytes(job: Job, numbers: float) -> float:
    """Of a weight's gradient until it is in the sums.

    A pipeline's is copied to fp32 before it is added (DeepSpeed's BF16_Optimizer); the plain
    engine's is added as it is (engine/deepspeed/bf16_sums.py).
    """
    is_copied = job.shape.sizes.pipeline > 1 and job.width == 2
    return numbers * (job.width + (4 if is_copied else 0))


def _gates(job: Job) -> int:
    return 2 if job.sizes.is_gated else 1


@dataclass(frozen=True)
class LossChunks:
    """How model/loss.py cuts a micro-batch: whole chunks of rows, and what is left."""

    count: int
    whole: float
    """fp32 bytes of the logits of a whole chunk."""
    last: float
    """The same of the last one."""

    @classmethod
    def of(cls, job: Job) -> LossChunks:
        """Of one micro-batch on a rank."""
        row = job.shape.padded_vocab_size / job.shape.sizes.tensor * 4
        rows = 1 << (max(16, int(LOSS_CHUNK_BYTES // row)).bit_length() - 1)
        count = math.ceil(job.micro_tokens / rows)
        left = job.micro_tokens - (count - 1) * rows
        return cls(count, min(rows, job.micro_tokens) * row, left * row)


def loss_bytes(job: Job) -> float:
    """Temporaries of the loss at their peak, beside the hidden states that enter the final norm.

    The norm's output and its gradient; under sequence parallelism the gathered sequence and, of
    several sequences, its copy in batch order; and the worst moment of the chunks: in the softmax,
    or where a chunk's part is added to the weight's gradient.
    """
    whole = whole_hidden_bytes(job)
    around = hidden_bytes(job) + whole
    if job.sequence_ranks > 1:
        around += whole * (2 if job.shape.micro_batch_size > 1 else 1)
    return around + _chunk_bytes(job)


def _chunk_bytes(job: Job) -> float:
    """The worst moment of the chunks.

    In units of a chunk's fp32 logits, in 16 bits: raw logits 1/2, their fp32 copy 1, probabilities
    1, and the logits' gradient of the chunk before 1/2. In fp32 logits 1, probabilities 1, gradient
    before 1. Compiled (model/fused_loss.py): raw logits and their gradient, as wide as they, alone.
    The weight's gradient is 16 bits wide after one chunk and fp32 after two, when both and the
    second's part stand beside each other.
    """
    chunks, table, width = LossChunks.of(job), job.table, job.width
    before, softmax = (1.0, 2.0) if width == 4 else (0.5, 1.0 if job.model.compile else 2.5)
    one, two = table * width, table * (width if width == 4 else 4)
    moments = [softmax * chunks.whole, before * chunks.whole + one]
    if chunks.count >= 2:
        second = chunks.last if chunks.count == 2 else chunks.whole
        moments.append(before * chunks.whole + softmax * second + one)
        moments.append(before * second + (two if width == 4 else one + two + one))
    if chunks.count >= 3:
        third = chunks.last if chunks.count == 3 else chunks.whole
        moments.append(before * chunks.whole + softmax * third + two)
        moments.append(before * third + two + (0 if width == 4 else one))
    return max(moments)
