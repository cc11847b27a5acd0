"""The order of one dataset: every epoch a permutation, the same from anywhere, at any scale."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.order import ROUNDS, Order, draw_keys, num_sequences, permute

# Worked out once with Python's integers alone (blake2b, splitmix64), not taken from numpy.
PINNED_KEYS = ["0xeaaa05c8f18d837e", "0xef70b5ad242d9339"]
PINNED_PERMUTATION = [3, 2, 5, 1, 4, 0, 7, 6]

shard_sizes = st.lists(st.integers(0, 400), min_size=1, max_size=40).filter(lambda s: max(s) > 17)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=25)
def test_permute_is_a_bijection_and_equal_one_by_one(size: int, seed: int):
    keys = draw_keys(seed)[:, None]
    drawn = permute(np.arange(size), size, keys)
    assert sorted(drawn.tolist()) == list(range(size))
    some = np.arange(0, size, 97)
    assert [int(permute(np.array([i]), size, keys)[0]) for i in some] == drawn[some].tolist()


def test_permute_with_a_size_and_keys_for_each_element_is_one_permutation_per_group():
    sizes, tags = np.repeat([1, 2, 5, 700], [1, 2, 5, 700]), np.repeat([0, 1, 2, 3], [1, 2, 5, 700])
    index = np.concatenate([np.arange(n) for n in (1, 2, 5, 700)])
    keys = np.stack([draw_keys(9, tag) for tag in range(4)], axis=1)[:, tags]
    drawn = permute(index, sizes, keys)
    for tag, size in enumerate((1, 2, 5, 700)):
        alone = permute(np.arange(size), size, draw_keys(9, tag)[:, None])
        assert drawn[tags == tag].tolist() == alone.tolist()


def test_permutations_of_few_elements_are_about_uniform():
    """All 24 orders of 4 elements over 4,800 keys: chi-square with 23 degrees of freedom, below its 1e-6 quantile."""
    keys = np.stack([draw_keys(seed) for seed in range(4800)], axis=1).repeat(4, axis=1)
    drawn = permute(np.tile(np.arange(4), 4800), 4, keys).reshape(4800, 4)
    orders, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(orders) == 24
    assert np.sum((counts - 200) ** 2 / 200) < 75


def test_round_keys_are_pinned():
    """Another machine, numpy or Python must draw the same keys, or a resumed run would read another order."""
    assert draw_keys(1, 2, 3).shape == (ROUNDS,)
    assert [hex(k) for k in draw_keys(1, 2, 3)[:2]] == PINNED_KEYS
    assert permute(np.arange(8), 8, draw_keys(1, 2, 3)[:, None]).tolist() == PINNED_PERMUTATION


@given(
    sizes=shard_sizes,
    seed=st.integers(0, 99),
    lanes=st.integers(1, 9),
    window=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=25)
def test_every_epoch_reads_every_sequence_exactly_once(sizes, seed, lanes, window, epoch):
    """Also with uneven shards, more lanes than shards and shards shorter than a sequence: nothing is dropped."""
    order = Order(sizes, seq_len=16, seed=seed, lanes=lanes, window=window)
    shard, sequence = order(np.arange(order.epoch_size) + epoch * order.epoch_size)
    expected = [(s, i) for s, n in enumerate(num_sequences(sizes, 16)) for i in range(n)]
    assert sorted(zip(shard.tolist(), sequence.tolist())) == expected


@given(sizes=shard_sizes, lanes=st.integers(1, 5), data=st.data())
@settings(deadline=None, max_examples=25)
def test_any_subset_in_any_order_gives_what_the_whole_gives(sizes, lanes, data):
    """The O(1) resume and every cut over ranks and workers rest on this."""
    whole = Order(sizes, seq_len=16, seed=5, lanes=lanes, window=3)
    total = 3 * whole.epoch_size
    k = np.array(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=30)))
    shard, sequence = whole(np.arange(total))
    fresh = Order(sizes, seq_len=16, seed=5, lanes=lanes, window=3)
    assert [c.tolist() for c in fresh(k)] == [shard[k].tolist(), sequence[k].tolist()]
    assert fresh.lane(k).tolist() == whole.lane(np.arange(total))[k].tolist()


def test_epochs_and_seeds_differ():
    order = Order([3000] * 4, seq_len=16, seed=1)
    n = order.epoch_size
    first, second = (list(zip(*(c.tolist() for c in order(np.arange(n) + e * n)))) for e in (0, 1))
    other = list(zip(*(c.tolist() for c in Order([3000] * 4, seq_len=16, seed=2)(np.arange(n)))))
    # Two random orders of 748 sequences agree in about one place.
    assert sum(a == b for a, b in zip(first, second)) < 10
    assert sum(a == b for a, b in zip(first, other)) < 10


def test_a_lane_reads_window_after_window_and_lanes_share_no_shard():
    order = Order(
        [161] * 64, seq_len=16, seed=1, lanes=4, window=4
    )  # 10 sequences a shard, 16 shards a lane
    k = np.arange(order.epoch_size)
    shard, lane = order(k)[0], order.lane(k)
    owners = {s: set(lane[shard == s].tolist()) for s in range(64)}
    assert all(len(lanes) == 1 for lanes in owners.values())
    for one in range(4):
        read = shard[lane == one].reshape(4, 40)  # 4 windows of 4 shards
        assert [len(set(window.tolist())) for window in read] == [4, 4, 4, 4]
        assert len(set(read.ravel().tolist())) == 16


@given(sizes=shard_sizes, lanes=st.integers(1, 4), window=st.integers(1, 5), at=st.floats(0, 2.9))
@example(sizes=[33, 0, 17, 161, 0, 0, 0, 0, 0, 0, 0, 0, 193], lanes=4, window=1, at=2.875)
@settings(deadline=None, max_examples=25)
def test_upcoming_shards_hold_this_and_the_next_window(sizes, lanes, window, at):
    """What is read next is in the list, unless its lane's turn crosses into an epoch after the next."""
    order = Order(sizes, seq_len=16, seed=3, lanes=lanes, window=window)
    k = int(at * order.epoch_size) + np.arange(lanes)
    upcoming = order.upcoming_shards(k)
    newest = k[k // order.epoch_size == k[-1] // order.epoch_size]
    assert set(order(newest)[0].tolist()) <= set(upcoming)
    assert len(upcoming) == len(set(upcoming)) <= 2 * lanes * window + lanes * window


def test_ten_trillion_tokens_are_held_in_200_mb():
    """300,000 shards of 32 Mi tokens, from the start and from the middle; benchmarks/loader.py has the times."""
    code = """
        import numpy as np
        from pipeline.data.order import Order
        order = Order(np.full(300_000, 1 << 25), seq_len=2048, seed=7, lanes=128, window=32)
        order(np.arange(8))
        half = order.epoch_size // 2
        order(np.arange(half, half + 512))
        status = open("/proc/self/status").read()  # ru_maxrss would count the parent of before exec
        print(status.split("VmHWM:")[1].split()[0])
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) / 1024 < 200
