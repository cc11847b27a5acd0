"""Windows for a comparison come from wherever the data are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.checkpoint.seen import Seen
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.data.datasets import open_datasets
from pipeline.data.sampler import Sampler
from pipeline.inference.known_windows import known_windows
from tests.support.checkpoint_runs import record_of
from tests.support.fault_server import serve
from tests.support.token_dataset import counting_shards, write_dataset

# fsspec keeps its connections open for the life of the process.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


def test_data_behind_a_url_are_fetched_again(tmp_path: Path) -> None:
    """The order is computed in a cache that is gone when the windows are read."""
    for name, base in (("read", 0), ("held", 10_000)):
        write_dataset(tmp_path / name, counting_shards([1000, 1000], base=base))
    with serve(tmp_path) as served:
        train, held_out = (DatasetConfig(path=f"{served.url}/{name}") for name in ("read", "held"))
        data = DataConfig(train=[train], validation=[held_out])
        sampler = Sampler(
            data, open_datasets([train], cfg=data, cache_dir=tmp_path), seq_len=16, seed=0
        )
        config = cli.to_dict(PretrainConfig(name="t", data=data))
        loader = sampler.state(sampler.skip(sampler.start(), 100))
        record = replace(record_of(10), config=config, loader=loader)
        found = known_windows(record, Seen(record), count=60, seed=0)
    assert found["read"].shape == found["held_out"].shape == (60, 17)
    assert int(found["read"].max()) < 10_000 <= int(found["held_out"].min())
