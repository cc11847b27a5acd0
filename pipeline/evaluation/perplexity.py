"""Loss, perplexity and bits per byte on held-out datasets, at any layout.

    validation_batches -> engine.evaluate -> Scores
    with the bytes of the labels          -> EvalResult of each dataset

The trainer and `python -m pipeline.evaluate` score alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from pipeline.config.data import DataConfig
    from pipeline.config.run_shape import ForwardShape
    from pipeline.data.batch import Batch
    from pipeline.data.datasets import Dataset
    from pipeline.distributed.layout import ParallelLayout
    from pipeline.engine.forward_only import Scores

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
    exact: float | None = None
    """Of dialogues: answers that greedy decoding would give word for word, percent."""
    answers: int = 0
    """Answers that were scored."""
    wrong_pictures_loss: float | None = None
    """`loss` where each row is shown the pictures of the row before: what looking is worth is the
    difference. None: nobody asked, or there are no pictures, or one row of them.
    """


class LabelBytes:
    """UTF-8 bytes of the text that labels of one dataset stand for.

    By id where the tokenizer's ids give them exactly; elsewhere each label counts the dataset's
    mean, bytes of the text that was prepared over tokens: exact for all of a dataset.
    """

    def __init__(self, dataset: Dataset, *, vocab_size: int, device: torch.device) -> None:
        """Read the dataset's tokenizer.

        Args:
            dataset: its manifest says which token ends documents, and how long its text is.
            vocab_size: of the model; ids between the tokenizer's vocabulary and it stand for
                nothing.
            device: of the batches.
        """
        import torch

        from pipeline.data.tokenizer import Tokenizer

        manifest = dataset.manifest
        self.eod = manifest.tokenizer.eod
        tokenizer = Tokenizer.from_file(dataset.tokenizer_path, eod=self.eod)
        size = max(vocab_size, tokenizer.vocab_size)
        # (2, size): as the first token of a document, and later
        table = torch.zeros(2, size, dtype=torch.float64)
        if tokenizer.has_exact_bytes:
            for row, at_start in enumerate((True, False)):
                lengths = tokenizer.token_byte_lengths(at_start=at_start)
                table[row, : len(lengths)] = torch.from_numpy(lengths)
        else:
            table[:] = manifest.text_bytes / max(manifest.tokens, 1)
        self._table = table.to(device)

    def count(self, batch: Batch) -> torch.Tensor:
        """Bytes of a micro-batch's labels that count, fp64, 0-dim."""
        later = (batch.tokens != self.eod).long()
        sizes = self._table[later, batch.labels]
        return (sizes if batch.loss_mask is None else sizes * batch.loss_mask).sum()


def with_wrong_pictures(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The micro-batches, each row with the pictures of the row before it.

    The first row gets those of the last row of its micro-batch.
    """
    import torch

    last = None
    for batch in batches:
        assert batch.images is not None, "a dataset with pictures gives them to every batch"
        before = batch.images[-1:] if last is None else last
        last = batch.images[-1:]
        yield replace(batch, images=torch.cat([before, batch.images[:-1]]))


def _has_other_pictures(dataset: Dataset) -> bool:
    """Whether a row can be shown those of another one."""
    row_tokens = dataset.manifest.row_tokens or 0
    return dataset.manifest.pictures is not None and int(dataset.manifest.tokens) > row_tokens


class Scorer(Protocol):
    """An engine that trains, or a model that is only asked (engine/forward_only.py)."""

    layout: ParallelLayout

    def evaluate(self, batches: list[Batch], *, answers: bool = False) -> Scores:
        """What these batches' unmasked tokens add up to; `answers`: their answers too."""


class Evaluator:
    """Scores an engine's model on held-out datasets."""

    def __init__(
        self,
        data: DataConfig,
        *,
        shape: ForwardShape,
        engine: Scorer,
        sequences: int,
        cache_dir: Path,
        wrong_pictures: bool = False,
    ) -> None:
        """Open the datasets.

        Args:
            data: what is held out, and how it is masked.
            sequences: per dataset and evaluation; 0: all of it.
            cache_dir: for shards that are not local.
            wrong_pictures: score datasets with pictures a second time, with wrong ones.

        Raises:
            DataError: a dataset is missing or damaged.
        """
        from pipeline.data.datasets import open_datasets

        self.data, self.shape, self.engine = data, shape, engine
        self.sequences, self.wrong_pictures = sequences, wrong_pictures
        held_out = data.validation
        self.datasets = open_datasets(held_out, cfg=data, cache_dir=cache_dir) if held_out else []
        self._label_bytes = [
            LabelBytes(dataset, vocab_size=shape.vocab_size, device=engine.layout.device)
            for dataset in self.datasets
        ]

    def run(self, *, alive: Callable[[], None] = lambda: None) -> dict[str, EvalResult]:
        """Dataset name to result, the same on every rank. Collective.

        Args:
            alive: called between batches.
        """
        return {
            dataset.name: self._score(dataset, label_bytes, alive)
            for dataset, label_bytes in zip(self.datasets, self._label_bytes, strict=True)
        }

    def _score(
        self, dataset: Dataset, label_bytes: LabelBytes, alive: Callable[[], None]
    ) -> EvalResult:
        """What the model makes of one dataset. Collective: call on every rank."""
        import torch.distributed as dist

        totals = self._totals(self._batches(dataset), dataset, label_bytes, alive)
        wrong = None
        if self.wrong_pictures and _has_other_pictures(dataset):
            batches = with_wrong_pictures(self._batches(dataset))
            nats, tokens = self._totals(batches, dataset, label_bytes, alive)[:2].tolist()
            wrong = nats / tokens
        size_bytes = totals[4].clone()
        dist.all_reduce(size_bytes, group=self.engine.layout.data.group)
        nats, tokens, exact, answers = totals[:4].tolist()
        loss, num_bytes = nats / tokens, float(size_bytes)
        return EvalResult(
            loss=loss,
            ppl=math.exp(loss) if loss < 700 else math.inf,
            bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else math.nan,
            tokens=round(tokens),
            exact=100 * exact / answers if answers else None,
            answers=round(answers),
            wrong_pictures_loss=wrong,
        )

    def _totals(
        self,
        batches: Iterator[Any],
        dataset: Dataset,
        label_bytes: LabelBytes,
        alive: Callable[[], None],
    ) -> torch.Tensor:
        """(5,) fp64: nats, tokens, exact answers, answers; bytes of this rank's labels."""
        import torch

        totals = torch.zeros(5, dtype=torch.float64, device=self.engine.layout.device)
        while group := list(islice(batches, MICRO_BATCHES)):
            scores = self.engine.evaluate(group, answers=dataset.is_packed)
            size = sum(label_bytes.count(batch) for batch in group)
            sums = [scores.nats, scores.tokens, scores.exact, scores.answers]
            totals += torch.stack([*(s.double() for s in sums), torch.as_tensor(size).to(totals)])
            alive()
        return totals

    def _batches(self, dataset: Dataset) -> Iterator[Any]:
        """This rank's share of a dataset's held-out windows."""
        from pipeline.data.validation import validation_batches

        layout = self.engine.layout
        return validation_batches(
            dataset,
            seq_len=self.shape.seq_len,
            micro_batch_size=self.shape.micro_batch_size,
            data_rank=layout.data.rank,
            data_parallel_size=layout.data.size,
            num_sequences=self.sequences,
            device=layout.device,
            cfg=self.data,
        )
