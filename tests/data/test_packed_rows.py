"""Packed rows: each read once an epoch, learned where the writer says, and never mixed with text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.tokens.check import find_faults
from pipeline.config.choices import OnCorrupt
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.config.model import ModelConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.config.training import RampStage, TrainingConfig
from pipeline.data.datasets import describe, follow_data, open_datasets
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest
from pipeline.data.order import Order
from pipeline.data.reader import Reader
from pipeline.data.validation import validation_batches
from pipeline.errors import ConfigError, DataError
from pipeline.files import sha256_of
from tests.support.token_dataset import write_dataset

CPU = torch.device("cpu")
ROW = 16
ROWS = [5, 8, 3]  # of each shard; blocks have four


def packed(folder: Path, *, seed: int = 0, **settings) -> Path:
    """Rows of two or three documents; half of what does not begin one is learned."""
    rng = np.random.default_rng(seed)
    shards, starts, losses = [], [], []
    for rows in ROWS:
        tokens = rng.integers(1, 900, rows * ROW)
        cuts = [np.sort(rng.choice(np.arange(1, ROW), 2, replace=False)) for _ in range(rows)]
        places = [row * ROW + np.array([0, *cut]) for row, cut in enumerate(cuts)]
        loss = rng.integers(0, 2, len(tokens))
        loss[np.concatenate(places)] = 0
        shards.append(tokens), starts.append(np.concatenate(places)), losses.append(loss)
    return write_dataset(
        folder, shards, starts=starts, losses=losses, row_tokens=ROW, vocab_size=900, **settings
    )  # fmt: skip


def text(folder: Path) -> Path:
    return write_dataset(folder, [np.arange(1, 400)], vocab_size=900)


def config(*paths: Path, validation: tuple[Path, ...] = (), seq_len: int = ROW, **settings):
    batch = settings.pop("batch", 4)
    return PretrainConfig(
        name="rows",
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, max_seq_len=64),
        data=DataConfig(
            train=[DatasetConfig(path=str(path)) for path in paths],
            validation=[DatasetConfig(path=str(path)) for path in validation],
            prefetch_steps=0,
            **settings.pop("data", {}),
        ),
        training=TrainingConfig(
            total_steps=99, seq_len=seq_len, global_batch_size=batch, micro_batch_size=1, **settings
        ),
    )


def shape_of(cfg: PretrainConfig, *, world_size: int = 1) -> RunShape:
    data = describe(cfg.data)
    return derive(
        replace(cfg, data=follow_data(cfg.data, data)),
        world_size=world_size,
        tokenizer_vocab_size=data.vocab_size,
        row_tokens=data.row_tokens,
    )


def loader_of(cfg: PretrainConfig, *, world_size: int = 1, data_rank: int = 0) -> Loader:
    return Loader(
        cfg.data, shape=shape_of(cfg, world_size=world_size), seed=7, data_rank=data_rank,
        device=CPU, cache_dir=Path("unused"),
    )  # fmt: skip


def test_every_row_is_read_exactly_once_an_epoch(tmp_path):
    """(tokens - 1) // seq_len, the count of text, never reaches the last row of a shard."""
    order = Order(np.array(ROWS) * ROW, seq_len=ROW, seed=3, packed=True)
    assert order.epoch_size == sum(ROWS)
    shard, row = order(np.arange(order.epoch_size) + order.epoch_size)
    expected = [(s, r) for s, rows in enumerate(ROWS) for r in range(rows)]
    assert sorted(zip(shard.tolist(), row.tolist())) == expected
    assert Order(np.array(ROWS) * ROW, seq_len=ROW, seed=3).epoch_size == sum(ROWS) - len(ROWS)


def test_windows_are_rows_with_their_masks_and_documents(tmp_path):
    folder = packed(tmp_path)
    (dataset,) = open_datasets(
        [DatasetConfig(path=str(folder))], cfg=DataConfig(), cache_dir=tmp_path
    )
    manifest = dataset.manifest
    reader = Reader([dataset], seq_len=ROW)
    for shard, rows in enumerate(ROWS):
        numbers = np.arange(rows)
        windows = reader.gather(numbers * 0, numbers * 0 + shard, numbers, documents=True)
        for row in range(rows):
            block, at = divmod(row * ROW, 64)
            tokens, starts, loss, _ = manifest.map_block(shard, block)
            assert windows.ids[row, :ROW].tolist() == tokens[at : at + ROW].tolist()
            assert windows.loss[row].tolist() == loss[at : at + ROW].tolist()
            mine = [s - at for s in starts.tolist() if at <= s < at + ROW]
            assert windows.starts[row].tolist() == mine


def expected_mask(batch, loss: np.ndarray) -> list[list[float]]:
    """mask[i] = loss[i + 1] where both are of one document; nothing at a row's end."""
    mask = np.zeros(loss.shape)
    ids = batch.document_ids.numpy()
    for row in range(len(loss)):
        for i in range(ROW - 1):
            mask[row, i] = loss[row, i + 1] * (ids[row, i] == ids[row, i + 1])
    return mask.tolist()


@pytest.mark.parametrize("on_corrupt", list(OnCorrupt))
def test_masks_follow_from_the_rows_and_not_from_the_settings(tmp_path, on_corrupt):
    """The settings say no masks at all; a mask off by one would pass every other test of the loader."""
    cfg = config(packed(tmp_path), data={"on_corrupt": on_corrupt})
    assert not cfg.data.mask_documents
    loader = loader_of(cfg)
    loss_of = {}
    manifest = loader.datasets[0].manifest
    for shard, rows in enumerate(ROWS):
        for row in range(rows):
            block, at = divmod(row * ROW, 64)
            tokens, _, loss, _ = manifest.map_block(shard, block)
            loss_of[tuple(tokens[at : at + ROW].tolist())] = loss[at : at + ROW]
    for batch in loader.next_step():
        loss = np.stack([loss_of[tuple(row)] for row in batch.tokens.tolist()])
        assert batch.loss_mask.tolist() == expected_mask(batch, loss)
        assert batch.labels[:, :-1].tolist() == batch.tokens[:, 1:].tolist()
        resets = torch.cat([torch.ones(1, 1), batch.document_ids.diff(dim=1)], 1) != 0
        assert ((batch.positions == 0) == resets).all()


def test_the_first_token_of_a_document_is_nobodys_label(tmp_path):
    """Even where a foreign writer marks it: its neighbour is of another dialogue."""
    tokens, starts = np.arange(1, 33), np.array([0, 5, 16])
    path = write_dataset(
        tmp_path, [tokens], starts=[starts], losses=[np.ones(32)], row_tokens=ROW, vocab_size=900
    )
    (batch,) = loader_of(config(path, batch=1)).next_step()
    places = np.flatnonzero(batch.loss_mask.numpy()[0] == 0).tolist()
    assert places == ([4, 15] if batch.tokens[0, 0] == 1 else [15])


def test_samples_do_not_depend_on_the_layout_and_resume_in_the_middle_of_an_epoch(tmp_path):
    """Two ranks from a state in mid-epoch read what one would have, each row once an epoch."""
    cfg = config(packed(tmp_path), batch=2)
    whole, seen = loader_of(cfg), []
    states = []
    for _ in range(sum(ROWS)):  # two epochs of 16 rows
        states.append(whole.state())
        seen.append([tuple(row) for batch in whole.next_step() for row in batch.tokens.tolist()])
    epochs = [[row for step in half for row in step] for half in (seen[:8], seen[8:])]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == sum(ROWS)
    for rank in range(2):
        part = loader_of(cfg, world_size=2, data_rank=rank)
        part.restore(states[5])
        for step in range(5, 12):
            (batch,) = part.next_step()
            assert tuple(batch.tokens[0].tolist()) in seen[step]


def test_validation_reads_every_row_and_text_beside_rows(tmp_path):
    rows, words = packed(tmp_path / "rows"), text(tmp_path / "text")
    cfg = config(rows, validation=(words,))
    cfg = replace(cfg, data=follow_data(cfg.data, describe(cfg.data)))
    assert cfg.data.mask_documents and cfg.data.reset_positions
    datasets = open_datasets(
        [DatasetConfig(path=str(p)) for p in (rows, words)], cfg=cfg.data, cache_dir=tmp_path
    )
    for dataset, sequences in zip(datasets, (sum(ROWS), -(-398 // ROW))):
        batches = [
            batch
            for rank in range(2)
            for batch in validation_batches(
                dataset, seq_len=ROW, micro_batch_size=2, data_rank=rank, data_parallel_size=2,
                num_sequences=0, device=CPU, cfg=cfg.data,
            )
        ]  # fmt: skip
        real = [
            batch.loss_mask[row]
            for batch in batches
            for row in range(2)
            if batch.sample_ids[row] < sequences
        ]
        assert len(real) == sequences
        assert all(
            batch.document_ids is not None and batch.positions is not None for batch in batches
        )
    assert sum(float(mask.sum()) for mask in real) == 398


def test_rows_do_not_mix_with_text_other_rows_or_another_template(tmp_path):
    rows, words = packed(tmp_path / "rows"), text(tmp_path / "text")
    other = packed(tmp_path / "other", seed=1, template="{{ other }}")
    with pytest.raises(DataError, match="one is rows of 16 tokens, the other text"):
        describe(config(rows, words).data)
    with pytest.raises(DataError, match="one is text, the other rows of 16 tokens"):
        describe(config(words, validation=(rows,)).data)
    with pytest.raises(DataError, match="different chat templates"):
        describe(config(rows, other).data)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"seq_len": 32},
            r"rows of 16 tokens, and training.seq_len is 32. Set training.seq_len=16",
        ),
        ({"ramp": [RampStage(until_step=2, seq_len=8)]}, "would cut packed rows"),
        ({"data": {"mask_eod_loss": True}}, "mask_eod_loss=true has no effect on packed rows"),
    ],
)
def test_what_does_not_go_with_rows_is_refused_with_the_way_out(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        shape_of(config(packed(tmp_path), **settings))


def test_a_reader_of_other_lengths_is_refused(tmp_path):
    (dataset,) = open_datasets(
        [DatasetConfig(path=str(packed(tmp_path)))], cfg=DataConfig(), cache_dir=tmp_path
    )
    with pytest.raises(DataError, match="rows of 16 tokens, and sequences have 8"):
        Reader([dataset], seq_len=8)


def reseal(folder: Path, **changes) -> None:
    """Change values of the manifest, and seal it again."""
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    content |= changes | {"checksum": "0" * 64}
    raw = json.dumps(content).encode()
    file.write_bytes(
        raw.replace(b'"checksum": "' + b"0" * 64, b'"checksum": "' + sha256_of(raw).encode())
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"row_tokens": 24}, "not whole rows of 24"),
        ({"row_tokens": 0}, "row_tokens is 0"),
        ({"end_of_turn": 900}, "end_of_turn 900 is no id"),
        ({"chat_template": None}, "chat_template is no text"),
        ({"version": 4}, "reads versions 1 to 3"),
        ({"version": 1}, "not rows of 32 bytes"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, changes, said):
    folder = packed(tmp_path)
    reseal(folder, **changes)
    with pytest.raises(DataError, match=said):
        _ = Manifest.load(folder).index


def faults(folder: Path) -> list[str]:
    found = list(find_faults(str(folder), workers=1))
    return [fault for fault in found if "provenance" not in fault]  # which tests do not write


def test_verify_knows_packed_rows(tmp_path):
    assert faults(packed(tmp_path / "good")) == []
    tokens, zero = np.arange(1, 33), np.zeros(32)
    first, two = zero.copy(), zero.copy()
    first[5], two[3] = 1, 2
    for name, starts, loss, said in (
        ("row", [0, 5], zero, "one of them with each row"),
        ("first", [0, 5, 16], first, "first token of a document is marked as learned"),
        ("two", [0, 5, 16], two, "the mask of the loss holds 2"),
    ):
        folder = write_dataset(
            tmp_path / name, [tokens], starts=[np.array(starts)], losses=[loss], row_tokens=ROW,
            vocab_size=900,
        )  # fmt: skip
        (fault,) = faults(folder)
        assert said in fault
    tar = tmp_path / "good/shards/00000/tok-00000000.tar"
    data = bytearray(tar.read_bytes())
    row = Manifest.load(tmp_path / "good").block_row(0, 0)
    data[int(row["loss_offset"]) + 3] ^= 1
    tar.write_bytes(data)
    assert any(
        "00000000-0000.loss.npy: crc32 is not the index's" in f for f in faults(tmp_path / "good")
    )
    zero = np.zeros(1, np.int64)
    (dataset,) = open_datasets(
        [DatasetConfig(path=str(tmp_path / "good"))], cfg=DataConfig(), cache_dir=tmp_path
    )
    with pytest.raises(DataError, match="block 0: the loss at byte"):
        Reader([dataset], seq_len=ROW).gather(zero, zero, zero)
    skipped = Reader([dataset], seq_len=ROW, skip_corrupt=True).gather(zero, zero, zero)
    assert skipped.num_corrupt == 1 and not skipped.loss.any()


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning"
)  # webdataset leaves its file to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_reads_the_three_members(tmp_path):
    import webdataset

    tar = packed(tmp_path) / "shards/00000/tok-00000000.tar"
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode())
    assert [len(sample["tokens.npy"]) for sample in samples] == [64, 16]
    assert [len(sample["loss.npy"]) for sample in samples] == [64, 16]


def test_the_audit_reads_the_rows_that_loaders_read(tmp_path, capsys):
    """Its hashes at three layouts, over the end of an epoch, are those of a loader."""
    from pipeline import cli
    from pipeline.order_audit import AuditConfig
    from pipeline.order_audit import main as audit

    folder = packed(tmp_path / "train")
    words = [f"training.seq_len={ROW}", "training.global_batch_size=12", "steps=3", "seed=7"]
    words += [f"data.train=[{{path: {folder}}}]", "layouts=[1x1,4x2,12x3]"]
    assert audit(cli.compose(AuditConfig, words, config="pretrain")) == 0
    printed = [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:-1]]
    loader = loader_of(config(folder, batch=12))
    for hashes in printed:
        loader.next_step()
        assert hashes == [loader.sample_hash] * 3
    assert len(printed) == 3
