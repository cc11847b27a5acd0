"""How long what ranks send each other takes, where no computation hides it: seconds by axis.

Job, Device --> seconds of a block, or of a step; step_time.py adds them up. Imports no torch.
"""

from __future__ import annotations

from pipeline.config.choices import Recompute
from pipeline.planning.devices import LINK_SHARE, Device
from pipeline.planning.job import Job, Stage


def tensor_parallel_seconds(job: Job, device: Device) -> float:
    """Seconds of a block's tensor-parallel collectives, none of which is hidden.

    As counted in a rehearsal: with sequence parallelism 6 all-gathers and 4 reduce-scatters of
    (S, B, H) a block; without it 4 all-reduces, each of which is two of those. A recomputed block
    gathers and scatters its forward pass again: 4 more.
    """
    tensor = job.shape.sizes.tensor
    if tensor == 1:
        return 0.0
    link = device.link_bytes_s(spans_nodes=tensor > device.per_node) * LINK_SHARE
    volume = job.micro_tokens * job.model.hidden_size * job.width * (tensor - 1) / tensor
    count = 10.0 if job.parallel.sequence_parallel else 8
    if job.training.recompute is Recompute.full:
        count += 4 / job.training.recompute_every
    return count * volume / link


def context_parallel_seconds(job: Job, device: Device) -> float:
    """Seconds of a block's exchanges between ranks that share sequences, none of which is hidden.

    Forward the queries, keys and values of this rank's tokens for whole sequences of its heads, and
    the context back; backward their gradients. A recomputed block exchanges its forward pass again.
    Of each a rank keeps its own part.
    """
    context, tensor = job.shape.sizes.context, job.shape.sizes.tensor
    if context == 1:
        return 0.0
    heads, groups = job.model.num_attention_heads, job.sizes.num_query_groups * job.key_copies
    numbers = 2 * (heads + groups) * job.sizes.head_dim / tensor
    volume = job.micro_tokens * numbers * job.width * (context - 1) / context
    link = device.link_bytes_s(spans_nodes=tensor * context > device.per_node) * LINK_SHARE
    count = 2.0
    if job.training.recompute is Recompute.full:
        count += 1 / job.training.recompute_every
    return count * volume / link


def expert_parallel_seconds(job: Job, device: Device) -> float:
    """Seconds of a block's all-to-alls, none of which is hidden; every expert takes as many tokens.

    Each of a rank's tokens is sent to top_k experts and back, forward and backward: 4 times, and
    twice more where the forward pass is computed again. An EP-th of them stays on the rank.
    """
    expert = job.shape.sizes.expert
    if expert == 1:
        return 0.0
    link = device.link_bytes_s(spans_nodes=expert > device.per_node) * LINK_SHARE
    tokens = job.model.moe.top_k * job.micro_tokens / job.sequence_ranks
    volume = tokens * job.model.hidden_size * job.width * (expert - 1) / expert
    again = job.training.recompute is Recompute.full
    return (4 + (2 / job.training.recompute_every if again else 0)) * volume / link


def between_stages_seconds(job: Job, device: Device, *, chunks: int) -> float:
    """Activations and their gradients between stages: DeepSpeed's schedule waits for each copy.

    A micro-batch sends one and receives one in each direction; copies of two micro-batches overlap
    in part (0.3 of them remain; it fits the pipelines of arXiv:2104.04473).

    Args:
        chunks: pieces of the pipeline on each rank.
    """
    if job.shape.sizes.pipeline == 1:
        return 0.0
    # Stages are the slowest axis: neighbours are all ranks of a stage apart.
    spans = job.shape.world_size > device.per_node
    link = device.link_bytes_s(spans_nodes=spans) * LINK_SHARE
    hidden = job.micro_tokens * job.model.hidden_size * job.width / job.sequence_ranks
    return 0.3 * 2 * hidden / link * job.num_micro_batches * chunks


def data_parallel_seconds(job: Job, device: Device, stage: Stage, *, hides: float) -> float:
    """Seconds of reductions and gathers over the copies of the model that nothing hides.

    Gradient sums travel in fp32, an all-reduce being two passes; ZeRO-2 reduces each micro-batch.
    They go on while the last backward pass (`hides` seconds; ZeRO-2: each) computes, which a
    pipeline's do not. ZeRO-1 and -2 gather the weights behind the update, ZeRO-3 at each use.
    """
    copies, zero, pipeline = (
        job.shape.sizes.replicas,
        job.shape.zero_stage,
        job.shape.sizes.pipeline,
    )
    if copies == 1:
        return 0.0
    link = _ring_bytes_s(job, device) * LINK_SHARE * copies / (copies - 1)
    m, weights = job.num_micro_batches, stage.parameters * job.width / link
    # Numbers that travel as far as all copies of the model: of n copies' ring (n - 1) / n is sent.
    of_experts, experts = job.expert_copies, stage.trained_experts
    trained = stage.trained - experts + experts * (1 - 1 / of_experts) * copies / (copies - 1)
    if zero == 3:  # two gathers and a reduction of each block; nine tenths are hidden
        return max(0.0, m * (2 * weights + trained * job.width / link) - 0.9 * m * 1.5 * hides)
    sums = 2 * trained * 4 / link * (m if zero == 2 else 1)
    hidden = 0.0 if pipeline > 1 else hides * (m if zero == 2 else 1)
    return max(0.0, sums - hidden) + (trained * job.width / link if zero else 0.0)


def _ring_bytes_s(job: Job, device: Device) -> float:
    """Bytes per second of a collective over the copies of the model.

    Between nodes a ring enters and leaves a node once: its members there share their parts of the
    network, up to the link inside the node. Ranks are laid out tensor fastest, then their copies.
    """
    tensor, copies = job.shape.sizes.tensor, job.shape.sizes.replicas
    inside = device.link_bytes_s(spans_nodes=False)
    if tensor * copies <= device.per_node:
        return inside
    members = max(1, device.per_node // tensor)
    return min(inside, members * device.link_bytes_s(spans_nodes=True))
