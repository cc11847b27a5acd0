"""Small runs under any layout, and the same run in plain torch: shared by the tests of equivalence."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.choices import (
    Activation,
    Float8,
    Init,
    Normalization,
    NormPlacement,
    OptimizerName,
    PipelineSchedule,
    Position,
    Precision,
    Recompute,
)
from pipeline.config.data import DataConfig
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig, MoeConfig, VisionConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.config.training import OptimizerConfig, ParallelConfig, ScheduleConfig, TrainingConfig
from pipeline.data.mixture import Samples, cut
from pipeline.distributed.layout import ParallelLayout, connect
from pipeline.distributed.ranks import ranks_from_environment

VOCAB, SEQ_LEN, BATCH, STEPS = 250, 32, 16, 10
FEW_STEPS = 5
"""What a fast test trains: four updates, of which a wrong one shows in the losses and norms behind it."""

GPT2: dict[str, Any] = {
    "name": "gpt2",
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_seq_len": SEQ_LEN,
}
MODERN: dict[str, Any] = {
    **GPT2, "name": "modern", "num_query_groups": 2, "position": Position.rope, "normalization": Normalization.rmsnorm,
    "activation": Activation.swiglu, "bias": False, "qk_norm": True, "tied_embeddings": False, "ffn_hidden_size": 96,
}  # fmt: skip
PICTURES = VisionConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, image_size=16, patch_size=8
)
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "modern": MODERN,
    "gpt2-untied": {**GPT2, "tied_embeddings": False},
    "gpt1": {**GPT2, "norm_placement": NormPlacement.post, "activation": Activation.gelu},
    "parallel": {
        **MODERN,
        "parallel_residual": True,
        "num_query_groups": 4,
        "qk_norm": False,
        "tied_embeddings": True,
    },
    "capped": {
        **GPT2,
        "logit_softcap": 5.0,
        "z_loss_coeff": 1e-3,
        "activation": Activation.squared_relu,
        "init": Init.fixed,
    },
    "moe": {
        **MODERN,
        "moe": MoeConfig(num_experts=4, aux_loss_coeff=0.0, shared_expert_ffn_hidden_size=32),
    },
    "moe-switch": {**MODERN, "moe": MoeConfig(num_experts=4, top_k=1, aux_loss_coeff=0.0)},
    "moe-aux": {**MODERN, "moe": MoeConfig(num_experts=4, aux_loss_coeff=0.1, z_loss_coeff=0.01)},
    "moe-whole": {
        **MODERN,
        "moe": MoeConfig(
            num_experts=4, aux_loss_coeff=0.1, z_loss_coeff=0.01, shared_expert_ffn_hidden_size=32
        ),
    },
    "moe-unbalanced": {**MODERN, "moe": MoeConfig(num_experts=4, aux_loss_coeff=0.0)},
    "odd": {
        **MODERN,
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "head_dim": 24,
        "vocab_size": 253,
        "tied_embeddings": True,
    },
    "pictures": {**GPT2, "vision": PICTURES},
    "modern-pictures": {**MODERN, "vision": PICTURES},
    "mqa": {
        **MODERN,
        "num_query_groups": 1,
        "position": Position.none,
        "normalization": Normalization.layernorm,
        "bias": True,
    },
}


def config(
    model: str = "gpt2", *, tp: int = 1, pp: int = 1, zero: int = 1, sp: bool = False, schedule: str = "1f1b",
    precision: str = "fp32", recompute: str = "none", dropout: float = 0.0, micro_batch_size: int = 2, offload: bool = False,
    clip_grad: float = 1.0, ep: int = 1, documents: bool = False, positions: bool = False,
    lanes: int = 1, batch_size: int = BATCH, train: str = "*", lora_rank: int = 0,
    optimizer: str = "adamw", fp8: str = "none", cp: int = 1,
) -> PretrainConfig:  # fmt: skip
    """A ten-step run of a small model."""
    return PretrainConfig(
        name="test",
        model=replace(ModelConfig(**MODELS[model]), hidden_dropout=dropout, attention_dropout=dropout),
        data=DataConfig(mask_documents=documents, reset_positions=positions, lanes=lanes),
        optimizer=OptimizerConfig(name=OptimizerName[optimizer], lr=3e-3, clip_grad=clip_grad, eps=1e-6),  # a tiny eps amplifies rounding of near-zero gradients
        schedule=ScheduleConfig(min_lr=3e-4, warmup_steps=2),
        parallel=ParallelConfig(
            tensor_parallel_size=tp, context_parallel_size=cp, expert_parallel_size=ep, pipeline_parallel_size=pp,
            zero_stage=zero, sequence_parallel=sp,
            pipeline_schedule=PipelineSchedule[schedule], offload_optimizer=offload,
        ),
        training=TrainingConfig(
            total_steps=STEPS, global_batch_size=batch_size, micro_batch_size=micro_batch_size, precision=Precision[precision],
            recompute=Recompute[recompute], fp8=Float8[fp8],
        ),
        finetune=FinetuneConfig(
            train=train.split(), lora_rank=lora_rank, lora_alpha=8.0,
            lora_targets=["*.self_attention.linear_*", *(["*.mlp.linear_*"] if "moe" not in model else [])],
        ),
    )  # fmt: skip


def batches(
    *,
    documents: bool = False,
    masked: bool = False,
    positions: bool = False,
    batch_size: int = BATCH,
) -> list[dict[str, Tensor]]:
    """Whole global batches of a learnable stream: every sequence counts up by its own stride."""
    generator = torch.Generator().manual_seed(7)
    start = torch.randint(0, VOCAB, (STEPS, batch_size, 1), generator=generator)
    stride = torch.randint(1, 7, (STEPS, batch_size, 1), generator=generator)
    stream = (start + stride * torch.arange(SEQ_LEN + 1)) % VOCAB
    steps = [{"tokens": s[:, :-1].contiguous(), "labels": s[:, 1:].contiguous()} for s in stream]
    for step in steps:
        cut = torch.randint(4, SEQ_LEN - 4, (batch_size, 1), generator=generator)
        if documents:
            step["document_ids"] = (torch.arange(SEQ_LEN)[None] >= cut).long()
        if positions:
            at = torch.arange(SEQ_LEN)[None]
            step["positions"] = torch.where(at >= cut, at - cut, at)
        if masked:
            step["mask"] = (torch.arange(SEQ_LEN)[None] < cut).float()
    return steps


def rank_batches(
    step: dict[str, Tensor], shape: RunShape, layout: ParallelLayout, *, lanes: int = 1
) -> list[Any]:
    """The micro-batches of a global batch that this data-parallel rank computes.

    Sample i lies in lane i modulo `lanes`, as data/order.py deals them.
    """
    number = np.arange(len(step["tokens"]))
    mine = cut(
        Samples(number, number, number), number % lanes,
        data_rank=layout.data.rank, data_parallel_size=layout.data.size,
    ).number  # fmt: skip
    size = shape.micro_batch_size
    optional = {"loss_mask": "mask"} | {
        name: name for name in ("document_ids", "positions", "images", "patch_ids")
    }
    return [
        SimpleNamespace(
            tokens=step["tokens"][rows],
            labels=step["labels"][rows],
            **{field: step[key][rows] if key in step else None for field, key in optional.items()},
            num_documents=2 * size,
        )
        for rows in mine.reshape(-1, size)
    ]


def train(cfg: PretrainConfig, steps: list[dict[str, Tensor]]) -> dict[str, Any]:
    """{"history": [(loss, gradient norm)], "eval": mean loss of the last batch after training, "routing": of a mixture,
    what Engine.routing counted}. Collective."""
    from pipeline.training.build import build_engine

    if cfg.training.precision is Precision.fp16:
        allow_fp16_on_the_cpu()
    ranks, lanes = ranks_from_environment(), cfg.data.lanes
    shape = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=VOCAB)
    layout = connect(ranks, shape.sizes)
    engine = build_engine(cfg, shape, layout)
    history = []
    for number, step in enumerate(steps):
        result = engine.train_step(rank_batches(step, shape, layout, lanes=lanes), step=number)
        history.append((float(result.loss), float(result.grad_norm)))
    scores = engine.evaluate(rank_batches(steps[-1], shape, layout, lanes=lanes))
    routing = engine.routing().tolist() if cfg.model.moe.num_experts else []
    reset_parallel_state()
    return {
        "history": history,
        "eval": float(scores.nats / scores.tokens),
        "routing": routing,
    }


def allow_fp16_on_the_cpu() -> None:
    """Torch computes in fp16 on any processor, if slowly; DeepSpeed allows it only where the processor is fast."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def reset_parallel_state() -> None:
    """Forget the model-parallel groups, keep the process group, so that the next layout can be formed."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def train_all(
    configs: list[PretrainConfig], kinds: list[dict[str, Any]], num_steps: int = STEPS
) -> list[dict[str, Any]]:
    """`train` for several layouts of one world size, in one set of processes."""
    pairs = zip(configs, kinds, strict=True)
    return [train(cfg, batches(**kind)[:num_steps]) for cfg, kind in pairs]


def reference(
    cfg: PretrainConfig, *, num_steps: int = STEPS, **kind: Any
) -> list[tuple[float, float]]:
    """The same run in plain torch."""
    from tests.support.reference import ReferenceGPT

    shape = derive(
        replace(cfg, parallel=ParallelConfig()), world_size=1, tokenizer_vocab_size=VOCAB
    )
    return ReferenceGPT(cfg, shape.vocab_size).train(
        batches(**kind)[:num_steps], shape, cfg.training.micro_batch_size
    )
