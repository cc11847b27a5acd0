"""What DeepSpeed 0.19 would make the host wait for in every step, and what stands there instead.

    is_invalid_grad_norm, check_overflow    read the norm: the optimizer's kernel leaves a step with
                                            bad gradients out instead (engine/verdict.py)
    unscale_and_clip_grads                  a pass over the gradients: the kernel divides instead
    get_grad_norm_direct, ..._of_tensors    copy constants one by one: `_total_norm` instead
    the loss scaler of fp16                 reads the overflow: `LossScale` instead
    synchronize() after a backward pass     waits for the reductions: the next kernel waits instead

tests/engine/test_host_waits.py finds what a new release adds.
"""

from __future__ import annotations

import pipeline.engine.deepspeed.environment  # noqa: F401

# isort: split
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from pipeline.engine.loss_scale import LossScale
from pipeline.model.tensor_parallel import is_split


def keep_decisions_on_device(
    optimizer: Any, loss_scale: LossScale | None, *, is_offloaded: bool
) -> None:
    """Let one of DeepSpeed's optimizers leave every decision to engine/verdict.py.

    Args:
        optimizer: of an initialised engine, any stage.
        loss_scale: of fp16; None: there is none.
        is_offloaded: gradients, norm and update are the host's, which therefore waits for the
            gradients.
    """
    for module in (bf16_optimizer, stage_1_and_2, stage3):
        module.is_invalid_grad_norm = lambda _: False
    bf16_optimizer.get_global_norm_of_tensors = _norm_over_model_parallel_ranks
    if not isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        return
    optimizer.check_grad_overflow = False
    optimizer.check_overflow = lambda *_, **__: None
    optimizer.unscale_and_clip_grads = lambda *_, **__: None
    optimizer._muon_update_lacks_loss_scale = lambda _: False  # compares the loss scale
    optimizer.get_grad_norm_direct = MethodType(_norm_over_all_ranks, optimizer)
    if loss_scale is not None:
        optimizer.loss_scaler = loss_scale
    if torch.cuda.is_available() and not is_offloaded:
        _order_by_streams(optimizer)


def reduce_tied_sums(engine: Any) -> None:
    """Let a pipeline of fp16 reduce the fp32 sums of a tied weight's gradients.

    PipelineEngine reduces weight.grad, which is None where the sums are kept apart
    (grad_accum_dtype), and says nothing: the copies of the weight drift apart.
    """
    weights = engine.module.get_tied_weights_and_groups
    engine.module.get_tied_weights_and_groups = lambda: [
        (SimpleNamespace(grad=weight.grad_accum), group) for weight, group in weights()
    ]


def _total_norm(gradients: list[Tensor]) -> Tensor:
    if not gradients:
        return torch.zeros((), device=get_accelerator().current_device_name())
    return torch.nn.utils.get_total_norm(gradients).float()


def _norm_over_model_parallel_ranks(
    input_tensors: Any, norm_type: float = 2, mpu: Any = None
) -> Tensor:
    """BF16_Optimizer's: every data-parallel rank has all gradients of its model-parallel rank."""
    total = _total_norm(list(input_tensors)).square()
    if mpu is not None:
        dist.all_reduce(total, group=mpu.get_model_parallel_group())
    return total.sqrt()


def _norm_over_all_ranks(
    self: Any, gradients: list[Tensor], params: list[Any], norm_type: float = 2
) -> Tensor:
    """ZeRO's norm, of partitions of the gradients; what several ranks hold whole counts once."""
    real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    counted = [
        gradient
        for gradient, parameter in zip(real, params)
        if (is_split(parameter) or self.model_parallel_rank == 0)
        and not getattr(parameter, "ds_pipe_replicated", False)
    ]
    total = _total_norm(counted).square()
    dist.all_reduce(total, group=self.dp_process_group)
    self._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
    return total.sqrt()


def _order_by_streams(optimizer: Any) -> None:
    """Let the device, not the host, wait for gradient reductions on a stream of their own."""
    accelerator = get_accelerator()
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        stream = optimizer.reduce_and_partition_stream
        stream.synchronize = lambda: accelerator.current_stream().wait_stream(stream)
        return
    epilogue = optimizer.independent_gradient_partition_epilogue

    def ordered() -> None:
        accelerator.synchronize = lambda *_: accelerator.current_stream().wait_stream(
            optimizer.reduction_stream
        )
        try:
            epilogue()
        finally:
            del accelerator.synchronize

    optimizer.independent_gradient_partition_epilogue = ordered


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
