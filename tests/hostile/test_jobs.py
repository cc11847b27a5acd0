"""Hostile output folders of data_prep: finalize ends well or in a PipelineError, and moves nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import finalize
from data_prep.tokens.shard_writer import Part
from pipeline.errors import DataError
from tests.hostile.test_fuzz import PART
from tests.support.hostile import Damage, every, of_file, of_json, try_all

UNIT = {
    "splits": {"train": {"parts": [PART], "text_bytes": 9}},
    "rejects": {"empty": 1},
    "nearest": None,
}
JOB = {
    "job": "tokenize",
    "units": 1,
    "validation_fraction": 0.0,
    "tokenizer": {"sha256": "0" * 64, "vocab_size": 400, "eod": 0},
}


def job(folder: Path) -> Path:
    """A job whose units are done; its part is not what the marker says."""
    for name in ("tokenize", "parts", "rejects"):
        (folder / ".work" / name).mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(JOB))
    (folder / ".work/tokenize/00000000.json").write_text(json.dumps(UNIT))
    (folder / ".work/tokenizer.json").write_text("{}")
    (folder / ".work/parts/a.tar").write_bytes(bytes(1024))
    return folder


def use(folder: Path) -> None:
    finalize.main(finalize.FinalizeConfig(output=str(folder)))


def test_jobs(tmp_path, outside, caplog):
    valid = job(tmp_path / "valid")
    marker = ".work/tokenize/00000000.json"

    def cases() -> Iterator[tuple[str, str, Damage]]:
        yield from every(["job.json", marker, ".work/parts/a.tar"], of_file(outside))
        for name, damage in of_json(JOB):
            yield "job.json", name, damage
        for name, damage in of_json(UNIT, depth=5):
            yield marker, name, damage

    try_all(valid, use, cases(), least=250)


@pytest.mark.parametrize(
    ("name", "most"), [("job.json", 1 << 26), (".work/tokenize/00000000.json", 1 << 28)]
)
def test_what_a_job_wrote_is_small(tmp_path: Path, name: str, most: int) -> None:
    """4 GB of it were read into memory, and more of them made by the parser."""
    with (job(tmp_path / "a") / name).open("ab") as file:
        file.truncate(most + 1)
    with pytest.raises(DataError, match=f"such a file has at most {most}"):
        use(tmp_path / "a")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.tar", "a/b.tar", "..", "", "a\0.tar"])
def test_a_part_is_a_file_of_the_folder_of_parts(name: str) -> None:
    """It is renamed to become a shard: a name with a path would move somebody's file."""
    with pytest.raises(DataError, match="tells of no part"):
        Part.of(PART | {"name": name})


def test_what_a_job_wrote_of_a_part_is_read_again() -> None:
    part = Part("00000000-train-000.tar", 0, "web", tokens=3, blocks=[[1, 2]], inputs=["a", "b"])
    assert Part.of(part.as_json()) == part
