"""Parameters, arithmetic per token, and how much of the device that uses (MFU).

    ModelConfig, vocab_size --> num_parameters, flops_per_token --with tokens/s and a peak--> mfu

Pure functions of the config; imports no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from pipeline.config.choices import Normalization, NormPlacement, Position
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig, VisionConfig
from pipeline.config.model_shape import resolve
from pipeline.config.parameter_names import (
    linear_shapes,
    matches,
    matrices_of,
    parameter_names,
    trained_names,
)
from pipeline.config.vision import encoder_of
from pipeline.planning.trained import (
    first_trained_layer,
    num_low_rank_parameters,
    num_trained_parameters,
)

# Of Muon's update of a matrix.
NEWTON_SCHULZ_STEPS = 5
# Dense (not sparse) bf16 TFLOP/s of one device, from the makers' datasheets. The first key that the
# device's name contains as whole words counts, so longer names come first.
PEAK_TFLOPS = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI355X": 2516.6,
    "MI350X": 2306.9,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
    "MI300A": 980.6,
    "MI250X": 191.5,  # one of its two dies, which is one device to torch
}


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of the device, or None where the table does not know it (every CPU).

    Args:
        device_name: as torch.cuda.get_device_name gives it, e.g. "NVIDIA H100 80GB HBM3".
    """
    name = known_name(device_name)
    return PEAK_TFLOPS[name] if name else None


def known_name(device_name: str) -> str | None:
    """The name under which the table knows the device, e.g. "H100"; None: it does not."""
    # Part of a word is another device ("A100" in "RTX A1000"), and so is a name with a suffix.
    variant = "(?! (?:D|Ti|SUPER|Laptop|Max-Q)\\b)"
    found = (name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b{variant}", device_name))
    return next(found, None)


def mfu(
    *, tokens_per_sec_per_device: float, flops_per_token: float, peak_tflops: float | None
) -> float | None:
    """Model FLOPs utilisation, 0 to 1: the model's own arithmetic over the device's peak.

    Recomputed activations do not count as work. None where the peak is not known.
    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
    """
    if peak_tflops is None:
        return None
    return tokens_per_sec_per_device * flops_per_token / (peak_tflops * 1e12)


def flops_per_token(
    model: ModelConfig,
    finetune: FinetuneConfig,
    *,
    vocab_size: int,
    seq_len: int,
    images_per_row: int = 0,
) -> float:
    """Floating-point operations that one training token costs, forward and backward.

        6 * (weights of the matrices a token passes) + 12 * num_layers * num_heads * head_dim *
        seq_len

    6: a multiply and an add, once forward and twice backward. The output head counts, the embedding
    lookup does not; of a mixture's experts the top_k count. Attention counts the whole seq_len x
    seq_len square although half is masked, as both sources do, so that numbers compare.
    Sources: PaLM, arXiv:2204.02311, appendix B; Narayanan et al. 2021 (Megatron), arXiv:2104.04473,
    section 3, whose formula without recomputation, 72 B s l h^2 (1 + s / 6h + V / 12lh), this
    equals for a GPT-3 layer.

    A frozen matrix has no gradient, so 4 instead of 6; below the first trained block nothing goes
    backwards, so 2, and 4 instead of 12; low-rank matrices come on top.

    Pictures are counted by the same rules, a patch as a token, and shared out over the row's
    tokens: `images_per_row` of them, blank ones too.
    """
    weights = _attention_weights(model) + _mlp_weights(model, active=True)
    attention = model.num_attention_heads * resolve(model).head_dim * seq_len
    trained = _trained_shares(model, finetune)
    first, total = first_trained_layer(model, finetune), 0.0
    for layer in range(model.num_layers):
        is_reached = layer >= first
        total += weights * (2 + 2 * is_reached + 2 * trained[layer])
        total += attention * (4 + 8 * is_reached)
    is_head_trained = matches(
        "embedding.word.weight" if model.tied_embeddings else "head.weight", finetune.train, model
    )
    names = trained_names(parameter_names(model, finetune), model, finetune)
    is_passed = any(name != "head.weight" for name in names)
    total += vocab_size * model.hidden_size * (2 + 2 * is_passed + 2 * is_head_trained)
    if images_per_row:
        total += _picture_flops(model, finetune) * images_per_row / seq_len
    return total + 6.0 * num_low_rank_parameters(model, finetune)


def _picture_flops(model: ModelConfig, finetune: FinetuneConfig) -> float:
    """Of one picture, forward and backward: patches, the encoder's blocks, projector.

    Its input has no gradient, so the patches' matrix never more than 4.
    """
    sizes, encoder, width = resolve(model).vision, encoder_of(model), model.vision.hidden_size
    assert sizes is not None
    names = trained_names(parameter_names(model, finetune), model, finetune)
    trained = [name for name in names if name.startswith("vision.")]

    def is_trained(name: str) -> bool:
        return f"vision.{name}.weight" in trained

    first = min((_encoder_layer(name, encoder.num_layers) for name in trained), default=None)
    total = sizes.patch_numbers * width * (2.0 + 2 * is_trained("patch"))
    for layer in range(encoder.num_layers):
        is_reached = first is not None and layer >= first
        for stem, shape in linear_shapes(replace(encoder, num_layers=1)).items():
            stem = stem.replace("layers.0.", f"layers.{layer}.")
            total += math.prod(shape) * (2 + 2 * is_reached + 2 * is_trained(stem))
        total += width * sizes.num_patches * (4 + 8 * is_reached)
    is_reached = first is not None and first < encoder.num_layers
    total += width * model.hidden_size * (2 + 2 * is_reached + 2 * is_trained("linear_1"))
    is_passed = first is not None and trained != ["vision.linear_2.weight", "vision.linear_2.bias"]
    total += model.hidden_size**2 * (2 + 2 * is_passed + 2 * is_trained("linear_2"))
    return total * sizes.num_patches


def _encoder_layer(name: str, num_layers: int) -> int:
    """The first of the encoder's blocks that a parameter's gradient passes; num_layers: none."""
    _, part, *rest = name.split(".")
    if part == "layers":
        return int(rest[0])
    return 0 if part in ("patch", "position") else num_layers


def _trained_shares(model: ModelConfig, finetune: FinetuneConfig) -> list[float]:
    """Of each block, which part of the weights of its linears is trained."""
    counts = [[0, 0] for _ in range(model.num_layers)]
    for stem, shape in linear_shapes(replace(model, vision=VisionConfig())).items():
        count = counts[int(stem.split(".")[1])]
        count[0] += math.prod(shape) * matches(f"{stem}.weight", finetune.train, model)
        count[1] += math.prod(shape)
    return [trained / whole for trained, whole in counts]


def orthogonalization_flops(name: str, shape: tuple[int, ...], model: ModelConfig) -> float:
    """Floating-point operations of Muon's update of a linear's weight (engine/muon.py).

    Of each of its matrices, (n, m) with n <= m: NEWTON_SCHULZ_STEPS times two products of 2 n^2 m
    and one of 2 n^3.

    Args:
        name: canonical.
        shape: whole.
    """
    total = 0.0
    for runs in matrices_of(name, shape[0], model):
        small, large = sorted((sum(stop - start for start, stop in runs), shape[1]))
        total += NEWTON_SCHULZ_STEPS * (4 * small**2 * large + 2 * small**3)
    return total


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the model itself, shared ones counted once, without padding of the vocabulary.

    How many of them are trained: planning/trained.py.
    """
    embeddings = vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    if model.position is Position.learned:
        embeddings += model.max_seq_len * model.hidden_size
    final_norm = _norm(model) if model.norm_placement is NormPlacement.pre else 0
    blocks = model.num_layers * _block_parameters(model)
    return embeddings + blocks + final_norm + _encoder_parameters(model)


def _encoder_parameters(model: ModelConfig) -> int:
    """Parameters of the picture encoder and its projector."""
    sizes, width, hidden = resolve(model).vision, model.vision.hidden_size, model.hidden_size
    if sizes is None:
        return 0
    ends = (sizes.patch_numbers + 1 + sizes.num_patches) * width
    projector = (width + 1) * hidden + (hidden + 1) * hidden
    return ends + projector + model.vision.num_layers * _block_parameters(encoder_of(model))


def count_parameters(
    model: ModelConfig, finetune: FinetuneConfig, vocab_size: int
) -> dict[str, int]:
    """What a run says of its size: parameters of the model, and how many numbers are trained."""
    return {
        "num_parameters": num_parameters(model, vocab_size),
        "num_trained_parameters": num_trained_parameters(model, finetune, vocab_size),
    }


def _block_parameters(model: ModelConfig) -> int:
    """Parameters of one block, biases and norms included."""
    hidden, heads, sizes = model.hidden_size, model.num_attention_heads, resolve(model)
    total = _attention_weights(model) + _mlp_weights(model, active=False) + 2 * _norm(model)
    if sizes.qkv_bias:
        total += (heads + 2 * sizes.num_query_groups) * sizes.head_dim
    if model.bias:
        total += hidden  # of the attention's output projection
        total += sizes.ffn_hidden_size * (sizes.num_mlp_matrices - 1) + hidden  # of a dense MLP
    if model.qk_norm:
        total += 2 * _norm(model) // hidden * sizes.head_dim
    return total


def _attention_weights(model: ModelConfig) -> int:
    sizes = resolve(model)
    heads = model.num_attention_heads + sizes.num_query_groups
    return 2 * model.hidden_size * sizes.head_dim * heads


def _mlp_weights(model: ModelConfig, *, active: bool) -> int:
    """Weights of one layer's MLP, or its router and experts; active: those one token passes."""
    sizes, moe = resolve(model), model.moe
    one = sizes.num_mlp_matrices * model.hidden_size * sizes.ffn_hidden_size
    if not moe.num_experts:
        return one
    shared = sizes.num_mlp_matrices * model.hidden_size * moe.shared_expert_ffn_hidden_size
    experts = moe.top_k if active else moe.num_experts
    return experts * one + shared + moe.num_experts * model.hidden_size


def _norm(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.normalization is Normalization.layernorm else 1)
