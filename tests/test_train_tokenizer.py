"""Tokenizers from text: merges where there is text, and none where a token is to be a byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.train_tokenizer import LEAST, TrainTokenizerConfig, main
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError, DataError, MachineError


def train(folder: Path, text: str, vocab_size: int, output: str = "t.json") -> Tokenizer:
    (folder / "text.txt").write_text(text)
    main(TrainTokenizerConfig(input=str(folder / "text.txt"), output=str(folder / output), vocab_size=vocab_size))  # fmt: skip
    return Tokenizer.from_file(folder / output)


def test_with_265_ids_a_token_is_a_byte(tmp_path: Path) -> None:
    """A model of characters, as nanoGPT's first example; it was refused as a text without text."""
    text = "To be, or not to be: that is the question.\nnaïve\n" * 20
    tokenizer = train(tmp_path, text, LEAST)
    ids = tokenizer.encode("to be naïve")
    assert tokenizer.vocab_size == LEAST and len(ids) == len("to be naïve".encode())
    assert tokenizer.decode(ids) == "to be naïve"
    assert len(train(tmp_path, text, 300).encode("to be")) < 5


def test_what_cannot_be_a_tokenizer_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be at least 265"):
        train(tmp_path, "a", 264)
    with pytest.raises(DataError, match="holds no text to train on"):
        train(tmp_path, "", 300)
    with pytest.raises(MachineError, match="cannot be written"):
        train(tmp_path, "abc " * 9, 300, output="text.txt/t.json")
