"""Scores of answers against hand-worked numbers, and base rates that read nothing."""

import json
import sys

import pytest

from pipeline.errors import DataError
from pipeline.evaluation.answers import base_answers, read_questions, score, score_all, word_f1


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def said(*contents, **last):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    messages[-1] |= last
    return messages


@pytest.fixture
def questions(tmp_path):
    return read_questions(
        write(
            tmp_path / "held.jsonl",
            {"messages": said("cat in German?", "Katze", "in French?", "chat"), "group": "a"},
            {"messages": said("dog in German?", "Hund", source="dog"), "group": "a"},
            {"messages": said("and?", "Hund", "again?", "Hund", learn=False), "group": "b"},
            {"prompt": "one?", "completion": "two"},
        )
    )


def test_every_answer_is_a_question_with_the_dialogue_before_it(questions):
    assert [q.reference for q in questions] == ["Katze", "chat", "Hund", "Hund", "two"]
    assert [m["content"] for m in questions[1].messages] == [
        "cat in German?",
        "Katze",
        "in French?",
    ]
    assert [q.source for q in questions] == ["cat in German?", "in French?", "dog", "and?", "one?"]
    assert [q.group for q in questions] == ["a", "a", "a", "b", ""]


def test_base_rates_stay_in_their_group(questions):
    base = base_answers(questions)
    assert base["commonest"] == ["Katze"] * 3 + ["Hund", "two"]
    assert base["shuffled"] == ["chat", "Hund", "Katze", "Hund", "two"]
    assert base["copy"] == [q.source for q in questions]


def test_scores_are_those_of_the_book(monkeypatch):
    """F1 of "a b b" and "b b c d": 2 words in common of 3 and 4, 2 * 2 / 7."""
    assert word_f1("a b b", "b b c d") == pytest.approx(4 / 7)
    assert (word_f1("", ""), word_f1("", "a"), word_f1("a", "b")) == (1.0, 0.0, 0.0)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # as if it were not installed
    found = score(["x", "a b b "], ["x", "b b c d"])
    assert found == {"exact": 50.0, "f1": pytest.approx(100 * (1 + 4 / 7) / 2)}


def test_chrf_is_that_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    answers, references = ["rote Katze", "Hund"], ["rote Katzen", "Hund"]
    expected = sacrebleu.corpus_chrf(answers, [references]).score
    assert score(answers, references)["chrf"] == pytest.approx(expected)


def test_each_group_is_scored_apart(questions):
    scores = score_all(["Katze", "x", "Hund", "x", "two"], questions)
    assert {group: rows["model"]["exact"] for group, rows in scores.items()} == {
        "all": 60.0, "a": pytest.approx(200 / 3), "b": 0.0,
    }  # fmt: skip
    assert scores["b"]["commonest"]["exact"] == 100.0
    assert list(scores["a"]) == ["model", "commonest", "copy", "shuffled"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"prompt": "a"}\n', "line 1 cannot be read .KeyError"),
        ("{\n", "line 1"),
        ("[1]\n", "line 1"),
        ("", "no answer"),
    ],
)
def test_what_is_no_dialogue_is_named(tmp_path, content, problem):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(DataError, match=problem):
        read_questions(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="nowhere.jsonl cannot be read"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_a_line_ends_where_jsonl_says(tmp_path):
    """U+2028 may stand in a JSON text as it is; other fields are for the template."""
    messages = said("a\u2028b?", "c")
    messages[0]["name"] = "Ada"
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    (question,) = read_questions(path)
    assert question.messages == [{"role": "user", "content": "a\u2028b?", "name": "Ada"}]
    path.write_text(json.dumps({"messages": messages, "tools": [{}]}))
    with pytest.raises(DataError, match="tools cannot be asked"):
        read_questions(path)
