"""A model that names colours: its captions exported, through OpenAI's endpoint, on the page, in the terminal."""

from __future__ import annotations

import base64
import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.tokens.conversation_job import TEMPLATES
from pipeline.checkpoint import folder as folders
from pipeline.config.vision import encoder_of
from pipeline.data.chat import ChatTemplate
from pipeline.data.pictures import spread
from pipeline.data.shard_format import Pictures
from pipeline.data.tokenizer import Tokenizer
from pipeline.generate import main
from pipeline.huggingface.writer import DType, export
from pipeline.inference.generation import GenerateConfig
from tests.support.browser import browser
from tests.support.checkpoint_runs import Run, learn
from tests.support.corpus import make_tokenizer
from tests.support.exported import exported_captions
from tests.support.layouts import BATCH, PICTURES, config
from tests.support.ranks import run_on_ranks
from tests.support.serving import ask, served, skip_unless_served

COLOURS = {
    "The fox": (220, 30, 30), "lazy, 数学": (30, 30, 220), "12345.": (30, 200, 30), "a document": (240, 240, 240),
    "jumps over": (10, 10, 10), "Größe": (220, 210, 20), "brown dog": (120, 70, 20), "return x": (200, 40, 200),
}  # fmt: skip
NAMES, STEPS, SEQ_LEN, SIZE = list(COLOURS), 140, 64, 16
pytestmark = pytest.mark.slow


def pixels_of(name: str, draw: np.random.Generator) -> np.ndarray:
    """(16, 16, 3) uint8: the colour, no two pixels quite alike."""
    noise = draw.normal(0, 6, (SIZE, SIZE, 3))
    return (np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)


def png(name: str, seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels_of(name, np.random.default_rng(seed))).save(out, "PNG")
    return out.getvalue()


def asked(name: str, *, word: bool) -> list[dict[str, Any]]:
    """A picture, with a question or without, and its name."""
    question: list[dict[str, str]] = [{"type": "image"}] + [{"type": "text", "text": "x?"}] * word
    return [{"role": "user", "content": question}, {"role": "assistant", "content": name}]


def learn_colours(root: Path) -> float:
    """A decoder of two blocks behind an encoder of two, its last loss."""
    template = (TEMPLATES / "chatml-pictures.jinja").read_text()
    tokenizer = Tokenizer.from_file(root / "tokenizer.json")
    chat = ChatTemplate(template, tokenizer)
    token = tokenizer.backend.token_to_id("<|image|>")
    pictures = Pictures(SIZE, PICTURES.patch_size, token)
    cfg = config("modern-pictures")
    assert encoder_of(cfg.model).num_layers == 2
    cfg.model.vocab_size, cfg.model.max_seq_len = tokenizer.vocab_size, SEQ_LEN
    cfg.training.total_steps, cfg.optimizer.lr = STEPS, 0.01
    run = Run(
        cfg, root / "chat",
        attachments={"tokenizer.json": tokenizer.raw, "chat_template.jinja": template.encode()},
        ends={"eod": tokenizer.eod, "end_of_turn": chat.end_of_turn, "image_token_id": token},
    )  # fmt: skip
    return learn(run, captions_to_learn(chat, pictures))


def captions_to_learn(chat: ChatTemplate, pictures: Pictures) -> Iterator[dict[str, torch.Tensor]]:
    """STEPS steps: each row shows a colour, every other one with a question, and names it."""
    draw = np.random.default_rng(0)
    for number in range(STEPS):
        rows = torch.full((BATCH, SEQ_LEN + 1), chat.tokenizer.eod)
        mask, images = torch.zeros(BATCH, SEQ_LEN), torch.zeros(BATCH, 1, 3, SIZE, SIZE).byte()
        for row in range(BATCH):
            name = NAMES[(row + number) % len(NAMES)]
            ids, loss = spread(*chat.encode(asked(name, word=row % 2 == 0))[1:], pictures)
            rows[row, : len(ids)] = torch.from_numpy(ids)
            mask[row, : len(ids) - 1] = torch.from_numpy(loss[1:].astype(np.float32))
            images[row, 0] = torch.from_numpy(pixels_of(name, draw)).permute(2, 0, 1)
        tokens = rows[:, :-1].contiguous()
        stands = tokens == pictures.image_token_id
        yield {
            "tokens": tokens, "labels": rows[:, 1:].contiguous(), "mask": mask, "images": images,
            "patch_ids": torch.where(stands, stands.cumsum(1) - 1, -1),
        }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seeing-chat")
    make_tokenizer(root / "tokenizer.json")
    assert run_on_ranks(learn_colours, 1, root)[0] < 0.05
    return root


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    skip_unless_served()
    with served(root / "chat") as (url, _):
        yield url


def both_captions(root: Path, files: list[bytes]) -> tuple[list[str], list[str]]:
    warnings.simplefilter("ignore")
    from launch.letter_sheet import captions

    export(folders.find(root / "chat"), root / "exported", dtype=DType.fp32)
    _, ours = captions(root / "chat", files)
    return ours, exported_captions(root / "exported", files)


def test_captions_of_the_exported_folder_are_ours_for_a_hundred_pictures(root: Path) -> None:
    """transformers' processor, template, cache and generate against our forward pass on the checkpoint."""
    names = [NAMES[number % len(NAMES)] for number in range(100)]
    files = [png(name, 100 + number) for number, name in enumerate(names)]
    ours, theirs = run_on_ranks(both_captions, 1, root, files)[0]
    assert theirs == ours and len(ours) == 100
    assert sum(map(str.__eq__, ours, names)) >= 95  # it looks: eight pictures, eight captions


def turn(name: str, text: str = "") -> dict[str, Any]:
    """What OpenAI's client sends who shows a picture."""
    data = base64.b64encode(png(name)).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return {"role": "user", "content": [shown] + [{"type": "text", "text": text}] * bool(text)}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_openais_client_hears_what_is_in_the_picture(url: str, stream: bool) -> None:
    for name in NAMES[:2]:
        assert ask(url, [turn(name)], stream=stream) == (name, "stop")
    assert ask(url, [turn(NAMES[2], "x?")], stream=stream) == (NAMES[2], "stop")


def test_a_long_dialogue_of_pictures_is_answered_about_the_last_one(url: str) -> None:
    said = [
        part for name in NAMES[:4] for part in (turn(name), {"role": "assistant", "content": name})
    ]
    assert ask(url, [*said, turn(NAMES[5])], stream=True) == (NAMES[5], "stop")


def test_what_is_no_picture_is_refused_with_a_sentence(url: str) -> None:
    import openai

    for address, words in [
        ("http://127.0.0.1:1/a.png", "nothing is fetched"),
        ("data:image/png;base64,AAAA", "no PNG, JPEG or WebP"),
    ]:
        part = {"type": "image_url", "image_url": {"url": address}}
        with pytest.raises(openai.BadRequestError, match=words):
            ask(url, [{"role": "user", "content": [part]}], stream=False)


DROP = """(() => {
  const bytes = Uint8Array.from(atob("%s"), (c) => c.charCodeAt(0)), files = new DataTransfer();
  files.items.add(new File([bytes], "%s", { type: "%s" }));
  const init = { dataTransfer: files, bubbles: true, cancelable: true };
  at("say").dispatchEvent(new DragEvent("dragover", init));
  at("say").dispatchEvent(new DragEvent("drop", init));
})()"""


def test_a_person_shows_pictures_on_the_page(url: str, tmp_path: Path) -> None:
    """One chosen as a file, one dropped; both are seen before and after they are sent, and can be taken back."""
    (tmp_path / "a.png").write_bytes(png(NAMES[0]))
    heard = "[...document.querySelectorAll('.said.assistant')].map(turn => turn.textContent)"
    shown = "document.querySelectorAll('#shown img').length"
    with browser(tmp_path / "profile") as page:
        page.open(f"{url}/", width=400, height=700)
        page.value("document.getElementById('temperature').value = 0")
        page.choose("#file", tmp_path / "a.png")
        page.wait_for(f"{shown} === 1")
        page.press_enter()
        page.wait_for(f"document.body.dataset.busy === 'false' && {heard}.length === 1")
        page.value(DROP % ("AAAA", "notes.txt", "text/plain"))
        page.wait_for(
            "document.getElementById('problem').textContent.includes('notes.txt is no PNG')"
        )
        dropped = (base64.b64encode(png(NAMES[1])).decode(), "b.png", "image/png")
        for _ in range(2):
            page.value(DROP % dropped)
        page.wait_for(f"{shown} === 2")
        page.value("document.querySelector('#shown button').click()")
        page.wait_for(f"{shown} === 1")
        page.value("document.getElementById('say').focus()")
        page.type("x?")
        page.press_enter()
        page.wait_for(f"document.body.dataset.busy === 'false' && {heard}.length === 2")
        assert page.value(heard) == NAMES[:2]
        sent = "[...document.querySelectorAll('.said.user')].map(t => [t.querySelectorAll('img').length, t.textContent])"
        assert page.value(sent) == [[1, ""], [1, "x?"]]
        loaded = "[...document.querySelectorAll('.said img')].every(one => one.naturalWidth === 16)"
        assert page.value(loaded) and page.value(shown) == 0
        assert page.value("document.documentElement.scrollWidth") <= 400
        page.screenshot(tmp_path / "pictures.png")
        assert page.said == []


def talked(root: Path) -> tuple[str, str]:
    """(what a chat with pictures prints, what it says of a file that is none)."""
    warnings.simplefilter("ignore")
    sys.stdin = io.StringIO(
        f"/image {root}/none.png\n/image {root}/a.png\n\n/image {root}/b.png\nx?\n"
    )
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        main(GenerateConfig(checkpoint=str(root / "chat"), chat=True, temperature=0.0))
    return out.getvalue(), said.getvalue()


def test_pictures_are_shown_in_the_terminal(root: Path) -> None:
    """Each with what is said next, which may be nothing; a wrong name ends no dialogue."""
    for file, name in (("a.png", NAMES[3]), ("b.png", NAMES[4])):
        (root / file).write_bytes(png(name))
    printed, said = run_on_ranks(talked, 1, root)[0]
    assert [line for line in printed.splitlines() if line in NAMES] == NAMES[3:5]
    assert "none.png cannot be read" in said
