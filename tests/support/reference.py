"""A GPT in plain torch, one process, no DeepSpeed, no megatron-core: what every layout is compared with.

Weights live in a dict of canonical names and whole shapes; the forward pass is written from the papers, not from
pipeline/model. Only the initial numbers are shared.
"""

from __future__ import annotations

import fnmatch
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.choices import (
    Activation,
    Normalization,
    NormPlacement,
    OptimizerName,
    Position,
)
from pipeline.config.model_shape import resolve
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape
from pipeline.model.initial_values import initialize
from pipeline.model.partition import Partition


def parameter_shapes(cfg: PretrainConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Canonical name -> whole shape, written down from the architecture."""
    model = cfg.model
    sizes = resolve(model)
    hidden, ffn, width = model.hidden_size, sizes.ffn_hidden_size, sizes.head_dim
    heads, groups = model.num_attention_heads, sizes.num_query_groups
    norm = ["weight"] + (["bias"] if model.normalization is Normalization.layernorm else [])
    shapes: dict[str, tuple[int, ...]] = {"embedding.word.weight": (vocab_size, hidden)}
    if model.position is Position.learned:
        shapes["embedding.position.weight"] = (model.max_seq_len, hidden)
    for i in range(model.num_layers):
        at = f"layers.{i}."
        for name in ("input_layernorm", "pre_mlp_layernorm"):
            shapes |= {f"{at}{name}.{n}": (hidden,) for n in norm}
        shapes[f"{at}self_attention.linear_qkv.weight"] = (
            groups * (heads // groups + 2) * width,
            hidden,
        )
        if sizes.qkv_bias:
            shapes[f"{at}self_attention.linear_qkv.bias"] = (
                groups * (heads // groups + 2) * width,
            )
        shapes[f"{at}self_attention.linear_proj.weight"] = (hidden, heads * width)
        if model.qk_norm:
            for name in ("q_layernorm", "k_layernorm"):
                shapes |= {f"{at}self_attention.{name}.{n}": (width,) for n in norm}
        mlps = {"mlp": ffn}
        if model.moe.num_experts:
            shapes[f"{at}mlp.router.weight"] = (model.moe.num_experts, hidden)
            mlps = {f"mlp.experts.local_experts.{e}": ffn for e in range(model.moe.num_experts)}
            if model.moe.shared_expert_ffn_hidden_size:
                mlps["mlp.shared_experts"] = model.moe.shared_expert_ffn_hidden_size
        for name, size in mlps.items():
            shapes[f"{at}{name}.linear_fc1.weight"] = (size * (2 if sizes.is_gated else 1), hidden)
            shapes[f"{at}{name}.linear_fc2.weight"] = (hidden, size)
        if model.bias:
            shapes[f"{at}self_attention.linear_proj.bias"] = (hidden,)
            shapes[f"{at}mlp.linear_fc1.bias"] = (ffn * (2 if sizes.is_gated else 1),)
            shapes[f"{at}mlp.linear_fc2.bias"] = (hidden,)
    if model.norm_placement is NormPlacement.pre:
        shapes |= {f"final_norm.{n}": (hidden,) for n in norm}
    if not model.tied_embeddings:
        shapes["head.weight"] = (vocab_size, hidden)
    rank = cfg.finetune.lora_rank
    for name in [n for n in shapes if ".linear_" in n and ".experts." not in n] if rank else []:
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and any(fnmatch.fnmatch(stem, t) for t in cfg.finetune.lora_targets):
            rows, columns = shapes[name]
            shapes |= {f"{stem}.lora_a": (rank, columns), f"{stem}.lora_b": (rows, rank)}
    return shapes


class Muon:
    """Of the linears' weights, as its author and Moonlight write it (see pipeline/engine/muon.py), a matrix at a time."""

    def __init__(self, weights: dict[str, Tensor], cfg: PretrainConfig) -> None:
        self.cfg, self.sizes = cfg, resolve(cfg.model)
        self.weights = {
            n: w for n, w in weights.items()
            if re.search(r"linear_\w+\.weight$", n) and w.requires_grad
        }  # fmt: skip
        self.momenta = {n: torch.zeros_like(w) for n, w in self.weights.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every matrix from its gradient."""
        cfg = self.cfg.optimizer
        for name, weight in self.weights.items():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            self.momenta[name] = cfg.momentum * self.momenta[name] + gradient
            update = gradient + cfg.momentum * self.momenta[name]
            weight.mul_(1 - lr * cfg.weight_decay)
            weight.sub_(lr * self._orthogonal(name, update))

    def _orthogonal(self, name: str, update: Tensor) -> Tensor:
        """Query, key, value and gate, up by themselves; the others whole."""
        if name.endswith("linear_qkv.weight"):
            groups, width = self.sizes.num_query_groups, self.sizes.head_dim
            heads = update.view(groups, -1, width, update.shape[1])
            parts = [heads[:, :-2], heads[:, -2], heads[:, -1]]
            q, k, v = (
                newton_schulz(part.reshape(-1, update.shape[1])).view_as(part) for part in parts
            )
            return torch.cat([q, k[:, None], v[:, None]], dim=1).view_as(update)
        if name.endswith("linear_fc1.weight") and self.sizes.is_gated:
            return torch.cat([newton_schulz(part) for part in update.chunk(2)])
        return newton_schulz(update)


def newton_schulz(g: Tensor) -> Tensor:
    """zeropower_via_newtonschulz5 of kellerjordan.github.io/posts/muon, times 0.2 sqrt(max(m, n)) of arXiv:2502.16982."""
    x = g / (g.norm() + 1e-7)
    if g.shape[0] > g.shape[1]:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    if g.shape[0] > g.shape[1]:
        x = x.T
    return 0.2 * math.sqrt(max(g.shape)) * x


class ReferenceGPT:
    """Forward pass and training of a PretrainConfig in plain torch."""

    def __init__(self, cfg: PretrainConfig, vocab_size: int) -> None:
        self.cfg, self.model = cfg, cfg.model
        self.router_losses: list[Tensor] = []  # of the last forward pass
        self.weights: dict[str, Tensor] = {}
        for name, shape in parameter_shapes(cfg, vocab_size).items():
            tensor = torch.empty(shape)
            initialize(tensor, name, Partition.of(shape), model=cfg.model, seed=cfg.seed)
            is_trained = any(fnmatch.fnmatch(name, p) for p in cfg.finetune.train)
            self.weights[name] = tensor.requires_grad_(is_trained)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        document_ids: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Mean cross entropy over the (unmasked) tokens; leaves `router_losses` behind."""
        self.router_losses = []
        model, w = self.model, self.weights
        hidden = F.embedding(tokens, w["embedding.word.weight"])
        size = tokens.shape[1]
        if model.position is Position.learned:
            rows = torch.arange(size)[None] if positions is None else positions
            hidden = hidden + w["embedding.position.weight"][rows]
        causal = torch.ones(size, size, dtype=torch.bool).tril()[None]
        if document_ids is not None:
            causal = causal & (document_ids[:, :, None] == document_ids[:, None, :])
        for i in range(model.num_layers):
            at = f"layers.{i}."
            if model.norm_placement is NormPlacement.post:
                hidden = self._norm(
                    hidden + self._attention(hidden, at, causal), f"{at}input_layernorm"
                )
                hidden = self._norm(hidden + self._mlp(hidden, at), f"{at}pre_mlp_layernorm")
                continue
            attended = self._attention(self._norm(hidden, f"{at}input_layernorm"), at, causal)
            if model.parallel_residual:
                hidden = (
                    hidden + attended + self._mlp(self._norm(hidden, f"{at}pre_mlp_layernorm"), at)
                )
            else:
                hidden = hidden + attended
                hidden = hidden + self._mlp(self._norm(hidden, f"{at}pre_mlp_layernorm"), at)
        if model.norm_placement is NormPlacement.pre:
            hidden = self._norm(hidden, "final_norm")
        logits = hidden @ w.get("head.weight", w["embedding.word.weight"]).t()
        if model.logit_softcap:
            logits = model.logit_softcap * torch.tanh(logits / model.logit_softcap)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        if model.z_loss_coeff:
            losses = losses + model.z_loss_coeff * logits.logsumexp(-1).flatten().square()
        if mask is None:
            return losses.mean()
        return (losses * mask.flatten()).sum() / mask.sum()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        if self.model.normalization is Normalization.rmsnorm:
            return (
                x
                * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model.norm_eps)
                * self.weights[f"{name}.weight"]
            )
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + self.model.norm_eps) * self.weights[
            f"{name}.weight"
        ] + self.weights[f"{name}.bias"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        out = F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))
        if f"{name}.lora_a" in self.weights:  # arXiv:2106.09685, section 4.1
            product = self.weights[f"{name}.lora_b"] @ self.weights[f"{name}.lora_a"]
            out = out + self.cfg.finetune.lora_alpha / self.cfg.finetune.lora_rank * x @ product.t()
        return out

    def _attention(self, x: Tensor, at: str, visible: Tensor) -> Tensor:
        model = self.model
        batch, size, _ = x.shape
        heads, groups, width = (
            model.num_attention_heads,
            resolve(model).num_query_groups,
            resolve(model).head_dim,
        )
        qkv = self._linear(x, f"{at}self_attention.linear_qkv").view(
            batch, size, groups, heads // groups + 2, width
        )
        q = qkv[:, :, :, :-2].reshape(batch, size, heads, width)
        k, v = (qkv[:, :, :, j].repeat_interleave(heads // groups, dim=2) for j in (-2, -1))
        if model.qk_norm:
            q, k = (
                self._norm(q, f"{at}self_attention.q_layernorm"),
                self._norm(k, f"{at}self_attention.k_layernorm"),
            )
        if model.position is Position.rope:
            q, k = self._rotate(q), self._rotate(k)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width)
        weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
        return self._linear(
            torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2),
            f"{at}self_attention.linear_proj",
        )

    def _rotate(self, x: Tensor) -> Tensor:
        width, size = x.shape[-1], x.shape[1]
        angles = torch.arange(size)[:, None] / self.model.rope_theta ** (
            torch.arange(0, width, 2) / width
        )
        turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
        pairs = (
            torch.complex(x[..., : width // 2].contiguous(), x[..., width // 2 :].contiguous())
            * turn
        )
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def _experts(self, x: Tensor, at: str) -> Tensor:
        """Softmax over the top_k experts' scores (Mixtral), plus the expert every token passes."""
        moe = self.model.moe
        scores = x @ self.weights[f"{at}mlp.router.weight"].t()
        best, chosen = scores.topk(moe.top_k, dim=-1)
        self.router_losses += self._router_losses(scores, chosen)
        share = torch.zeros(*x.shape[:-1], moe.num_experts).scatter(-1, chosen, best.softmax(-1))
        if moe.top_k == 1:  # Switch: the chosen expert's probability among all
            share = share * scores.softmax(-1)
        every = [self._mlp(x, at, f"mlp.experts.local_experts.{e}") for e in range(moe.num_experts)]
        total = (torch.stack(every, dim=-1) * share[..., None, :]).sum(-1)
        return (
            total + self._mlp(x, at, "mlp.shared_experts")
            if moe.shared_expert_ffn_hidden_size
            else total
        )

    def _router_losses(self, scores: Tensor, chosen: Tensor) -> list[Tensor]:
        """Load balancing of each sequence, E sum_e f_e P_e, and the z-loss: means, weighted."""
        moe = self.model.moe
        tokens = scores.shape[1]
        sent = F.one_hot(chosen, moe.num_experts).sum(dim=(1, 2)) / (moe.top_k * tokens)
        balance = moe.num_experts * (sent * scores.softmax(-1).mean(dim=1)).sum(-1).mean()
        return [
            moe.aux_loss_coeff * balance,
            moe.z_loss_coeff * scores.logsumexp(-1).square().mean(),
        ]

    def _mlp(self, x: Tensor, at: str, name: str = "mlp") -> Tensor:
        if self.model.moe.num_experts and name == "mlp":
            return self._experts(x, at)
        wide = self._linear(x, f"{at}{name}.linear_fc1")
        if self.model.activation is Activation.swiglu:
            gate, up = wide.chunk(2, dim=-1)
            wide = F.silu(gate) * up
        elif self.model.activation is Activation.squared_relu:
            wide = F.relu(wide) ** 2
        else:
            wide = F.gelu(
                wide,
                approximate="tanh" if self.model.activation is Activation.gelu_tanh else "none",
            )
        return self._linear(wide, f"{at}{name}.linear_fc2")

    def train(
        self, steps: list[dict[str, Tensor]], shape: RunShape, micro_batch: int
    ) -> list[tuple[float, float]]:
        """[(loss, gradient norm)] over steps; each step holds whole-batch tokens, labels, optional ids, mask."""
        from pipeline.engine.lr_schedule import lr_at

        cfg = self.cfg.optimizer
        trained = [w for w in self.weights.values() if w.requires_grad]
        muon = Muon(self.weights, self.cfg) if cfg.name is OptimizerName.muon else None
        matrices = {id(w) for w in muon.weights.values()} if muon else set()
        decayed = [w for w in trained if w.dim() > 1 and id(w) not in matrices]
        plain = [w for w in trained if w.dim() == 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps,
        )  # fmt: skip
        history = []
        for number, step in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(
                    number,
                    lr=cfg.lr,
                    schedule=self.cfg.schedule,
                    warmup_steps=shape.warmup_steps,
                    total_steps=shape.total_steps,
                )
            optional = (step.get(key) for key in ("document_ids", "mask", "positions"))
            loss = self.loss(step["tokens"], step["labels"], *optional)
            for w in trained:
                w.grad = None
            sum(self.router_losses, loss).backward()
            limit = cfg.clip_grad or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(trained, limit)
            optimizer.step()
            if muon:
                muon.step(optimizer.param_groups[0]["lr"])
            history.append((float(loss.detach()), float(norm)))
        return history
