"""Loss, perplexity and bits per byte of a checkpoint on shard datasets, at any layout.

    python -m pipeline.evaluate runs/NAME                      newest checkpoint, on the run's data
    python -m pipeline.evaluate runs/NAME/checkpoints/step-00001000 'data.validation=[{path: A}]'
    torchrun --nproc-per-node 4 -m pipeline.evaluate runs/NAME parallel.tensor_parallel_size=4

Of dialogues also how many answers greedy decoding would give word for word; of pictures also the
loss with wrong ones. The trainer evaluates with the same Evaluator. Hugging Face folders are
evaluated too: checkpoint=FOLDER.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import cli, log
from pipeline.evaluation.perplexity import EvalResult, Evaluator
from pipeline.files import check_writable, write_durably
from pipeline.inference.asked_model import (
    CACHE_DIR,
    AskedConfig,
    evaluation_of,
    open_asked_model,
)
from pipeline.tracking.afterwards import run_of

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset


# ---- command line --------------------------------------------------------------------------------


@dataclass
class EvaluateConfig(AskedConfig):
    """Evaluate a checkpoint."""

    output: str | None = None
    """Also write the results here, as JSON."""
    track: bool = False
    """Also tell the trackers of the checkpoint's run: its summary gets evaluation/DATASET/..."""


def main(cfg: EvaluateConfig) -> int:
    """Build the model on this layout, load the weights, score every dataset."""
    from pipeline.config.run_shape import derive_evaluation
    from pipeline.distributed.ranks import ranks_from_environment

    ranks = ranks_from_environment()
    log.setup(global_rank=ranks.global_rank)
    if cfg.output is not None:  # hours of scoring come before it is written
        check_writable(Path(cfg.output), "output=")
    run = run_of(Path(cfg.checkpoint)) if cfg.track else None
    evaluation, path, data = evaluation_of(cfg)
    shape = derive_evaluation(
        evaluation,
        world_size=ranks.world_size,
        tokenizer_vocab_size=data.vocab_size,
        row_tokens=data.row_tokens,
        pictures=data.row_pictures,
    )
    for dataset in data.train:
        log.logger.info("evaluating on %s", _described(dataset, shape.seq_len, cfg.sequences))

    from pipeline.distributed.layout import connect, disconnect  # from here on torch is needed

    layout = connect(ranks, shape.sizes)
    model, path = open_asked_model(evaluation, shape, layout, path=path)
    evaluator = Evaluator(
        evaluation.data,
        shape=shape,
        engine=model,
        sequences=evaluation.sequences,
        cache_dir=Path(evaluation.data.cache_dir or CACHE_DIR),
        wrong_pictures=True,
    )
    results = evaluator.run()
    if ranks.is_main:
        _report(path, results, cfg.output)
        if run is not None:
            run.tell(lambda tracker, at: tracker.summarize(at, _summary(results)))
    disconnect()
    return 0


def _summary(results: Mapping[str, EvalResult]) -> dict[str, float]:
    """The scores by the names of a run's summary."""
    keys = ("loss", "ppl", "bits_per_byte", "exact", "tokens", "wrong_pictures_loss")
    return {
        f"evaluation/{name}/{key}": float(value)
        for name, result in results.items()
        for key in keys
        if (value := getattr(result, key)) is not None
    }


def _described(dataset: Dataset, seq_len: int, limit: int) -> str:
    """Path, tokenizer, and how much of a dataset is read; the last sequence of a shard is short."""
    from pipeline.data.order import num_windows

    windows = num_windows(dataset.shard_tokens, seq_len, packed=dataset.is_packed)
    sequences = int(windows.sum())
    part = f"{min(limit or sequences, sequences):,} of {sequences:,} sequences of {seq_len}"
    sha256 = dataset.manifest.tokenizer.sha256[:12]
    return f"{dataset.path}: {part}, {int(dataset.manifest.tokens):,} tokens, tokenizer {sha256}"


def _report(path: Path, results: dict[str, EvalResult], output: str | None) -> None:
    """Print a table of the results, and write them to `output` where one is given."""
    print(f"checkpoint: {path}")
    has_answers = any(result.exact is not None for result in results.values())
    exact = f"{'exact':>6}  {'answers':>9}  " if has_answers else ""
    print(f"{'loss':>8}  {'perplexity':>11}  {'bits/byte':>9}  {'tokens':>14}  {exact}dataset")
    for name, result in results.items():
        if has_answers:
            share = "" if result.exact is None else f"{result.exact:.1f} %"
            exact = f"{share:>6}  {result.answers:9,}  "
        print(
            f"{result.loss:8.4f}  {result.ppl:11.4f}  {result.bits_per_byte:9.4f}  "
            f"{result.tokens:14,}  {exact}{name}"
        )
    for name, result in results.items():
        if result.wrong_pictures_loss is not None:
            right, wrong = (x / math.log(2) for x in (result.loss, result.wrong_pictures_loss))
            print(
                f"{name}: {right:.2f} bits per token with the right pictures, {wrong:.2f} with "
                "those of another row"
            )
    if output is not None:
        document = {
            "checkpoint": str(path),
            "results": {name: asdict(result) for name, result in results.items()},
        }
        write_durably(Path(output), (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    cli.run(main, EvaluateConfig, config="evaluate", positional=("checkpoint",))
