"""What pipeline/probing measures, computed from an exported folder with transformers and torch's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.layouts import SEQ_LEN, VOCAB


class Theirs:
    """A folder's model under transformers, and what passes by in it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        self.model.eval()
        inner = getattr(self.model, "transformer", None) or self.model.model
        self.is_gpt2 = hasattr(inner, "h")
        self.blocks = list(inner.h if self.is_gpt2 else inner.layers)
        self.norm = inner.ln_f if self.is_gpt2 else inner.norm
        self.unembedding = self.model.lm_head.weight.detach()
        self.num_heads = self.model.config.num_attention_heads

    def attention(self, block: Any) -> Any:
        return block.attn if self.is_gpt2 else block.self_attn

    def projection(self, block: Any) -> Any:
        return self.attention(block).c_proj if self.is_gpt2 else self.attention(block).o_proj

    def places(self) -> list[slice]:
        """Of each head in the input of the output projection."""
        config = self.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        return [slice(head * width, (head + 1) * width) for head in range(self.num_heads)]

    @torch.no_grad()
    def run(self, tokens: Tensor) -> dict[str, Any]:
        """Everything that passed by, in plain tensors."""
        seen: dict[Any, Any] = {}

        def keep(name: Any) -> Callable[..., None]:
            def hook(_m: Any, inputs: Any, out: Any) -> None:
                seen[name] = (inputs, out[0] if isinstance(out, tuple) else out)

            return hook

        handles = [self.norm.register_forward_hook(keep("norm"))]
        for number, block in enumerate(self.blocks):
            for name, part in (
                ("block", block), ("attention", self.attention(block)), ("mlp", block.mlp),
                ("projection", self.projection(block)),
            ):  # fmt: skip
                handles.append(part.register_forward_hook(keep((name, number))))
        out = self.model(tokens, output_attentions=True, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        count = range(len(self.blocks))
        return {
            "logits": out.logits,
            "attentions": out.attentions,
            "embedded": out.hidden_states[0],
            "after": [*out.hidden_states[1:-1], seen["norm"][0][0]],
            "attended": [seen["attention", i][1] for i in count],
            "mlp": [seen["mlp", i][1] for i in count],
            "context": [seen["projection", i][0][0] for i in count],
        }

    def logits(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) @ self.unembedding.t()

    def adds(self, vector: Tensor, final: Tensor, labels: Tensor) -> Tensor:
        """(B, S): what a vector of the stream adds to its label's logit above the mean logit."""
        if self.is_gpt2:
            scale = (final.var(-1, keepdim=True, unbiased=False) + self.norm.eps).sqrt()
            vector = vector - vector.mean(-1, keepdim=True)
        else:
            scale = (final.square().mean(-1, keepdim=True) + self.norm.variance_epsilon).sqrt()
        normed = vector / scale * self.norm.weight
        logits = normed @ self.unembedding.t()
        return logits.gather(-1, labels[..., None])[..., 0] - logits.mean(-1)

    @contextmanager
    def changed(self, module: Any, hook: Callable[..., Any], *, before: bool) -> Iterator[None]:
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        handle = register(hook)
        yield
        handle.remove()


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


@torch.no_grad()
def means(theirs: Theirs, tokens: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Any]:
    """`averages`, one definition after the other."""
    seen = theirs.run(tokens)
    count, heads = mask.sum(), theirs.num_heads

    def mean(values: Tensor) -> float:
        return float((values.double() * mask).sum() / count)

    final = seen["after"][-1]
    add = lambda vector: mean(theirs.adds(vector, final, labels))  # noqa: E731
    by_head: list[list[float]] = []
    biases = []
    for number, block in enumerate(theirs.blocks):
        projection = theirs.projection(block)
        weight = projection.weight if theirs.is_gpt2 else projection.weight.t()  # (in, out)
        parts = seen["context"][number].unflatten(-1, (heads, -1))
        rows = weight.unflatten(0, (heads, -1))
        by_head.append([add(parts[:, :, h] @ rows[h]) for h in range(heads)])
        biases.append(
            0.0 if projection.bias is None else add(projection.bias.expand_as(final).clone())
        )
    bias = torch.zeros_like(final) if not theirs.is_gpt2 else theirs.norm.bias.expand_as(final)
    of_bias = bias @ theirs.unembedding.t()
    of_bias = of_bias.gather(-1, labels[..., None])[..., 0] - of_bias.mean(-1)
    logits = seen["logits"]
    later = mask[:, 1:].sum()
    return {
        "tokens": int(count),
        "lens_loss": [mean(losses_of(theirs.logits(h), labels)) for h in seen["after"]],
        "residual": [mean(h.norm(dim=-1)) for h in seen["after"]],
        "attention": [mean(h.norm(dim=-1)) for h in seen["attended"]],
        "mlp": [mean(h.norm(dim=-1)) for h in seen["mlp"]],
        "entropy": [
            [mean(-(a[:, h] * a[:, h].clamp(min=1e-30).log()).sum(-1)) for h in range(heads)]
            for a in seen["attentions"]
        ],
        "sink": [
            [float((a[:, h, 1:, 0].double() * mask[:, 1:]).sum() / later) for h in range(heads)]
            for a in seen["attentions"]
        ],
        "logit": mean(logits.gather(-1, labels[..., None])[..., 0] - logits.mean(-1)),
        "attribution": {
            "heads": by_head,
            "attention_bias": biases,
            "mlp": [add(m) for m in seen["mlp"]],
            "embedding": add(seen["embedded"]),
            "final_norm_bias": mean(of_bias),
        },
    }


@torch.no_grad()
def head_kinds(theirs: Theirs) -> dict[str, Any]:
    """Scores on the same repeated random tokens, place by place."""
    generator = torch.Generator().manual_seed(0)
    half = SEQ_LEN // 2
    ids = torch.randint(0, VOCAB, (8, half), generator=generator)
    attentions = theirs.run(torch.cat([ids, ids], 1))["attentions"]
    places = {
        "previous": [(i, i - 1) for i in range(1, 2 * half)],
        "duplicate": [(i, i - half) for i in range(half, 2 * half)],
        "induction": [(i, i - half + 1) for i in range(half, 2 * half)],
    }
    return {
        name: [
            [
                float(np.mean([float(a[:, h, i, j].double().mean()) for i, j in pairs]))
                for h in range(theirs.num_heads)
            ]
            for a in attentions
        ]
        for name, pairs in places.items()
    }


@torch.no_grad()
def ablation(theirs: Theirs, tokens: Tensor) -> dict[str, Any]:
    """Losses of (1, S) tokens with a part that adds zeros."""

    def loss() -> float:
        logits = theirs.model(tokens).logits[:, :-1]
        return float(losses_of(logits, tokens[:, 1:]).mean())

    def zero(_m: Any, _i: Any, out: Any) -> Any:
        is_tuple = isinstance(out, tuple)
        return (torch.zeros_like(out[0]), *out[1:]) if is_tuple else torch.zeros_like(out)

    def without(place: slice) -> Callable[..., Any]:
        def silent(_m: Any, inputs: Any) -> Any:
            context = inputs[0].clone()
            context[..., place] = 0
            return (context,)

        return silent

    found: dict[str, Any] = {"none": [loss()], "attention": [], "mlp": [], "heads": []}
    for block in theirs.blocks:
        for name, part in (("attention", theirs.attention(block)), ("mlp", block.mlp)):
            with theirs.changed(part, zero, before=False):
                found[name].append(loss())
        row = []
        for place in theirs.places():
            with theirs.changed(theirs.projection(block), without(place), before=True):
                row.append(loss())
        found["heads"].append(row)
    return found


@torch.no_grad()
def patching(theirs: Theirs, prompt: Tensor, other: Tensor, answer: int) -> dict[str, Any]:
    """Log-probabilities of the answer after (1, S) `other`, with what passed by for `prompt`."""

    def chance(tokens: Tensor) -> float:
        return float(theirs.model(tokens).logits[0, -1].log_softmax(-1)[answer])

    def head_put(place: slice, context_of_prompt: Tensor) -> Callable[..., Any]:
        def put(_m: Any, inputs: Any) -> Any:
            context = inputs[0].clone()
            context[..., place] = context_of_prompt[..., place]
            return (context,)

        return put

    def stream_put(at: int, after: Tensor) -> Callable[..., Any]:
        def put(_m: Any, _i: Any, out: Any) -> Any:
            hidden = (out[0] if isinstance(out, tuple) else out).clone()
            hidden[0, at] = after[0, at]
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        return put

    source = theirs.run(prompt)
    found: dict[str, Any] = {"of_prompt": chance(prompt), "of_other": chance(other)}
    found |= {"streams": [], "heads": []}
    for number, block in enumerate(theirs.blocks):
        heads, streams = [], []
        for place in theirs.places():
            put = head_put(place, source["context"][number])
            with theirs.changed(theirs.projection(block), put, before=True):
                heads.append(chance(other))
        for at in range(prompt.shape[1]):
            with theirs.changed(block, stream_put(at, source["after"][number]), before=False):
                streams.append(chance(other))
        found["heads"].append(heads)
        found["streams"].append(streams)
    return found
