"""The recipe that names letters, and the pictures that it makes."""

from __future__ import annotations

import importlib.util
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.recipe import ROOT, copy_repository, programs, run_recipe


def script() -> Any:
    spec = importlib.util.spec_from_file_location("letters", ROOT / "launch/letters.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def read(path: Path) -> dict[str, tuple[bytes, str]]:
    """Key to (png, name)."""
    with tarfile.open(path) as archive:
        files = {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]
    return {n[:-4]: (files[n], files[n[:-4] + ".txt"].decode()) for n in files if n.endswith("png")}


def test_no_face_that_is_held_out_is_learned_and_a_wrong_picture_is_wrong(tmp_path: Path) -> None:
    """Every name that is asked for was learned, in other faces; the wrong picture is another letter's."""
    letters = script()
    letters.main(tmp_path)
    train, held, wrong = (read(tmp_path / f"{part}.tar") for part in ("train", "held", "wrong"))
    assert len(train) > 10_000 and len(held) == letters.NUM_HELD
    faces = [{key.rpartition("-")[0] for key in part} for part in (train, held)]
    assert faces[1] == set(letters.HELD_FACES) and len(faces[0]) == 10 and not faces[0] & faces[1]
    known = {name for _, name in train.values()}
    assert {name for _, name in held.values()} <= known
    assert known == set((tmp_path / "names.txt").read_text().splitlines())
    assert {key: name for key, (_, name) in wrong.items()} == {
        key: name for key, (_, name) in held.items()
    }
    shown = [
        {name for other, name in held.values() if other == picture} for picture, _ in wrong.values()
    ]
    apart = sum(name not in names for names, (_, name) in zip(shown, wrong.values(), strict=True))
    assert apart == len(wrong)
    assert sorted(picture for picture, _ in wrong.values()) == sorted(
        picture for picture, _ in held.values()
    )


@pytest.mark.slow
def test_the_recipe_goes_its_way_from_letters_to_a_sheet(tmp_path: Path) -> None:
    """A few steps of it; docs/pictures.md has what the whole of it reaches."""
    copy_repository(tmp_path)
    words = (
        "training.total_steps=20",
        "schedule.warmup_steps=5",
        "training.eval_every=0",
        "checkpoint.save_every=0",
    )
    first = run_recipe(tmp_path, "caption", *words, timeout_s=1800)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    assert programs(first.stdout) == [
        "letters.py", "data_prep.train_tokenizer", *["data_prep.conversations"] * 3, "data_prep.show", "local.sh",
        "pipeline.evaluate", "pipeline.export", "launch.letter_sheet", "pipeline.report",
    ]  # fmt: skip
    assert re.search(
        r"bits a token: \d\.\d\d with the right picture, \d\.\d\d with another one", first.stdout
    )
    assert (tmp_path / "runs/caption/sheet.png").stat().st_size > 10_000
    second = run_recipe(tmp_path, "caption", timeout_s=900)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "local.sh" not in second.stdout and "conversations" not in second.stdout
