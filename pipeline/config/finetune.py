"""What is trained: everything, parameters by name, or low-rank matrices beside frozen ones."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PrivacyConfig:
    """Differential privacy of the sequences that are trained on; none with clip_norm=null."""

    clip_norm: float | None = None
    """Norm to which the gradient of each sequence is clipped; null: training is not private."""
    noise_multiplier: float = 1.0
    """Standard deviation of the noise on the sum of a step's clipped gradients, over clip_norm."""
    delta: float = 1e-5
    """Chance with which epsilon need not hold; well below one over the number of sequences."""


@dataclass
class FinetuneConfig:
    """Which parameters are trained; the others stay as they were read. Presets: conf/finetune/."""

    train: list[str] = field(default_factory=lambda: ["*"])
    """Canonical-name patterns (fnmatch) of what is trained; layers.-1 is the last block. What no
    pattern names is frozen: no gradient, no optimizer state, not in the checkpoints.
    """
    lora_rank: int = 0
    """Width of the low-rank matrices lora_a and lora_b of each target (arXiv:2106.09685); 0: there
    are none.
    """
    lora_alpha: float = 16.0
    """A target computes W x + lora_alpha / lora_rank * B (A x)."""
    lora_targets: list[str] = field(
        default_factory=lambda: ["*.self_attention.linear_*", "*.mlp.linear_*"]
    )
    """Patterns of the linears that get lora_a and lora_b: linear_qkv, linear_proj, linear_fc1,
    linear_fc2 of each block, not those of experts.
    """
    dp: PrivacyConfig = field(default_factory=PrivacyConfig)
    """Differential privacy (docs/privacy.md)."""
