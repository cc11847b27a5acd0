"""A listener hears what the text is in the end, and no beginning of what ends it."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.inference.streaming import Outlet, cut_at_stop

TEXT = st.text("ab", max_size=12)


@given(st.lists(TEXT, max_size=6), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
@example(pieces=["ab", "b"], stop=["b", "abb"])  # one begins first, the other is whole first
def test_what_is_heard_is_the_text_without_its_stop(pieces: list[str], stop: list[str]) -> None:
    """A stop string that comes in two tokens was heard up to the second one."""
    heard: list[str] = []
    outlet, text = Outlet(heard.append, stop), ""
    for piece in pieces:
        text += piece
        outlet.show(text, is_whole=False)
        # What is held back is shorter than a stop string: text does not stand still.
        longest = max(map(len, stop), default=1)
        assert len("".join(heard)) > len(cut_at_stop(text, stop)) - longest
    outlet.show(text, is_whole=True)
    assert "".join(heard) == cut_at_stop(text, stop)
