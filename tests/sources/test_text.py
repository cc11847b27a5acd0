"""A huge text is asked in slices, and answers as it would in one piece."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.sources import text as module
from data_prep.sources.text import is_encodable, slices, text_bytes
from data_prep.tokens.encode import DISPUTED, is_disputed

CHARACTERS = st.text(
    st.sampled_from(["a", "é", "汉", "😀", "\ud83d", "\ude00", DISPUTED[0], "\U00010940"])
)


@given(CHARACTERS, st.integers(1, 4))
def test_slices_answer_as_the_whole(text, size):
    """Two halves of a surrogate pair are two characters to Python, wherever the cut is."""
    whole = is_encodable(text), is_disputed(text) if is_encodable(text) else None
    try:
        assert text_bytes(text) == len(text.encode()) and whole[0]
    except UnicodeEncodeError:
        assert not whole[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLICE_CHARACTERS", size)
        assert "".join(slices(text)) == text
        assert (is_encodable(text), is_disputed(text) if whole[0] else None) == whole
