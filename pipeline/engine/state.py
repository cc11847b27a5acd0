"""This rank's fp32 weights and optimizer state, as views under layout-free names.

    fragments(engine) -> [Fragment(name, start, {"weight": view, "exp_avg": view, ...})]

A checkpoint is written from these views and read into them; nothing is gathered. Loading is
`create_state`, writing into the views, then `Engine.publish_weights`, which hands the fp32 weights
to the copies that forward and backward use.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.config.parameter_names import is_linear_weight
from pipeline.engine.home_ranks import Run
from pipeline.engine.muon import MOMENTUM, Muon
from pipeline.engine.runner import Runner, Slot
from pipeline.engine.weights import Weights
from pipeline.model.fragments import WEIGHT, Fragment
from pipeline.model.partition import Partition, is_expert, is_shared


class Trained(Weights, Protocol):
    """Weights that an optimizer updates: an Engine."""

    runner: Runner


def by_identity(engine: Trained) -> dict[int, tuple[str, Partition]]:
    """The id of a parameter of this stage -> its canonical name and partition."""
    return {
        id(parameter): (name, partition)
        for name, (parameter, partition) in engine.all_parameters().items()
    }


def fragments(engine: Trained) -> list[Fragment]:
    """Views of this rank's trained weights and optimizer state, tied copies included."""
    named = by_identity(engine)
    state = engine.runner.optimizer.state
    found = []
    for index, slot in enumerate(engine.runner.slots()):
        name, partition = named[id(slot.parameter)]
        views = {WEIGHT: slot.flat.data.view(-1).narrow(0, slot.offset, slot.numel)}
        for key, value in state.get(slot.flat, {}).items():
            if isinstance(value, Tensor) and value.numel() == slot.flat.numel() and value.dim() > 0:
                views[key] = value.view(-1).narrow(0, slot.offset, slot.numel)
        found.append(Fragment(name, partition, slot.start, views, _is_owned(engine, slot, index)))
    return found


def frozen_fragments(engine: Trained) -> list[Fragment]:
    """Views of this rank's frozen weights, in the precision the model computes in.

    No checkpoint holds them: they are read from the base, whenever a run starts.
    """
    named = by_identity(engine)
    return [
        Fragment(*named[id(slot.parameter)], slot.start, {WEIGHT: slot.flat}, False)
        for slot in engine.runner.frozen_slots()
    ]


def _is_owned(engine: Trained, slot: Slot, index: int) -> bool:
    if getattr(slot.parameter, "ds_pipe_replicated", False):
        return False
    if is_shared(slot.parameter) and engine.layout.tensor.rank:
        return False
    # ZeRO-0: all copies hold everything, so they take turns. Otherwise each holds runs of its own.
    copies = engine.layout.expert_data if is_expert(slot.parameter) else engine.layout.replica
    return not engine.runner.is_unsharded or index % copies.size == copies.rank


def linear_runs(engine: Trained) -> list[Run]:
    """Where this rank's share of the trained weights of linears lies."""
    named = by_identity(engine)
    number = {id(flat): i for i, (flat, _) in enumerate(engine.runner.flats())}
    return [
        Run(name, partition, slot.start, slot.numel, number[id(slot.flat)], slot.offset)
        for slot in engine.runner.slots()
        for name, partition in [named[id(slot.parameter)]]
        if is_linear_weight(name)
    ]


def create_state(engine: Trained, keys: list[str], *, optimizer_step: int) -> None:
    """Give an optimizer its step count, and state under `keys` to read a checkpoint into.

    A fresh one would create it at its first step, which is too late. One that has trained, or has
    read a damaged checkpoint, keeps nothing that the checkpoint does not replace: a checkpoint from
    before the first update has no state, which is zeros.
    """
    optimizer, named = engine.runner.optimizer, by_identity(engine)
    for slot in {id(slot.flat): slot for slot in engine.runner.slots()}.values():
        flat, kept = slot.flat, keys_of(engine, named[id(slot.parameter)][0], keys)
        state = optimizer.state[flat]
        for key in kept:
            if key not in state:
                state[key] = torch.zeros_like(flat.data)
        for key, value in state.items():
            if key not in kept and isinstance(value, Tensor):
                value.zero_()
        state["step"] = _step_count(optimizer, flat, optimizer_step)


def keys_of(engine: Trained, name: str, keys: list[str]) -> list[str]:
    """Those kinds of state that the optimizer keeps of the parameter called `name`."""
    is_muon = isinstance(engine.runner.optimizer, Muon) and is_linear_weight(name)
    return [key for key in keys if (key == MOMENTUM) == is_muon]


def optimizer_step(engine: Trained) -> int:
    """Updates the optimizer has applied: steps without the skipped ones."""
    states = engine.runner.optimizer.state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def _step_count(optimizer: torch.optim.Optimizer, flat: Tensor, count: int) -> Any:
    """As the optimizer counts: torch's in a tensor, one on the host in an int."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return count
    is_on_device = any(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )
    return torch.tensor(float(count), device=flat.device if is_on_device else "cpu")
