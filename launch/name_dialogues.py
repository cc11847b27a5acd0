"""Dialogues about people and what they do, in four languages, from the PyPI package `emoji`.

    python launch/name_dialogues.py OUT      OUT/train.jsonl, OUT/held.jsonl

The package has the names that Unicode's CLDR gives to every emoji. Here are families of three and
more that differ in who does it: "man surfing", "woman surfing", "person surfing". A dialogue asks
for one of them in all languages, turn by turn; only the first turn names it.

Held out is one of each family, in every language and turn. What its parts are called can be learned
from others, how they go together must be made up. Skin tones are left out: a name with another tone
at its end would be the same question again. Things without relatives are left out too: nobody can
say "Schwamm" who has never heard it.
"""

from __future__ import annotations

import json
import random
import sys
import zlib
from itertools import permutations
from pathlib import Path

import emoji

LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian"}
QUESTIONS = ("What is {} in {}?", "How does one say {} in {}?")
WHO = {"man", "woman", "person", "men", "women", "people", "boy", "girl"}
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}

Names = dict[str, str]


def read_names() -> list[Names]:
    """Language to name of each thing, in the order of the English ones; `en` is a language too."""
    for language in LANGUAGES:
        emoji.config.load_language(language)
    found = {}
    for symbol, entry in emoji.EMOJI_DATA.items():
        is_whole = entry["status"] == emoji.STATUS["fully_qualified"]
        if is_whole and not SKIN_TONES & set(symbol) and all(key in entry for key in LANGUAGES):
            names = {key: plain(entry[key]) for key in ("en", *LANGUAGES)}
            found.setdefault(names["en"], names)
    return [found[name] for name in sorted(found)]


def plain(name: str) -> str:
    """As one says it, without the package's colons and underscores."""
    return name.strip(":").replace("_", " ")


def hold_out(things: list[Names]) -> tuple[list[Names], list[Names]]:
    """(those to learn from, those held out): of each large family one that shares no name."""
    families: dict[str, list[Names]] = {}
    for names in things:
        words = [word for word in names["en"].lower().split() if word not in WHO]
        families.setdefault(" ".join(words), []).append(names)
    known, held = [], []
    for family in families.values():
        alone = [one for one in family if is_alone(one, family)]
        if len(family) > 2 and alone:
            asked = min(alone, key=lambda names: zlib.crc32(names["en"].encode()))
            held.append(asked)
            known += [names for names in family if names is not asked]
    return known, held


def is_alone(names: Names, family: list[Names]) -> bool:
    """Whether no relative is called the same in any language: the answer would be known."""
    others = [other for other in family if other is not names]
    return all(names[key] != other[key] for other in others for key in LANGUAGES)


def dialogue(names: Names, order: tuple[str, ...], question: str) -> str:
    """A line of jsonl: a thing's names in this order, `source` and `group` for pipeline.answer."""
    messages: list[dict[str, str]] = []
    for number, key in enumerate(order):
        ask = (
            question.format(names["en"], LANGUAGES[key])
            if number == 0
            else f"And in {LANGUAGES[key]}?"
        )
        answer = {"content": names[key], "source": names["en"], "group": LANGUAGES[key]}
        messages += [{"role": "user", "content": ask}, {"role": "assistant", **answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def main(output: Path) -> None:
    """Write both files."""
    known, held = hold_out(read_names())
    draw, orders = random.Random(0), list(permutations(LANGUAGES))
    lines = [dialogue(names, order, draw.choice(QUESTIONS)) for names in known for order in orders]
    draw.shuffle(lines)
    # Every language comes as often in each turn.
    asked = [
        dialogue(names, orders[(7 * number) % len(orders)], QUESTIONS[number % 2])
        for number, names in enumerate(held)
    ]
    output.mkdir(parents=True, exist_ok=True)
    (output / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    (output / "held.jsonl").write_text("".join(asked), encoding="utf-8")
    print(f"{len(known)} things in {len(lines)} dialogues; {len(held)} held out: {output}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
