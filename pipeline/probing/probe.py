"""All that a request asks for, of a model at a layout.

    Request, ForwardOnly -> batches -> measures, interventions -> findings

Findings are plain values; docs/probing.md says what each of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.config.run_shape import ForwardShape
from pipeline.data.batch import Batch
from pipeline.errors import ConfigError
from pipeline.log import logger
from pipeline.probing.interventions import Patching, ablate
from pipeline.probing.measures import Measures
from pipeline.probing.request import Request
from pipeline.probing.tuned_lens import TunedLens

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset
    from pipeline.engine.forward_only import ForwardOnly

Findings = dict[str, Any]
CURVES = ("lens_loss", "entropy", "sink")
"""Means that the curve over checkpoints has, beside the kinds of heads."""
LENS_BATCH = 32
"""Sequences of a step of the tuned lens."""
SHOWN = 64
"""First tokens of a text whose attention and lens are shown."""


def probe(
    model: ForwardOnly,
    request: Request,
    *,
    shape: ForwardShape,
    earlier: Sequence[tuple[int, Callable[[], Any]]] = (),
    alive: Callable[[], None] = lambda: None,
) -> Findings:
    """Everything that was asked for, the same on every rank. Collective: call on every rank.

    Args:
        earlier: (step, what loads its weights into the model), for the curve; they stay there.
        alive: called between forward passes.
    """
    tuned = None
    if request.lens is not None:
        tuned = _tuned_lens(model, request, request.lens, shape=shape, alive=alive)
    measures = Measures(model, tuned)
    prompt = request.prompt
    if prompt is None:
        batches = list(_held_out(model, request, shape))
        size = min(SHOWN, shape.seq_len)
        parts = model.schema.sequence_ranks  # which take equal parts
        shown = batches[0].beginning(rows=1, tokens=-(-size // parts) * parts)
    else:
        size = min(SHOWN, len(prompt))
        shown = measures.batch_of(_padded(prompt, shape), count=len(prompt))
        batches = [shown]
    ids = shown.tokens[0, :size].tolist()
    findings: Findings = {
        "layers": model.model.num_layers,
        "heads": model.model.num_attention_heads,
        "averages": measures.averages(batches, alive=alive),
        "kinds": measures.kinds(seq_len=request.longest),
        "text": {
            "ids": ids,
            "tokens": [request.tokenizer.decode([i]) for i in ids],
            **measures.view(shown, count=size),
        },
    }
    for lens in (findings["text"][name] for name in ("lens", "tuned") if name in findings["text"]):
        lens["tokens"] = [
            [[request.tokenizer.decode([i]) for i in place] for place in row] for row in lens["ids"]
        ]
    if request.ablates:
        findings["ablation"] = ablate(model, batches, alive=alive)
    if request.patching is not None:
        findings["patching"] = _patch(model, request, shape, shown, measures)
    if earlier:
        findings["curve"] = _curve(measures, batches, earlier, longest=request.longest)
    return findings


def _tuned_lens(
    model: ForwardOnly,
    request: Request,
    path: Path,
    *,
    shape: ForwardShape,
    alive: Callable[[], None],
) -> TunedLens:
    """The lens of a file, or one that is trained now and written there."""
    lens = TunedLens(model)
    if not request.lens_steps:
        lens.load(path)
        return lens
    history = lens.train(_unmeasured(model, request, shape), request.lens_steps, alive=alive)
    logger.info(
        f"tuned lens, nats from the model's own prediction: {history[0]:.4f} at first, "
        f"{history[-1]:.4f} in step {len(history)}"
    )
    lens.save(path)
    return lens


def _curve(
    measures: Measures,
    batches: Sequence[Batch],
    earlier: Sequence[tuple[int, Callable[[], Any]]],
    *,
    longest: int,
) -> Findings:
    """Means and head kinds by checkpoint: each a list as long as `steps`."""
    curve: Findings = {"steps": [step for step, _ in earlier]}
    for _, load in earlier:
        load()
        means = measures.averages(batches, alive=lambda: None)
        found = {name: means[name] for name in CURVES} | measures.kinds(seq_len=longest)
        for name, value in found.items():
            curve.setdefault(name, []).append(value)
    return curve


def _patch(
    model: ForwardOnly, request: Request, shape: ForwardShape, prompt: Batch, measures: Measures
) -> Findings:
    """Log-probabilities of the answer: of both prompts, by block with a place or head patched."""
    assert request.patching is not None
    ids, answer = request.patching
    other = measures.batch_of(_padded(ids, shape), count=len(ids))
    patching = Patching(model, prompt, other, at=len(ids) - 1, answer=answer)
    rows = shape.micro_batch_size
    return {
        "answer": request.tokenizer.decode([answer]),
        "tokens": [request.tokenizer.decode([i]) for i in ids],
        "of_prompt": patching.of_prompt,
        "of_other": patching.of_other,
        "streams": patching.streams(rows=rows),
        "heads": patching.heads(rows=rows),
    }


def _padded(ids: list[int], shape: ForwardShape) -> Tensor:
    """(1, seq_len) ids, filled up behind with what no earlier token sees."""
    return torch.tensor([ids + [0] * (shape.seq_len - len(ids))])


def _held_out(model: ForwardOnly, request: Request, shape: ForwardShape) -> Iterator[Batch]:
    """This rank's share of the held-out windows of every dataset."""
    read = _reading(model, request, shape)
    for dataset in _datasets(request):
        yield from read(dataset, num_sequences=request.evaluation.sequences)


def _unmeasured(
    model: ForwardOnly, request: Request, shape: ForwardShape
) -> Iterator[Sequence[Batch]]:
    """This rank's share of LENS_BATCH windows behind those that `_held_out` gives, again and again.

    Datasets take turns, and each begins anew where it ends.

    Raises:
        ConfigError: there are not so many.
    """
    from pipeline.data.validation import count_windows

    read, begin = _reading(model, request, shape), request.evaluation.sequences
    datasets = list(_datasets(request))
    counts = [count_windows(d, seq_len=shape.seq_len) - begin for d in datasets]
    usable = [
        (d, n // LENS_BATCH) for d, n in zip(datasets, counts, strict=True) if n >= LENS_BATCH
    ]
    if not usable:
        raise ConfigError(
            f"train_lens needs {LENS_BATCH} held-out sequences behind the {begin} that are "
            f"measured, and the datasets have {counts}: set sequences or seq_len lower, or name "
            "more data, data.validation=[{path: OUT/train}]."
        )
    for turn in count():
        for dataset, batches in usable:
            first = begin + turn % batches * LENS_BATCH
            yield list(read(dataset, num_sequences=LENS_BATCH, begin=first))


def _datasets(request: Request) -> Iterator[Dataset]:
    """The held-out datasets, opened."""
    from pipeline.data.datasets import open_datasets

    data = request.evaluation.data
    yield from open_datasets(data.validation or [], cfg=data, cache_dir=request.cache_dir)


def _reading(
    model: ForwardOnly, request: Request, shape: ForwardShape
) -> Callable[..., Iterator[Batch]]:
    """validation_batches for this rank's share."""
    from pipeline.data.validation import validation_batches

    layout = model.layout
    return partial(
        validation_batches,
        seq_len=shape.seq_len,
        micro_batch_size=shape.micro_batch_size,
        data_rank=layout.data.rank,
        data_parallel_size=layout.data.size,
        device=layout.device,
        cfg=request.evaluation.data,
    )
