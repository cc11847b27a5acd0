"""The canonical names and whole shapes of a model's parameters, without building it.

    ModelConfig, FinetuneConfig --parameter_shapes--> {name: shape} --trained_names--> {name}

See pipeline/model/names.py for the names.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator

from pipeline.config.choices import Normalization, NormPlacement, Position
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.config.vision import encoder_of

Shape = tuple[int, ...]
Rows = tuple[int, int]
"""First row, and the one behind the last."""


def parameter_shapes(
    model: ModelConfig, finetune: FinetuneConfig, *, vocab_size: int
) -> dict[str, Shape]:
    """Canonical name to whole shape of every parameter, low-rank matrices at the end."""
    hidden, linears = model.hidden_size, linear_shapes(model)
    shapes: dict[str, Shape] = {"embedding.word.weight": (vocab_size, hidden)}
    if model.position is Position.learned:
        shapes["embedding.position.weight"] = (model.max_seq_len, hidden)
    shapes |= _block_shapes(model)
    if model.norm_placement is NormPlacement.pre:
        shapes |= dict.fromkeys(_norm(model, "final_norm"), (hidden,))
    if not model.tied_embeddings:
        shapes["head.weight"] = (vocab_size, hidden)
    if model.vision.num_layers:
        shapes |= _encoder_shapes(model)
    for stem in lora_stems(model, finetune):
        rows, columns = linears[stem]
        shapes[f"{stem}.lora_a"] = (finetune.lora_rank, columns)
        shapes[f"{stem}.lora_b"] = (rows, finetune.lora_rank)
    return shapes


def _block_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Of the parameters of the blocks, low-rank matrices left out."""
    hidden, sizes = model.hidden_size, resolve(model)
    shapes: dict[str, Shape] = {}
    for layer in range(model.num_layers):
        at = f"layers.{layer}"
        norms = {"input_layernorm": hidden, "pre_mlp_layernorm": hidden}
        if model.qk_norm:
            norms |= {f"self_attention.{n}_layernorm": sizes.head_dim for n in "qk"}
        for name, size in norms.items():
            shapes |= dict.fromkeys(_norm(model, f"{at}.{name}"), (size,))
        if model.moe.num_experts:
            shapes[f"{at}.mlp.router.weight"] = (model.moe.num_experts, hidden)
    for stem, (rows, columns) in _block_linears(model).items():
        shapes[f"{stem}.weight"] = (rows, columns)
        if sizes.qkv_bias if stem.endswith("linear_qkv") else model.bias:
            shapes[f"{stem}.bias"] = (rows,)
    return shapes


def _encoder_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Of the picture encoder and its projector."""
    sizes, width, hidden = resolve(model).vision, model.vision.hidden_size, model.hidden_size
    assert sizes is not None
    blocks = _block_shapes(encoder_of(model))
    return {
        "vision.patch.weight": (width, sizes.patch_numbers),
        "vision.patch.bias": (width,),
        "vision.position.weight": (sizes.num_patches, width),
        **{f"vision.{name}": shape for name, shape in blocks.items()},
        "vision.linear_1.weight": (hidden, width),
        "vision.linear_1.bias": (hidden,),
        "vision.linear_2.weight": (hidden, hidden),
        "vision.linear_2.bias": (hidden,),
    }


def parameter_names(model: ModelConfig, finetune: FinetuneConfig) -> list[str]:
    """The canonical name of every parameter."""
    return list(parameter_shapes(model, finetune, vocab_size=1))


def linear_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Canonical name, without its end, to (rows, columns) of every linear of the blocks.

    Those of the picture encoder's blocks are behind the others.
    """
    linears = _block_linears(model)
    if model.vision.num_layers:
        of_encoder = _block_linears(encoder_of(model))
        linears |= {f"vision.{name}": shape for name, shape in of_encoder.items()}
    return linears


def _block_linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The same of a model's own blocks."""
    sizes, hidden = resolve(model), model.hidden_size
    heads, width = model.num_attention_heads, sizes.head_dim
    rows, mlps = (heads + 2 * sizes.num_query_groups) * width, _mlps(model)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(model.num_layers):
        at = f"layers.{layer}"
        shapes[f"{at}.self_attention.linear_qkv"] = (rows, hidden)
        shapes[f"{at}.self_attention.linear_proj"] = (hidden, heads * width)
        for mlp, inner in mlps.items():
            shapes[f"{at}.{mlp}.linear_fc1"] = (inner * (2 if sizes.is_gated else 1), hidden)
            shapes[f"{at}.{mlp}.linear_fc2"] = (hidden, inner)
    return shapes


def is_linear_weight(name: str) -> bool:
    """Whether a canonical name is that of the weight of a linear of one of the GPT's blocks."""
    return re.fullmatch(r"layers\..*\.linear_(qkv|proj|fc1|fc2)\.weight", name) is not None


def matrices_of(name: str, rows: int, model: ModelConfig) -> list[list[Rows]]:
    """The matrices that lie in the weight of a linear: queries, keys, values; gate, up; or one.

    What is said of a matrix, such as its singular values, is said of each of them.

    Args:
        name: canonical, of the weight.
        rows: of the whole weight.

    Returns:
        Of each matrix the runs of rows of the whole weight that it is made of, in order.
    """
    sizes = resolve(model)
    if name.endswith("linear_qkv.weight"):
        # Rows are [group][queries of the group, key, value][head_dim] (model/attention.py).
        width, groups = sizes.head_dim, sizes.num_query_groups
        queries = model.num_attention_heads // groups * width
        cuts = [(0, queries), (queries, queries + width), (queries + width, queries + 2 * width)]
        starts = range(0, rows, queries + 2 * width)
        return [[(start + a, start + b) for start in starts] for a, b in cuts]
    if name.endswith("linear_fc1.weight") and sizes.is_gated:
        return [[(0, rows // 2)], [(rows // 2, rows)]]
    return [[(0, rows)]]


def lora_stems(model: ModelConfig, finetune: FinetuneConfig) -> list[str]:
    """The linears that get low-rank matrices."""
    if not finetune.lora_rank:
        return []
    return list(matching(linear_shapes(model), finetune.lora_targets, model))


def is_lora(name: str) -> bool:
    """Whether a canonical name is that of a low-rank matrix."""
    return name.endswith((".lora_a", ".lora_b"))


def trained_names(
    names: Iterable[str], model: ModelConfig, finetune: FinetuneConfig
) -> Iterator[str]:
    """Those of the names that are trained."""
    return matching(names, finetune.train, model)


def freezes(model: ModelConfig, finetune: FinetuneConfig) -> bool:
    """Whether any parameter is not trained."""
    names = parameter_names(model, finetune)
    return len(names) > len(list(trained_names(names, model, finetune)))


def matching(names: Iterable[str], patterns: Iterable[str], model: ModelConfig) -> Iterator[str]:
    """Those that one of the patterns names; layers.-1 is the last block."""
    counted = [counted_from_0(pattern, model) for pattern in patterns]
    return (name for name in names if any(fnmatch.fnmatchcase(name, p) for p in counted))


def matches(name: str, patterns: Iterable[str], model: ModelConfig) -> bool:
    """The same of one name."""
    return any(matching([name], patterns, model))


def counted_from_0(pattern: str, model: ModelConfig) -> str:
    """The pattern with layers.-N as the block it means; one that there is not stays as it is."""
    found = re.match(r"layers\.-(\d+)(?=\.|$)", pattern)
    layer = model.num_layers - int(found[1]) if found else -1
    return pattern if found is None or layer < 0 else f"layers.{layer}{pattern[found.end() :]}"


def _norm(model: ModelConfig, at: str) -> list[str]:
    has_bias = model.normalization is Normalization.layernorm
    return [f"{at}.weight", *([f"{at}.bias"] if has_bias else [])]


def _mlps(model: ModelConfig) -> dict[str, int]:
    """The MLPs of a block, one or the experts, and their inner widths."""
    inner, moe = resolve(model).ffn_hidden_size, model.moe
    if not moe.num_experts:
        return {"mlp": inner}
    widths = {f"mlp.experts.local_experts.{e}": inner for e in range(moe.num_experts)}
    if moe.shared_expert_ffn_hidden_size:
        widths["mlp.shared_experts"] = moe.shared_expert_ffn_hidden_size
    return widths
