"""How good answers are, and how good they would be without reading the question.

jsonl of dialogues -> Question(dialogue so far, answer, source, group)
answers, references -> exact match, token F1, chrF, of each group, beside base rates
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.files import parse_json, read_file
from pipeline.shapes import misfits

MOST_BYTES = 1 << 30
BASE_RATES = ("commonest", "copy", "shuffled")


# Fields of a message that are for us, not for the chat template.
OURS = {"learn", "source", "group"}
MESSAGE = {"role": str, "content": str, "learn?": bool, "source?": str}


@dataclass(frozen=True)
class Question:
    """One answer that is asked for."""

    messages: list[dict[str, Any]]
    """The dialogue up to it; earlier answers are the references."""
    reference: str
    source: str
    """What copying would give: `source` of the answer's message, else the message before it."""
    group: str
    """Value of `group` beside the messages, such as a language; empty: none."""


def read_questions(path: Path) -> list[Question]:
    """A question for each answer of each dialogue, but those that say learn: false.

    Raises:
        DataError: the file cannot be read, or holds no question.
    """
    try:
        # Not splitlines(): JSON's texts may hold U+2028 and the like as they are.
        lines = read_file(path, most=MOST_BYTES).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Give a file of jsonl.") from None
    questions: list[Question] = []
    for number, line in enumerate(lines, 1):
        try:
            questions += _questions_of(parse_json(line)) if line.strip() else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number} cannot be read ({type(error).__name__}: {error}). Give "
                '{"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., '
                '"completion": ...}, a dialogue a line.'
            ) from None
    if not questions:
        raise DataError(f"{path} holds no answer of an assistant.")
    return questions


def _questions_of(record: dict[str, Any]) -> list[Question]:
    """The questions of one dialogue."""
    messages = record.get("messages") or [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["completion"]},
    ]
    if wrong := next(misfits(messages, [MESSAGE], "messages"), None):
        raise ValueError(wrong)
    json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    if record.get("tools"):
        raise ValueError("dialogues with tools cannot be asked yet")
    group = str(record.get("group", ""))
    return [
        Question(
            [{k: v for k, v in m.items() if k not in OURS} for m in messages[:place]],
            message["content"],
            message.get("source", messages[place - 1]["content"]),
            str(message.get("group", group)),
        )
        for place, message in enumerate(messages)
        if place and message["role"] == "assistant" and message.get("learn", True)
    ]


def base_answers(questions: Sequence[Question]) -> dict[str, list[str]]:
    """What three ways of not reading the question would answer.

    commonest: always the reference that its group has most often, known from the references
    themselves; copy: the source; shuffled: the reference of the next question of its group.
    """
    by_group: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        by_group.setdefault(question.group, []).append(number)
    commonest, shuffled = [""] * len(questions), [""] * len(questions)
    for numbers in by_group.values():
        references = [questions[n].reference for n in numbers]
        best = Counter(references).most_common(1)[0][0]
        for place, number in enumerate(numbers):
            commonest[number] = best
            shuffled[number] = references[(place + 1) % len(references)]
    copied = [question.source for question in questions]
    return dict(zip(BASE_RATES, (commonest, copied, shuffled), strict=True))


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Percentages: `exact`, `f1` (of words), and `chrf` where sacrebleu is installed.

    Source of F1: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1, on words as they stand.
    Source of chrF: Popovic 2015, W15-3049, as sacrebleu computes it over the whole corpus.
    """
    pairs = list(zip(answers, references, strict=True))
    found = {
        "exact": 100 * sum(a.strip() == r.strip() for a, r in pairs) / len(pairs),
        "f1": 100 * sum(word_f1(a, r) for a, r in pairs) / len(pairs),
    }
    try:
        import sacrebleu
    except ImportError:
        return found
    return found | {"chrf": float(sacrebleu.corpus_chrf(list(answers), [list(references)]).score)}


def word_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the shares of words that two texts have in common, repeats counted."""
    ours, theirs = Counter(answer.split()), Counter(reference.split())
    common = (ours & theirs).total()
    if not common:
        return float(ours == theirs)
    return 2 * common / (ours.total() + theirs.total())


def score_all(
    answers: Sequence[str], questions: Sequence[Question]
) -> dict[str, dict[str, dict[str, float]]]:
    """Group ("all" and each group) to `model` and each base rate to its scores."""
    rows = {"model": list(answers), **base_answers(questions)}
    groups: dict[str, list[int]] = {"all": list(range(len(questions)))}
    for number, question in enumerate(questions):
        if question.group:
            groups.setdefault(question.group, []).append(number)
    references = [question.reference for question in questions]
    return {
        group: {
            name: score([row[n] for n in numbers], [references[n] for n in numbers])
            for name, row in rows.items()
        }
        for group, numbers in groups.items()
    }
