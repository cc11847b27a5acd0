"""What a model wrote while it was trained, by step."""

import json

import pytest

from pipeline.errors import DataError
from pipeline.tracking.samples import Sample, read_samples


def write(run_dir, *rows, tail=""):
    lines = [json.dumps(row) for row in rows]
    (run_dir / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines) + tail)


def row(step, number, prompt, text):
    return {"step": step, "tokens": 8 * step, "number": number, "prompt": prompt, "text": text}


def test_of_steps_that_a_restart_repeats_the_later_samples_count(tmp_path):
    """The same prompt may stand twice in the settings; a killed process leaves half a line."""
    assert read_samples(tmp_path) == {}
    write(
        tmp_path,
        row(4, 0, "a", "1"), row(4, 1, "a", "2"), row(4, 2, "", "3"), row(8, 0, "a", "lost"),
        row(4, 0, "a", "4"), row(4, 1, "a", "5"), row(4, 2, "", "6"),
        tail='{"step": 8, "tok',
    )  # fmt: skip
    assert read_samples(tmp_path) == {
        4: [Sample("a", "4"), Sample("a", "5"), Sample("", "6")],
        8: [Sample("a", "lost")],
    }


def test_a_step_that_is_repeated_at_once_has_its_samples_once(tmp_path):
    """With one prompt, killed before the next samples: both stood in the report."""
    write(tmp_path, row(4, 0, "", "old"), row(4, 0, "", "new"))
    assert read_samples(tmp_path) == {4: [Sample("", "new")]}


def test_a_prompt_may_come_again_behind_another(tmp_path):
    write(tmp_path, row(4, 0, "a", "1"), row(4, 1, "b", "2"), row(4, 2, "a", "3"))
    assert read_samples(tmp_path) == {4: [Sample("a", "1"), Sample("b", "2"), Sample("a", "3")]}


def test_a_row_of_something_else_is_named(tmp_path):
    write(tmp_path, row(4, 0, "a", 5))
    with pytest.raises(DataError, match="has a row that is no sample: text"):
        read_samples(tmp_path)
