"""All that a request asks for, of a model at a layout.

    Request, ForwardOnly -> batches -> measures, interventions -> findings

Findings are plain values; docs/probing.md says what each of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.config.run_shape import ForwardShape
from pipeline.data.batch import Batch
from pipeline.probing.interventions import Patching, ablate
from pipeline.probing.measures import Measures
from pipeline.probing.request import Request

if TYPE_CHECKING:
    from pipeline.engine.forward_only import ForwardOnly

Findings = dict[str, Any]
CURVES = ("lens_loss", "entropy", "sink")
"""Means that the curve over checkpoints has, beside the kinds of heads."""
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
    measures = Measures(model)
    prompt = request.prompt
    if prompt is None:
        batches = list(_held_out(model, request, shape))
        count = min(SHOWN, shape.seq_len)
        shown = _beginning(batches[0], count)
    else:
        count = min(SHOWN, len(prompt))
        shown = measures.batch_of(_padded(prompt, shape), count=len(prompt))
        batches = [shown]
    ids = shown.tokens[0, :count].tolist()
    findings: Findings = {
        "layers": model.model.num_layers,
        "heads": model.model.num_attention_heads,
        "averages": measures.averages(batches, alive=alive),
        "kinds": measures.kinds(seq_len=request.longest),
        "text": {
            "ids": ids,
            "tokens": [request.tokenizer.decode([i]) for i in ids],
            **measures.view(shown, count=count),
        },
    }
    lens = findings["text"]["lens"]
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


def _beginning(batch: Batch, count: int) -> Batch:
    """The first `count` tokens of the first sequence of a batch."""

    def cut(field: Tensor | None) -> Any:
        return None if field is None else field[:1, :count].contiguous()

    return Batch(
        tokens=cut(batch.tokens), labels=cut(batch.labels), loss_mask=cut(batch.loss_mask),
        document_ids=cut(batch.document_ids), positions=cut(batch.positions),
        sample_ids=batch.sample_ids[:1],
    )  # fmt: skip


def _held_out(model: ForwardOnly, request: Request, shape: ForwardShape) -> Iterator[Batch]:
    """This rank's share of the held-out windows of every dataset."""
    from pipeline.data.datasets import open_datasets
    from pipeline.data.validation import validation_batches

    data, layout = request.evaluation.data, model.layout
    held_out = data.validation or []
    for dataset in open_datasets(held_out, cfg=data, cache_dir=request.cache_dir):
        yield from validation_batches(
            dataset,
            seq_len=shape.seq_len,
            micro_batch_size=shape.micro_batch_size,
            data_rank=layout.data.rank,
            data_parallel_size=layout.data.size,
            num_sequences=request.evaluation.sequences,
            device=layout.device,
            cfg=data,
        )
