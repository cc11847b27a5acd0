import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning import dedup, hashing
from data_prep.cleaning.recipes import ExactDedup, MinHashDedup

rensa = pytest.importorskip("rensa")


def text_of(seed: int, length: int = 400) -> list[str]:
    return random.Random(seed).choices([f"w{i}" for i in range(5000)], k=length)


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(lambda e: e[0] != e[1]),
        max_size=60,
    )
)
def test_clusters_are_the_connected_components(edges: list[tuple[int, int]]) -> None:
    """Reference: union-find in plain Python."""
    parent = {d: d for e in edges for d in e}

    def root(d: int) -> int:
        return d if parent[d] == d else root(parent[d])

    for later, first in edges:
        low, high = sorted((root(later), root(first)))
        parent[high] = low
    expected = {d: root(d) for d in parent if root(d) != d}
    moved, roots = dedup.clusters(np.array(edges, np.uint64).reshape(-1, 2))
    assert expected == dict(zip(moved.tolist(), roots.tolist()))


def test_a_long_chain_of_links_is_one_cluster() -> None:
    order = np.random.default_rng(0).permutation(2000).astype(np.uint64)
    moved, roots = dedup.clusters(np.stack([order[1:], order[:-1]], axis=1))
    assert len(moved) == 1999
    assert set(roots.tolist()) == {0}


@given(st.lists(st.integers(0, 6), max_size=30), st.randoms())
def test_links_point_at_the_first_document_whatever_the_order(
    keys: list[int], rng: random.Random
) -> None:
    expected = {(d, keys.index(k)) for d, k in enumerate(keys) if keys.index(k) != d}
    pairs = list(enumerate(keys))
    rng.shuffle(pairs)
    columns = np.array([(k, k + 1) for _, k in pairs], np.uint64).reshape(-1, 2)
    found = dedup.links(columns, np.array([d for d, _ in pairs], np.uint64))
    assert {tuple(row) for row in found.tolist()} == expected


def test_exact_keys_differ_by_one_character_and_may_ignore_case_and_space() -> None:
    strict, loose = ExactDedup(), ExactDedup(ignore_case_and_space=True)
    assert (hashing.exact_key("a b", strict) == hashing.exact_key("a b", strict)).all()
    assert (hashing.exact_key("a b", strict) != hashing.exact_key("a  b", strict)).all()
    assert (hashing.exact_key("A\n b ", loose) == hashing.exact_key("a b", loose)).all()


def test_bands_match_as_often_as_theory_says() -> None:
    """P(at least one of 14 bands of 8 agrees) = 1 - (1 - s^8)^14 for shingle similarity s."""
    cfg, trials = MinHashDedup(), 300
    for similarity, tolerance in ((0.55, 0.08), (0.75, 0.08), (0.9, 0.04)):
        texts = []
        for trial in range(
            trials
        ):  # 400 words in common, then unlike tails, give the wanted Jaccard similarity
            tail = round(396 * (1 - similarity) / (2 * similarity))
            common = text_of(trial)
            texts += [" ".join(common + text_of(10_000 + 2 * trial + i, tail)) for i in (0, 1)]
        keys = hashing.minhash_keys(texts, cfg).reshape(trials, 2, cfg.bands)
        found = (keys[:, 0] == keys[:, 1]).any(axis=1).mean()
        assert found == pytest.approx(1 - (1 - similarity**8) ** 14, abs=tolerance)


def test_minhash_keys_do_not_depend_on_the_batch() -> None:
    """Batches differ between runs only if inputs do, but a key must be a function of its text alone."""
    texts = [" ".join(text_of(seed, length)) for seed, length in enumerate((3, 1, 400, 50, 5))]
    together = hashing.minhash_keys(texts, MinHashDedup())
    for text, keys in zip(texts, together):
        assert (hashing.minhash_keys([text], MinHashDedup())[0] == keys).all()


def test_case_and_punctuation_do_not_matter_but_short_texts_must_be_equal() -> None:
    a, b, c, d = hashing.minhash_keys(
        ["One two, three.", "one two three", "one two four", "..."], MinHashDedup()
    )
    assert (a == b).all()
    assert (a != c).all()
    assert (a != d).all()


def test_other_seeds_give_other_keys() -> None:
    text = " ".join(text_of(1))
    assert (
        hashing.minhash_keys([text], MinHashDedup())
        != hashing.minhash_keys([text], MinHashDedup(seed=2))
    ).all()
