"""Settings of the optimizer and its schedule, the layout, and the arithmetic of training."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from pipeline.config.choices import (
    Decay,
    Float8,
    OptimizerName,
    PipelineSchedule,
    Precision,
    Recompute,
)


@dataclass
class OptimizerConfig:
    """Optimizer. Presets: conf/optimizer/."""

    name: OptimizerName = OptimizerName.adamw
    """Which optimizer."""
    lr: float = 6e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the mean of gradients, a step."""
    beta2: float = 0.95
    """Decay of the mean of their squares, a step."""
    eps: float = 1e-8
    """Added to the root of that mean before it divides."""
    momentum: float = 0.95
    """muon: of the matrices of the blocks (Nesterov's)."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases are not decayed."""
    decay_embeddings: bool = True
    """Decay embedding tables too."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Canonical-name pattern (fnmatch) to learning-rate factor, e.g. {embedding.*: 0.5}."""


@dataclass
class ScheduleConfig:
    """Learning rate over steps. Presets: conf/schedule/."""

    decay: Decay = Decay.cosine
    """From the peak to min_lr: by a cosine, by a line, constant then a line (wsd), or not."""
    min_lr: float = 6e-5
    """Final learning rate."""
    warmup_steps: int | None = None
    """Linear warm-up from 0, optimizer steps; null: 100, and in a run of less than 1,000 steps a
    tenth of them.
    """
    warmup_tokens: int | None = None
    """Warm-up in tokens; null: warmup_steps counts."""
    decay_steps: int | None = None
    """wsd: steps of the final descent (null: 20 % of the run); cosine and linear: length (null: the
    run).
    """


@dataclass
class ParallelConfig:
    """Layout: speed only, never results; data_parallel_size is what remains. conf/parallel/."""

    tensor_parallel_size: int = 1
    """Ranks that share each layer's matrices; at most the devices of a node."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor-parallel ranks
    (arXiv:2205.05198).
    """
    expert_parallel_size: int = 1
    """Ranks that share each layer's experts, whole ones on each: 1, or tensor_parallel_size times
    some of the context- and data-parallel ranks; 1 splits every expert over the tensor-parallel
    ranks.
    """
    context_parallel_size: int = 1
    """Ranks that share each sequence, for long ones: in attention each has whole sequences of some
    heads (arXiv:2309.14509).
    """
    pipeline_parallel_size: int = 1
    """Ranks that share the stack of layers."""
    pipeline_schedule: PipelineSchedule = PipelineSchedule["1f1b"]
    """1f1b: one forward, one backward; dualpipev: from both ends, half the bubble (DeepSeek-V3)."""
    zero_stage: int = 1
    """0 nothing, 1 optimizer state, 2 gradients, 3 parameters are partitioned over data-parallel
    ranks.
    """
    offload_optimizer: bool = False
    """Optimizer state and step on the host (DeepSpeedCPUAdam)."""


@dataclass
class RampStage:
    """Smaller batches or shorter sequences at the start."""

    until_step: int = MISSING
    """First optimizer step at which this stage no longer holds."""
    global_batch_size: int | None = None
    """Sequences per step in this stage; null: training.global_batch_size."""
    seq_len: int | None = None
    """Must divide the full seq_len; null: the full one."""


@dataclass
class TrainingConfig:
    """Length, batch, arithmetic."""

    total_steps: int | None = None
    """Optimizer steps; exactly one of total_steps and total_tokens is set."""
    total_tokens: float | None = None
    """Training tokens, rounded up to whole steps; 300e9 is GPT-3's."""
    seq_len: int | None = None
    """Tokens per sequence; null: model.max_seq_len."""
    global_batch_size: int = 512
    """Sequences per optimizer step, all ranks."""
    micro_batch_size: int = 1
    """Sequences per data-parallel rank per forward pass."""
    ramp: list[RampStage] = field(default_factory=list)
    """Batch-size and sequence-length warm-up, in order of until_step."""
    precision: Precision = Precision.bf16
    """Arithmetic of forward and backward; weights, moments and gradient sums are fp32 in all."""
    fp8: Float8 = Float8.none
    """Arithmetic of the blocks' linears forward and of their input's gradient (bf16 runs)."""
    recompute: Recompute = Recompute.none
    """What the backward pass computes again to save memory: nothing, attention, whole blocks."""
    recompute_every: int = 1
    """recompute=full: every n-th block."""
    eval_every: int = 1000
    """Steps between evaluations; 0: only at the end."""
    eval_sequences: int = 1024
    """Sequences per validation dataset and evaluation; 0: all of it."""
    probe_every: int = 0
    """Steps between looks at the attention heads, and at held-out text through the logit lens
    (docs/probing.md); 0: never.
    """
    sample_every: int = 0
    """Steps between samples of what the model writes, kept in runs/<name>/samples.jsonl; 0: never.
    """
    sample_prompts: list[str] = field(default_factory=lambda: [""])
    """What the samples continue; an empty one is the start of a document. Models of dialogues
    answer them.
    """
    sample_tokens: int = 64
    """Longest sample, tokens; each costs a forward pass of all prompts."""
    sample_temperature: float = 0.8
    """Divides the logits of a sample; 0 takes the likeliest token every time."""
    profile_steps: list[int] | None = None
    """[a, b]: trace steps a to b (as logged) of every rank into runs/<name>/profiles/; null: none.
    """
    gc_every: int = 1000
    """Steps between Python garbage collections, on all ranks together; 0: leave it to Python."""
