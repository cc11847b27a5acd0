"""What cannot be probed is said before any process group forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError
from pipeline.probing.request import encode_patching, encode_prompt
from tests.support.exported import tokenizer_file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(tokenizer_file(Path(tmp_path_factory.mktemp("tokenizer"))))


@pytest.mark.parametrize("text", ["t1", "t1 t2 t3 t4 t5"])
def test_prompts_that_predict_nothing_or_do_not_fit_are_refused(
    tokenizer: Tokenizer, text: str
) -> None:
    assert encode_prompt(tokenizer, "t1 t2 t3 t4", longest=4) == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="prompt has [15] tokens; it must have 2 .* to 4"):
        encode_prompt(tokenizer, text, longest=4)


def test_patching_needs_two_prompts_of_one_length_and_an_answer(tokenizer: Tokenizer) -> None:
    """A token more in front would put everything at the place of its neighbour."""
    found = encode_patching(tokenizer, [1, 2], patch_into="t3 t4", answer="t5 t6", longest=4)
    assert found == ([3, 4], 5)
    with pytest.raises(ConfigError, match=r"prompt has 2 tokens, patch_into 3.*\['t1', 't2'\]"):
        encode_patching(tokenizer, [1, 2], patch_into="t3 t4 t5", answer="t5", longest=4)
    for other, answer in (("", "t5"), ("t3 t4", "")):
        with pytest.raises(ConfigError, match="set all three"):
            encode_patching(tokenizer, [1, 2], patch_into=other, answer=answer, longest=4)
