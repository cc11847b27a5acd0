"""Settings of the architecture. Presets: conf/model/."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from pipeline.config.choices import (
    Activation,
    Init,
    Normalization,
    NormPlacement,
    Position,
    RopeScaling,
)


@dataclass
class MoeConfig:
    """Mixture of experts in every block; off while num_experts is 0."""

    num_experts: int = 0
    """Experts per layer; 0 makes the MLP dense."""
    top_k: int = 2
    """Experts each token is sent to, with weights that sum to 1; a single one keeps its weight
    among all (Switch).
    """
    ffn_hidden_size: int | None = None
    """Width of one expert; null: model.ffn_hidden_size."""
    shared_expert_ffn_hidden_size: int = 0
    """Width of the expert every token passes; 0: none."""
    aux_loss_coeff: float = 0.01
    """Weight of the load-balancing loss (arXiv:2101.03961), the mean over sequences; 0: off."""
    z_loss_coeff: float = 0.0
    """Weight of the router z-loss (arXiv:2202.08906); 0: off."""


@dataclass
class VisionConfig:
    """A picture encoder in front of the GPT's blocks, in width of its own; off at num_layers 0.

    Its sizes are those of the pictures as data_prep stored them; its blocks are the GPT's, with
    LayerNorm, biases and gelu_tanh, and every patch sees every other.
    """

    num_layers: int = 0
    """Blocks of the picture encoder; 0: the model reads text only."""
    hidden_size: int = 768
    """Width of what runs from block to block of the encoder."""
    num_attention_heads: int = 12
    """Heads in each block of the encoder."""
    ffn_hidden_size: int | None = None
    """Width of the encoder's MLPs; null: 4 * model.vision.hidden_size."""
    image_size: int = 224
    """Height and width of a picture, pixels; the dataset's."""
    patch_size: int = 16
    """Height and width of what one placeholder token stands for, pixels; the dataset's."""


@dataclass
class ModelConfig:
    """Architecture. Presets: conf/model/."""

    name: str = MISSING
    """Preset name, used in run names."""
    num_layers: int = MISSING
    """Blocks, each of attention and MLP."""
    hidden_size: int = MISSING
    """Width of what runs from block to block."""
    num_attention_heads: int = MISSING
    """Heads of queries in each block."""
    num_query_groups: int | None = None
    """Key/value heads (GQA); null: one per attention head; 1: MQA."""
    head_dim: int | None = None
    """Width of one head; null: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; null: 4 * hidden_size."""
    vocab_size: int | None = None
    """Rows of the embedding; null: the tokenizer's. May exceed the tokenizer's, never fall
    below.
    """
    max_seq_len: int = 1024
    """Longest sequence in tokens; the size of a learned position table."""
    position: Position = Position.learned
    """How positions are told apart: a learned table (GPT-2), rotary (arXiv:2104.09864), not."""
    rope_theta: float = 10000.0
    """Rotary base."""
    rope_scaling: RopeScaling = RopeScaling.none
    """How rotary positions are stretched for longer sequences, as in Hugging Face configs."""
    rope_scaling_factor: float = 1.0
    """Stretch for rope_scaling linear and llama3."""
    rope_original_max_seq_len: int = 8192
    """llama3 scaling: context length before stretching, tokens."""
    normalization: Normalization = Normalization.layernorm
    """Kind of the norms; rmsnorm: arXiv:1910.07467."""
    norm_placement: NormPlacement = NormPlacement.pre
    """pre: before attention and MLP; post: after each residual sum (GPT-1)."""
    norm_eps: float = 1e-5
    """Added to the variance before its root is taken."""
    activation: Activation = Activation.gelu_tanh
    """Between the matrices of the MLP; gelu_tanh: GPT-2's; swiglu: with a gate."""
    bias: bool = True
    """Biases in the linear layers of attention and MLP."""
    qkv_bias: bool | None = None
    """Bias of the query/key/value projection; null: as `bias` (Qwen2 has true with bias=false)."""
    qk_norm: bool = False
    """Norm over each head's queries and keys (arXiv:2302.05442), of kind `normalization`."""
    tied_embeddings: bool = True
    """The output head is the word embedding."""
    parallel_residual: bool = False
    """Attention and MLP read the same input and are summed (GPT-J, PaLM)."""
    hidden_dropout: float = 0.0
    """After the embedding, attention and MLP."""
    attention_dropout: float = 0.0
    """Of attention's weights."""
    init: Init = Init.scaled
    """Initial weights: scaled (GPT-2): residual projections / sqrt(2 num_layers); fixed: the same
    everywhere; mup: maximal update parametrisation (arXiv:2203.03466).
    """
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    mup_base_hidden_size: int = 256
    """Width at which muP equals the standard parametrisation."""
    logit_softcap: float = 0.0
    """cap * tanh(logits / cap) (Gemma 2); 0: off."""
    z_loss_coeff: float = 0.0
    """Weight of log(Z)^2 in the loss (PaLM); 0: off."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    compile: bool = False
    """torch.compile each block (CUDA)."""
