"""Canaries are planted as often as they say, in the training split alone, and their list is sealed."""

from __future__ import annotations

import stat
from collections import Counter
from pathlib import Path

import pytest

from data_prep.tokens.browse import read_document, tokenizer_of
from data_prep.tokens.canaries import CanaryConfig, check, draw
from data_prep.tokens.tokenize_job import TokenizeConfig
from data_prep.tokens.tokenize_job import main as tokenize
from pipeline import cli
from pipeline.data.canary_list import CANARIES, fill, read_list
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError, DataError
from tests.support.corpus import checksums, make_texts, make_tokenizer, write_jsonl

PLANTED = ["canaries.each=3", "canaries.repetitions=[1,5,20]", "canaries.seed=7"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canaries")
    make_tokenizer(folder / "tokenizer.json")
    for i in range(3):
        write_jsonl(folder / f"in/{i}.jsonl", make_texts(90)[30 * i : 30 * i + 30])
    return folder


def prepare(corpus: Path, output: Path, *words: str) -> Path:
    places = [f"input={corpus}/in", f"output={output}", f"tokenizer={corpus}/tokenizer.json"]
    more = ["unit_mb=0.01", "encoder=hf", "validation_fraction=0.2", *words]
    tokenize(cli.compose(TokenizeConfig, [*places, *more], config="tokenize"))
    return output


def texts(folder: Path) -> list[str]:
    manifest = Manifest.load(folder)
    backend = tokenizer_of(manifest)
    return [
        backend.decode(read_document(manifest, n)[:-1]) for n in range(manifest.documents)
    ]  # fmt: skip


def test_they_are_planted_once_to_64_times_unless_it_is_said_otherwise() -> None:
    drawn = draw(CanaryConfig(each=2))
    assert Counter(c.repetitions for c in drawn) == dict.fromkeys((0, 1, 4, 16, 64), 2)


def test_each_is_planted_as_often_as_it_says_and_never_held_out(
    corpus: Path, tmp_path: Path
) -> None:
    output = prepare(corpus, tmp_path / "out", "workers=1", *PLANTED)
    template, canaries = read_list(output / CANARIES)
    assert Counter(c.repetitions for c in canaries) == {0: 3, 1: 3, 5: 3, 20: 3}
    assert len({c.secret for c in canaries}) == len({c.name for c in canaries}) == 12
    train, held_out = Counter(texts(output / "train")), Counter(texts(output / "validation"))
    for canary in canaries:
        text = fill(template, canary.name, canary.secret)
        assert train.pop(text, 0) == canary.repetitions
        assert text not in held_out
    plain = prepare(corpus, tmp_path / "plain", "workers=1")
    assert not (plain / CANARIES).exists()
    assert train == Counter(texts(plain / "train"))
    assert held_out == Counter(texts(plain / "validation"))


def test_a_file_called_canary_is_none(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went past remove=, the count of personal data and the split, by its name."""
    monkeypatch.chdir(tmp_path)
    Path("canary").write_text("to be left out")
    Path("other").write_text("to be kept")
    words = ["input=canary,other", "remove=canary", "format=text", "validation_fraction=0"]
    output = prepare(corpus, tmp_path / "out", "workers=1", *words)
    assert texts(output / "train") == ["to be kept"]


def test_copies_lie_apart_and_workers_change_no_byte(corpus: Path, tmp_path: Path) -> None:
    """Copies side by side would be learned from one window."""
    one = prepare(corpus, tmp_path / "one", "workers=1", *PLANTED)
    two = prepare(corpus, tmp_path / "two", "workers=2", *PLANTED)
    assert checksums(one) == checksums(two)
    template, canaries = read_list(one / CANARIES)
    often = next(c for c in canaries if c.repetitions == 20)
    text = fill(template, often.name, often.secret)
    places = [i for i, found in enumerate(texts(one / "train")) if found == text]
    assert places[-1] - places[0] > 60  # of 90 * 0.8 documents and 78 copies
    assert sum(b - a > 1 for a, b in zip(places, places[1:])) > 12


def test_another_list_is_another_job_and_a_changed_one_is_refused(
    corpus: Path, tmp_path: Path
) -> None:
    output = prepare(corpus, tmp_path / "out", "workers=1", *PLANTED)
    assert stat.S_IMODE((output / CANARIES).stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="canaries"):
        prepare(corpus, output, "workers=1", *PLANTED[:2], "canaries.seed=8")
    raw = (output / CANARIES).read_bytes()
    (output / CANARIES).write_bytes(raw.replace(b'"repetitions": 20', b'"repetitions": 21', 1))
    with pytest.raises(DataError, match="checksum"):
        read_list(output / CANARIES)
    (output / CANARIES).write_bytes(b"[]")
    with pytest.raises(DataError, match="is not what data_prep.tokenize.py writes"):
        read_list(output / CANARIES)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"each": -1}, "at least 0"),
        ({"repetitions": [0, 4]}, "never planted are drawn"),
        ({"repetitions": [4, 4]}, "twice"),
        ({"template": "no secret of {name}"}, "once"),
        ({"template": "{secret} of {name}"}, "then"),
        ({"each": 10**6}, "copies"),
    ],
)
def test_what_cannot_be_planted_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(CanaryConfig(**({"each": 1} | change)))


def test_the_seed_decides(corpus: Path) -> None:
    assert draw(CanaryConfig(each=2, seed=1)) == draw(CanaryConfig(each=2, seed=1))
    assert draw(CanaryConfig(each=2, seed=1)) != draw(CanaryConfig(each=2, seed=2))
