"""The contenders of benchmarks/train_step.py: each a function that makes a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# layers, width, heads, sequence, batch, vocabulary
SHAPES = {
    "small": (4, 128, 4, 64, 12, 256),
    "medium": (6, 384, 6, 256, 8, 8192),
    "large": (12, 768, 12, 512, 2, 32000),
    "gpu": (12, 768, 12, 1024, 32, 50304),  # too large for a CPU: only where it is asked for
}
NAMES = ("ours", "ours compiled", "eager", "compiled", "huggingface", "huggingface+deepspeed")
LR, BETAS, DECAY, CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0


def eager_gpt(layers: int, width: int, heads: int, seq: int, vocab: int) -> Any:
    """GPT-2 in plain torch: the layers, residuals and initialisation of Radford et al. 2019."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, size, _ = x.shape
            q, k, v = (
                t.view(batch, size, heads, -1).transpose(1, 2)
                for t in self.qkv(self.norm1(x)).split(width, dim=2)
            )
            y = (
                F.scaled_dot_product_attention(q, k, v, is_causal=True)
                .transpose(1, 2)
                .reshape(batch, size, width)
            )
            x = x + self.out(y)
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.position = nn.Embedding(vocab, width), nn.Embedding(seq, width)
            self.layers, self.norm = (
                nn.ModuleList(Layer() for _ in range(layers)),
                nn.LayerNorm(width),
            )

        def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            x = self.word(tokens) + self.position.weight[: tokens.shape[1]]
            for layer in self.layers:
                x = layer(x)
            logits = F.linear(self.norm(x), self.word.weight)
            return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    torch.manual_seed(0)
    model = GPT()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def torch_step(
    model: Any, precision: str, loss_of: Callable[..., Any], optimizer: Any = None
) -> Callable[[], float]:
    """One step of AdamW on a model in plain torch, as nanoGPT does it: autocast in bf16, clip, fused AdamW."""
    import torch

    device = next(model.parameters()).device
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if optimizer is None:
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def build(contender: str, shape: str, precision: str) -> Callable[[], float]:
    """A function that makes one training step and returns its loss."""
    import torch

    layers, width, heads, seq, batch, vocab = SHAPES[shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.randint(
        0, vocab, (batch, seq + 1), generator=torch.Generator().manual_seed(1)
    ).to(device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if contender in ("ours", "ours compiled"):
        return our_step(shape, precision, inputs, labels, compiled=contender != "ours")
    if contender in ("eager", "compiled"):
        model = eager_gpt(layers, width, heads, seq, vocab).to(device)
        model = torch.compile(model) if contender == "compiled" else model
        return torch_step(model, precision, lambda m: m(inputs, labels))
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab, n_positions=seq, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device)
    if contender == "huggingface":
        return torch_step(model, precision, lambda m: m(tokens[:, :-1], labels=tokens[:, :-1]).loss)
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": batch, "gradient_clipping": CLIP, "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "torch_adam": True}},
            "bf16": {"enabled": precision == "bf16"}, "steps_per_print": 2**60,
        },
    )  # fmt: skip

    def step() -> float:
        loss = engine(tokens[:, :-1], labels=tokens[:, :-1]).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


def our_step(
    shape: str, precision: str, inputs: Any, labels: Any, *, compiled: bool
) -> Callable[[], float]:
    """A step of pipeline.engine as the trainer calls it."""
    from types import SimpleNamespace

    from pipeline.config.choices import Precision
    from pipeline.config.model import ModelConfig
    from pipeline.config.pretrain import PretrainConfig
    from pipeline.config.run_shape import derive
    from pipeline.config.training import OptimizerConfig, TrainingConfig
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.training.build import build_engine

    layers, width, heads, seq, batch, vocab = SHAPES[shape]
    cfg = PretrainConfig(
        name="benchmark",
        model=ModelConfig(
            name=shape,
            num_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            max_seq_len=seq,
            compile=compiled,
        ),
        optimizer=OptimizerConfig(lr=LR, weight_decay=DECAY, clip_grad=CLIP),
        training=TrainingConfig(
            total_steps=10**6,
            global_batch_size=batch,
            micro_batch_size=batch,
            precision=Precision[precision],
        ),
    )
    shape = derive(cfg, world_size=1, tokenizer_vocab_size=vocab)
    engine = build_engine(cfg, shape, connect(ranks_from_environment(), shape.sizes))
    micro_batch: Any = SimpleNamespace(
        tokens=inputs, labels=labels, loss_mask=None, document_ids=None, positions=None,
        images=None, patch_ids=None,
    )  # fmt: skip
    number = iter(range(10**9))
    return lambda: float(engine.train_step([micro_batch], step=next(number)).loss)
