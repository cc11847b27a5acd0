"""`pretrain serve`: OpenAI's client and a person in a browser hear an answer, and its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline import export
from pipeline.data.chat import ChatTemplate
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.serve import ServeConfig, main
from tests.inference.test_chat_models import CHATML
from tests.support.browser import browser
from tests.support.checkpoint_runs import Run, learn
from tests.support.corpus import make_tokenizer
from tests.support.layouts import BATCH, config
from tests.support.ranks import run_on_ranks
from tests.support.serving import ask, served, served_by_transformers, skip_unless_served

TALK = [
    {"role": "user", "content": "fox?"}, {"role": "assistant", "content": "It jumps over."},
    {"role": "user", "content": "dog?"}, {"role": "assistant", "content": "lazy, 数学"},
]  # fmt: skip
STEPS, SEQ_LEN = 60, 96


def learn_a_dialogue(root: Path) -> float:
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
    return learn(run, [step] * STEPS)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a dialogue that was learned."""
    skip_unless_served()
    root = tmp_path_factory.mktemp("served")
    make_tokenizer(root / "tokenizer.json")
    assert run_on_ranks(learn_a_dialogue, 1, root)[0] < 0.1
    return root / "chat"


@pytest.fixture(scope="module")
def url(chat: Path) -> Iterator[str]:
    """Where it is served, by the command."""
    with served(chat) as (url, pid):
        check_that_nobody_else_is_answered(pid, url)
        yield url


def check_that_nobody_else_is_answered(pid: int, url: str) -> None:
    """The port behind the page's is one that any program, or a page that guesses it, could ask."""
    import httpx

    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    listening = [c.laddr for one in processes for c in one.net_connections() if c.status == "LISTEN"]  # fmt: skip
    (port,) = {place.port for place in listening} - {int(url.rpartition(":")[2])}
    assert {place.ip for place in listening} == {"127.0.0.1"}
    with httpx.Client(trust_env=False, base_url=f"http://127.0.0.1:{port}") as client:
        assert {client.get(path).status_code for path in ("/health", "/v1/models")} == {403}
        assert client.post("/reset").status_code == 403


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_openais_client_hears_an_answer_and_its_end(url: str, stream: bool) -> None:
    """Both turns, nothing of the prompt, no special token; without its id for the end, it would go on."""
    for number in (1, 3):
        answer = ask(url, TALK[:number], stream=stream)
        assert answer == (TALK[number]["content"], "stop")


@pytest.mark.slow
def test_an_exported_folder_answers_and_ends_on_transformers_serve_alone(
    chat: Path, tmp_path: Path
) -> None:
    """What is needed for it is in the folder: the template, and the id that ends a turn."""
    folder = tmp_path / "folder"
    assert export.main(export.ExportConfig(str(chat), str(folder))) == 0
    with served_by_transformers(folder) as url:
        for stream in (False, True):
            for number in (1, 3):
                answer = ask(url, TALK[:number], stream=stream, model=str(folder))
                assert answer == (TALK[number]["content"], "stop")


@pytest.mark.slow
def test_a_model_of_text_refuses_a_picture_with_a_sentence(url: str) -> None:
    import openai

    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    with pytest.raises(openai.BadRequestError, match="this model reads no pictures"):
        ask(url, [{"role": "user", "content": [picture]}], stream=False)


@pytest.mark.slow
def test_a_dialogue_longer_than_the_model_is_answered(url: str) -> None:
    """Its oldest turns are left out: more tokens than positions would end in an index error."""
    long = [*TALK[:2] * 12, TALK[0]]
    text, reason = ask(url, long, stream=True)
    assert text in (TALK[1]["content"], TALK[3]["content"]) and reason == "stop"


@pytest.mark.slow
def test_a_person_talks_to_it_on_the_page(url: str, tmp_path: Path) -> None:
    """Two turns typed in a browser, at the width of a telephone; a new dialogue forgets them."""
    heard = "[...document.querySelectorAll('.said.assistant')].map(turn => turn.textContent)"
    with browser(tmp_path / "profile") as page:
        page.open(f"{url}/", width=400, height=700)
        page.value("document.getElementById('temperature').value = 0")
        for number in (0, 2):
            page.type(TALK[number]["content"])
            page.press_enter()
            page.wait_for(f"document.body.dataset.busy === 'false' && {heard}.length === {number // 2 + 1}")  # fmt: skip
        assert page.value(heard) == [TALK[1]["content"], TALK[3]["content"]]
        assert page.value("document.documentElement.scrollWidth") <= 400
        page.screenshot(tmp_path / "talk.png")
        page.value("document.getElementById('back').click()")
        assert page.value(heard) == [] and page.said == []


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": 3.0}, {"port": 70000}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match="must be in"):
        main(ServeConfig(checkpoint="nowhere", **wrong))


def test_a_missing_run_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        main(ServeConfig(checkpoint=str(tmp_path / "nowhere")))
