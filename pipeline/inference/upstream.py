"""`transformers serve` that answers its front alone; front.py starts it.

    python -m pipeline.inference.upstream NAME PORT      VARIABLE=word in its environment

Every program of this machine finds a port of loopback, and so does a page that guesses it: /reset
would forget the model, and a site under a name of its own (DNS rebinding) read what it answers.
"""

from __future__ import annotations

import hmac
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

HEADER = "x-front"
"""In lower case, as ASGI has it."""
VARIABLE = "PRETRAIN_FRONT"

App = Callable[[dict[str, Any], Any, Callable[[dict[str, Any]], Awaitable[None]]], Awaitable[None]]
"""An ASGI application."""


def guarded(app: App, word: str) -> App:
    """The application for requests that bring the word; others are told 403, and no more."""

    async def guard(
        scope: dict[str, Any], receive: Any, send: Callable[[dict[str, Any]], Awaitable[None]]
    ) -> None:
        given = dict(scope.get("headers", ())).get(HEADER.encode(), b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(given, word.encode()):
            return await app(scope, receive, send)
        if scope["type"] == "http":  # of a web socket nothing is accepted, which closes it
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    return guard


def main(name: str, port: int, word: str) -> None:
    """Serve the model of the folder `name` until the process is ended."""
    from transformers.cli.serve import Serve

    class Guarded(Serve):
        def start_server(self) -> None:
            app: Any = self.server.config.app
            self.server.config.app = guarded(app, word)
            self.server.run()

    # What is not to block starts itself by start_server, where the application can be had.
    Guarded(force_model=name, host="127.0.0.1", port=port, non_blocking=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), os.environ.pop(VARIABLE))
