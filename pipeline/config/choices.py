"""The choices a setting can have, by the name that yaml and command line write."""

from __future__ import annotations

from enum import Enum

# Choices. yaml and command line write the member's name.
Position = Enum("Position", ["learned", "rope", "none"])  # rope: rotary, arXiv:2104.09864
RopeScaling = Enum("RopeScaling", ["none", "linear", "llama3"])  # as in Hugging Face configs
Normalization = Enum("Normalization", ["layernorm", "rmsnorm"])  # rmsnorm: arXiv:1910.07467
NormPlacement = Enum("NormPlacement", ["pre", "post"])  # post: after the residual sum (GPT-1)
# gelu_tanh: GPT-2's
Activation = Enum("Activation", ["gelu", "gelu_tanh", "swiglu", "squared_relu"])
# scaled: GPT-2, residual projections / sqrt(2 num_layers); fixed: init_std everywhere;
# mup: maximal update parametrisation, arXiv:2203.03466
Init = Enum("Init", ["scaled", "fixed", "mup"])
# Arithmetic of forward and backward; weights, moments and gradient sums are fp32 in all three.
Precision = Enum("Precision", ["fp32", "bf16", "fp16"])
# Products of the blocks' linears in float8 numbers: none; rowwise, a factor for each row (e4m3)
Float8 = Enum("Float8", ["none", "rowwise"])
# What the backward pass computes again: nothing, the attention core, every n-th block.
Recompute = Enum("Recompute", ["none", "selective", "full"])
# 1f1b: one forward, one backward; dualpipev: two directions, half the bubble (DeepSeek-V3).
PipelineSchedule = Enum("PipelineSchedule", ["1f1b", "dualpipev"])
# wsd: constant, then linear to min_lr (arXiv:2404.06395).
Decay = Enum("Decay", ["cosine", "linear", "wsd", "constant"])
# muon: orthogonalised momentum for the matrices of the blocks (kellerjordan.github.io/posts/muon),
# AdamW for the rest
OptimizerName = Enum("OptimizerName", ["adamw", "muon"])
WandbMode = Enum("WandbMode", ["auto", "online", "offline", "disabled"])  # auto: online with a key
# What trackers draw over: optimizer steps, or the tokens they used.
XAxis = Enum("XAxis", ["step", "tokens"])
OnCorrupt = Enum("OnCorrupt", ["fail", "skip"])
OnSpike = Enum("OnSpike", ["none", "skip", "rollback"])
