"""Pictures belong to their placeholders: in the ids of a dialogue, in a block, in a row, in a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.data.batch import Masks, make_batches
from pipeline.data.datasets import describe, open_datasets
from pipeline.data.pictures import picture_rows, spread
from pipeline.data.reader import Reader, Windows
from pipeline.data.shard_format import Pictures
from pipeline.errors import DataError, ShardError
from tests.support.token_dataset import write_dataset

PICTURES = Pictures(image_size=4, patch_size=2, image_token_id=3)
ROW = 12
X = [3] * 4  # one picture
# Four rows: two pictures side by side, none, one, one at the row's end.
ROWS = [
    [7, *X, *X, 8, 9, 0],
    [7, 8, 9, *[5] * 9],
    [7, 8, *X, 9, *[5] * 5],
    [7, *[8] * 7, *X],
]
TOKENS = np.array(ROWS).reshape(-1)


def shown(count: int, first: int = 1) -> np.ndarray:
    """Pictures that are told apart by their value."""
    return np.arange(first, first + count, dtype=np.uint8)[:, None, None, None] * np.ones(
        (3, 4, 4), np.uint8
    )


def dataset(
    folder: Path,
    tokens: np.ndarray = TOKENS,
    images: np.ndarray | None = None,
    most: int = 2,
    **other: object,
) -> Path:
    """Rows with pictures, two rows a block."""
    return write_dataset(
        folder, [tokens], starts=[np.arange(0, len(tokens), ROW)], block_tokens=2 * ROW, vocab_size=50,
        losses=[tokens == 9], row_tokens=ROW, pictures=PICTURES,
        images=[shown(4) if images is None else images], images_per_row_max=most, **other,
    )  # fmt: skip


def opened(*folders: Path, tmp: Path) -> list:
    """The datasets, as training opens them."""
    cfg = DataConfig(train=[DatasetConfig(path=str(folder)) for folder in folders])
    return open_datasets(cfg.train, cfg=cfg, cache_dir=tmp)


def gather(folder: Path, tmp_path: Path, **settings: bool) -> tuple[Reader, Windows]:
    """All rows of one dataset."""
    reader = Reader(opened(folder, tmp=tmp_path), seq_len=ROW, **settings)
    rows = np.arange(4)
    return reader, reader.gather(rows * 0, rows * 0, rows, documents=True)


def test_a_row_gets_its_own_pictures_in_order_and_blank_ones_behind(tmp_path: Path) -> None:
    """Rows of one block share its pictures; the slots are those of the fullest row, in every row."""
    reader, windows = gather(dataset(tmp_path / "d"), tmp_path)
    assert reader.slots == 2
    assert windows.images is not None and windows.images.shape == (4, 2, 3, 4, 4)
    assert windows.images.dtype == np.uint8
    assert windows.images[:, :, 0, 0, 0].tolist() == [[1, 2], [0, 0], [3, 0], [4, 0]]
    batches = make_batches(
        windows, np.arange(4), seq_len=ROW, micro_batch_size=2, masks=Masks.of(DataConfig(), packed=True),
        eod=0, device=torch.device("cpu"), placeholder=3,
    )  # fmt: skip
    patches = torch.cat([batch.patch_ids for batch in batches if batch.patch_ids is not None])
    assert patches[0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1]
    assert patches[1].eq(-1).all() and patches[3].tolist() == [-1] * 8 + [0, 1, 2, 3]
    found = torch.cat([batch.images for batch in batches if batch.images is not None])
    assert found.dtype == torch.uint8 and torch.equal(found, torch.from_numpy(windows.images))
    assert all(
        batch.images is not None and batch.images.shape == (2, 2, 3, 4, 4) for batch in batches
    )


def test_a_dataset_that_may_have_pictures_but_has_none_gives_one_blank_slot(tmp_path: Path) -> None:
    """An encoder that does not run on one rank is a collective that its peers wait in for ever."""
    text = np.array([ROWS[1]] * 4).reshape(-1)
    _, windows = gather(dataset(tmp_path / "d", text, shown(0), most=0), tmp_path)
    assert windows.images is not None
    assert windows.images.shape == (4, 1, 3, 4, 4) and not windows.images.any()


@pytest.mark.parametrize(
    ("tokens", "count", "message"),
    [
        (TOKENS, 5, "placeholders of 2 pictures, and 3 pictures"),
        (TOKENS, 3, "placeholders of 2 pictures, and 1 pictures"),
        (np.where(np.arange(48) == 47, 8, TOKENS), 4, "7 placeholders, not a multiple of 4"),
        (np.roll(TOKENS, 1), 4, "that are not 4 in one run inside one row"),
    ],
)
def test_placeholders_and_pictures_that_do_not_fit_are_named(
    tmp_path: Path, tokens: np.ndarray, count: int, message: str
) -> None:
    """A gather would repeat the last picture and go on: the loss says nothing."""
    if count == 4 and "7" not in message:
        tokens = TOKENS.copy()
        tokens[24:36] = [7, 8, 3, 9, 3, 3, 3, 5, 5, 5, 5, 5]  # a word inside a run
    folder = dataset(tmp_path / "d", tokens, shown(count))
    with pytest.raises(ShardError, match=message):
        gather(folder, tmp_path)
    _, windows = gather(folder, tmp_path, skip_corrupt=True)
    assert windows.num_corrupt == 2 and windows.images is not None
    assert windows.images[:, :, 0, 0, 0].tolist() == [[1, 2], [0, 0], [0, 0], [0, 0]]


def test_a_picture_over_the_end_of_a_row_is_refused() -> None:
    """The next row belongs to another sample."""
    tokens = np.array([7] * 10 + X + [8] * 10)
    with pytest.raises(
        ValueError, match="from token 10 on that are not 4 in one run inside one row"
    ):
        picture_rows(tokens, PICTURES, ROW)


def test_damaged_pixels_are_found_by_their_sum(tmp_path: Path) -> None:
    """They come from a disk as tokens do."""
    folder = dataset(tmp_path / "d")
    (tar,) = folder.glob("shards/*/*.tar")
    content = bytearray(tar.read_bytes())
    content[content.index(bytes([2] * 48))] ^= 1
    tar.write_bytes(bytes(content))
    with pytest.raises(ShardError, match="the images at byte .* are corrupt"):
        gather(folder, tmp_path)


def test_rows_with_pictures_mix_with_rows_without(tmp_path: Path) -> None:
    """The rows without get blank slots; of other sizes there is no mixture."""
    text = write_dataset(
        tmp_path / "text", [np.array([ROWS[1]] * 2).reshape(-1)], starts=[np.array([0, ROW])], block_tokens=2 * ROW,
        vocab_size=50, losses=[np.ones(2 * ROW)], row_tokens=ROW,
    )  # fmt: skip
    pictures = dataset(tmp_path / "d")
    reader = Reader(opened(pictures, text, tmp=tmp_path), seq_len=ROW)
    windows = reader.gather(np.array([0, 1]), np.zeros(2, int), np.zeros(2, int), documents=True)
    assert windows.images is not None
    assert windows.images[:, :, 0, 0, 0].tolist() == [[1, 2], [0, 0]]
    cfg = DataConfig(
        train=[DatasetConfig(path=str(text)), DatasetConfig(path=str(pictures))], validation=[]
    )
    assert describe(cfg).pictures == PICTURES
    other = write_dataset(
        tmp_path / "other", [TOKENS], starts=[np.arange(0, 48, ROW)], block_tokens=2 * ROW, vocab_size=50,
        losses=[TOKENS == 9], row_tokens=ROW, pictures=Pictures(2, 1, 3),
        images=[np.zeros((4, 3, 2, 2))], images_per_row_max=2,
    )  # fmt: skip
    cfg.train.append(DatasetConfig(path=str(other)))
    with pytest.raises(DataError, match="differ: .*image_size=4.* and .*image_size=2"):
        describe(cfg)


def test_text_that_holds_a_placeholder_does_not_mix_with_pictures(tmp_path: Path) -> None:
    """Its row would be shown nothing where it says that there is a picture."""
    text = write_dataset(
        tmp_path / "text", [TOKENS], starts=[np.arange(0, 48, ROW)], block_tokens=2 * ROW, vocab_size=50,
        losses=[TOKENS == 9], row_tokens=ROW,
    )  # fmt: skip
    reader = Reader(opened(dataset(tmp_path / "d"), text, tmp=tmp_path), seq_len=ROW)
    with pytest.raises(ShardError, match="placeholders of 2 pictures, and 0 pictures"):
        reader.gather(np.ones(1, int), np.zeros(1, int), np.zeros(1, int), documents=True)


def test_a_placeholder_becomes_one_a_patch_and_is_never_learned() -> None:
    """Also where an answer shows a picture; what follows it is learned."""
    ids, loss = spread(np.array([7, 3, 8, 3, 3]), np.array([0, 0, 1, 1, 1], np.uint8), PICTURES)
    assert ids.tolist() == [7, *X, 8, *X, *X]
    assert loss.tolist() == [0, *[0] * 4, 1, *[0] * 8] and loss.dtype == np.uint8
