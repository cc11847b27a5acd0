"""The contenders of benchmarks/parallel.py: each a function that makes this rank's part of a training step.

All train the GPT of contenders/steps.py on the same global batch, at its `medium` shape, with fused AdamW and clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.contenders.steps import BETAS, CLIP, DECAY, LR, SHAPES, eager_gpt, torch_step

SHAPE = SHAPES["medium"]
MICRO_BATCHES = 4  # of a pipeline
# settings of parallel.*, sequences of a micro-batch
OURS: dict[str, tuple[dict[str, Any], int]] = {
    "ours DP2 ZeRO-1": ({"zero_stage": 1}, 4),
    "ours DP2 ZeRO-2": ({"zero_stage": 2}, 4),
    "ours DP2 ZeRO-3": ({"zero_stage": 3}, 4),
    "ours TP2": ({"tensor_parallel_size": 2}, 8),
    "ours TP2 + SP": ({"tensor_parallel_size": 2, "sequence_parallel": True}, 8),
    "ours PP2": ({"pipeline_parallel_size": 2}, 8 // MICRO_BATCHES),
    "ours CP2": ({"context_parallel_size": 2}, 8),
}
THEIRS = ("DDP", "DDP + ZeroRedundancyOptimizer", "FSDP2", "DTensor TP2")
ALONE = ("ours, one process", "eager, one process")
"""One process with as many threads as the others have processes."""
NAMES = ("DDP", *(name for name in THEIRS if name != "DDP"), *OURS, *ALONE)


def tokens_of_step() -> int:
    """Tokens of the global batch."""
    _, _, _, seq, batch, _ = SHAPE
    return seq * batch


def build(contender: str, precision: str) -> Callable[[], float]:
    """A function that makes one step and returns the loss that this rank sees."""
    import torch

    _, _, _, seq, batch, vocab = SHAPE
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab, (batch, seq + 1), generator=generator)
    if contender in OURS or contender == "ours, one process":
        settings, size = OURS.get(contender, ({}, batch))
        return our_step(settings, size, precision, tokens)
    if contender == "eager, one process":
        return torch_step(
            new_model(),
            precision,
            lambda m: m(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()),
        )
    return their_step(contender, precision, tokens)


def new_model() -> Any:
    """The plain GPT, the same weights everywhere."""
    layers, width, heads, seq, _, vocab = SHAPE
    return eager_gpt(layers, width, heads, seq, vocab)


def their_step(contender: str, precision: str, tokens: Any) -> Callable[[], float]:
    """A step of torch's own parallelism, over gloo or NCCL."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if contender == "DTensor TP2":
        return tensor_parallel_step(precision, tokens)
    mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]
    inputs, labels = mine[:, :-1].contiguous(), mine[:, 1:].contiguous()
    model = new_model()
    if contender == "FSDP2":
        return fsdp_step(model, precision, inputs, labels)
    model = torch.nn.parallel.DistributedDataParallel(model)
    if contender == "DDP":
        return torch_step(model, precision, lambda m: m(inputs, labels))
    from torch.distributed.optim import ZeroRedundancyOptimizer

    # It takes one group of parameters only; the norms' decay changes no speed.
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True
    )

    return torch_step(model, precision, lambda m: m(inputs, labels), optimizer)


def fsdp_step(model: Any, precision: str, inputs: Any, labels: Any) -> Callable[[], float]:
    """fully_shard on every layer and on the rest; in bf16 with fp32 reductions, as ours reduces."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float32
    )
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return torch_step(model, "fp32", lambda m: m(inputs, labels))  # the policy casts


def tensor_parallel_step(precision: str, tokens: Any) -> Callable[[], float]:
    """Linears split by heads and columns, the embedding and the loss by vocabulary."""
    import torch
    import torch.nn.functional as F
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    _, width, heads, _, _, vocab = SHAPE
    mesh = init_device_mesh("cpu", (2,))
    model, size = new_model(), width // heads
    for layer in model.layers:
        # q, k and v of a head lie together, so that a contiguous half of the rows is half of the heads.
        plan = {
            "qkv": ColwiseParallel(), "out": RowwiseParallel(),
            "up": ColwiseParallel(), "down": RowwiseParallel(),
        }  # fmt: skip
        parallelize_module(layer, mesh, plan)
    parallelize_module(model, mesh, {"word": RowwiseParallel(input_layouts=Replicate())})
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def attend(layer: Any, x: Any) -> Any:
        batch, seq, _ = x.shape
        q, k, v = (t.transpose(1, 2) for t in layer.qkv(x).view(batch, seq, -1, 3, size).unbind(3))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return layer.out(y.transpose(1, 2).reshape(batch, seq, -1))

    def loss_of() -> Any:
        x = model.word(inputs) + model.position.weight[: inputs.shape[1]]
        for layer in model.layers:
            x = x + attend(layer, layer.norm1(x))
            x = x + layer.down(F.gelu(layer.up(layer.norm2(x)), approximate="tanh"))
        whole = DTensor.from_local(model.norm(x), mesh, [Replicate()], run_check=False)
        logits = F.linear(whole, model.word.weight)
        return F.cross_entropy(logits.view(-1, vocab).float(), labels.flatten())

    optimizer, clip = split_optimizer(model)

    def step() -> float:
        with loss_parallel():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of()
            loss.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.full_tensor()) if isinstance(loss, DTensor) else float(loss)

    return step


def split_optimizer(model: Any) -> tuple[Any, Callable[[], None]]:
    """AdamW, and clipping, of parameters of which some are DTensors: torch takes no mixture."""
    import torch
    from torch.distributed.tensor import DTensor

    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    alike = [p for p in model.parameters() if not isinstance(p, DTensor)]
    groups = [
        {"params": [p for p in kind if (p.dim() > 1) == decays], "weight_decay": DECAY * decays}
        for kind in (split, alike)
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=LR, betas=BETAS, fused=True
    )

    def clip() -> None:
        whole, part = (
            torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])
            for kind in (alike, split)
        )
        total = torch.linalg.vector_norm(torch.stack([whole, part.full_tensor()]))  # type: ignore[attr-defined]
        for p in (*split, *alike):
            p.grad.mul_((CLIP / (total + 1e-6)).clamp(max=1.0))  # type: ignore[union-attr]

    return optimizer, clip


def our_step(
    settings: dict[str, Any], micro_batch_size: int, precision: str, tokens: Any
) -> Callable[[], float]:
    """A step of pipeline.engine as the trainer calls it, at the layout of parallel.`settings`."""
    from types import SimpleNamespace

    from pipeline.config.choices import Precision
    from pipeline.config.model import ModelConfig
    from pipeline.config.pretrain import PretrainConfig
    from pipeline.config.run_shape import derive
    from pipeline.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.training.build import build_engine

    layers, width, heads, seq, batch, vocab = SHAPE
    cfg = PretrainConfig(
        name="benchmark",
        model=ModelConfig(
            name="medium", num_layers=layers, hidden_size=width, num_attention_heads=heads, max_seq_len=seq
        ),
        optimizer=OptimizerConfig(lr=LR, weight_decay=DECAY, clip_grad=CLIP),
        parallel=ParallelConfig(**settings),
        training=TrainingConfig(
            total_steps=10**6, global_batch_size=batch, micro_batch_size=micro_batch_size, precision=Precision[precision]
        ),
    )  # fmt: skip
    ranks = ranks_from_environment()
    shape = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=vocab)
    layout = connect(ranks, shape.sizes)
    engine = build_engine(cfg, shape, layout)
    mine = tokens.chunk(layout.data.size)[layout.data.rank]
    batches: Any = [
        SimpleNamespace(
            tokens=part[:, :-1].contiguous(), labels=part[:, 1:].contiguous(),
            loss_mask=None, document_ids=None, positions=None,
            images=None, patch_ids=None,
        )
        for part in mine.split(micro_batch_size)
    ]  # fmt: skip
    number = iter(range(10**9))
    return lambda: float(engine.train_step(batches, step=next(number)).loss)
