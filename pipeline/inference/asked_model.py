"""What a command is asked that only asks a model: typed settings, their nulls from the checkpoint.

checkpoint, data, layout  --evaluation_of-->  Evaluation, the folder with the weights
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import log
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import attachment, read_record
from pipeline.config.choices import Precision
from pipeline.config.data import DataConfig
from pipeline.config.evaluation import Evaluation
from pipeline.config.model import ModelConfig
from pipeline.config.training import ParallelConfig, TrainingConfig
from pipeline.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from pipeline.config.run_shape import ForwardShape
    from pipeline.data.datasets import DataSummary
    from pipeline.data.tokenizer import Tokenizer
    from pipeline.distributed.layout import ParallelLayout
    from pipeline.engine.forward_only import ForwardOnly


CACHE_DIR = "runs/evaluate/cache"
"""Local folder for remote shards where data.cache_dir names none."""


@dataclass
class AskedConfig:
    """The settings that such commands have in common."""

    checkpoint: str = "???"
    """A run folder (its newest checkpoint), one checkpoint, or a Hugging Face folder."""
    sequences: int = 0
    """Sequences of each dataset, from its first one on; 0: all of them."""
    seq_len: int | None = None
    """Tokens per sequence; null: what the model was trained with."""
    micro_batch_size: int = 8
    """Sequences per data-parallel rank per forward pass."""
    precision: Precision | None = None
    """Arithmetic; null: what the model was trained with (fp32 for a Hugging Face folder)."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read: data.validation, or the held-out data of the run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Sizes and sequence_parallel count; what concerns training alone does not."""


def evaluation_of(cfg: AskedConfig) -> tuple[Evaluation, Path, DataSummary]:
    """What is asked, its nulls filled from the checkpoint; the folder with the weights; the data.

    Raises:
        ConfigError: no held-out data are named, or settings would have no effect.
        DataError: the data are missing, or their tokenizer is another than the weights'.
    """
    from pipeline.data.datasets import describe, follow_data
    from pipeline.training.startup import check_same_tokenizer

    model, path, training, run_data = model_of(Path(cfg.checkpoint))
    lengths = (cfg.seq_len, training.seq_len, model.max_seq_len)
    data = held_out_data(cfg, run_data)
    summary = describe(data)
    data = follow_data(data, summary)
    say_if_masks_differ(data, run_data)
    check_same_tokenizer(summary, path)
    evaluation = Evaluation(
        model=model,
        data=data,
        parallel=cfg.parallel,
        precision=cfg.precision or training.precision,
        seq_len=next(length for length in lengths if length is not None),
        micro_batch_size=cfg.micro_batch_size,
        sequences=cfg.sequences,
    )
    return evaluation, path, summary


def held_out_data(cfg: AskedConfig, run_data: DataConfig | None) -> DataConfig:
    """The data that were named, or else the held-out ones of the run, masks and all; never others.

    `train` is the same: whose tokenizer and sizes count.
    """
    data, caches = cfg.data, ("cache_dir", "cache_size_gib")
    if not data.validation and run_data is not None:
        plain = DataConfig()
        typed = [f.name for f in fields(data) if getattr(data, f.name) != getattr(plain, f.name)]
        if lost := [f"data.{name}" for name in typed if name not in caches]:
            raise ConfigError(
                f"{', '.join(lost)} would have no effect: no held-out data are named, and those "
                f"of {cfg.checkpoint} are read as the run reads them. Name the data too: "
                "data.path=OUT or data.validation."
            )
        # Older runs could give held-out data a share, which had no effect and now is refused.
        held_out = [replace(d, weight=None, max_epochs=None) for d in run_data.validation or []]
        ours = {name: getattr(data, name) for name in caches}
        data = replace(run_data, validation=held_out, **ours)
    if not data.validation:
        raise ConfigError(
            f"nothing to evaluate: {cfg.checkpoint} names no held-out data. "
            "Set data.path=OUT (its validation split), or list data.validation."
        )
    return replace(data, train=data.validation)


def say_if_masks_differ(data: DataConfig, run_data: DataConfig | None) -> None:
    """Warn where a run of masked documents reads others without masks.

    Args:
        data: as they are read; packed rows are masked whatever was typed.
        run_data: of the run; None: there is none.
    """
    if run_data is not None and run_data.mask_documents and not data.mask_documents:
        log.logger.warning(
            "the run attends inside documents only, this evaluation across them: set "
            "data.mask_documents=true data.reset_positions=%s to score it as it was trained",
            str(run_data.reset_positions).lower(),
        )


def model_of(path: Path) -> tuple[ModelConfig, Path, TrainingConfig, DataConfig | None]:
    """Architecture, folder of the weights, and of a run its training and data settings."""
    if (path / "config.json").is_file():
        from pipeline.huggingface.settings import read_model_config

        return read_model_config(path), path, TrainingConfig(precision=Precision.fp32), None
    path = folders.find(path)
    record = read_record(path)
    return record.model(), path, record.training(), record.data()


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint or a Hugging Face folder, `path` of `model_of`.

    Raises:
        CheckpointError: it has none.
    """
    from pipeline.data.tokenizer import Tokenizer

    raw = attachment(path, "tokenizer.json")
    if raw is None:
        raise CheckpointError(f"{path} has no tokenizer.json: texts cannot be read by its model.")
    is_ours = not (path / "config.json").is_file()
    # Which token ends documents matters to nobody here; id 0 spares the guess, which may fail.
    eod = read_record(path).eod if is_ours else 0
    return Tokenizer(raw, path=str(path / "tokenizer.json"), eod=0 if eod is None else eod)


def open_asked_model(
    evaluation: Evaluation, shape: ForwardShape, layout: ParallelLayout, *, path: Path
) -> tuple[ForwardOnly, Path]:
    """The model of an evaluation with its weights, and the folder they were read from.

    Collective: call on every rank.
    """
    from pipeline.engine.forward_only import ForwardOnly
    from pipeline.model.architecture import Architecture
    from pipeline.model.stage_io import StageSchema
    from pipeline.training.initial_weights import load_weights

    architecture = Architecture(
        evaluation.model,
        evaluation.parallel,
        evaluation.precision,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.padded_vocab_size,
    )
    schema = StageSchema.of(evaluation.data, evaluation.parallel, evaluation.model)
    model = ForwardOnly(architecture, schema, layout, seq_len=shape.seq_len)
    return model, load_weights(model, path)
