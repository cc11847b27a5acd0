"""What a token adds to the text, for every family of tokenizers: bits per byte divides by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.tokenizer import BYTE_TEXTS, Tokenizer
from tests.support.corpus import make_texts
from tests.support.tokenizers import EXACT, FORGETFUL, build, gemma


def counted(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    start = tokenizer.token_byte_lengths(at_start=True)
    return int(start[ids[:1]].sum() + tokenizer.token_byte_lengths()[ids[1:]].sum())


@pytest.mark.parametrize("family", EXACT)
def test_bytes_of_the_tokens_sum_to_the_bytes_of_the_text(family: str, tmp_path: Path) -> None:
    """Spaces before words, runs of them, bytes that fall back, characters of several tokens."""
    tokenizer = build(EXACT[family], tmp_path)
    assert tokenizer.has_exact_bytes
    for text in [*make_texts(40), *BYTE_TEXTS, "a  b   c    d     e", "\u2028", "数"]:
        assert counted(tokenizer, text) == len(text.encode()), text
    assert tokenizer.token_byte_lengths()[tokenizer.eod] == 0


@pytest.mark.parametrize("family", FORGETFUL)
def test_family_that_forgets_parts_of_the_text_says_so(family: str, tmp_path: Path) -> None:
    """Its bits per byte are counted from the text, not from the ids."""
    assert not build(FORGETFUL[family], tmp_path).has_exact_bytes


@pytest.mark.parametrize(
    ("family", "text", "by_hand"),
    [
        ("word piece", "the lazy dog", 12),
        ("end-of-word suffix", "The lazy dog", 13),  # a space ends each word, the last one too
        ("word level", "The lazy dog", 12),
        ("unigram", "abc  de", 7),
    ],
)
def test_marks_of_the_vocabulary_are_no_bytes(
    family: str, text: str, by_hand: int, tmp_path: Path
) -> None:
    """`##`, `</w>` and U+2581 are not in the text; the spaces between words are."""
    assert counted(build(FORGETFUL[family], tmp_path), text) == by_hand


def test_gemmas_runs_of_spaces_are_a_byte_for_each(tmp_path: Path) -> None:
    """They counted three bytes for each space, as U+2581 has in UTF-8."""
    tokenizer = build(gemma, tmp_path)
    run = tokenizer.backend.token_to_id("▁▁▁")
    assert run in tokenizer.encode("a   b")
    assert tokenizer.token_bytes[run] == b"   "
