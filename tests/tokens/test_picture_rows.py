"""Dialogues with pictures from tars, lines and tables: every picture reaches its own placeholders."""

from __future__ import annotations

import contextlib
import json
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import show
from data_prep.tokens.check import find_faults
from pipeline import cli
from pipeline.data import shard_format as fmt
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError
from tests.support.corpus import checksums, make_tokenizer
from tests.support.picture_talks import (
    PATCH,
    ROW,
    SIZE,
    colour,
    convert,
    dialogues,
    fill,
    picture,
    write_tar,
)
from tests.support.waiting import kill_after_new_names


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_tokenizer(folder / "tokenizer.json")
    fill(folder / "in")
    return folder


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(corpus, tmp_path_factory.mktemp("reference") / "out")


def test_every_picture_stands_where_its_dialogue_shows_it(reference: Path) -> None:
    """Its colour is the number that the words beside it say; nothing is lost, and verify finds no fault."""
    found = [pair for split in ("train", "validation") for pair in dialogues(reference / split)]
    assert len(found) == 40 + 40 + 40 + 10
    shown = 0
    for words, images in found:
        numbers = [int(n) for n in "".join(c if c.isdigit() else " " for c in words).split()]
        assert words.count("<|image|>") == len(images)
        for image, number in zip(images, numbers):
            assert image.shape == (3, SIZE, SIZE) and np.ptp(image, (1, 2)).max() == 0
            assert tuple(image[:, 0, 0].tolist()) == colour(number), words
            shown += 1
    assert shown == 30 + 2 * 10 + 8 * (2 + 2 + 1 + 2) + 40 + 2 * 10
    assert any("Is this <|image|>" in words and "No, <|image|>" in words for words, _ in found)
    for split in ("train", "validation"):
        assert list(find_faults(str(reference / split), workers=1)) == []
        manifest = Manifest.load(reference / split)
        assert manifest.layout.version == 3 and manifest.pictures is not None
        assert (manifest.pictures.image_size, manifest.pictures.patch_size) == (SIZE, PATCH)
    assert Manifest.load(reference / "train").images_per_row_max >= 4


def test_bytes_do_not_depend_on_workers_or_kills(
    corpus: Path, reference: Path, tmp_path: Path
) -> None:
    """As those of text: units are done whole or again."""
    assert checksums(convert(corpus, tmp_path / "three", "workers=3")) == checksums(reference)
    draw, output = random.Random(5), tmp_path / "killed"
    for _ in range(4):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                convert(corpus, output)
            os._exit(0)
        kill_after_new_names(child, output, draw.randint(1, 12))
    assert checksums(convert(corpus, output)) == checksums(reference)
    assert not (output / ".work").exists()


def test_bytes_do_not_depend_on_array_tasks(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task i of n by its settings and as a Slurm array counts from 1; the last one makes the datasets."""
    output = tmp_path / "tasks"
    for task in (2, 0, 1):
        assert not (output / "train").exists()
        convert(corpus, output, f"task={task}", "num_tasks=3")
    assert checksums(output) == checksums(reference)
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    output = tmp_path / "array"
    for task in (2, 3, 1):
        assert not (output / "train").exists()
        for name, value in {**array, "SLURM_ARRAY_TASK_ID": str(task)}.items():
            monkeypatch.setenv(name, value)
        convert(corpus, output)
    assert checksums(output) == checksums(reference)


def test_every_suffix_of_a_picture_is_one_in_a_tar(corpus: Path, tmp_path: Path) -> None:
    """Also in capitals, as cameras write them, and beside each other in one sample."""
    jpeg = partial(picture, kind="JPEG", quality=100, subsampling=0)
    members = {
        "a.png": picture(10), "a.txt": b"10", "b.jpg": jpeg(20), "b.txt": b"20", "c.jpeg": jpeg(30), "c.txt": b"30",
        "d.webp": picture(40, "WEBP"), "d.txt": b"40", "E.JPG": jpeg(50), "E.txt": b"50",
        "f.0.png": picture(60), "f.1.jpg": jpeg(61), "f.2.webp": picture(62, "WEBP"), "f.txt": b"60 61 62",
    }  # fmt: skip
    write_tar(corpus / "kinds.tar", members)
    output = convert(corpus, tmp_path / "out", "validation_fraction=0", source="kinds.tar")
    seen = []
    for words, images in dialogues(output / "train"):
        said = words.split("assistant\n")[1].split("<")[0].split()
        for number, image in zip(map(int, said), images, strict=True):
            off = np.abs(image.astype(int) - np.reshape(colour(number), (3, 1, 1)))
            assert off.max() <= (2 if number in (20, 30, 50, 61) else 0), words
            seen.append(number)
    assert sorted(seen) == [10, 20, 30, 40, 50, 60, 61, 62]


def test_blocks_and_shards_are_cut_between_rows(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Pictures are large: a block has few rows, a shard is not as long as one of text."""
    monkeypatch.setattr(fmt, "PICTURE_BLOCK_BYTES", 3 * PATCH**2 * ROW * 2)
    monkeypatch.setattr(fmt, "SHARD_TOKENS", 3 * fmt.BLOCK_TOKENS)
    output = convert(corpus, tmp_path / "out")
    manifest = Manifest.load(output / "train")
    assert manifest.block_tokens == 2 * ROW and manifest.num_shards > 2
    assert list(find_faults(str(output / "train"), workers=1)) == []
    texts = [
        sorted(words for words, _ in dialogues(folder / "train")) for folder in (output, reference)
    ]
    assert texts[0] == texts[1]


def test_what_is_said_of_one_picture_is_held_out_together(corpus: Path, tmp_path: Path) -> None:
    """Else a model has seen the picture that it is scored on."""
    lines = [
        {"image": f"in/small/{n}.png", "text": f"{n} {k}"}
        for n in range(200, 230)
        for k in range(3)
    ]
    (corpus / "same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = convert(corpus, tmp_path / "out", "validation_fraction=0.3", source="same.jsonl")
    seen, held = (
        {w.split("<|image|>")[1].split()[2] for w, _ in dialogues(output / s)}
        for s in ("train", "validation")
    )
    assert (
        seen and held and not seen & held and len(dialogues(output / "validation")) == 3 * len(held)
    )


def test_a_few_dialogues_have_a_held_out_one_with_its_picture(corpus: Path, tmp_path: Path) -> None:
    """Rows are packed anew for it, pictures and all."""
    lines = [{"image": f"in/small/{n}.png", "text": f"{n}"} for n in range(200, 209)]
    (corpus / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = convert(corpus, tmp_path / "out", "validation_fraction=1e-6", source="few.jsonl")
    found = [dialogues(output / split) for split in ("train", "validation")]
    assert [len(part) for part in found] == [8, 1]
    for words, images in found[0] + found[1]:
        assert tuple(images[0, :, 0, 0].tolist()) == colour(
            int(words.split("assistant\n")[1].split("<")[0])
        )
    assert list(find_faults(str(output / "validation"), workers=1)) == []


def reseal(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) | changes | {"checksum": fmt.UNSEALED}
    path.write_bytes(fmt.seal(json.dumps(content).encode()))


def test_verify_names_what_is_wrong_with_pictures(corpus: Path, tmp_path: Path) -> None:
    """Their sum, their number, and that a row has no more than the manifest says."""
    folder = convert(corpus, tmp_path / "out", "validation_fraction=0") / "train"
    most = Manifest.load(folder).images_per_row_max
    reseal(folder, images_per_row_max=most - 1)
    faults = "\n".join(find_faults(str(folder), workers=1))
    assert f"a row of {most} pictures, more than {most - 1}" in faults
    reseal(folder, images_per_row_max=most)
    (tar,) = folder.glob("shards/*/*.tar")
    content = bytearray(tar.read_bytes())
    content[content.index(bytes([colour(303)[0]] * 64))] ^= 1
    tar.write_bytes(bytes(content))
    faults = "\n".join(find_faults(str(folder), workers=1))
    assert "images.npy: crc32 is not the index's" in faults


def test_show_writes_the_pictures_of_a_document_where_it_is_told(
    corpus: Path, reference: Path, tmp_path: Path, capsys: Any
) -> None:
    """And nowhere else; in the text each is one placeholder."""

    def shown(*words: str) -> str:
        show.main(
            cli.compose(
                show.ShowConfig,
                [str(reference / "train"), *words],
                config="show",
                positional=["dataset"],
            )
        )
        return str(capsys.readouterr().out)

    words, images = dialogues(reference / "train")[0]
    out = shown("document=0", f"pictures={tmp_path}/seen")
    assert words in out and f"picture: {tmp_path}/seen/document-0-0.png" in out
    files = sorted((tmp_path / "seen").iterdir())
    assert len(files) == len(images)
    assert np.array_equal(np.asarray(Image.open(files[0])).transpose(2, 0, 1), images[0])
    row = shown("row=0", f"pictures={tmp_path}/row")
    assert "<|image|>" in row and "<|image|><|image|><|image|>" not in row
    assert len(list((tmp_path / "row").iterdir())) == row.count("<|image|>")
    with pytest.raises(ConfigError, match="one document= or one row="):
        shown(f"pictures={tmp_path}/seen")
