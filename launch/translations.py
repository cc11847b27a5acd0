"""Pairs of names in five languages, each way, from the PyPI package `emoji`.

    python -m launch.translations OUT           OUT/train.jsonl, OUT/held.jsonl, OUT/names.txt
    python -m launch.translations OUT memory    what looking up the likest learned name would score

The people and the split of launch/name_dialogues.py: "man surfing" and "person surfing" are learned
in every language and direction, "woman surfing" never is, in none of them.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

from launch.name_dialogues import LANGUAGES, Names, hold_out, read_names
from pipeline.evaluation.answers import Question, read_questions, score

NAMES = {"en": "English", **LANGUAGES}


def pairs(things: list[Names]) -> list[str]:
    """A line of jsonl for each, direction by direction, so that no two neighbours are alike.

    `source` and `group` are for pipeline.answer.
    """
    lines = []
    for here, there in permutations(NAMES, 2):
        for names in things:
            ask = {"role": "user", "content": f"{NAMES[here]} to {NAMES[there]}: {names[here]}"}
            answer = {"content": names[there], "source": names[here], "group": NAMES[there]}
            line = {"messages": [ask, {"role": "assistant", **answer}]}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def write(output: Path) -> None:
    """Both files, and a text of what is learned for the tokenizer."""
    known, held = hold_out(read_names())
    lines, asked = pairs(known), pairs(held)
    random.Random(0).shuffle(lines)
    text = "".join(f"{NAMES[key]} to {name}\n" for names in known for key, name in names.items())
    output.mkdir(parents=True, exist_ok=True)
    (output / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    (output / "held.jsonl").write_text("".join(asked), encoding="utf-8")
    (output / "names.txt").write_text(text, encoding="utf-8")
    print(f"{len(known)} things in {len(lines)} pairs; {len(held)} held out: {output}")


def triples(text: str) -> Counter[str]:
    """How often each three characters follow each other, its ends included."""
    padded = f" {text} "
    return Counter(padded[at : at + 3] for at in range(len(padded) - 2))


def look_up(question: Question, learned: list[tuple[Counter[str], str]]) -> str:
    """The translation of what has most triples in common with the question's source."""
    wanted = triples(question.source)

    def likeness(entry: tuple[Counter[str], str]) -> float:
        return (wanted & entry[0]).total() / (wanted.total() + entry[0].total())

    return max(learned, key=likeness)[1]


def print_memory(output: Path) -> None:
    """Exact match, F1 and chrF of what is looked up, for all and for each language."""

    def way(question: Question) -> str:
        return question.messages[-1]["content"].partition(":")[0]

    learned: dict[str, list[tuple[Counter[str], str]]] = {}
    for pair in read_questions(output / "train.jsonl"):
        learned.setdefault(way(pair), []).append((triples(pair.source), pair.reference))
    found: dict[str, list[tuple[str, str]]] = {"all": []}
    for question in read_questions(output / "held.jsonl"):
        both = look_up(question, learned[way(question)]), question.reference
        for group in ("all", question.group):
            found.setdefault(group, []).append(both)
    for group, both_of in found.items():
        values = score(*zip(*both_of)).values()
        print(f"{group:<14}{'looked up':<12}" + "".join(f"{value:>10.1f}" for value in values))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2] == "memory":
        print_memory(Path(sys.argv[1]))
    elif len(sys.argv) == 2:
        write(Path(sys.argv[1]))
    else:
        sys.exit(__doc__)
