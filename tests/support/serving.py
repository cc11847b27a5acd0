"""A model that `pretrain serve`, or `transformers serve` alone, serves, and what OpenAI's client hears from it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.serve import NEEDED
from tests.support.waiting import HANG_S


def skip_unless_served() -> None:
    """Skip the test where a part of `transformers serve` is not installed."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is missing: pip install -e '.[hf,serve]'")


@contextlib.contextmanager
def served(run: Path) -> Iterator[tuple[str, int]]:
    """Its address and the command's process, which ends with Ctrl-C."""
    command = [sys.executable, "-m", "pipeline.pretrain", "serve", str(run), "port=0"]
    with (run.parent / "serve.log").open("w+") as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server:
            try:
                assert server.stdout is not None
                page = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
                assert page is not None, Path(log.name).read_text()
                yield page[0], server.pid
                server.send_signal(signal.SIGINT)
                assert server.wait(HANG_S) == 0, Path(log.name).read_text()
            finally:
                server.kill()


@contextlib.contextmanager
def served_by_transformers(folder: Path) -> Iterator[str]:
    """The address of `transformers serve FOLDER`, none of our code in it."""
    import httpx

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    with (folder.parent / "transformers.log").open("w+") as log:
        with subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=folder.parent
        ) as server, httpx.Client(trust_env=False) as client:  # fmt: skip
            try:
                while True:
                    assert server.poll() is None, Path(log.name).read_text()
                    with contextlib.suppress(httpx.TransportError):
                        if client.get(f"{url}/health").status_code == 200:
                            break
                    time.sleep(0.2)
                yield url
            finally:
                server.kill()


def ask(
    url: str, messages: list[dict[str, Any]], *, stream: bool, model: str = ""
) -> tuple[str, str]:
    """(the answer, why it ended) as OpenAI's client has them, greedily; "": the model it lists."""
    import httpx
    import openai

    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", timeout=HANG_S, max_retries=0,
        http_client=httpx.Client(trust_env=False),
    ) as client:  # fmt: skip
        name = model or client.models.list().data[0].id
        given: dict[str, Any] = dict(model=name, messages=messages, max_tokens=40)
        found = client.chat.completions.create(**given, temperature=0.0, stream=stream)
        if not stream:
            return found.choices[0].message.content, found.choices[0].finish_reason
        text, reason = "", ""
        for chunk in found:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
        return text, reason
