"""How much of its training data a model gives away: exposure, extraction, membership.

    canaries, references -> nats of each text          -> exposure by repetitions
    windows read, held out -> prefix, greedy continuation -> extraction rate by prefix length
                           -> log-probability of each token -> membership

Sources: Carlini et al. 2019, arXiv:1802.08232; 2022, arXiv:2202.07646; attacks.py has the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.canary_list import Canary, draw_secret, fill
from pipeline.errors import CheckpointError
from pipeline.evaluation import attacks
from pipeline.evaluation.attacks import Numbers

Findings = dict[str, Any]


class Answering(Protocol):
    """A model in this process."""

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, S, vocab_size) fp32 for (B, S) ids."""


@dataclass(frozen=True)
class Audit:
    """How it is measured."""

    rows: int
    """Texts computed together."""
    seed: int
    """Of references and resampling."""


def canaries_exposed(
    model: Answering,
    template: str,
    canaries: Sequence[Canary],
    *,
    encode: Callable[[str], list[int]],
    eod: int,
    references: int,
    audit: Audit,
) -> Findings:
    """Exposure of canaries by how often they were planted, beside its chance level and maximum.

    Args:
        encode: text to ids.
        eod: id that stands before a document.
        references: secrets that were never planted, for each canary in its own template.
    """
    random, most = np.random.default_rng(audit.seed), math.log2(references + 1)
    found: dict[int, list[float]] = {}
    for canary in canaries:
        secrets = [canary.secret, *(draw_secret(random) for _ in range(references))]
        texts = [[eod, *encode(fill(template, canary.name, s)), eod] for s in secrets]
        losses = np.array(list(nats(model, texts, audit.rows)))
        found.setdefault(canary.repetitions, []).append(attacks.exposure(losses[0], losses[1:]))
    return {
        "chance": attacks.chance_exposure(references),
        "most": most,
        "references": references,
        "repetitions": {
            str(count): {
                "canaries": len(values),
                **asdict(attacks.mean(values, most=most, seed=audit.seed)),
            }
            for count, values in sorted(found.items())
        },
    }


def nats(model: Answering, texts: Sequence[list[int]], rows: int) -> Iterator[float]:
    """Cross entropy of each text's ids behind the first, summed."""
    for at in range(0, len(texts), rows):
        part = texts[at : at + rows]
        longest = max(map(len, part))
        # Filled up behind, where no earlier token sees it, and not counted.
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in part])
        scores = log_probabilities(model, ids)
        for row, text in zip(scores, part):
            yield -float(row[: len(text) - 1].sum())


def log_probabilities(model: Answering, ids: Tensor) -> Numbers:
    """(B, S - 1) log-probability of each of (B, S) ids behind the first, fp64.

    Raises:
        CheckpointError: the model says what is no number: it would be compared with nothing.
    """
    logits = model.logits(ids[:, :-1])
    taken = ids[:, 1:].to(logits.device)
    # A row at a time: of all rows, in fp64 and normalised, they are four times the logits.
    rows = [
        row.double().log_softmax(-1).gather(-1, id_[:, None]).squeeze(-1)
        for row, id_ in zip(logits, taken)
    ]
    result: Numbers = torch.stack(rows).cpu().numpy()
    if not np.isfinite(result).all():
        raise CheckpointError(
            "the model's probabilities are no numbers: it has diverged, and nothing of it can be "
            "measured. Measure an earlier checkpoint."
        )
    return result


def extraction(
    model: Answering,
    windows: dict[str, Tensor],
    *,
    prefixes: Sequence[int],
    length: int,
    audit: Audit,
) -> list[Findings]:
    """By prefix length: shares of windows whose next `length` tokens greedy decoding gives.

    Args:
        windows: "read" and "held_out" to (n, tokens) ids. Each prefix ends at the same place, so
            that the same tokens are asked for whatever its length.
    """
    found = []
    end = max(prefixes)
    for prefix in prefixes:
        row: Findings = {"prefix": prefix}
        for name, ids in windows.items():
            given, truth = ids[:, end - prefix : end], ids[:, end : end + length]
            parts = given.split(audit.rows)
            said = torch.cat([greedy(model, part, length) for part in parts])
            distance = attacks.distances(said.numpy(), truth.numpy())
            row[name] = {
                "exact": asdict(attacks.share(distance == 0)),
                "near": asdict(attacks.share(distance <= attacks.NEAR)),
            }
        found.append(row)
    return found


def greedy(model: Answering, ids: Tensor, length: int) -> Tensor:
    """(B, length) likeliest ids after (B, S) ones, one by one."""
    start = ids.shape[1]
    for _ in range(length):
        following = model.logits(ids)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following.to(ids.device)], dim=1)
    return ids[:, start:]


def membership(
    model: Answering,
    windows: dict[str, Tensor],
    *,
    reference: Answering | None,
    percent: float,
    audit: Audit,
) -> Findings:
    """AUC and true positives of attacks that tell windows read from held-out ones.

    Args:
        windows: "read" and "held_out" to (n, tokens) ids.
        reference: a model that has not read them; None: that attack is left out.
        percent: of a window's tokens, for min-k.
    """
    scores: dict[str, dict[str, Numbers]] = {}
    for name, ids in windows.items():
        own = _all_log_probabilities(model, ids, audit.rows)
        scores.setdefault("loss", {})[name] = own.mean(1)
        scores.setdefault("min_k", {})[name] = attacks.min_k(own, percent)
        if reference is not None:
            other = _all_log_probabilities(reference, ids, audit.rows)
            scores.setdefault("reference", {})[name] = own.mean(1) - other.mean(1)
    found: Findings = {}
    for attack, of in scores.items():
        pair = of["read"], of["held_out"]
        measures = {"auc": attacks.auc, "tpr_at_1_percent_fpr": attacks.true_positives}
        found[attack] = {
            key: asdict(attacks.with_interval(measure, *pair, seed=audit.seed))
            for key, measure in measures.items()
        }
    return found


def _all_log_probabilities(model: Answering, ids: Tensor, rows: int) -> Numbers:
    return np.concatenate([log_probabilities(model, part) for part in ids.split(rows)])
