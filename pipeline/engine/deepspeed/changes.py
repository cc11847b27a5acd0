"""What DeepSpeed 0.19 would make the host wait for in every step, and what stands there instead.

Each change goes through pipeline/patching.py, with its reason and the test that fails without it.
tests/engine/test_host_waits.py finds what a new release adds.
"""

from __future__ import annotations

import pipeline.engine.deepspeed.environment  # noqa: F401

# isort: split
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from pipeline.distributed.layout import ParallelLayout
from pipeline.engine.loss_scale import LossScale
from pipeline.model.partition import is_shared, spans_data
from pipeline.patching import replace

NOT_REPORTED = "not reported"
EXPERTS_MATCH = "tests/model/test_moe.py::test_expert_parallelism_matches_plain_torch"
HOST_WAITS = "tests/engine/test_host_waits.py::test_a_step_reads_nothing_back"


def keep_decisions_on_device(
    optimizer: Any,
    loss_scale: LossScale | None,
    *,
    partial_parameters: list[nn.Parameter],
    layout: ParallelLayout,
    is_offloaded: bool,
) -> None:
    """Let one of DeepSpeed's optimizers leave every decision to engine/verdict.py.

    Args:
        optimizer: of an initialised engine, any stage.
        partial_parameters: to be summed over the tensor-parallel ranks before ZeRO takes its norm.
        loss_scale: of fp16; None: there is none.
        layout: of this run.
        is_offloaded: gradients, norm and update are the host's, which therefore waits for the
            gradients.
    """
    waits = partial(replace, upstream=NOT_REPORTED, proof=f"{HOST_WAITS}[1]")
    for module in (bf16_optimizer, stage_1_and_2, stage3):
        waits(
            module,
            "is_invalid_grad_norm",
            lambda _: False,
            why="reads the norm; the optimizer's kernel leaves a step with bad gradients out",
        )
    if isinstance(optimizer, BF16_Optimizer):
        _norm_of_sums(optimizer, layout)
    if not isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        return
    waits(optimizer, "check_overflow", lambda *_, **__: None, why="reads whether fp16 overflowed")
    if not is_offloaded:
        _sum_the_norm_once(optimizer, partial_parameters, layout)
    if loss_scale is not None:
        _leave_loss_scale_to_us(optimizer, loss_scale)
    if torch.cuda.is_available() and not is_offloaded:
        _order_by_streams(optimizer)


def _sum_the_norm_once(
    optimizer: Any, partial_parameters: list[nn.Parameter], layout: ParallelLayout
) -> None:
    """Let all parameter groups share one norm, and one reduction, of gradients that are whole."""
    change = partial(
        replace,
        optimizer,
        why="a reduction for each parameter group: stages that differ in groups wait for ever",
        upstream=NOT_REPORTED,
    )
    from pipeline.model.tensor_parallel import sum_at_once  # megatron-core, once it is made lean

    chosen = set(map(id, partial_parameters))

    def norm(groups: Any) -> Tensor:
        parts = _parts_of_gradients(optimizer, groups)
        if sums := [gradient for parameter, gradient in parts if id(parameter) in chosen]:
            sum_at_once(sums, layout.tensor.group)
        return _norm_over_all_ranks(optimizer, parts)

    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        change(
            "_get_norm_groups",
            lambda: [norm(optimizer.fp16_groups)],
            proof=f"{HOST_WAITS}[1]",
        )
        return
    change(
        "scaled_global_norm",
        lambda norm_type=2: norm(optimizer.params_in_partition),
        proof="tests/engine/test_equivalence.py::test_stages_may_differ_in_parameter_groups",
    )


def _leave_loss_scale_to_us(optimizer: Any, loss_scale: LossScale) -> None:
    """Let the scale of fp16 be a tensor that nobody reads."""
    stage = 3 if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) else 2
    change = partial(replace, optimizer, upstream=NOT_REPORTED)
    change(
        "loss_scaler",
        loss_scale,
        why="DeepSpeed's scaler lives on the host and would have to read whether a step overflowed",
        proof="tests/engine/test_engine.py::"
        f"test_a_loss_scale_that_overflows_is_halved_until_it_does_not[{stage}]",
    )
    change(
        "_muon_update_lacks_loss_scale",
        lambda _: False,
        why="compares the loss scale on the host, also without Muon",
        proof=f"{HOST_WAITS}[1]",
    )
    change(
        "unscale_and_clip_grads",
        lambda *_, **__: None,
        why="would undo the loss scale a second time: the kernel divides by it (verdict.py)",
        proof="tests/engine/test_equivalence.py::test_layouts_match_plain_torch"
        f"[{1 if stage == 3 else 2}]",
    )


def reduce_tied_sums(engine: Any) -> None:
    """Let a pipeline of fp16 reduce the fp32 sums of a tied weight's gradients.

    PipelineEngine reduces weight.grad, which is None where the sums are kept apart
    (grad_accum_dtype), and says nothing: the copies of the weight drift apart.
    """
    weights = engine.module.get_tied_weights_and_groups
    replace(
        engine.module,
        "get_tied_weights_and_groups",
        lambda: [(SimpleNamespace(grad=weight.grad_accum), group) for weight, group in weights()],
        why="tied weights drift apart in a pipeline of fp16: weight.grad is None there",
        upstream=NOT_REPORTED,
        proof="tests/engine/test_equivalence.py::test_layouts_match_plain_torch[2]",
    )


def total_norm(gradients: list[Tensor]) -> Tensor:
    """0-dim fp32 norm of all of them, on the device also where there are none."""
    if not gradients:
        return torch.zeros((), device=get_accelerator().current_device_name())
    return torch.nn.utils.get_total_norm(gradients).float()


def _norm_of_sums(optimizer: BF16_Optimizer, layout: ParallelLayout) -> None:
    """Let BF16_Optimizer's norm be ours: the gradients it takes it of are then the norm itself."""
    change = partial(replace, upstream=NOT_REPORTED, proof=f"{HOST_WAITS}[1]")
    change(
        optimizer,
        "get_grads_for_norm",
        lambda: (_norm_over_model_parallel_ranks(optimizer, layout), {}),
        why="leaves out the experts of tensor ranks above 0",
        proof=EXPERTS_MATCH,
    )
    change(
        bf16_optimizer,
        "get_global_norm_of_tensors",
        lambda input_tensors, **_: input_tensors,
        why="copies constants to the device one by one",
    )
    change(
        bf16_optimizer,
        "get_norm_with_moe_layers",
        lambda non_expert_norm, **_: non_expert_norm,
        why="reads the norms, and adds those of experts a second time",
        proof=EXPERTS_MATCH,
    )


def _norm_over_model_parallel_ranks(optimizer: Any, layout: ParallelLayout) -> Tensor:
    """BF16_Optimizer's: every data-parallel rank has all gradients of its model-parallel rank.

    Of experts that span the data-parallel ranks each has its own, and expert_data ranks the same.
    """
    alike: list[Tensor] = []
    spanning: list[Tensor] = []
    for members, gradients in zip(
        optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True
    ):
        for parameter, gradient in zip(members, gradients, strict=True):
            if _counts_here(parameter, layout.tensor.rank):
                (spanning if spans_data(parameter) else alike).append(gradient)
    total = total_norm(alike).square()
    if layout.experts_span_data:
        # Over all ranks, of which `replica` count the same gradient, and `expert_data` the same
        # expert's: divided by that many, each counts once.
        of_experts = total_norm(spanning).square() / layout.expert_data.size
        total = total / layout.replica.size + of_experts
        dist.all_reduce(total)
    elif optimizer.mpu is not None:
        dist.all_reduce(total, group=optimizer.mpu.get_model_parallel_group())
    return total.sqrt()


def _counts_here(parameter: Any, tensor_rank: int) -> bool:
    """Whether this rank counts a parameter that ranks of tensor and pipeline may hold whole."""
    is_first = not getattr(parameter, "ds_pipe_replicated", False)
    return is_first and (tensor_rank == 0 or not is_shared(parameter))


def _parts_of_gradients(optimizer: Any, groups: Any) -> list[tuple[Any, Tensor]]:
    """(parameter, ZeRO's part of its gradient) of all groups; the same on tensor-parallel ranks.

    Args:
        groups: the parameters of each group that this rank has gradients of, in their order.
    """
    found = []
    for index, parameters in enumerate(groups):
        gradients = optimizer.averaged_gradients[index]
        real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        found += list(zip(parameters, real))
    return found


def _norm_over_all_ranks(optimizer: Any, parts: list[tuple[Any, Tensor]]) -> Tensor:
    """ZeRO's norm, of partitions of the gradients; what several ranks hold whole counts once."""
    counted = [
        gradient
        for parameter, gradient in parts
        if _counts_here(parameter, optimizer.model_parallel_rank)
    ]
    # |g|^2 is a sum over all elements, whichever group, rank or stage they belong to. One sum a
    # step: a middle stage has no embedding, hence under muP a group fewer, and with a sum for each
    # group the ranks waited in different ones.
    total = total_norm(counted).square()
    dist.all_reduce(total, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
    return total.sqrt()


def _order_by_streams(optimizer: Any) -> None:
    """Let the device, not the host, wait for gradient reductions on a stream of their own."""
    accelerator = get_accelerator()
    change = partial(
        replace,
        why="the host waits at the end of each backward pass; the next kernel is enough",
        upstream=NOT_REPORTED,
        proof="tests/engine/test_host_waits.py::"
        "test_kernels_wait_for_reductions_instead_of_the_host",
    )
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        stream = optimizer.reduce_and_partition_stream
        change(stream, "synchronize", lambda: accelerator.current_stream().wait_stream(stream))
        return
    epilogue = optimizer.independent_gradient_partition_epilogue

    def ordered() -> None:
        # For this call only: elsewhere a synchronisation means what it says.
        change(
            accelerator,
            "synchronize",
            lambda *_: accelerator.current_stream().wait_stream(optimizer.reduction_stream),
        )
        try:
            epilogue()
        finally:
            vars(accelerator).pop("synchronize", None)

    change(optimizer, "independent_gradient_partition_epilogue", ordered)


class HostAdam(DeepSpeedCPUAdam):
    """DeepSpeed's Adam for offloaded state, obeying grad_scale and found_inf like torch's AdamW.

    Its gradients are on the host, so the host has waited for them already.
    """

    grad_scale: Tensor | None
    found_inf: Tensor

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Update, unless found_inf is 1."""
        if self.found_inf:
            return None
        if self.grad_scale is not None:
            scale = self.grad_scale.cpu()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.div_(scale)
        return super().step(*args, **kwargs)
