"""Settings of what is read and how. Presets: conf/data/."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from pipeline.config.choices import OnCorrupt


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
    """Output folder of data_prep/tokenize.py, whose two splits are read; null: train names all."""
    train: list[DatasetConfig] = field(default_factory=list)
    """The training mixture; empty: the split `train` of data.path."""
    validation: list[DatasetConfig] | None = None
    """Held-out datasets, evaluated one by one; []: no evaluation; null: the split `validation` of
    data.path, or none where that is null.
    """
    temperature: float = 1.0
    """Weights are raised to 1/temperature before they are normalised; above 1 flattens the
    mixture.
    """
    blend_schedule: list[BlendStage] = field(default_factory=list)
    """Later weights of the mixture, in order of start_step; empty: they stay."""
    lanes: int = 1
    """Independent shard streams; a power of two near the number of nodes keeps a remote shard on
    one node.
    """
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
    """A sample that cannot be read ends the run (fail), or is left out and counted (skip)."""
    cache_dir: str | None = None
    """Local folder for remote shards; null: runs/<name>/cache."""
    cache_size_gib: float = 64.0
    """Upper bound of cache_dir on each node, GiB."""
    allow_dataset_change: bool = False
    """Resume although the datasets differ from those in the checkpoint."""

    def __post_init__(self) -> None:
        """Name the splits of data.path, so that a run's config.yaml says what is read."""
        if self.path is not None and not self.train:
            self.train = [DatasetConfig(path=f"{self.path}/train")]
        if self.validation is None:
            held_out = [] if self.path is None else [f"{self.path}/validation"]
            self.validation = [DatasetConfig(path=path) for path in held_out]
