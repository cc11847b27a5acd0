"""Remote shards: whole, verified, bounded and shared, whatever the server does; against real HTTP and S3 servers."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import remote
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.data import dataset_folder
from pipeline.data.datasets import Dataset, describe, open_datasets
from pipeline.data.reader import Reader
from pipeline.data.sampler import Sampler
from pipeline.errors import ConfigError, DataError, MachineError, ShardError
from tests.support.fault_server import Served, serve
from tests.support.s3_server import s3_server
from tests.support.token_dataset import counting_shards, write_dataset
from tests.support.waiting import HANG_S

# fsspec keeps its connections open for the life of the process.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

SIZES = [1000] * 6
TAR = "/shards/00000/tok-0000000{}.tar"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "origin", counting_shards(SIZES), block_tokens=256)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(dataset_folder, "FIRST_PAUSE_S", 0.001)
    with serve(folder) as served:
        yield served


def opened(url: str, cache_dir: Path, *, size_gib: float = 1.0) -> Dataset:
    cfg = DataConfig(train=[DatasetConfig(path=url)], cache_size_gib=size_gib)
    return open_datasets(cfg.train, cfg=cfg, cache_dir=cache_dir)[0]


def read_all(dataset: Dataset) -> list[int]:
    """The first token of every sequence of 100 tokens."""
    shard, sequence = np.repeat(np.arange(6), 9), np.tile(np.arange(9), 6)
    return Reader([dataset], seq_len=100).gather(shard * 0, shard, sequence).ids[:, 0].tolist()


EXPECTED = [1000 * s + 100 * i for s in range(6) for i in range(9)]


@pytest.mark.parametrize("ranges", [True, False], ids=["with ranges", "server ignores ranges"])
def test_http_shards_are_fetched_once_and_read_like_local_ones(
    server, tmp_path, ranges, monkeypatch
):
    monkeypatch.setattr(dataset_folder, "CHUNK_BYTES", 1000)
    server.ranges = ranges
    assert read_all(opened(server.url, tmp_path / "cache")) == EXPECTED
    before = len(server.requests)
    assert (
        read_all(opened(server.url, tmp_path / "cache")) == EXPECTED
    )  # another process of the node, later
    assert server.requests[before:] == ["/manifest.json"]
    assert describe(DataConfig(train=[DatasetConfig(path=server.url)])).tokens == sum(SIZES)


@pytest.mark.parametrize("fault", ["error", "reset", "short", "slow"])
def test_faults_of_the_first_two_requests_of_every_file_are_survived(server, tmp_path, fault):
    server.fault = lambda path, nth: fault if nth < 2 else None
    assert read_all(opened(server.url, tmp_path / "cache")) == EXPECTED
    count = server.requests.count(TAR.format(3))
    assert count == (1 if fault == "slow" else 3)


def test_wrong_bytes_are_fetched_again_and_never_reach_the_cache(server, tmp_path):
    server.fault = lambda path, nth: "wrong" if path == TAR.format(2) and nth == 0 else None
    assert read_all(opened(server.url, tmp_path / "cache")) == EXPECTED


def test_bytes_that_stay_wrong_are_a_corrupt_shard(server, tmp_path):
    server.fault = lambda path, nth: "wrong" if path == TAR.format(2) else None
    dataset = opened(server.url, tmp_path / "cache")
    with pytest.raises(ShardError, match=r"tok-00000002.tar is corrupt: sha256 .*downloaded twice"):
        read_all(dataset)
    assert not list((tmp_path / "cache").glob("*/shards/*/tok-00000002.tar"))


def test_a_missing_shard_is_named_at_once(server, tmp_path, folder):
    (folder / TAR.format(4)[1:]).unlink()
    with pytest.raises(ShardError, match="tok-00000004.tar does not exist"):
        read_all(opened(server.url, tmp_path / "cache"))
    assert server.requests.count(TAR.format(4)) == 1


def test_a_server_that_never_recovers_is_named_with_the_last_error(server, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_folder, "ATTEMPTS", 3)
    dataset = opened(server.url, tmp_path / "cache")
    server.fault = lambda path, nth: "error"
    with pytest.raises(
        DataError, match="could not be read in 3 attempts; the last error was .*503"
    ):
        read_all(dataset)


def test_a_server_that_stops_sending_is_given_up_and_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE_S", 0.2)
    release = threading.Event()
    server.fault = lambda path, nth: (
        release.wait(HANG_S) and None if path == TAR.format(0) and nth == 0 else None
    )
    assert read_all(opened(server.url, tmp_path / "cache")) == EXPECTED
    release.set()
    assert server.requests.count(TAR.format(0)) == 2, "asked again while the first was silent"


def test_the_cache_stays_within_its_size_and_the_data_stay_right(server, tmp_path, folder):
    size = (folder / TAR.format(0)[1:]).stat().st_size
    dataset = opened(server.url, tmp_path / "cache", size_gib=2.5 * size / 2**30)
    largest = 0
    for _ in range(2):
        for shard in range(6):
            dataset.shard_path(shard)
            files = list((tmp_path / "cache").glob("*/shards/*/*"))
            largest = max(largest, sum(file.stat().st_size for file in files))
    assert largest == 2 * size
    assert sorted(file.name for file in files) == [
        "tok-00000004.tar",
        "tok-00000005.tar",
    ]  # the most recently used
    assert read_all(dataset) == EXPECTED  # maps outlive the deletion of their files


def test_least_recently_used_is_by_use_and_not_by_download(server, tmp_path, folder):
    size = (folder / TAR.format(0)[1:]).stat().st_size
    dataset = opened(server.url, tmp_path / "cache", size_gib=2.5 * size / 2**30)
    for used_at, shard in enumerate((0, 1, 0, 2)):
        os.utime(dataset.shard_path(shard), (used_at, used_at))
    names = sorted(file.name for file in (tmp_path / "cache").glob("*/shards/*/*"))
    assert names == ["tok-00000000.tar", "tok-00000002.tar"]


def test_a_cache_smaller_than_a_shard_is_refused(server, tmp_path):
    with pytest.raises(ConfigError, match="data.cache_size_gib .* is smaller than one shard"):
        read_all(opened(server.url, tmp_path / "cache", size_gib=1e-6))


def test_a_changed_dataset_at_the_same_url_does_not_mix_with_the_cached_one(
    server, tmp_path, folder
):
    read_all(opened(server.url, tmp_path / "cache"))
    write_dataset(folder, counting_shards(SIZES, base=7), block_tokens=256)
    assert read_all(opened(server.url, tmp_path / "cache")) == [token + 7 for token in EXPECTED]


def _rank(url: str, cache_dir: Path, results: multiprocessing.Queue) -> None:
    results.put(read_all(opened(url, cache_dir)))


def test_ranks_of_a_node_download_each_shard_once_between_them(server, tmp_path):
    server.fault = lambda path, nth: "slow"  # long enough for all to meet
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(server.url, tmp_path / "cache", results))
        for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    assert [results.get(timeout=HANG_S) for _ in ranks] == [EXPECTED] * 3
    for rank in ranks:
        rank.join()
    assert [server.requests.count(TAR.format(n)) for n in range(6)] == [1] * 6


def test_what_a_killed_process_left_behind_blocks_nobody_and_is_cleared_away(
    server, tmp_path, folder
):
    dataset = opened(
        server.url,
        tmp_path / "cache",
        size_gib=2.5 * (folder / TAR.format(0)[1:]).stat().st_size / 2**30,
    )
    shards = dataset.folder.local / "shards/00000"
    shards.mkdir(parents=True)
    (shards / "tok-00000000.tar.part").write_bytes(b"half")
    (shards / "tok-00000009.tar.part").write_bytes(bytes(2 * int(dataset.manifest.shard_bytes[0])))
    assert read_all(dataset) == EXPECTED
    assert not list(shards.glob("*.part"))


def test_the_next_windows_are_fetched_ahead(server, tmp_path):
    cfg = DataConfig(train=[DatasetConfig(path=server.url)], window=2)
    datasets = open_datasets(cfg.train, cfg=cfg, cache_dir=tmp_path / "cache")
    sampler = Sampler(cfg, datasets, seq_len=100, seed=1)
    samples, _ = sampler.advance(sampler.start(), 4)
    sampler.prefetch(samples)
    upcoming = sampler.orders[0].upcoming_shards(samples.index)
    assert len(upcoming) == 4
    deadline = time.monotonic() + HANG_S
    while (
        len(list((tmp_path / "cache").glob("*/shards/*/*.tar"))) < 4 and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    found = {path.name for path in (tmp_path / "cache").glob("*/shards/*/*.tar")}
    assert found == {f"tok-0000000{shard}.tar" for shard in upcoming}


def test_an_unknown_protocol_is_a_setting_error(tmp_path):
    with pytest.raises(ConfigError, match="nosuch://bucket/set cannot be opened"):
        opened("nosuch://bucket/set", tmp_path)


@pytest.fixture
def bucket(folder: Path) -> Iterator[str]:
    """The dataset in a bucket of a real S3-speaking server."""
    with s3_server():
        import s3fs

        files = s3fs.S3FileSystem()
        files.mkdir("data")
        files.put(str(folder), "data/origin", recursive=True)
        yield "s3://data/origin"


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
def test_s3_shards_are_read_like_local_ones(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_folder, "CHUNK_BYTES", 1000)
    assert read_all(opened(bucket, tmp_path / "cache")) == EXPECTED
    with pytest.raises(ShardError, match="s3://data/elsewhere/manifest.json does not exist"):
        opened("s3://data/elsewhere", tmp_path / "cache")


def test_a_planted_link_in_the_cache_is_not_written_through(tmp_path):
    """The names in it can be foreseen, and a cache may lie where others write too."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x.tar.part").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(MachineError, match="x.tar.part cannot be written"),
        dataset_folder._lock(tmp_path / "x.tar.part", wait=False),
    ):
        raise AssertionError("it was opened")
    assert (tmp_path / "precious").read_text() == "mine"
