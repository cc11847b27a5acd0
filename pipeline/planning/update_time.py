"""How long the optimizer's update takes: its pass over the state, and Muon's products.

Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pipeline.config.parameter_names import linear_shapes
from pipeline.planning.devices import LINK_SHARE, MEMORY_SHARE, Device
from pipeline.planning.flops import orthogonalization_flops
from pipeline.planning.job import Job, Stage

# Bytes a parameter's update reads and writes: gradient, three fp32 states both ways, the weight;
# under Muon two states, and what becomes the update leaves and comes back in bf16.
UPDATE_BYTES, MUON_UPDATE_BYTES = 30, 26


def update_seconds(job: Job, device: Device, stage: Stage) -> float:
    """The optimizer's pass over the part of the state that a rank owns, and Muon's products."""
    copies = job.copies(stage) if job.shape.zero_stage else 1
    bytes_ = (stage.trained - stage.by_muon) * UPDATE_BYTES + stage.by_muon * MUON_UPDATE_BYTES
    seconds = bytes_ / copies / (device.memory_gb_s * 1e9 * MEMORY_SHARE)
    return seconds + (_muon_seconds(job, device, stage, copies=copies) if stage.by_muon else 0.0)


def _muon_seconds(job: Job, device: Device, stage: Stage, *, copies: float) -> float:
    """Products on whole matrices, each on one of the ranks that share it; the way there and back.

    The dearest weight is the least a step takes, however many ranks there are.
    """
    one = replace(job.model, num_layers=1)
    costs = {
        name: orthogonalization_flops(f"{name}.weight", shape, one)
        for name, shape in linear_shapes(one).items()
    }
    numbers = sum(math.prod(shape) for shape in linear_shapes(one).values())
    ranks = job.shape.sizes.tensor * copies
    whole = stage.by_muon * job.shape.sizes.tensor / numbers * sum(costs.values())
    products = max(max(costs.values()), whole / ranks) / (device.peak * device.matrix_share)
    if ranks == 1:
        return products
    link = device.link_bytes_s(spans_nodes=ranks > device.per_node) * LINK_SHARE
    return products + 2 * stage.by_muon / copies * job.width / link
