"""Which layers each pipeline stage holds: pure arithmetic.

The list of layers is [embedding, block 0, ..., block n-1, head]; where the head is the word
embedding, a copy of it stands before the head. Stages are contiguous; their costs, in units of one
block's multiply-adds per token, are as equal as contiguity allows, the most loaded stage as light
as possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from pipeline.config.choices import Precision, Recompute
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.config.vision import encoder_of

# Rows of the embedding are padded to a multiple of this times tensor_parallel_size: GEMM tiles stay
# full.
VOCAB_MULTIPLE = 128


def layer_costs(
    model: ModelConfig, *, padded_vocab_size: int, seq_len: int, images_per_row: int = 0
) -> list[float]:
    """Relative cost of [embedding, blocks..., head]: a lookup is almost free, a product is not.

    images_per_row: that the encoder, a part of the embedding, reads with each sequence.
    """
    block = _block_cost(model, seq_len / 2)  # causal: half of the scores
    encoder = 0.0
    if images_per_row:
        encoder = encoder_products(model) * images_per_row / seq_len / block
    head = padded_vocab_size * model.hidden_size / block
    return [0.01 + encoder, *[1.0] * model.num_layers, head]


def encoder_products(model: ModelConfig) -> float:
    """Multiply-adds of a picture on its way to the GPT's blocks, forward."""
    sizes = resolve(model).vision
    assert sizes is not None, "the model has no picture encoder"
    width, hidden = model.vision.hidden_size, model.hidden_size
    # No mask: a patch sees all patches.
    blocks = model.vision.num_layers * _block_cost(encoder_of(model), sizes.num_patches)
    projector = (width + hidden) * hidden
    return sizes.num_patches * (sizes.patch_numbers * width + blocks + projector)


def _block_cost(model: ModelConfig, keys: float) -> float:
    """Multiply-adds of a token in a block whose queries see so many keys in the mean."""
    hidden, heads, sizes = model.hidden_size, model.num_attention_heads, resolve(model)
    width = sizes.head_dim
    projections = hidden * width * (2 * heads + 2 * sizes.num_query_groups)
    scores = 2 * width * heads * keys
    inner = sizes.ffn_hidden_size
    if model.moe.num_experts:
        inner = model.moe.top_k * inner + model.moe.shared_expert_ffn_hidden_size
    return projections + scores + hidden * inner * sizes.num_mlp_matrices


def pipeline_costs(
    model: ModelConfig, *, padded_vocab_size: int, seq_len: int, images_per_row: int = 0
) -> list[float]:
    """`layer_costs` of a training pipeline, which has a layer more for a tied head's weight."""
    costs = layer_costs(
        model,
        padded_vocab_size=padded_vocab_size,
        seq_len=seq_len,
        images_per_row=images_per_row,
    )
    return [*costs[:-1], 0.0, costs[-1]] if model.tied_embeddings else costs


def places_of(name: str, model: ModelConfig) -> list[int]:
    """Which of the layers of `pipeline_costs` hold a parameter, by its canonical name."""
    tied = ["embedding.word.weight"] if model.tied_embeddings else []
    copy = model.num_layers + 1
    if name.startswith("layers."):
        return [int(name.split(".")[1]) + 1]
    if name.startswith("vision."):
        return [0]
    if name.startswith("embedding."):
        return [0, copy] if name in tied else [0]
    return [copy + len(tied)]


def pad_vocabulary(vocab_size: int, *, tensor_parallel_size: int) -> int:
    """Rows of the embedding: a multiple of VOCAB_MULTIPLE on every tensor-parallel rank."""
    multiple = VOCAB_MULTIPLE * tensor_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def partition(costs: Sequence[float], num_stages: int) -> list[int]:
    """Boundaries b with stage s = layers [b[s], b[s + 1]), none empty, the largest cost minimal.

    Among equal partitions the one with the smallest sum of squares is taken, so the result is
    unique.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"cannot cut {len(costs)} layers into {num_stages} non-empty stages")
    return list(_partition(tuple(costs), num_stages))


@lru_cache(maxsize=1024)
def _partition(costs: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    """`partition`, remembered: a search for layouts asks for the same few hundreds of times."""
    count = len(costs)
    prefix = [0.0, *accumulate(costs)]
    infinity = (float("inf"), float("inf"))
    # Dynamic programming: best[k][j] is (largest stage, sum of squares) of the first j layers in k
    # stages, cut[k][j] the layer at which the last of these stages begins. count^2 * stages / 2
    # steps: 77,000 for 96 blocks in 16 stages; most are spared, for once a stage alone costs more
    # than the best found, so do the longer ones before it.
    best = [[infinity] * (count + 1) for _ in range(num_stages + 1)]
    cut = [[0] * (count + 1) for _ in range(num_stages + 1)]
    best[0][0] = (0.0, 0.0)
    for k in range(1, num_stages + 1):
        for j in range(k, count + 1):
            for i in range(j - 1, k - 2, -1):
                stage = prefix[j] - prefix[i]
                if stage > best[k][j][0]:
                    break
                value = (max(best[k - 1][i][0], stage), best[k - 1][i][1] + stage * stage)
                if value <= best[k][j]:
                    best[k][j], cut[k][j] = value, i
    bounds = [count]  # read back from the last stage to the first
    for k in range(num_stages, 0, -1):
        bounds.append(cut[k][bounds[-1]])
    return tuple(bounds[::-1])


def sends_gradients_first(model: ModelConfig, precision: Precision, recompute: Recompute) -> bool:
    """Whether a stage puts its weights' gradients off until its input's gradient is on its way.

    Not compiled ones: their products are not ours. Not in fp16: there DeepSpeed takes a
    micro-batch's gradients over into its sums at the end of the backward pass. Not with
    recompute=full: inputs and output gradients of every linear of the stage would wait together, 32
    bytes a token and unit of width and block in bf16, where recomputing keeps 2.
    """
    return not model.compile and precision is not Precision.fp16 and recompute is not Recompute.full
