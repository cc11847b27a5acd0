"""Of a long dialogue the last turns that fit, found without rendering it over and over."""

from __future__ import annotations

import pytest

from pipeline.data.chat import Messages
from pipeline.errors import ConfigError
from pipeline.inference.turns import fitting_turns


def ids(messages: Messages) -> list[int]:
    """A word is a token, and so is each message's role."""
    return [0] * sum(1 + len(message["content"].split()) for message in messages)


def dialogue(turns: int, *, system: bool = False) -> Messages:
    said = [{"role": "user", "content": "w " * (1 + n % 5)} for n in range(turns)]
    return [{"role": "system", "content": "s"}, *said] if system else said


def left_out_one_by_one(messages: Messages, room: int) -> Messages:
    head = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(head) :]
    while len(ids([*head, *turns])) > room and len(turns) > 2:
        turns = turns[2:]
    return [*head, *turns]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("turns", range(1, 9))
def test_as_many_last_turns_as_fit_are_kept(turns: int, system: bool) -> None:
    """As if they were left out a pair at a time."""
    messages = dialogue(turns, system=system)
    for room in range(1, 40):
        kept = left_out_one_by_one(messages, room)
        if len(ids(kept)) > room:
            with pytest.raises(ConfigError, match=f"has room for {room}"):
                fitting_turns(messages, ids, room)
        else:
            assert fitting_turns(messages, ids, room) == (kept, ids(kept))


def test_a_hundred_thousand_turns_are_rendered_a_few_times() -> None:
    """A request of 4 MB of one word each kept the server busy for hours."""
    rendered = []

    def counted(messages: Messages) -> list[int]:
        rendered.append(len(messages))
        return ids(messages)

    kept, _ = fitting_turns(dialogue(100_000), counted, 30)
    assert len(kept) <= 10 and len(rendered) < 25
