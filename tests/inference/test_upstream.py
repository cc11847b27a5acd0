"""transformers' server answers who brings the word, and nobody else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pipeline.inference.upstream import HEADER, guarded

WORD = "word"


def told(scope: dict[str, Any]) -> list[dict[str, Any]]:
    """What an application behind the guard, and the guard, send."""
    sent: list[dict[str, Any]] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "answer"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(guarded(app, WORD)(scope, None, send))
    return sent


@pytest.mark.parametrize(
    "headers", [[], [(HEADER.encode(), b"")], [(HEADER.encode(), b"other")], [(b"host", b"word")]]
)
def test_a_request_without_the_word_is_not_handed_on(headers: list[tuple[bytes, bytes]]) -> None:
    """Of another user's program, or of a page that found the port."""
    sent = told({"type": "http", "headers": headers})
    assert [message.get("status") for message in sent] == [403, None]
    assert told({"type": "websocket", "headers": headers}) == []


def test_the_front_and_the_servers_own_start_are() -> None:
    sent = told({"type": "http", "headers": [(b"host", b"x"), (HEADER.encode(), WORD.encode())]})
    assert sent == [{"type": "answer"}] == told({"type": "lifespan"})
