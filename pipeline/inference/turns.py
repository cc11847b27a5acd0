"""Of a dialogue that is longer than a model's room, the last turns that fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from pipeline.data.chat import Messages
from pipeline.errors import ConfigError


def fitting_turns(
    messages: Messages, ids: Callable[[Messages], list[int]], room: int
) -> tuple[Messages, list[int]]:
    """A dialogue, its oldest turns left out until it fits, and its ids; a system's message stays.

    Raises:
        ConfigError: the template refuses the dialogue, or its last message alone is too long.
    """
    head = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(head) :])
    try:
        row = ids([*head, *turns])
        if len(row) > room and (starts := range(2, len(turns), 2)):
            # By halves: of a thousand turns that are left out one by one, each is rendered a
            # thousand times.
            found = bisect_left(starts, -room, key=lambda at: -len(ids([*head, *turns[at:]])))
            turns = turns[starts[min(found, len(starts) - 1)] :]
            row = ids([*head, *turns])
    except ConfigError:
        raise
    except Exception as error:  # transformers hands on what the template's Python raises
        raise ConfigError(f"the chat template refuses this dialogue: {error}.") from error
    if len(row) > room:
        raise ConfigError(f"the message has {len(row)} tokens; the model has room for {room}.")
    return [*head, *turns], row
