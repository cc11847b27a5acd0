"""Settings of running a job: checkpoints, tracking, and what happens when something breaks."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config.choices import OnSpike, WandbMode, XAxis


@dataclass
class CheckpointConfig:
    """Saving and resuming. Every checkpoint loads at any layout."""

    save_every: int = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep those whose step is a multiple; 0: none."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest held-out loss, the mean over data.validation: an
    evaluation that beats it saves one. checkpoints/best names it.
    """
    asynchronous: bool = True
    """Write in the background; training stops only for the copy to host memory."""
    resume: bool = True
    """Continue at the newest good checkpoint of runs/<name>, or of fallback_dir."""
    fallback_dir: str | None = None
    """Folder on another disk, seen by every rank, for checkpoints that runs/<name> does not take:
    <fallback_dir>/<name>/checkpoints; null: none.
    """
    max_failed_saves: int = 3
    """Saves in a row that may fail, each tried several times and in both places; then training
    ends.
    """
    init_from: str | None = None
    """Start weights: a checkpoint folder of another run or a Hugging Face folder; used when nothing
    is resumed.
    """
    init_tower: str | None = None
    """Start of the picture encoder (model.vision): a local folder of a SigLIP model or vision
    tower; everything else begins as without it. Used when nothing is resumed.
    """
    upcycle: bool = False
    """init_from is a dense model: each expert begins as a copy of its MLP, the routers at random.
    """
    init_adapter: str | None = None
    """Start of the low-rank matrices (finetune=lora): a folder of peft, or of pipeline.export
    adapter=true, whose base is init_from; null: A random and B 0. Used when nothing is resumed.
    """


@dataclass
class TrackingConfig:
    """Logs, Weights & Biases, TensorBoard. Presets: conf/tracking/."""

    log_every: int = 10
    """Steps between logged steps (the only ones that wait for the device)."""
    progress: bool = True
    """Progress bar with ETA when standard error is a terminal."""
    sample_hash: bool = False
    """Log a hash of the sample ids of each logged step."""
    peak_tflops: float | None = None
    """Datasheet TFLOP/s of one device for MFU; null: from the table in flops.py."""
    wandb: WandbMode = WandbMode.auto
    """Weights & Biases; auto: online where WANDB_API_KEY is set, offline elsewhere."""
    project: str = "pretrain"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null: W&B's default."""
    group: str | None = None
    """W&B group, for runs that belong together."""
    tags: list[str] = field(default_factory=list)
    """W&B tags, by which its pages filter runs."""
    tensorboard: bool = False
    """Also write for TensorBoard, to runs/<name>/tensorboard; needs the extra tensorboard."""
    x_axis: XAxis = XAxis.step
    """What W&B draws over unless a chart says otherwise, and TensorBoard calls a step."""


@dataclass
class ResilienceConfig:
    """What happens when something breaks."""

    hang_timeout_s: float = 600.0
    """Seconds without progress of a rank before the job reports and ends; 0: wait for ever."""
    collective_timeout_s: float = 1800.0
    """Seconds a collective may take before torch.distributed gives up; between devices, once a step
    is done, 1.5 times hang_timeout_s if that is less: the watchdog's page comes first.
    """
    max_bad_steps: int = 5
    """Steps in a row with NaN or Inf before training ends; each is skipped and counted."""
    on_spike: OnSpike = OnSpike.none
    """A loss far above what is normal is let be, its step skipped, or the run rolled back."""
    spike_window: int = 128
    """Steps of loss history that define normal."""
    spike_sigmas: float = 8.0
    """Robust standard deviations above the median that make a spike."""
    straggler_every: int = 100
    """Steps between reports of the slowest rank; 0: never."""
    straggler_ratio: float = 1.3
    """A rank this much slower than the median, in three reports in a row, is named in a warning."""
