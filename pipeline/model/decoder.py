"""A whole GPT to sample from: plain torch, one process, keys and values of what was read are kept.

    rows of ids --begin--> logits behind each row --draw--> an id a row --read--> logits ...

The blocks that are trained are megatron-core's, whose import alone takes 3.3 s of CPU beside
torch's 1.4, and they read a whole text again for each token. Every model of ours, the encoder of
pictures left out; equal to local_model.py, which runs the trained blocks, by the test.

B rows, S tokens read now, T tokens read so far with these; G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config.choices import Init, Normalization, NormPlacement, Position
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig, VisionConfig
from pipeline.config.model_shape import resolve
from pipeline.config.parameter_names import parameter_shapes
from pipeline.model.activations import ACTIVATIONS, activate
from pipeline.model.rope import apply_rope, rope_table

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's, which plans each new number of keys, and here every token brings one."""
ROPE_STEP = 256
"""Positions by which the rotary table grows, so that it is not made anew for each token."""


@dataclass
class Memory:
    """What a decoder has read: of each layer the keys and values, (B, G, T, D)."""

    padding: Tensor
    """(B,) tokens in front of each row that only fill it up."""
    is_padded: bool
    length: int = 0
    """T."""
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far, of whose last ones these are."""
        if layer in self.layers:
            keys, values = (torch.cat(pair, 2) for pair in zip(self.layers[layer], (keys, values)))
        self.layers[layer] = keys, values
        return keys, values

    def mask(self, places: Tensor) -> Tensor | None:
        """(B, 1, S, T) bool, what the tokens at `places` see; None: all that stands before them."""
        if not self.is_padded and (self.length == len(places) or len(places) == 1):
            return None
        keys, queries = torch.arange(self.length, device=places.device), places[:, None]
        # A token that only fills up sees itself: a softmax over nothing is NaN, and as a value that
        # is masked NaN * 0 would still reach the others.
        seen = (keys >= self.padding[:, None, None]) & (keys <= queries) | (keys == queries)
        return seen[:, None]


class Decoder:
    """A GPT that answers with the logits of what comes next."""

    def __init__(self, model: ModelConfig, weight: Callable[[str], Tensor]) -> None:
        """Take the weights, one parameter at a time: bf16 on a CUDA device, else fp32.

        Args:
            model: architecture, with vocab_size.
            weight: canonical name to whole parameter.
        """
        assert model.vocab_size is not None
        on_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if on_cuda else "cpu")
        dtype = torch.bfloat16 if on_cuda else torch.float32
        self.model, self.sizes = model, resolve(model)
        text = replace(model, vision=VisionConfig())
        names = parameter_shapes(text, FinetuneConfig(), vocab_size=model.vocab_size)
        self.weights = {name: weight(name).to(self.device, dtype) for name in names}
        self.rope = rope_table(model) if model.position is Position.rope else None

    def begin(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Memory]:
        """((B, vocab_size) fp32 logits behind rows of ids of any lengths, what was read)."""
        longest = max(map(len, rows))
        padding = [longest - len(row) for row in rows]
        memory = Memory(torch.tensor(padding, device=self.device), any(padding))
        ids = [[0] * count + [*row] for count, row in zip(padding, rows, strict=True)]
        return self.read(torch.tensor(ids), memory), memory

    @torch.no_grad()
    @sdpa_kernel(KERNELS)
    def read(self, tokens: Tensor, memory: Memory) -> Tensor:
        """(B, vocab_size) fp32 logits behind (B, S) ids that come after what was read."""
        model, tokens = self.model, tokens.to(self.device)
        places = memory.length + torch.arange(tokens.shape[1], device=self.device)
        memory.length += len(places)
        positions = (places - memory.padding[:, None]).clamp(min=0)
        hidden = F.embedding(tokens, self.weights["embedding.word.weight"])
        if model.position is Position.learned:
            hidden = hidden + self.weights["embedding.position.weight"][positions]
        rope, mask = self._rope(positions, memory.length, hidden), memory.mask(places)

        def attend(x: Tensor, layer: int) -> Tensor:
            return self._attention(x, layer, memory, mask=mask, rope=rope)

        for layer in range(model.num_layers):
            hidden = self._block(hidden, layer, attend)
        hidden = hidden[:, -1]
        if model.norm_placement is NormPlacement.pre:
            hidden = self._norm(hidden, "final_norm")
        word = self.weights.get("head.weight", self.weights["embedding.word.weight"])
        logits = F.linear(hidden, word).float()
        if model.init is Init.mup:
            logits = logits * (model.mup_base_hidden_size / model.hidden_size)
        cap = model.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def _rope(self, positions: Tensor, length: int, like: Tensor) -> tuple[Tensor, ...]:
        """(cos, sin), each (B, 1, S, D), of (B, S) positions below `length`; empty: no rotation."""
        if self.rope is None:
            return ()
        whole = self.rope.tables(
            -(-length // ROPE_STEP) * ROPE_STEP, like, sequence_first=False
        )  # (1, T, 1, 1, D)
        return tuple(table[0, :, 0, 0][positions][:, None] for table in whole)

    def _block(self, hidden: Tensor, layer: int, attend: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Hidden after block `layer`, (B, S, H)."""
        at = f"layers.{layer}"
        first, second = f"{at}.input_layernorm", f"{at}.pre_mlp_layernorm"
        if self.model.norm_placement is NormPlacement.post:
            hidden = self._norm(hidden + attend(hidden, layer), first)
            return self._norm(hidden + self._mlp(hidden, f"{at}.mlp"), second)
        attended = hidden + attend(self._norm(hidden, first), layer)
        read = hidden if self.model.parallel_residual else attended
        return attended + self._mlp(self._norm(read, second), f"{at}.mlp")

    def _attention(
        self, x: Tensor, layer: int, memory: Memory, *, mask: Tensor | None, rope: tuple
    ) -> Tensor:
        """What attention adds to (B, S, H); mask and rope as in Memory.mask and _rope."""
        at, groups, width = (
            f"layers.{layer}.self_attention",
            self.sizes.num_query_groups,
            self.sizes.head_dim,
        )
        qkv = self._linear(x, f"{at}.linear_qkv").unflatten(-1, (groups, -1, width))
        q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        if self.model.qk_norm:
            q, k = self._norm(q, f"{at}.q_layernorm"), self._norm(k, f"{at}.k_layernorm")
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, heads, S, D)
        if rope:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        k, v = memory.keep(layer, k, v)
        context = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1,
            scale=1 / width if self.model.init is Init.mup else None,
            enable_gqa=q.shape[1] != groups,
        )  # fmt: skip
        return self._linear(context.transpose(1, 2).flatten(2), f"{at}.linear_proj")

    def _mlp(self, x: Tensor, at: str) -> Tensor:
        """What an MLP, or a mixture of them, makes of (B, S, H)."""
        if f"{at}.router.weight" in self.weights:
            return self._mixture(x, at)
        wide, act = self._linear(x, f"{at}.linear_fc1"), ACTIVATIONS[self.model.activation]
        inner = activate(wide, act, is_gated=self.sizes.is_gated)
        return self._linear(inner, f"{at}.linear_fc2")

    def _mixture(self, x: Tensor, at: str) -> Tensor:
        """Each token through its experts, weighted as experts.py does, and through the shared one.

        The router computes in fp32. The weights are a softmax over the chosen ones; of a single one
        its probability among all.
        """
        rows, moe = x.flatten(0, -2), self.model.moe
        scores = F.linear(rows.float(), self.weights[f"{at}.router.weight"].float())
        if moe.top_k == 1:
            shares, chosen = scores.softmax(-1).max(-1, keepdim=True)
        else:
            best, chosen = scores.topk(moe.top_k, dim=-1)
            shares = best.softmax(-1)
        total = torch.zeros_like(rows)
        for expert in chosen.unique().tolist():
            places, rank = (chosen == expert).nonzero(as_tuple=True)
            out = self._mlp(rows[places], f"{at}.experts.local_experts.{expert}")
            total[places] += shares[places, rank, None].to(out.dtype) * out
        if moe.shared_expert_ffn_hidden_size:
            total = total + self._mlp(rows, f"{at}.shared_experts")
        return total.view_as(x)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, eps = self.weights[f"{name}.weight"], self.model.norm_eps
        if self.model.normalization is Normalization.rmsnorm:
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.layer_norm(x, weight.shape, weight, self.weights[f"{name}.bias"], eps)
