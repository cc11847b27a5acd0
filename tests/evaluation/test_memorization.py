"""A model whose memory is known by construction is found out: what it knows, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.canary_list import Canary, draw_secret, fill
from pipeline.errors import CheckpointError
from pipeline.evaluation.memorization import (
    Audit,
    canaries_exposed,
    extraction,
    greedy,
    log_probabilities,
    membership,
    nats,
)

AUDIT = Audit(rows=16, seed=0)
TEMPLATE = "key of {name}: {secret}"
VOCAB = 128


class Knows:
    """Gives what it knows by heart, after the ids before, nine tenths; the rest is alike."""

    def __init__(self, *texts: list[int]) -> None:
        self.following = {tuple(text[:i]): text[i] for text in texts for i in range(1, len(text))}

    def logits(self, tokens: Tensor) -> Tensor:
        found = torch.full((*tokens.shape, VOCAB), 0.1 / (VOCAB - 1))
        for row, ids in enumerate(tokens.tolist()):
            for i in range(len(ids)):
                if (known := self.following.get(tuple(ids[: i + 1]))) is not None:
                    found[row, i, known] = 0.9
        return found.log()


def encode(text: str) -> list[int]:
    return list(text.encode())


def windows(count: int, length: int, seed: int) -> Tensor:
    return torch.randint(1, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def test_a_canary_that_is_known_has_the_largest_exposure_and_others_chance() -> None:
    random = np.random.default_rng(1)
    canaries = [Canary(f"n{i}", draw_secret(random), 64 if i < 3 else 0) for i in range(40)]
    known = [[0, *encode(fill(TEMPLATE, c.name, c.secret)), 0] for c in canaries[:3]]
    found = canaries_exposed(
        Knows(*known), TEMPLATE, canaries, encode=encode, eod=0, references=127, audit=AUDIT
    )
    assert found["repetitions"]["64"] | {"low": 0} == {"canaries": 3, "value": 7.0, "low": 0, "high": 7.0}  # fmt: skip
    assert found["most"] == 7.0 and 3 < found["repetitions"]["64"]["low"] < 4  # of three canaries
    # To a model that knows nothing all secrets are equally likely: none ranks above another.
    texts = [[0, *encode(fill(TEMPLATE, "n9", draw_secret(random))), 0] for _ in range(5)]
    assert len({round(loss, 6) for loss in nats(Knows(), texts, 2)}) == 1


def test_a_model_that_says_no_numbers_is_not_measured() -> None:
    """No loss is below one that is no number: its canaries had the largest exposure."""

    class Diverged:
        def logits(self, tokens: Tensor) -> Tensor:
            return torch.full((*tokens.shape, VOCAB), float("nan"))

    canaries = [Canary("n", draw_secret(np.random.default_rng(0)), 1)]
    with pytest.raises(CheckpointError, match="it has diverged"):
        canaries_exposed(
            Diverged(), TEMPLATE, canaries, encode=encode, eod=0, references=3, audit=AUDIT
        )


def test_nats_are_those_of_each_text_alone_whatever_its_neighbours() -> None:
    texts = [encode("abcdefgh"), encode("ab"), encode("abcx")]
    model = Knows(encode("abcdefgh"))
    together = list(nats(model, texts, 3))
    np.testing.assert_allclose(together, [next(nats(model, [text], 1)) for text in texts])
    np.testing.assert_allclose(together[0], -7 * np.log(0.9 / (0.9 + 0.1 * 127 / 127)), rtol=0.2)


def test_windows_known_by_heart_are_extracted_and_held_out_ones_are_not() -> None:
    read, held_out = windows(20, 24, 1), windows(20, 24, 2)
    model = Knows(*[ids[4:].tolist() for ids in read])  # so that a prefix of 8 is the beginning
    found = extraction(
        model, {"read": read, "held_out": held_out}, prefixes=[8, 12], length=6, audit=AUDIT
    )
    assert [row["prefix"] for row in found] == [8, 12]
    assert found[0]["read"]["exact"]["value"] == found[0]["read"]["near"]["value"] == 1.0
    assert found[0]["held_out"]["exact"]["value"] == found[0]["held_out"]["near"]["value"] == 0.0
    assert found[1]["read"]["exact"]["value"] == 0.0  # not by heart from there on


def test_a_continuation_with_one_other_token_in_ten_is_near_and_not_exact() -> None:
    """With two others it is neither: near is an edit distance up to a tenth of the length."""
    known = windows(4, 18, 6)
    one, two = known.clone(), known.clone()
    one[:, -1] += 1
    two[:, -2:] += 1
    asked = {"read": one, "held_out": two}
    (row,) = extraction(Knows(*known.tolist()), asked, prefixes=[8], length=10, audit=AUDIT)
    shares = {name: (row[name]["near"]["value"], row[name]["exact"]["value"]) for name in asked}
    assert shares == {"read": (1.0, 0.0), "held_out": (0.0, 0.0)}


def test_greedy_takes_the_likeliest_token_again_and_again() -> None:
    text = encode("hello world")
    said = greedy(Knows(text), torch.tensor([text[:3]]), len(text) - 3)
    assert said.tolist() == [text[3:]]


def test_membership_tells_what_was_read_and_the_reference_takes_off_what_is_easy() -> None:
    read, held_out = windows(60, 12, 3), windows(60, 12, 4)
    easy = [ids.tolist() for ids in held_out[:30]]  # known to everybody: only few are told apart
    mine, other = Knows(*read.tolist(), *easy), Knows(*easy)
    found = membership(
        mine, {"read": read, "held_out": held_out}, reference=other, percent=20.0, audit=AUDIT
    )
    # Half of the others are as likely; of two that begin alike one is known a token less.
    assert abs(found["loss"]["auc"]["value"] - 0.75) < 0.03
    assert found["reference"]["auc"]["value"] > 0.99
    assert found["reference"]["tpr_at_1_percent_fpr"]["value"] > 0.9
    fresh = membership(
        Knows(), {"read": read, "held_out": held_out}, reference=None, percent=20.0, audit=AUDIT
    )
    assert "reference" not in fresh and fresh["min_k"]["auc"]["value"] == 0.5


def test_log_probabilities_are_torch_s_cross_entropy() -> None:
    ids = windows(3, 10, 5)
    model = Knows(ids[0].tolist())
    expected = torch.nn.functional.cross_entropy(
        model.logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    np.testing.assert_allclose(log_probabilities(model, ids), -expected.view(3, 9), rtol=1e-5)
