"""Loss, perplexity and bits per byte on held-out datasets, at any layout.

    validation_batches -> engine.evaluate -> (nats, tokens); bytes of the labels -> EvalResult per dataset

The trainer and `python -m pipeline.evaluate` score alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.pretrain import PretrainConfig

if TYPE_CHECKING:
    from pipeline.config.run_shape import RunShape
    from pipeline.data.datasets import Dataset
    from pipeline.engine.engine import Engine

# Micro-batches of one call of the engine: a pipeline's start and end cost little, a sign of life
# comes often.
MICRO_BATCHES = 16


@dataclass(frozen=True)
class EvalResult:
    """What a model makes of one held-out dataset."""

    loss: float
    """Mean cross entropy, nats per token."""
    ppl: float
    """exp(loss); depends on the tokenizer."""
    bits_per_byte: float
    """Cross entropy of all tokens in bits, over the UTF-8 bytes they stand for; comparable between
    tokenizers.
    """
    tokens: int
    """Labels that were scored."""


class Evaluator:
    """Scores an engine's model on the validation datasets of a config."""

    def __init__(self, cfg: PretrainConfig, *, shape: RunShape, engine: Engine) -> None:
        """Open the datasets.

        Raises:
            DataError: a dataset is missing or damaged.
        """
        import torch

        from pipeline.data.datasets import open_datasets
        from pipeline.data.tokenizer import Tokenizer

        self.cfg, self.run_shape, self.engine = cfg, shape, engine
        cache_dir = Path(cfg.data.cache_dir or Path(cfg.runs_dir) / cfg.name / "cache")
        self.datasets = (
            open_datasets(cfg.data.validation, cfg=cfg.data, cache_dir=cache_dir)
            if cfg.data.validation
            else []
        )
        self._bytes_of: torch.Tensor | None = None
        if self.datasets:
            lengths = Tokenizer.from_file(self.datasets[0].tokenizer_path).token_byte_lengths()
            # Ids between the tokenizer's vocabulary and the model's stand for nothing.
            padded = torch.zeros(max(shape.vocab_size, len(lengths)), dtype=torch.int64)
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
        totals = torch.zeros(
            3, dtype=torch.float64, device=layout.device
        )  # nats, tokens; bytes of this rank's labels
        batches = self._batches(dataset)
        while group := list(islice(batches, MICRO_BATCHES)):
            nats, tokens = self.engine.evaluate(group)
            size = sum(
                (self._bytes_of[batch.labels] * batch.loss_mask).sum(dtype=torch.float64)
                for batch in group
            )
            totals += torch.stack(
                [nats.double(), tokens.double(), torch.as_tensor(size, device=layout.device)]
            )
            alive()
        size_bytes = totals[2].clone()
        dist.all_reduce(size_bytes, group=layout.data.group)
        nats_total, token_total, byte_total = float(totals[0]), float(totals[1]), float(size_bytes)
        loss = nats_total / token_total
        ppl = math.exp(loss) if loss < 700 else math.inf
        return EvalResult(
            loss,
            ppl,
            nats_total / math.log(2) / byte_total if byte_total else math.nan,
            round(token_total),
        )

    def _batches(self, dataset: Dataset) -> Iterator[Any]:
        from pipeline.data.batch import Masks
        from pipeline.data.validation import validation_batches

        layout = self.engine.layout
        return validation_batches(
            dataset, seq_len=self.run_shape.seq_len, micro_batch_size=self.run_shape.micro_batch_size,
            data_rank=layout.data.rank, data_parallel_size=layout.data.size,
            num_sequences=self.cfg.training.eval_sequences, device=layout.device, masks=Masks.of(self.cfg.data),
        )  # fmt: skip
