"""The audit: the trainer's own hashes without torch, and a verdict that can be negative."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config.data import BlendStage, DataConfig, DatasetConfig
from pipeline.config.training import RampStage
from pipeline.data.datasets import open_datasets
from pipeline.data.sampler import Sampler
from pipeline.errors import ConfigError
from pipeline.order_audit import AuditConfig, main
from tests.support.loading import loaders, shape_of
from tests.support.token_dataset import counting_shards, write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    for number, split in enumerate(("train", "validation")):
        write_dataset(folder / split, counting_shards([500, 20, 300], base=number * 1000))
    return folder


def composed(data: Path, *words: str) -> AuditConfig:
    return cli.compose(
        AuditConfig, [f"data.path={data}", "training.seq_len=16", *words], config="pretrain"
    )


def test_the_audit_prints_the_hashes_the_trainer_logs(data, capsys):
    """Read by real loaders on 2 ranks, from step 3 on."""
    cfg = composed(
        data, "layouts=[1x1,4x2,64x3]", "start=3", "steps=4", "training.global_batch_size=64"
    )
    assert main(cfg) == 0
    printed = [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:-1]]
    loader = loaders(cfg.data, shape_of(2, batch=64), seed=cfg.seed)[1]
    expected = []
    for _ in range(7):
        loader.next_step()
        expected.append(loader.sample_hash)
    loader.close()
    assert printed == [[step] * 3 for step in expected[3:]]


def test_a_layout_that_reads_other_samples_is_reported_with_the_step(data, capsys, monkeypatch):
    share = Sampler.share

    def wrong(self, samples, *, data_rank, data_parallel_size):
        mine = share(self, samples, data_rank=data_rank, data_parallel_size=data_parallel_size)
        if data_parallel_size == 4 and samples.number[0] >= 128:
            mine.index[:] += 1
        return mine

    monkeypatch.setattr(Sampler, "share", wrong)
    assert main(composed(data, "layouts=[1x1,4x1]", "steps=4")) == 1
    assert "NOT equal: the layouts part at step 2 (2 of 4 steps differ)" in capsys.readouterr().out


def test_seek_is_stepping_through_ramps_and_blends(data):
    train = [
        DatasetConfig(path=str(data / name), max_epochs=2.5) for name in ("train", "validation")
    ]
    cfg = DataConfig(
        train=train,
        blend_schedule=[BlendStage(start_step=4, weights={"train": 0.8, "validation": 0.2})],
    )
    shape = shape_of(
        1,
        batch=8,
        ramp=(RampStage(until_step=2, seq_len=8), RampStage(until_step=5, global_batch_size=4)),
    )
    sampler = Sampler(cfg, open_datasets(cfg.train, cfg=cfg, cache_dir=data), seq_len=16, seed=1)
    position = sampler.start()
    for step in range(20):
        _, position = sampler.advance(position, shape.at(step).num_samples)
        sought = sampler.seek(step + 1, shape)
        assert (sought.step, sought.samples_seen) == (position.step, position.samples_seen)
        assert sought.ledger == position.ledger
        assert sampler.advance(sought, 1)[0].index == sampler.advance(position, 1)[0].index


def test_a_layout_that_is_no_layout_is_refused(data):
    with pytest.raises(ConfigError, match="layout '4' is not understood"):
        main(composed(data, "layouts=['4']"))


@pytest.mark.parametrize("words", ["steps=0", "start=-1", "layouts=[]"])
def test_nothing_is_not_found_equal(data, words):
    with pytest.raises(ConfigError, match="nothing would be compared"):
        main(composed(data, words))


def test_the_audit_imports_no_torch(data):
    code = f"import sys; sys.argv=['audit','data.path={data}','steps=2','quiet=true','training.seq_len=16']\n"
    code += (
        "import runpy\ntry:\n    runpy.run_module('pipeline.order_audit', run_name='__main__')\n"
    )
    code += "except SystemExit as end:\n    assert end.code == 0\nassert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout == "equal: 1x1, 4x2, 16x3 read the same samples in steps 0 to 1\n"
