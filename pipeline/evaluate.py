"""Loss, perplexity and bits per byte of a checkpoint on shard datasets, at any layout.

    python -m pipeline.evaluate runs/NAME data.path=OUT                       the run's newest checkpoint, one process
    python -m pipeline.evaluate runs/NAME/checkpoints/step-00001000 'data.validation=[{path: A}, {path: B}]'
    torchrun --nproc-per-node 4 -m pipeline.evaluate runs/NAME parallel.tensor_parallel_size=4

    validation_batches -> engine.evaluate -> (nats, tokens); bytes of the labels -> EvalResult per dataset

The trainer evaluates with the same Evaluator. Hugging Face folders are evaluated too: checkpoint=FOLDER.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import checkpoint_folder as folders
from pipeline import cli, log
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PipelineSchedule,
    Precision,
    PretrainConfig,
    ScheduleConfig,
    TrainingConfig,
)
from pipeline.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from pipeline.data.facts import Dataset
    from pipeline.engine import Engine
    from pipeline.run_shape import RunShape

# Micro-batches of one call of the engine: a pipeline's start and end cost little, a sign of life comes often.
MICRO_BATCHES = 16


@dataclass(frozen=True)
class EvalResult:
    """What a model makes of one held-out dataset."""

    loss: float
    """Mean cross entropy, nats per token."""
    ppl: float
    """exp(loss); depends on the tokenizer."""
    bits_per_byte: float
    """Cross entropy of all tokens in bits, over the UTF-8 bytes they stand for; comparable between tokenizers."""
    tokens: int
    """Labels that were scored."""


class Evaluator:
    """Scores an engine's model on the validation datasets of a config."""

    def __init__(self, cfg: PretrainConfig, *, run: RunShape, engine: Engine) -> None:
        """Open the datasets.

        Raises:
            DataError: a dataset is missing or damaged.
        """
        import torch

        from pipeline.data.facts import open_datasets
        from pipeline.data.tokenizer import Tokenizer

        self.cfg, self.run_shape, self.engine = cfg, run, engine
        cache_dir = Path(cfg.data.cache_dir or Path(cfg.runs_dir) / cfg.name / "cache")
        self.datasets = (
            open_datasets(cfg.data.validation, cfg=cfg.data, cache_dir=cache_dir) if cfg.data.validation else []
        )
        self._bytes_of: torch.Tensor | None = None
        if self.datasets:
            lengths = Tokenizer.from_file(self.datasets[0].tokenizer_path).token_byte_lengths()
            # Ids between the tokenizer's vocabulary and the model's stand for nothing.
            padded = torch.zeros(max(run.vocab_size, len(lengths)), dtype=torch.int64)
            padded[: len(lengths)] = torch.from_numpy(lengths)
            self._bytes_of = padded.to(engine.layout.device)

    def run(self, *, alive: Callable[[], None] = lambda: None) -> dict[str, EvalResult]:
        """Dataset name to result, the same on every rank. Collective.

        Args:
            alive: called between batches.
        """
        return {dataset.name: self._score(dataset, alive) for dataset in self.datasets}

    def _score(self, dataset: Dataset, alive: Callable[[], None]) -> EvalResult:
        import torch
        import torch.distributed as dist

        assert self._bytes_of is not None
        layout = self.engine.layout
        totals = torch.zeros(3, dtype=torch.float64, device=layout.device)  # nats, tokens; bytes of this rank's labels
        batches = self._batches(dataset)
        while group := list(islice(batches, MICRO_BATCHES)):
            nats, tokens = self.engine.evaluate(group)
            size = sum((self._bytes_of[batch.labels] * batch.loss_mask).sum(dtype=torch.float64) for batch in group)
            totals += torch.stack([nats.double(), tokens.double(), torch.as_tensor(size, device=layout.device)])
            alive()
        size_bytes = totals[2].clone()
        dist.all_reduce(size_bytes, group=layout.data_group)
        nats_total, token_total, byte_total = float(totals[0]), float(totals[1]), float(size_bytes)
        loss = nats_total / token_total
        ppl = math.exp(loss) if loss < 700 else math.inf
        return EvalResult(
            loss, ppl, nats_total / math.log(2) / byte_total if byte_total else math.nan, round(token_total)
        )

    def _batches(self, dataset: Dataset) -> Iterator[Any]:
        from pipeline.data.loader import Masks, validation_batches

        layout = self.engine.layout
        return validation_batches(
            dataset, seq_len=self.run_shape.seq_len, micro_batch_size=self.run_shape.micro_batch_size,
            data_rank=layout.data_rank, data_parallel_size=layout.data_parallel_size,
            num_sequences=self.cfg.training.eval_sequences, device=layout.device, masks=Masks.of(self.cfg.data),
        )  # fmt: skip


# ---- command line -----------------------------------------------------------------------------------------------


@dataclass
class EvaluateConfig:
    """Evaluate a checkpoint."""

    checkpoint: str = "???"
    """A run folder (its newest checkpoint), one checkpoint, or a Hugging Face folder."""
    output: str | None = None
    """Also write the results here, as JSON."""
    sequences: int = 0
    """Sequences per dataset; 0: all of it."""
    seq_len: int | None = None
    """Tokens per sequence; null: what the model was trained with."""
    micro_batch_size: int = 8
    """Sequences per data-parallel rank per forward pass."""
    precision: Precision | None = None
    """Arithmetic; null: what the model was trained with (fp32 for a Hugging Face folder)."""
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def main(cfg: EvaluateConfig) -> int:
    """Build the model on this layout, load the weights, score every dataset."""
    from pipeline.data.facts import describe
    from pipeline.distributed import ranks_from_environment
    from pipeline.run_shape import derive

    ranks = ranks_from_environment()
    log.setup(global_rank=ranks.global_rank)
    if not cfg.data.validation:
        raise ConfigError("nothing to evaluate: set data.path=OUT (its validation split), or list data.validation.")
    cfg.data.train = cfg.data.validation  # whose tokenizer and sizes count
    pretrain, path = _training_config(cfg, ranks.world_size)
    run = derive(pretrain, world_size=ranks.world_size, tokenizer_vocab_size=describe(cfg.data).vocab_size)

    from pipeline import distributed  # from here on torch is needed

    parallel = cfg.parallel
    layout = distributed.connect(
        ranks,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
    )
    from pipeline.checkpoint import Checkpointer
    from pipeline.engine import Engine

    engine = Engine(pretrain, run, layout)
    path = Checkpointer(CheckpointConfig(), folder=path, layout=layout).load_weights(engine, path)
    results = Evaluator(pretrain, run=run, engine=engine).run()
    if ranks.is_main:
        _report(path, results, cfg.output)
    distributed.disconnect()
    return 0


def _training_config(cfg: EvaluateConfig, world_size: int) -> tuple[PretrainConfig, Path]:
    """A one-step training run of the checkpoint's model, for engine and shapes; and the folder with the weights."""
    model, path, training = _model(Path(cfg.checkpoint))
    parallel = replace(cfg.parallel, pipeline_schedule=PipelineSchedule["1f1b"])  # nothing runs backwards
    copies = max(1, world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size))
    stages = 2 * parallel.pipeline_parallel_size  # enough micro-batches for every schedule
    return PretrainConfig(
        name="evaluate",
        model=replace(model, hidden_dropout=0.0, attention_dropout=0.0),
        data=cfg.data,
        parallel=parallel,
        schedule=ScheduleConfig(min_lr=0.0),
        training=TrainingConfig(
            total_steps=1,
            seq_len=cfg.seq_len or training.get("seq_len"),
            global_batch_size=cfg.micro_batch_size * copies * stages,
            micro_batch_size=cfg.micro_batch_size,
            precision=cfg.precision or Precision[training.get("precision", "fp32")],
            eval_sequences=cfg.sequences,
        ),
    ), path


def _model(path: Path) -> tuple[ModelConfig, Path, dict[str, Any]]:
    if (path / "config.json").is_file():
        from pipeline.hf_import import read_model_config

        return read_model_config(path), path, {}
    path = folders.find(path)
    record = folders.read_record(path)
    return folders.saved_model(record), path, record["config"]["training"]


def _report(path: Path, results: dict[str, EvalResult], output: str | None) -> None:
    print(f"checkpoint: {path}")
    print(f"{'loss':>8}  {'perplexity':>11}  {'bits/byte':>9}  {'tokens':>14}  dataset")
    for name, result in results.items():
        print(f"{result.loss:8.4f}  {result.ppl:11.4f}  {result.bits_per_byte:9.4f}  {result.tokens:14,}  {name}")
    if output is not None:
        document = {"checkpoint": str(path), "results": {name: asdict(result) for name, result in results.items()}}
        try:
            Path(output).write_text(json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise CheckpointError(f"{output} cannot be written: {error.strerror}.") from error


if __name__ == "__main__":
    cli.run(main, EvaluateConfig, config="evaluate", positional=("checkpoint",))
