"""Prompts of samples are checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.training import TrainingConfig
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError
from pipeline.training.prompts import misfitting_prompts, prompt_rows
from tests.support.corpus import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|endoftext|>' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(make_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.json"))


def test_an_empty_prompt_begins_a_document_and_a_dialogue_is_answered(tokenizer: Tokenizer) -> None:
    """Of dialogues the model learned what comes behind its template, and nothing else."""
    assert prompt_rows(["ab", ""], tokenizer, None) == [tokenizer.encode("ab"), [tokenizer.eod]]
    (row,) = prompt_rows(["ab"], tokenizer, TEMPLATE)
    assert tokenizer.decode(row) == "<user>ab<assistant>"
    with pytest.raises(ConfigError, match="sample_prompts: the chat template of the data refuses"):
        prompt_rows(["a<|endoftext|>"], tokenizer, TEMPLATE)


def test_what_does_not_fit_is_named_with_what_would(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = make_tokenizer(tmp_path / "tokenizer.json")
    data: Any = SimpleNamespace(tokenizer_json=path.read_bytes(), eod=0, chat=None)

    def wrong(**settings: Any) -> list[str]:
        cfg = TrainingConfig(sample_every=5, **settings)
        return list(misfitting_prompts(cfg, data, seq_len=32))

    assert wrong(sample_tokens=31) == [] and len(tokenizer.encode("zqzqzq")) == 6
    (found,) = wrong(sample_tokens=27, sample_prompts=["", "zqzqzq"])
    assert "'zqzqzq' has 6 tokens" in found and "Set training.sample_tokens=26" in found
    assert "has no training.sample_prompts" in wrong(sample_prompts=[])[0]
