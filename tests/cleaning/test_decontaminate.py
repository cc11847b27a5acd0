import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.cleaning.decontaminate import decontaminate
from pipeline.errors import ConfigError, DataError

QUESTION = (
    "Which of the following planets of our solar system has the largest number of known moons today"
)
SHORT = "name the capital city of the french republic"


@pytest.fixture
def evals(tmp_path: Path) -> list[str]:
    rows = [{"question": QUESTION, "choices": ["Saturn", SHORT], "id": 7}, {"question": "Why?"}]
    (tmp_path / "planets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "poem.txt").write_text(" ".join(f"word{i}" for i in range(40)))
    return [str(tmp_path / "*.jsonl"), str(tmp_path / "poem.txt")]


def find(evals: list[str], text: str, **changes: object) -> str | None:
    settings = {"fields": [], "n_gram": 13, "min_n_gram": 8} | changes
    return decontaminate(evals, **settings)(text)


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not(evals: list[str]) -> None:
    words = QUESTION.split()
    assert find(evals, "So: " + " ".join(words[2:15]) + ", they ask.") == "planets"
    assert find(evals, "So: " + " ".join(words[2:14]) + ", they ask.") is None


def test_case_punctuation_and_line_breaks_do_not_hide_an_overlap(evals: list[str]) -> None:
    assert find(evals, QUESTION.upper().replace(" ", ",\n ")) == "planets"


def test_a_changed_word_breaks_the_overlap(evals: list[str]) -> None:
    words = QUESTION.split()
    words[7] = "galaxy"
    assert find(evals, " ".join(words)) is None


def test_the_same_words_in_another_order_are_no_overlap(evals: list[str]) -> None:
    assert find(evals, " ".join(reversed(QUESTION.split()))) is None


def test_short_texts_must_agree_as_a_whole_and_very_short_ones_are_ignored(
    evals: list[str],
) -> None:
    assert find(evals, f"Please {SHORT}, quickly") == "planets"
    assert find(evals, SHORT.removesuffix(" republic")) is None
    assert find(evals, "Why? Saturn. Why?") is None


def test_the_name_of_the_set_is_reported(evals: list[str]) -> None:
    assert find(evals, "xx " + " ".join(f"word{i}" for i in range(20, 33))) == "poem"


def test_fields_limit_what_is_compared(evals: list[str]) -> None:
    assert find(evals, SHORT, fields=["question"]) is None
    with pytest.raises(DataError, match="answer"):
        find(evals[:1], SHORT, fields=["answer"])


@pytest.mark.parametrize("folder", ["plain", "a[1], b=c", "größe 数学", "d?*"])
@pytest.mark.parametrize(
    "kind", ["jsonl.gz", "json.zst", "parquet", "arrow", "tar", "txt.xz", "md"]
)
def test_sets_are_whatever_input_takes(tmp_path: Path, folder: str, kind: str) -> None:
    """A set that is silently not compared with is a contaminated corpus."""
    rows = [{"q": QUESTION, "deep": [{"choice": SHORT}]}]
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / f"planets.{kind}"
    lines = json.dumps(rows[0]).encode() + b"\n"
    table = pa.table({"q": [QUESTION], "deep": [[{"choice": SHORT}]]})
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo("0.json")
            info.size = len(lines)
            archive.addfile(info, io.BytesIO(lines))
    else:
        content = lines if "json" in kind else f"{QUESTION}\n".encode()
        pack = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress}
        path.write_bytes(pack.get(kind.split(".")[-1], bytes)(content))
    for entry in (str(path), str(tmp_path / folder), str(tmp_path / folder / "*")):
        assert find([entry], QUESTION) == "planets", entry
        if "txt" not in kind and kind != "md":
            assert find([entry], f"Please {SHORT}, quickly") == "planets"


def test_a_set_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(QUESTION)
    with pytest.raises(ConfigError, match="a.csv is of no kind"):
        find([str(tmp_path / "a.csv")], "")


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        find([str(tmp_path / "nowhere.jsonl")], "")


def test_all_overlaps_equal_those_of_a_plain_search(evals: list[str]) -> None:
    """Reference: every 13-gram of the set as a tuple in a Python set."""
    import random

    rng = random.Random(3)
    words = [f"word{i}" for i in range(40)]
    grams = {tuple(words[i : i + 13]) for i in range(28)}
    check = decontaminate(evals[1:], fields=[], n_gram=13, min_n_gram=13)
    seen = set()
    for _ in range(300):
        start, length = rng.randrange(30), rng.randrange(8, 30)
        text = ["xx", *words[start : start + length], rng.choice(words), "yy"]
        if rng.random() < 0.5:
            text[rng.randrange(len(text))] = "zz"
        expected = any(tuple(text[i : i + 13]) in grams for i in range(len(text) - 12))
        seen.add(expected)
        assert (check(" ".join(text)) is not None) == expected
    assert seen == {True, False}
