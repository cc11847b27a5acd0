"""Every knob of a pretraining run on one page: typed sections, units, defaults.

    conf/pretrain.yaml + groups  --hydra-->  PretrainConfig  --run_shape.derive-->  RunShape
    (values)                                 (this file: the schema)                (every derived number)

A field is followed by its meaning, unit, and what null or 0 does. Components receive their own section, never the
root. Nothing here is changed after composition; numbers that follow from others live in `run_shape.RunShape`.
Enum values are written by name: `training.precision=bf16`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

# Choices. yaml and command line write the member's name.
Position = Enum("Position", ["learned", "rope", "none"])  # rope: rotary, arXiv:2104.09864
RopeScaling = Enum("RopeScaling", ["none", "linear", "llama3"])  # as in Hugging Face configs
Normalization = Enum("Normalization", ["layernorm", "rmsnorm"])  # rmsnorm: arXiv:1910.07467
NormPlacement = Enum("NormPlacement", ["pre", "post"])  # post: after the residual sum (GPT-1)
Activation = Enum("Activation", ["gelu", "gelu_tanh", "swiglu", "squared_relu"])  # gelu_tanh: GPT-2's
# scaled: GPT-2, residual projections / sqrt(2 num_layers); fixed: init_std everywhere;
# mup: maximal update parametrisation, arXiv:2203.03466
Init = Enum("Init", ["scaled", "fixed", "mup"])
Backend = Enum("Backend", ["local", "te"])  # megatron-core layers over torch, or Transformer Engine
# Arithmetic of forward and backward; weights, moments and gradient sums are fp32 in all three.
Precision = Enum("Precision", ["fp32", "bf16", "fp16"])
# What the backward pass computes again: nothing, the attention core, every n-th block.
Recompute = Enum("Recompute", ["none", "selective", "full"])
# 1f1b: one forward, one backward; dualpipev: two directions, half the bubble (DeepSeek-V3).
PipelineSchedule = Enum("PipelineSchedule", ["1f1b", "dualpipev"])
# wsd: constant, then linear to min_lr (arXiv:2404.06395).
Decay = Enum("Decay", ["cosine", "linear", "wsd", "constant"])
OptimizerName = Enum("OptimizerName", ["adamw", "lion", "adafactor", "muon"])
WandbMode = Enum("WandbMode", ["auto", "online", "offline", "disabled"])  # auto: online with a key
OnCorrupt = Enum("OnCorrupt", ["fail", "skip"])
OnSpike = Enum("OnSpike", ["none", "skip", "rollback"])


@dataclass
class MoeConfig:
    """Mixture of experts in every block; off while num_experts is 0."""

    num_experts: int = 0
    """Experts per layer; 0 makes the MLP dense."""
    top_k: int = 2
    """Experts each token is sent to, with weights that sum to 1; a single one keeps its weight among all (Switch)."""
    ffn_hidden_size: int | None = None
    """Width of one expert; null: model.ffn_hidden_size."""
    shared_expert_ffn_hidden_size: int = 0
    """Width of the expert every token passes; 0: none."""
    aux_loss_coeff: float = 0.01
    """Weight of the load-balancing loss (arXiv:2101.03961); 0: off."""
    z_loss_coeff: float = 0.0
    """Weight of the router z-loss (arXiv:2202.08906); 0: off."""


@dataclass
class ModelConfig:
    """Architecture. Presets: conf/model/."""

    name: str = MISSING
    """Preset name, used in run names."""
    num_layers: int = MISSING
    hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int | None = None
    """Key/value heads (GQA); null: one per attention head; 1: MQA."""
    head_dim: int | None = None
    """Width of one head; null: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; null: 4 * hidden_size."""
    vocab_size: int | None = None
    """Rows of the embedding; null: the tokenizer's. May exceed the tokenizer's, never fall below."""
    max_seq_len: int = 1024
    """Longest sequence in tokens; the size of a learned position table."""
    position: Position = Position.learned
    rope_theta: float = 10000.0
    """Rotary base."""
    rope_scaling: RopeScaling = RopeScaling.none
    rope_scaling_factor: float = 1.0
    """Stretch for rope_scaling linear and llama3."""
    rope_original_max_seq_len: int = 8192
    """llama3 scaling: context length before stretching, tokens."""
    normalization: Normalization = Normalization.layernorm
    norm_placement: NormPlacement = NormPlacement.pre
    norm_eps: float = 1e-5
    activation: Activation = Activation.gelu_tanh
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
    init: Init = Init.scaled
    init_std: float = 0.02
    mup_base_hidden_size: int = 256
    """Width at which muP equals the standard parametrisation."""
    logit_softcap: float = 0.0
    """cap * tanh(logits / cap) (Gemma 2); 0: off."""
    z_loss_coeff: float = 0.0
    """Weight of log(Z)^2 in the loss (PaLM); 0: off."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    backend: Backend = Backend.local
    compile: bool = False
    """torch.compile each block (CUDA)."""


@dataclass
class DatasetConfig:
    """One dataset of a mixture."""

    path: str = MISSING
    """Folder with manifest.json; local, s3://, gs://, http(s)://."""
    name: str | None = None
    """Name in metrics and the ledger; null: the folder's last names."""
    weight: float | None = None
    """Share of the tokens, relative to the other datasets; null: in proportion to its size."""
    max_epochs: float | None = None
    """Passes after which the dataset is used up; null: no limit."""


@dataclass
class BlendStage:
    """A later blend of the same datasets."""

    start_step: int = MISSING
    """First optimizer step with these weights."""
    weights: dict[str, float] = field(default_factory=dict)
    """Dataset name to weight; datasets that are not named get 0."""


@dataclass
class DataConfig:
    """What is read and how. Presets: conf/data/."""

    path: str | None = None
    """Output folder of data_prep/tokenize.py; `train` and `validation` default to its two splits."""
    train: list[DatasetConfig] = field(default_factory=list)
    """The training mixture."""
    validation: list[DatasetConfig] = field(default_factory=list)
    """Held-out datasets, evaluated one by one; empty: no evaluation."""
    temperature: float = 1.0
    """Weights are raised to 1/temperature before they are normalised; above 1 flattens the mixture."""
    blend_schedule: list[BlendStage] = field(default_factory=list)
    lanes: int = 1
    """Independent shard streams; a power of two near the number of nodes keeps a remote shard on one node."""
    window: int = 64
    """Shards of a lane that are shuffled together."""
    mask_documents: bool = False
    """Attention stays inside a document."""
    reset_positions: bool = False
    """Positions start at 0 in each document; needs mask_documents."""
    mask_eod_loss: bool = False
    """No loss where the input is the end-of-document token."""
    prefetch_steps: int = 2
    """Steps read ahead by the background thread; 0: read in the training loop."""
    on_corrupt: OnCorrupt = OnCorrupt.fail
    cache_dir: str | None = None
    """Local folder for remote shards; null: runs/<name>/cache."""
    cache_size_gib: float = 64.0
    """Upper bound of cache_dir on each node, GiB."""
    allow_dataset_change: bool = False
    """Resume although the datasets differ from those in the checkpoint."""


@dataclass
class OptimizerConfig:
    """Optimizer. Presets: conf/optimizer/."""

    name: OptimizerName = OptimizerName.adamw
    lr: float = 6e-4
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
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
    min_lr: float = 6e-5
    """Final learning rate."""
    warmup_steps: int = 0
    """Linear warm-up from 0, optimizer steps."""
    warmup_tokens: int | None = None
    """Warm-up in tokens; null: warmup_steps counts."""
    decay_steps: int | None = None
    """wsd: steps of the final descent (null: 20 % of the run); cosine and linear: length (null: the run)."""


@dataclass
class ParallelConfig:
    """Layout: speed only, never results. data_parallel_size is what remains. Presets: conf/parallel/."""

    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor-parallel ranks (arXiv:2205.05198)."""
    pipeline_parallel_size: int = 1
    pipeline_schedule: PipelineSchedule = PipelineSchedule["1f1b"]
    expert_parallel_size: int = 1
    zero_stage: int = 1
    """0 nothing, 1 optimizer state, 2 gradients, 3 parameters are partitioned over data-parallel ranks."""
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
    recompute: Recompute = Recompute.none
    recompute_every: int = 1
    """recompute=full: every n-th block."""
    eval_every: int = 1000
    """Steps between evaluations; 0: only at the end."""
    eval_sequences: int = 1024
    """Sequences per validation dataset and evaluation; 0: all of it."""
    gc_every: int = 1000
    """Steps between Python garbage collections, on all ranks together; 0: leave it to Python."""


@dataclass
class CheckpointConfig:
    """Saving and resuming. Every checkpoint loads at any layout."""

    save_every: int = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep those whose step is a multiple; 0: none."""
    asynchronous: bool = True
    """Write in the background; training stops only for the copy to host memory."""
    resume: bool = True
    """Continue at the newest good checkpoint of runs/<name>."""
    init_from: str | None = None
    """Start weights: a checkpoint folder of another run or a Hugging Face folder; used when nothing is resumed."""


@dataclass
class TrackingConfig:
    """Logs and Weights & Biases. Presets: conf/tracking/."""

    log_every: int = 10
    """Steps between logged steps (the only ones that wait for the device)."""
    progress: bool = True
    """Progress bar with ETA when standard error is a terminal."""
    sample_hash: bool = False
    """Log a hash of the sample ids of each logged step."""
    peak_tflops: float | None = None
    """Datasheet TFLOP/s of one device for MFU; null: from the table in flops.py."""
    wandb: WandbMode = WandbMode.auto
    project: str = "pretrain"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class ResilienceConfig:
    """What happens when something breaks."""

    hang_timeout_s: float = 600.0
    """Seconds without progress of a rank before the job reports and ends; 0: wait for ever."""
    collective_timeout_s: float = 1800.0
    """Seconds a collective may take before torch.distributed gives up."""
    max_bad_steps: int = 5
    """Steps in a row with NaN or Inf before training ends; each is skipped and counted."""
    on_spike: OnSpike = OnSpike.none
    spike_window: int = 128
    """Steps of loss history that define normal."""
    spike_sigmas: float = 8.0
    """Robust standard deviations above the median that make a spike."""
    straggler_every: int = 100
    """Steps between reports of the slowest rank; 0: never."""
    straggler_ratio: float = 1.3
    """A rank this much slower than the median, in three reports in a row, is named in a warning."""


@dataclass
class PretrainConfig:
    """The root of conf/pretrain.yaml."""

    name: str = MISSING
    """Run name; the run lives in <runs_dir>/<name>."""
    runs_dir: str = "runs"
    seed: int = 1234
    """Seeds weights, data order and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
