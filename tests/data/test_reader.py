"""Windows out of shards equal plain slicing of the tokens; damage is found, named, and never read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.data import reader as reader_module
from pipeline.data.datasets import Dataset, describe, open_datasets
from pipeline.data.reader import Reader
from pipeline.errors import ConfigError, DataError, ShardError
from tests.support.token_dataset import write_dataset

SIZES = [300, 65, 17, 129, 1, 64]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, list[np.ndarray], list[np.ndarray]]:
    """A dataset in six shards with blocks of 64 tokens, and its arrays."""
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, 60000, n) for n in SIZES]
    starts = [np.flatnonzero(rng.random(n) < 0.1) for n in SIZES]
    return write_dataset(tmp_path / "set", shards, starts=starts), shards, starts


def opened(path: Path, **settings) -> list[Dataset]:
    cfg = DataConfig(train=[DatasetConfig(path=str(path))], **settings)
    return open_datasets(cfg.train, cfg=cfg, cache_dir=path)


def everywhere(seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(shard, sequence) of every full window."""
    places = [(s, i) for s, n in enumerate(SIZES) for i in range((n - 1) // seq_len)]
    shard, sequence = np.array(places).T
    return shard, sequence


@pytest.mark.parametrize("seq_len", [3, 16, 63, 64, 65, 128, 200])
def test_windows_equal_slices_of_the_tokens_across_blocks(made, seq_len):
    path, shards, starts = made
    shard, sequence = everywhere(seq_len)
    windows = Reader(opened(path), seq_len=seq_len).gather(
        shard * 0, shard, sequence, documents=True
    )
    assert (windows.num_labels == seq_len).all()
    for row, (s, i) in enumerate(zip(shard, sequence)):
        begin = i * seq_len
        assert windows.ids[row].tolist() == shards[s][begin : begin + seq_len + 1].tolist()
        begins = [b - begin for b in starts[s] if begin <= b < begin + seq_len]
        assert windows.starts[row].tolist() == begins


def test_tokens_above_16_bits_are_read_as_they_are(tmp_path):
    tokens = np.arange(100_000, 100_200)
    reader = Reader(opened(write_dataset(tmp_path, [tokens], vocab_size=200_000)), seq_len=150)
    zero = np.zeros(1, np.int64)
    assert reader.gather(zero, zero, zero).ids[0].tolist() == tokens[:151].tolist()


def test_the_end_of_a_shard_is_padding_without_labels(made):
    path, shards, _ = made
    windows = Reader(opened(path), seq_len=100).gather(*(np.array([x]) for x in (0, 3, 1)))
    assert windows.ids[0].tolist() == [*shards[3][100:129], *[0] * 72]
    assert windows.num_labels.tolist() == [28]


def test_few_open_shards_read_the_same(made, monkeypatch):
    path, shards, _ = made
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 1)
    shard, sequence = (np.tile(x, 3) for x in everywhere(16))
    shuffled = np.random.default_rng(1).permutation(len(shard))
    windows = Reader(opened(path), seq_len=16).gather(
        shard * 0, shard[shuffled], sequence[shuffled]
    )
    for ids, s, i in zip(windows.ids, shard[shuffled], sequence[shuffled]):
        assert ids.tolist() == shards[s][i * 16 : i * 16 + 17].tolist()


def damage(path: Path, *, kind: str) -> Path:
    """Break shard 0 in one way."""
    tar = path / "shards/00000/tok-00000000.tar"
    data = bytearray(tar.read_bytes())
    if kind == "flipped token":
        data[512 + 128 + 40] ^= 1  # block 0
    elif kind == "flipped document":
        data[512 + 512 + 512 + 128] ^= 1
    if kind == "missing":
        tar.unlink()
    else:
        tar.write_bytes(data[:2000] if kind == "truncated" else data)
    return tar


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "flipped token",
            r"tok-00000000.tar, block 0: the tokens at byte 640 are corrupt \(crc32 ",
        ),
        ("flipped document", "block 0: the docs at byte 1664 are corrupt"),
        ("truncated", "has 2000 bytes, the manifest says"),
        ("missing", "tok-00000000.tar cannot be read .No such file"),
    ],
)
def test_damage_is_found_at_first_touch_and_the_message_says_how_to_check(made, kind, said):
    path, _, _ = made
    damage(path, kind=kind)
    zero = np.zeros(1, np.int64)
    with pytest.raises(ShardError, match=said) as caught:
        Reader(opened(path), seq_len=16).gather(zero, zero, zero)
    assert f"python -m data_prep.verify {path}" in str(caught.value)
    assert "data.on_corrupt=skip" in str(caught.value)


def test_skip_leaves_out_the_damaged_block_and_nothing_else(made, caplog):
    path, shards, _ = made
    damage(path, kind="flipped token")
    shard, sequence = everywhere(16)
    windows = Reader(opened(path), seq_len=16, skip_corrupt=True).gather(
        shard * 0, shard, sequence, documents=True
    )
    hit = (shard == 0) & (sequence * 16 < 64)  # windows that begin in block 0
    assert windows.num_corrupt == hit.sum() == 4
    assert not windows.num_labels[hit].any()
    assert not windows.ids[hit].any()
    assert (windows.num_labels[~hit] == 16).all()
    for row in np.flatnonzero(~hit):
        begin = sequence[row] * 16
        assert windows.ids[row].tolist() == shards[shard[row]][begin : begin + 17].tolist()


def test_describe_gives_what_the_model_needs(made):
    path, _, _ = made
    facts = describe(
        DataConfig(
            train=[DatasetConfig(path=str(path))], validation=[DatasetConfig(path=str(path))]
        )
    )
    assert (facts.vocab_size, facts.eod, facts.tokens) == (60000, 0, sum(SIZES))
    assert list(facts.identities) == [str(path)]


def test_datasets_of_two_tokenizers_are_refused(tmp_path):
    for name in ("a", "b"):
        write_dataset(tmp_path / name, [np.arange(50)], tokenizer=name.encode())
    a, b = (DatasetConfig(path=str(tmp_path / name)) for name in ("a", "b"))
    for cfg in (DataConfig(train=[a, b]), DataConfig(train=[a], validation=[b])):
        with pytest.raises(DataError, match="different tokenizers"):
            describe(cfg)


def test_no_dataset_one_twice_and_a_wrong_folder_are_refused(made, tmp_path):
    path, _, _ = made
    one = DatasetConfig(path=str(path))
    with pytest.raises(ConfigError, match="no training data: set data.path"):
        describe(DataConfig())
    with pytest.raises(ConfigError, match="two datasets are called"):
        describe(DataConfig(train=[one, one]))
    with pytest.raises(ConfigError, match="are the same data"):
        describe(DataConfig(train=[one, DatasetConfig(path=str(path), name="again")]))
    with pytest.raises(DataError, match="there is no such file"):
        describe(DataConfig(train=[DatasetConfig(path=str(tmp_path / "nowhere"))]))


def test_names_come_from_as_many_folders_as_keep_them_apart(tmp_path):
    for name in ("web/train", "code/train"):
        write_dataset(tmp_path / name, [np.arange(len(name) * 10)])
    cfg = DataConfig(
        train=[DatasetConfig(path=str(tmp_path / n)) for n in ("web/train", "code/train")]
    )
    assert [d.name for d in open_datasets(cfg.train, cfg=cfg, cache_dir=tmp_path)] == [
        "web/train",
        "code/train",
    ]
