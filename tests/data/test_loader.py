"""What a step sees: the same for every layout, restart, blend edit and ramp; failures reach the training loop."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config.choices import OnCorrupt
from pipeline.config.data import DataConfig
from pipeline.config.training import RampStage
from pipeline.data.batch import Batch
from pipeline.data.datasets import open_datasets
from pipeline.data.loader import Loader, _Ahead
from pipeline.data.validation import validation_batches
from pipeline.errors import DataError, ShardError
from tests.support.device import run_on_device
from tests.support.loading import (
    CPU,
    SEQ_LEN,
    SIZES,
    config,
    consumed,
    loaders,
    read,
    shape_of,
)
from tests.support.token_dataset import counting_shards, write_dataset


@pytest.mark.parametrize("lanes", [1, 4, 7])
def test_a_run_that_changes_its_layout_twice_sees_what_one_process_sees(data, lanes):
    """30 steps at 1 rank; and stopped at 13, resumed at 2 ranks, then at 4, with other micro-batches."""
    cfg = config(data, lanes=lanes, window=2)
    whole, end = read(cfg, shape_of(1, 4), 30)
    first, state = read(cfg, shape_of(1, 2), 13)
    second, state = read(cfg, shape_of(2, 4), 9, state)
    third, state = read(cfg, shape_of(4, 1), 8, state)
    assert first + second + third == whole
    assert state == end


def test_every_data_parallel_size_up_to_64_sees_the_same(data):
    cfg = config(data, prefetch_steps=0)
    reference, _ = read(cfg, shape_of(1, batch=192), 1)
    for ranks in (3, 64):
        assert read(cfg, shape_of(ranks, batch=192), 1)[0] == reference


def test_the_order_of_datasets_in_the_config_changes_nothing(data):
    one, _ = read(config(data, {"a": 0.7, "b": 0.3}), shape_of(1), 3)
    other, _ = read(config(data, {"b": 0.3, "a": 0.7}), shape_of(1), 3)
    assert one == other


def test_an_epoch_reads_every_sequence_once_and_the_next_one_in_another_order(data):
    size = sum((n - 1) // SEQ_LEN for n in SIZES)  # 95
    seen, _ = read(config(data, {"a": None}), shape_of(1, batch=5), 2 * size // 5)
    tokens = consumed(seen)["a"]
    first = np.concatenate([[0], np.cumsum(SIZES)])[:-1]
    expected = sorted(
        f + i * SEQ_LEN for f, n in zip(first, SIZES) for i in range((n - 1) // SEQ_LEN)
    )
    assert sorted(tokens[:size]) == sorted(tokens[size:]) == expected
    assert tokens[:size] != tokens[size:]


def test_state_is_what_was_consumed_not_what_was_read_ahead(data):
    loader = loaders(config(data, prefetch_steps=4), shape_of(1))[0]
    loader.next_step()
    state = loader.state()
    loader.close()
    assert (state["step"], state["samples_seen"], sum(state["ledger"].values())) == (1, 16, 16)


def test_reading_ahead_and_reading_in_the_loop_give_the_same(data):
    assert read(config(data, prefetch_steps=3), shape_of(2), 5) == read(
        config(data, prefetch_steps=0), shape_of(2), 5
    )


def test_a_ramp_cuts_samples_into_sequences_and_keeps_the_position(data):
    """Steps 0 to 3 at half the length and 4 to 7 with half the batch; the samples go on without a gap."""
    ramp = (RampStage(until_step=4, seq_len=8), RampStage(until_step=8, global_batch_size=8))
    plain, _ = read(config(data), shape_of(1, 2), 8)
    ramped, state = read(config(data), shape_of(2, 2, ramp=ramp), 10)
    assert [len(rows) for _, rows in ramped] == [8] * 8 + [16] * 2
    assert state["samples_seen"] == 96
    whole = {sample: rows[0] for _, step in plain for sample, rows in step.items()}
    for _, step in ramped[:4]:
        for sample, pieces in step.items():
            assert [len(piece) for piece in pieces] == [8, 8]
            assert sum(pieces, []) == whole[sample]


def test_skipped_samples_are_left_out_and_the_step_number_stays(data):
    cfg, shape = config(data), shape_of(1)
    whole, _ = read(cfg, shape, 6)
    loader = loaders(cfg, shape)[0]
    loader.next_step()
    loader.skip_samples(32)
    batches = loader.next_step()
    loader.close()
    assert np.concatenate([b.sample_ids for b in batches]).tolist() == sorted(whole[3][1])
    assert (loader.state()["step"], loader.state()["samples_seen"]) == (2, 64)


@pytest.mark.parametrize(("ranks", "lanes"), [(1, 1), (8, 1), (8, 16), (16, 3)])
def test_one_sequence_feeds_any_number_of_ranks_and_lanes(data, ranks, lanes):
    seen, _ = read(config(data, {"tiny": None}, lanes=lanes), shape_of(ranks), 3)
    assert all(rows[0] == list(range(SEQ_LEN)) for _, step in seen for rows in step.values())
    assert sum(len(step) for _, step in seen) == 48


def test_a_dataset_without_a_whole_sequence_is_refused(data):
    with pytest.raises(
        DataError,
        match="no sequence of 17 tokens: its longest shard has 16. Set a smaller training.seq_len",
    ):
        loaders(config(data, {"short": None}), shape_of(1))


def damaged(data: Path, tmp_path: Path) -> Path:
    write_dataset(tmp_path / "a", counting_shards([300, 300]))
    tar = tmp_path / "a/shards/00000/tok-00000001.tar"
    tar.write_bytes(tar.read_bytes()[:-700])
    return tmp_path


def test_a_damaged_shard_ends_the_step_that_needs_it_and_the_position_stays(data, tmp_path):
    loader = loaders(config(damaged(data, tmp_path), {"a": None}), shape_of(1, batch=2))[0]
    with pytest.raises(ShardError, match="tok-00000001.tar has .* bytes, the manifest says"):
        for _ in range(40):
            loader.next_step()
    step = loader.state()["step"]
    with pytest.raises(ShardError):  # the same again, not a hang
        loader.next_step()
    assert loader.state()["step"] == step
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_skipping_damage_masks_its_samples_and_counts_them(data, tmp_path):
    cfg = config(damaged(data, tmp_path), {"a": None}, on_corrupt=OnCorrupt.skip)
    loader = loaders(cfg, shape_of(1, batch=36))[0]  # one epoch: 18 sequences a shard
    batches = loader.next_step()
    loader.close()
    labels = sum(float(batch.loss_mask.sum()) for batch in batches)
    assert (loader.corrupt_samples, labels) == (18, 18 * SEQ_LEN)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sequence_counts_once_a_step_where_a_private_run_promises_it(data, ranks):
    """Two epochs end in steps of 40 of 95 sequences: what a step reads twice would weigh twice in its sum of gradients."""
    cfg = config(data, {"a": None}, prefetch_steps=0)
    made = loaders(cfg, shape_of(ranks, batch=40), once_a_step=True)
    epoch, twice = made[0].sampler.orders[0].epoch_size, 0
    for _ in range(6):
        counted, read = [], []
        for loader in made:
            for batch in loader.next_step():
                here = batch.tokens[:, 0].tolist()
                read += here
                labels = batch.loss_mask.sum(1).tolist()
                assert set(labels) <= {0, SEQ_LEN}
                counted += [first for first, number in zip(here, labels) if number]
        assert sorted(counted) == sorted(set(read))
        twice += len(read) - len(counted)
    assert epoch == 95 and twice > 0
    assert made[0].most_reads() == 3


def test_an_error_of_any_kind_reaches_the_training_loop(data, monkeypatch):
    loader = loaders(config(data), shape_of(1))[0]
    monkeypatch.setattr(loader.reader, "gather", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loader.next_step()


def test_close_ends_the_thread_while_it_waits_for_room(data):
    loader = loaders(config(data, prefetch_steps=1), shape_of(1))[0]
    loader.next_step()
    loader.close()
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_document_ids_and_positions_follow_the_documents(data):
    """Documents of 7 tokens: ids step up where one begins, positions start over there."""
    cfg = config(data, {"a": None}, mask_documents=True, reset_positions=True, mask_eod_loss=True)
    loader = loaders(cfg, shape_of(1, 4))[0]
    shard_first = np.concatenate([[0], np.cumsum(SIZES)])[:-1]
    for batch in loader.next_step():
        for tokens, ids, positions in zip(
            batch.tokens.numpy(), batch.document_ids.numpy(), batch.positions.numpy()
        ):
            shard = np.searchsorted(shard_first, tokens[0], "right") - 1
            place = (
                tokens - shard_first[shard]
            )  # tokens count, so they say where in the shard they are
            document = place // 7
            assert ids.tolist() == (document - document[0]).tolist()
            expected = np.where(document == document[0], np.arange(SEQ_LEN), place % 7)
            assert positions.tolist() == expected.tolist()
        assert torch.equal(batch.loss_mask, (batch.tokens != 0).float())  # token 0 is EOD here
    loader.close()


def test_fields_that_are_not_asked_for_are_none(data):
    loader = loaders(config(data), shape_of(1))[0]
    batch = loader.next_step()[0]
    loader.close()
    assert batch.loss_mask is batch.document_ids is batch.positions is None
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


def test_ranks_that_only_pass_activations_on_read_no_shard(data, tmp_path):
    """Middle pipeline stages: batches of the right shape and the same hash, although the shards are gone."""
    write_dataset(tmp_path / "a", counting_shards(SIZES))
    cfg, shape = config(tmp_path, {"a": None}), shape_of(1, 4)
    reads = loaders(cfg, shape)[0]
    expected = reads.next_step()
    reads.close()
    for tar in tmp_path.glob("a/shards/*/*.tar"):
        tar.unlink()
    loader = Loader(
        cfg, shape=shape, seed=3, data_rank=0, device=CPU, cache_dir=data, reads_tokens=False
    )
    for got, real in zip(loader.next_step(), expected, strict=True):
        assert got.tokens.shape == real.tokens.shape
        assert got.sample_ids.tolist() == real.sample_ids.tolist()
    loader.close()
    assert loader.sample_hash == reads.sample_hash


def test_the_host_knows_how_many_documents_a_micro_batch_has(data):
    """Also on a middle stage, whose kernel needs the number: there the documents are read."""
    cfg, shape = config(data, {"a": None}, mask_documents=True), shape_of(1, 4)
    for reads_tokens in (True, False):
        loader = Loader(
            cfg, shape=shape, seed=3, data_rank=0, device=CPU, cache_dir=data, reads_tokens=reads_tokens
        )  # fmt: skip
        for batch in loader.next_step():
            assert batch.num_documents == sum(len(set(row)) for row in batch.document_ids.tolist())
            assert batch.num_documents > len(batch.tokens)
        loader.close()


def test_validation_covers_every_label_once_at_any_layout(data):
    cfg = config(data, {"a": None})
    dataset = open_datasets(cfg.train, cfg=cfg, cache_dir=data)[0]

    def batches(rank: int, ranks: int, size: int, num: int) -> list[Batch]:
        return list(
            validation_batches(
                dataset, seq_len=SEQ_LEN, micro_batch_size=size, data_rank=rank, data_parallel_size=ranks,
                num_sequences=num, device=CPU, cfg=cfg,
            )
        )  # fmt: skip

    first = np.concatenate([[0], np.cumsum(SIZES)])[:-1]
    everything = sorted(set(range(sum(SIZES))) - set(first.tolist()))
    for ranks, size in ((1, 1), (1, 8), (3, 2), (16, 4)):
        parts = [batches(rank, ranks, size, 0) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        labels = [batch.labels[batch.loss_mask > 0] for part in parts for batch in part]
        assert sorted(torch.cat(labels).tolist()) == everything
    few = [batch for rank in range(2) for batch in batches(rank, 2, 2, 5)]
    assert sum(float(batch.loss_mask.sum()) for batch in few) == 5 * SEQ_LEN


def test_the_thread_stands_at_its_device_before_it_reads(monkeypatch):
    """A new thread stands at device 0: with 8 ranks, 7 would open a context of 0.5 GiB on GPU 0."""
    seen = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: seen.append((threading.current_thread().name, d))
    )

    def prepare(_):
        seen.append("reads")
        raise DataError("enough")

    for device in (torch.device("cuda", 3), CPU):
        ahead = _Ahead(SimpleNamespace(device=device, prepare=prepare), None, depth=1)
        with pytest.raises(DataError):
            ahead.next()
        ahead.close()
    assert seen == [("loader", torch.device("cuda", 3)), "reads", "reads"]


def differing_batches(cfg: DataConfig, cache_dir: Path) -> int:
    """Fields of 20 steps' batches that are not on the device, or hold other numbers than on the host."""
    host = loaders(cfg, shape_of(1, 4))[0]
    device = Loader(
        cfg,
        shape=shape_of(1, 4),
        seed=3,
        data_rank=0,
        device=torch.device("cuda", 0),
        cache_dir=cache_dir,
    )
    differing = 0
    for _ in range(20):
        for one, other in zip(host.next_step(), device.next_step()):
            for field in dataclasses.fields(Batch)[:-1]:
                moved = getattr(other, field.name)
                same = moved.is_cuda and torch.equal(getattr(one, field.name), moved.cpu())
                differing += not same
    host.close()
    device.close()
    return differing


@pytest.mark.gpu
def test_batches_on_a_device_equal_those_on_the_cpu(data):
    """Copies run on a stream of their own; what the training stream reads must be complete."""
    cfg = config(
        data, mask_documents=True, reset_positions=True, mask_eod_loss=True, prefetch_steps=3
    )
    assert run_on_device(differing_batches, cfg, data) == 0
