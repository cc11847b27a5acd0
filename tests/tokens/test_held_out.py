"""A small corpus has a held-out set too: the same for any workers, tasks and kills."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep import import_tokens
from data_prep.tokens.browse import read_document
from data_prep.tokens.check import find_faults
from data_prep.tokens.split import digest_text, is_held_out
from data_prep.tokens.tokenize_job import TokenizeConfig, main
from pipeline import cli
from pipeline.data.canary_list import CANARIES, fill, read_list
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizer import Tokenizer
from tests.support.corpus import make_texts, make_tokenizer, write_jsonl
from tests.support.log_lines import unbroken

FRACTION = 1e-5  # no text of make_texts(300) falls into it


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_file(make_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.json"))


def tokenize(folder, tokenizer, texts, *words, name="out", fraction=FRACTION):
    write_jsonl(folder / "in.jsonl", texts)
    places = [f"input={folder}/in.jsonl", f"output={folder}/{name}", f"tokenizer={tokenizer.path}"]
    words = [f"validation_fraction={fraction}", "unit_mb=0.02", *(words or ["workers=1"])]
    main(cli.compose(TokenizeConfig, [*places, *words], config="tokenize"))
    return folder / name


def texts_of(output, split, tokenizer):
    assert list(find_faults(str(output / split), workers=1)) == []
    manifest = Manifest.load(output / split)
    texts = [tokenizer.decode(read_document(manifest, n)[:-1]) for n in range(manifest.documents)]
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    return texts


def note_of(output):
    return json.loads((output / "summary.json").read_text())["held_out"]


def files(output):
    paths = (p for p in output.rglob("*") if p.is_file() and p.name != "job.json")
    return {str(p.relative_to(output)): p.read_bytes() for p in paths}


@pytest.mark.parametrize("count", [2, 3, 30, 300])
def test_the_document_with_the_lowest_digest_is_held_out(tmp_path, tokenizer, count, capsys):
    """As if the fraction were just large enough: a larger one holds out the same and more."""
    texts = make_texts(count)
    assert not any(is_held_out(digest_text(text), FRACTION) for text in texts)
    output = tokenize(tmp_path, tokenizer, texts)
    chosen = min(texts, key=digest_text)
    assert texts_of(output, "validation", tokenizer) == [chosen]
    assert texts_of(output, "train", tokenizer) == [text for text in texts if text != chosen]
    note = (
        f"none of {count} documents fell into validation_fraction={FRACTION}; held out is the next"
    )
    assert note in note_of(output)
    assert note in unbroken(capsys.readouterr().err)
    lines = (output / "validation/provenance.jsonl").read_text()
    assert lines.count(f"{tmp_path}/in.jsonl@") == 2


def planted_in(output):
    template, canaries = read_list(output / CANARIES)
    return Counter({fill(template, c.name, c.secret): c.repetitions for c in canaries if c.repetitions})  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_canaries_stay_in_train_and_move_no_place(tmp_path, tokenizer, workers):
    """Places were counted without them: another document was held out, or one of them."""
    texts = make_texts(30)
    words = [f"workers={workers}", "canaries.each=2", "canaries.repetitions=[1,5]"]
    output = tokenize(tmp_path, tokenizer, texts, *words)
    assert texts_of(output, "validation", tokenizer) == [min(texts, key=digest_text)]
    train = Counter(texts_of(output, "train", tokenizer))
    assert train == Counter(texts) - Counter([min(texts, key=digest_text)]) + planted_in(output)


@pytest.mark.parametrize("fraction", [FRACTION, 0.999])
def test_of_an_only_document_among_canaries_the_end_is_held_out(tmp_path, tokenizer, fraction):
    """Held out by its digest or not: canaries are nothing to train on, and are not divided."""
    text = "".join(make_texts(40))
    assert is_held_out(digest_text(text), fraction) == (fraction > 0.5)
    words = ["workers=1", "canaries.each=2", "canaries.repetitions=[1,3]"]
    output = tokenize(tmp_path, tokenizer, [text], *words, fraction=fraction)
    (end,) = texts_of(output, "validation", tokenizer)
    train = Counter(texts_of(output, "train", tokenizer))
    (begin,) = (train - planted_in(output)).elements()
    assert begin + end == text and begin and train == Counter([begin]) + planted_in(output)


def test_an_only_document_is_divided(tmp_path, tokenizer):
    text = "".join(make_texts(40))
    output = tokenize(tmp_path, tokenizer, [text])
    train, validation = (texts_of(output, split, tokenizer) for split in ("train", "validation"))
    assert len(train) == len(validation) == 1
    assert train[0] + validation[0] == text
    size = len(tokenizer.encode(text))
    assert len(tokenizer.encode(validation[0])) in range(size // 10 - 5, size // 10 + 5)
    assert f"held out are the last {size // 10} of {size} tokens" in note_of(output)


def test_an_only_document_that_is_held_out_leaves_something_to_train_on(tmp_path, tokenizer):
    """Once in two hundred corpora of one document, at the default fraction."""
    text = "".join(make_texts(40))
    fraction = digest_text(text) / 2**64 * 1.001
    assert is_held_out(digest_text(text), fraction)
    output = tokenize(tmp_path, tokenizer, [text], fraction=fraction)
    (train,), (validation,) = (texts_of(output, s, tokenizer) for s in ("train", "validation"))
    assert train + validation == text and len(train) > len(validation)
    assert f"all of 1 documents fell into validation_fraction={fraction}; held out are the last" in note_of(output)  # fmt: skip


@pytest.mark.parametrize("words", [("workers=1",), ("workers=2",)])
def test_documents_that_are_all_held_out_leave_all_but_one_to_train_on(tmp_path, tokenizer, words):
    texts = make_texts(30)
    fraction = max(map(digest_text, texts)) / 2**64 * 1.0001
    assert all(is_held_out(digest_text(text), fraction) for text in texts) and fraction < 1
    output = tokenize(tmp_path, tokenizer, texts, *words, fraction=fraction)
    chosen = min(texts, key=digest_text)
    assert texts_of(output, "validation", tokenizer) == [chosen]
    assert texts_of(output, "train", tokenizer) == [text for text in texts if text != chosen]
    assert "all of 30 documents fell into" in note_of(output)


def test_copies_are_held_out_together(tmp_path, tokenizer):
    texts = make_texts(60)
    chosen = min(texts, key=digest_text)
    texts = [*texts, chosen, *make_texts(80)[60:], chosen]
    output = tokenize(tmp_path, tokenizer, texts)
    least = min(texts, key=digest_text)
    held_out = texts_of(output, "validation", tokenizer)
    assert held_out == [least] * texts.count(least)
    assert least not in texts_of(output, "train", tokenizer)


def test_only_copies_of_one_document_leave_something_to_train_on(tmp_path, tokenizer):
    text = make_texts(40)[39]
    output = tokenize(tmp_path, tokenizer, [text] * 5)
    train = texts_of(output, "train", tokenizer)
    (tail,) = texts_of(output, "validation", tokenizer)
    assert train[:4] == [text] * 4 and train[4] + tail == text


def test_a_document_of_one_token_stays_whole(tmp_path, tokenizer):
    output = tokenize(tmp_path, tokenizer, ["x"])
    assert texts_of(output, "train", tokenizer) == ["x"]
    assert Manifest.load(output / "validation").documents == 0
    assert "a document of 1 token cannot be divided" in note_of(output)


def test_without_a_fraction_nothing_is_held_out(tmp_path, tokenizer):
    output = tokenize(tmp_path, tokenizer, make_texts(3), fraction=0)
    assert texts_of(output, "train", tokenizer) == make_texts(3)
    assert not (output / "validation").exists()


@pytest.mark.parametrize("texts", [make_texts(120), ["".join(make_texts(40))]], ids=["many", "one"])
def test_bytes_do_not_depend_on_workers_tasks_or_kills(tmp_path, tokenizer, texts, monkeypatch):
    expected = files(tokenize(tmp_path, tokenizer, texts, name="reference"))
    assert expected["validation/manifest.json"]
    assert files(tokenize(tmp_path, tokenizer, texts, "workers=2", name="two")) == expected
    for task in (2, 0, 1):
        words = ("workers=1", f"task={task}", "num_tasks=3")
        tokenize(tmp_path, tokenizer, texts, *words, name="tasks")
    assert files(tmp_path / "tasks") == expected
    replace = os.replace
    for limit in range(100):
        left = [limit]

        def dies(source, target, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= Path(target).parent.name != "tokenize"  # the units' own markers
            replace(source, target)

        monkeypatch.setattr(os, "replace", dies)
        try:
            tokenize(tmp_path, tokenizer, texts, name="killed")
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "killed/summary.json").exists()
    assert limit > 8
    assert files(tmp_path / "killed") == expected


@pytest.mark.parametrize("count", [1, 2, 30])
def test_imported_tokens_have_a_held_out_set_too(tmp_path, tokenizer, count):
    texts = make_texts(45)[-count:]
    stream = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eod]]
    np.array(stream, "<u2").tofile(tmp_path / "a.bin")
    words = [
        f"input={tmp_path}/a.bin",
        f"output={tmp_path}/out",
        f"tokenizer={tokenizer.path}",
        f"validation_fraction={FRACTION}",
        "workers=1",
    ]
    import_tokens.main(cli.compose(import_tokens.ImportConfig, words, config="import_tokens"))
    train, validation = (
        texts_of(tmp_path / "out", split, tokenizer) for split in ("train", "validation")
    )
    assert len(validation) == 1
    if count == 1:
        assert train[0] + validation[0] == texts[0]
    else:
        assert sorted(train + validation) == sorted(texts)


def test_a_document_that_fills_several_parts_has_bounds() -> None:
    """A lone document of 100 MB ended tokenization in IndexError: its first part names no document."""
    from types import SimpleNamespace
    from typing import Any

    from data_prep.tokens.held_out import _bounds

    parts: list[Any] = [SimpleNamespace(inputs=names) for names in ([], ["a:1"], [])]
    assert _bounds(parts) == ["a:1", "a:1"]
