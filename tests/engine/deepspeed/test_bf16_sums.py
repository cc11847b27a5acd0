"""The fp32 sums of bf16 gradients: no number changes, and the reduction does not wait for the backward pass to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.test_engine import engine_of
from tests.support.layouts import batches, config, rank_batches, reset_parallel_state, train
from tests.support.ranks import run_on_ranks


class ReductionAfterwards:
    """One all-reduce of all sums after the backward pass, as DeepSpeed does it."""

    def __init__(self, sums: list, group: dist.ProcessGroup, *_: Any, **__: Any) -> None:
        self.sums, self.group = sums, group

    def finish(self) -> None:
        for each in self.sums:
            dist.all_reduce(each.flat, group=self.group)
            each.flat.mul_(1.0 / self.group.size())


def history_of(cfg: Any, skips: bool) -> list[tuple[float, float]]:
    """Losses and norms of six steps.

    skips: every second step passes a layer by, whose parameters then get no gradient.
    """
    engine, history = engine_of(cfg), []
    layer = engine.runner.module.layers[2]
    whole = layer.forward
    for number, step in enumerate(batches()[:6]):
        layer.forward = (lambda hidden, _: hidden) if skips and number % 2 else whole
        parts = rank_batches(step, engine.shape, engine.layout)
        result = engine.train_step(parts, step=number)
        history.append((float(result.loss), float(result.grad_norm)))
    reset_parallel_state()
    return history


def histories(skips: bool) -> list[list[tuple[float, float]]]:
    """The same run with our sums and with DeepSpeed's own, reduced afterwards."""
    from pipeline.engine.deepspeed import bf16_sums, plain
    from pipeline.engine.deepspeed import reduction as buckets

    buckets.BUCKET_ELEMENTS = 10_000  # several buckets
    spared, found = [], []
    ours, reduction = bf16_sums.sum_in_place, plain.Reduction
    for change, reduce in (
        (lambda *a: spared.append(ours(*a)), reduction),
        (lambda *_: None, ReductionAfterwards),
    ):
        bf16_sums.sum_in_place, plain.Reduction = change, reduce
        found.append(history_of(config("gpt2", precision="bf16"), skips))
    assert len(spared) == 1
    return found


@pytest.mark.parametrize(
    "skips",
    [
        pytest.param(False, id="all used"),
        pytest.param(True, id="a layer passed by", marks=pytest.mark.slow),
    ],
)
def test_losses_and_norms_are_deepspeeds_own(skips: bool) -> None:
    for found, expected in run_on_ranks(histories, 2, skips):
        assert [loss for loss, _ in found] == [loss for loss, _ in expected]
        # DeepSpeed adds up the norms of the gradients that there are: other terms, one rounding.
        norms = [norm for _, norm in expected]
        assert [norm for _, norm in found] == pytest.approx(norms, rel=3e-7 if skips else 0.0)


class LargeOps(TorchDispatchMode):
    """Names of the operators that write or read `numel` elements or more."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.found = numel, []  # type: int, list[str]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.numel:
            self.found.append(func.name())
        return result


def large_ops(case: dict[str, Any]) -> list[str]:
    engine = engine_of(config("gpt2-untied", precision="bf16", **case))
    for number, step in enumerate(batches()[:2]):
        parts = rank_batches(step, engine.shape, engine.layout)
        with LargeOps(sum(p.numel() for p in engine.runner.parameters) // 2) as ops:
            engine.train_step(parts, step=number)
    return ops.found


def test_one_rank_copies_no_gradients() -> None:
    """Nor does it clear sums that are overwritten: passes over as much memory as the weights."""
    [found] = run_on_ranks(large_ops, 1, {})
    assert not {"aten::cat", "aten::zero_"} & set(found), found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_pipeline_copies_no_gradients(world_size: int) -> None:
    """Its sums are reduced where they lie, or not at all on one data-parallel rank."""
    for found in run_on_ranks(large_ops, world_size, {"pp": 2}):
        assert "aten::zero_" in found  # DeepSpeed clears a pipeline's sums: the watch sees them
        assert "aten::cat" not in found, found


def reductions_beside_large_ops(case: dict[str, Any]) -> tuple[list[tuple[str, bool]], list[str]]:
    """Of each reduction of gradients its dtype and whether it is of the sums where they lie; operators on that much."""
    engine = engine_of(config("gpt2-untied", precision="bf16", micro_batch_size=1, **case))
    places = {t.untyped_storage().data_ptr() for t in engine.runner.wrapper.fp32_groups_gradients_flat}  # fmt: skip
    numel = sum(p.numel() for p in engine.runner.parameters)
    found, all_reduce = [], dist.all_reduce

    def recorded(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() > 2500:  # no activation has as many elements
            found.append((str(tensor.dtype), tensor.untyped_storage().data_ptr() in places))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = recorded
    with LargeOps(numel // 2) as ops:
        for number, step in enumerate(batches()[:2]):
            engine.train_step(rank_batches(step, engine.shape, engine.layout), step=number)
    dist.all_reduce = all_reduce
    return found, ops.found


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_a_pipeline_of_data_parallel_ranks_reduces_its_fp32_sums_where_they_lie(
    schedule: str,
) -> None:
    """DeepSpeed flattens all sums, and reduces a bf16 copy: 6 bytes a parameter, the peak of the last stage."""
    case = {"pp": 2, "schedule": schedule}
    for found, ops in run_on_ranks(reductions_beside_large_ops, 4, case):
        assert found and set(found) == {("torch.float32", True)}, found
        assert "aten::zero_" in ops  # DeepSpeed clears a pipeline's sums: the watch sees them
        assert "aten::cat" not in ops and "aten::_to_copy" not in ops, ops


def events() -> list[str]:
    """What happens in the last micro-batch: a reduction is launched, or the gradient of a parameter arrives."""
    from pipeline.engine.deepspeed import reduction

    reduction.BUCKET_ELEMENTS = 10_000
    engine = engine_of(config("gpt2", precision="bf16"))
    found: list[str] = []
    for name, parameter in engine.runner.module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: found.append(name))
    all_reduce = dist.all_reduce

    def recorded(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() > 1000:
            found.append("reduce")
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = recorded
    engine.train_step(rank_batches(batches()[0], engine.shape, engine.layout), step=0)
    dist.all_reduce = all_reduce
    return found


def test_gradients_are_reduced_while_the_backward_pass_goes_on() -> None:
    """The last layer's are on their way before the first layer's are there; earlier micro-batches reduce nothing."""
    for found in run_on_ranks(events, 2):
        names = [name for name in found if name != "reduce"]
        per_micro_batch = names.index("embedding.word.weight", 1) + 1
        last = len(found) - 1 - found[::-1].index("embedding.word.weight")
        before = [i for i, event in enumerate(found[:last]) if event == "reduce"]
        assert len(names) % per_micro_batch == 0 and found.count("reduce") - len(before) <= 3
        assert len(before) >= 10 and min(before) >= len(names) - per_micro_batch, (
            "not the last micro-batch"
        )


REDUCTIONS = (
    "all_reduce",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
)


def reduced(cases: list[dict[str, Any]]) -> list[tuple[list[tuple[float, float]], set[str]]]:
    """Losses and norms of a run, and the dtypes in which its gradients were reduced."""
    dtypes: set[str] = set()

    def recording(call: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            # Gradients: with a micro-batch of one sequence no activation has as many elements.
            dtypes.update(str(x.dtype) for x in tensors if x.numel() > 2500)
            return call(*args, **kwargs)

        return recorded

    for name in REDUCTIONS:
        setattr(dist, name, recording(getattr(dist, name)))
    found = []
    for case in cases:
        dtypes.clear()
        found.append(
            (
                train(config(**case, precision="bf16", micro_batch_size=1), batches()[:4])[
                    "history"
                ],
                set(dtypes),
            )
        )
    return found


CASES: dict[int, list[dict[str, Any]]] = {
    2: [dict(zero=1), dict(zero=2), dict(zero=3)],
    4: [dict(zero=1), dict(pp=2), dict(pp=2, schedule="dualpipev")],
}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_summed_in_fp32_is_reduced_in_fp32(world_size: int) -> None:
    """DeepSpeed reduces in the model's precision: the sums of data-parallel ranks lost 16 bits."""
    first, *others = run_on_ranks(reduced, world_size, CASES[world_size])[0]
    for history, dtypes in (first, *others):
        assert dtypes == {"torch.float32"}
        for (loss, norm), (want_loss, want_norm) in zip(history, first[0]):
            assert loss == pytest.approx(want_loss, rel=5e-3)
            assert norm == pytest.approx(want_norm, rel=3e-2)
