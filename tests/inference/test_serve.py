"""An exported model of dialogues behind `transformers serve`: OpenAI's client hears an answer, and its end."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import folder as folders
from pipeline.data.chat import ChatTemplate
from pipeline.data.tokenizer import Tokenizer
from pipeline.huggingface.writer import DType, export
from tests.inference.test_chat_models import CHATML
from tests.support.checkpoint_runs import Run
from tests.support.corpus import make_tokenizer
from tests.support.layouts import BATCH, config, rank_batches
from tests.support.ranks import run_on_ranks
from tests.support.waiting import HANG_S

TALK = [
    {"role": "user", "content": "fox?"}, {"role": "assistant", "content": "It jumps over."},
    {"role": "user", "content": "dog?"}, {"role": "assistant", "content": "lazy, 数学"},
]  # fmt: skip
STEPS, SEQ_LEN = 60, 96


def learn(root: Path) -> float:
    """A q/k-norm model (Qwen3 elsewhere) that learns one dialogue by heart; its last loss.

    Its tokenizer is of bytes: the server looks for the turns in the text that ids decode to.
    """
    tokenizer = Tokenizer.from_file(root / "tokenizer.json")
    template = ChatTemplate(CHATML, tokenizer)
    _, ids, loss = template.encode(TALK)
    row = torch.full((SEQ_LEN + 1,), tokenizer.eod)
    row[: len(ids)] = torch.from_numpy(ids.astype("int64"))
    mask = torch.zeros(SEQ_LEN)
    mask[: len(ids) - 1] = torch.from_numpy(loss[1:].astype("float32"))
    step = {"tokens": row[:-1], "labels": row[1:], "mask": mask}
    step = {key: value.expand(BATCH, -1).contiguous() for key, value in step.items()}
    cfg = config("modern")
    cfg.model.vocab_size, cfg.model.max_seq_len = tokenizer.vocab_size, SEQ_LEN
    cfg.training.total_steps, cfg.optimizer.lr = STEPS, 0.01
    files = {"tokenizer.json": tokenizer.raw, "chat_template.jinja": CHATML.encode()}
    ends = {"eod": tokenizer.eod, "end_of_turn": template.end_of_turn}
    run = Run(cfg, root / "chat", attachments=files, ends=ends)
    for number in range(STEPS):
        mine = rank_batches(step, run.shape, run.layout)
        last = float(run.engine.train_step(mine, step=number).loss)
    run.save(STEPS)
    run.close()
    return last


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    make_tokenizer(root / "tokenizer.json")
    assert run_on_ranks(learn, 1, root)[0] < 0.1
    export(folders.find(root / "chat"), root / "chat-hf", dtype=DType.fp32)
    return root / "chat-hf"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that loads the folder that a request names."""
    for name in ("openai", "fastapi", "uvicorn", "multipart"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is missing: pip install -e '.[serve]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path_factory.mktemp("log") / "serve.log").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *words],
            env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            end = time.monotonic() + HANG_S
            while not _answers(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None and time.monotonic() < end, Path(log.name).read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()
            server.wait()


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as found:
            return bool(found.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def ask(url: str, folder: Path, messages: list[dict[str, str]], *, stream: bool) -> tuple[str, str]:
    """(the answer, why it ended) as OpenAI's client has them."""
    import httpx
    import openai

    with openai.OpenAI(
        base_url=url, api_key="none", timeout=HANG_S, http_client=httpx.Client(trust_env=False)
    ) as client:
        given: dict[str, Any] = dict(model=str(folder), messages=messages, max_tokens=40)
        found = client.chat.completions.create(**given, temperature=0.0, stream=stream)
        if not stream:
            return found.choices[0].message.content, found.choices[0].finish_reason
        text, reason = "", ""
        for chunk in found:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
        return text, reason


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_served_model_answers_and_stops_at_the_end_of_its_turn(
    url: str, exported: Path, tmp_path: Path, stream: bool
) -> None:
    """Both turns, nothing of the prompt, no special token; without its id for the end, it would go on."""
    for number in (1, 3):
        answer = ask(url, exported, TALK[:number], stream=stream)
        assert answer == (TALK[number]["content"], "stop")
    endless = shutil.copytree(exported, tmp_path / "endless")
    generation = json.loads((endless / "generation_config.json").read_text())
    eod, end_of_turn = generation["eos_token_id"]
    generation["eos_token_id"] = eod
    (endless / "generation_config.json").write_text(json.dumps(generation))
    text, reason = ask(url, endless, TALK[:1], stream=stream)
    assert (text, reason) != (TALK[1]["content"], "stop"), end_of_turn
