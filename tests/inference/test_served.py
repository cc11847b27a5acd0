"""A folder as it is served, and requests that are cut to the model's room before they are asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as Backend

from data_prep.tokens.conversation_job import TEMPLATES
from pipeline.data.chat import ChatTemplate
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.inference.pictures import Sight, picture_of_url, url_of
from pipeline.inference.served import Served, prepare
from tests.inference.test_chat_models import CHATML, chat_tokenizer
from tests.support.corpus import edit_tokenizer, make_tokenizer
from tests.support.llama_folder import write_llama
from tests.support.strange_pictures import RED


@pytest.fixture
def served(tmp_path: Path) -> Served:
    """Forty positions; a word is a token."""
    tokenizer = Tokenizer.from_file(chat_tokenizer(tmp_path / "tokenizer.json"))
    template = ChatTemplate(CHATML, tokenizer)
    return Served(tmp_path / "mine", 40, 0.8, tokenizer, template, is_chat=True)


def shown(colour: tuple[int, int, int]) -> dict[str, Any]:
    """A picture of one colour, as OpenAI's clients send it."""
    image = Image.new("RGB", (30, 20), colour)
    return {"type": "image_url", "image_url": {"url": url_of(image), "detail": "low"}}


def turn(role: str, words: int) -> dict[str, str]:
    return {"role": role, "content": " ".join(["t5"] * words)}


def test_a_dialogue_loses_its_oldest_turns_and_keeps_room_for_the_answer(served: Served) -> None:
    """More tokens than positions are an index error in transformers' server."""
    long = [turn("user", 9), turn("assistant", 9), turn("user", 3)]
    fitted = served.fit({"model": "mine", "messages": long, "max_completion_tokens": 15}, chat=True)
    assert fitted["messages"] == long[2:] and fitted["model"] == "mine"
    assert fitted["max_tokens"] == 15 and "max_completion_tokens" not in fitted
    used = len(served.template.prompt_ids(long[2:])) if served.template else 0
    alone = served.fit({"messages": long[2:]}, chat=True)
    assert alone["max_tokens"] == 40 - used  # no number was named: up to the last position


def test_a_text_keeps_its_end(served: Served) -> None:
    words = [f"t{number}" for number in range(5, 50)]
    fitted = served.fit({"prompt": " ".join(words), "max_tokens": 10}, chat=False)
    kept = fitted["prompt"].split()
    assert kept == words[-len(kept) :] and 20 <= len(kept) <= 30 and fitted["max_tokens"] == 10
    given = {"prompt": "t5 t6", "max_tokens": 38, "temperature": 0.8}
    assert served.fit({"prompt": "t5 t6"}, chat=False) == given
    assert served.fit({"prompt": ""}, chat=False)["prompt"] == "<|endoftext|>"


@pytest.mark.parametrize("own", [0.0, 0.8])
def test_a_request_draws_at_its_own_temperature(served: Served, own: float) -> None:
    """Served at 0, every request was answered with the likeliest words, whatever it named."""
    alone = replace(served, temperature=own)
    assert alone.fit({"prompt": "t5"}, chat=False)["temperature"] == own
    assert alone.fit({"prompt": "t5", "temperature": None}, chat=False)["temperature"] == own
    for asked in (0, 0.7):
        assert alone.fit({"prompt": "t5", "temperature": asked}, chat=False)["temperature"] == asked


def test_what_is_added_to_a_text_has_room_too(served: Served, tmp_path: Path) -> None:
    """transformers puts this tokenizer's <s> in front; one more token than positions is an index error."""
    begins = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    token = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    path = chat_tokenizer(tmp_path / "adds.json")
    edit_tokenizer(path, post_processor={
        "type": "TemplateProcessing", "single": [begins, text], "pair": [begins, text, text], "special_tokens": token,
    })  # fmt: skip
    adds = replace(served, tokenizer=Tokenizer.from_file(path))
    assert adds.fit({"prompt": "t5 t6"}, chat=False)["max_tokens"] == 37


def test_a_cut_text_never_takes_more_than_the_positions(served: Served, tmp_path: Path) -> None:
    """A cut inside of a letter is another letter, of more tokens."""
    tokenizer = Tokenizer.from_file(make_tokenizer(tmp_path / "bytes.json"))
    text = "🐍数" * 40
    for context in range(16, 60):
        small = replace(served, tokenizer=tokenizer, context=context)
        fitted = small.fit({"prompt": text}, chat=False)
        used = len(tokenizer.encode(fitted["prompt"]))
        assert used + fitted["max_tokens"] <= context, context


@pytest.mark.parametrize(
    "chat, wrong, part",
    [
        (True, {"messages": [turn("user", 60)]}, "has room for"),
        (True, {"messages": [{"role": "user", "content": [1]}]}, "must be a list"),
        (True, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "must be a list"),
        (True, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 1}}]}]}, "must be a list"),
        (True, {"messages": [{"role": "user", "content": [shown(RED)]}]}, "reads no pictures: leave image_url out"),
        (True, {"messages": []}, "must be a list"),
        (True, {"messages": [turn("user", 1)], "max_tokens": 0}, r"max_tokens \(0\)"),
        (False, {"prompt": ["t5"]}, "must be a text"),
        (False, {"prompt": "t5", "max_tokens": "9"}, r"max_tokens \('9'\)"),
        (False, {"prompt": "t5", "temperature": -1}, r"temperature \(-1\)"),
        (False, {"prompt": "t5", "temperature": "hot"}, r"temperature \('hot'\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(
    served: Served, chat: bool, wrong: dict[str, Any], part: str
) -> None:
    with pytest.raises(ConfigError, match=part):
        served.fit(wrong, chat=chat)


def test_texts_in_parts_are_texts(served: Served) -> None:
    """As OpenAI's clients may send them, also to a model that reads nothing else."""
    parts = [{"type": "text", "text": "t5"}, {"type": "text", "text": "t6"}]
    fitted = served.fit({"messages": [{"role": "user", "content": parts}]}, chat=True)
    assert fitted["messages"] == [{"role": "user", "content": "t5\nt6"}]


def seeing(tmp_path: Path) -> Served:
    """Forty positions, of which a picture takes four; 16 x 16 pixels."""
    path = tmp_path / "tokenizer.json"
    backend = Backend.from_file(str(path))
    backend.add_special_tokens(["<|image|>"])
    backend.save(str(path))
    tokenizer = Tokenizer.from_file(path)
    template = ChatTemplate((TEMPLATES / "chatml-pictures.jinja").read_text(), tokenizer)
    sight = Sight(backend.token_to_id("<|image|>"), 4, (16, 16))
    return Served(tmp_path / "mine", 40, 0.8, tokenizer, template, is_chat=True, sight=sight)


def test_a_picture_is_sent_on_as_the_model_reads_it(served: Served, tmp_path: Path) -> None:
    """Whatever file it was: what transformers' server decodes was made here, and takes its room."""
    sees = seeing(tmp_path)
    asked = [{"role": "user", "content": [shown(RED), {"type": "text", "text": "t5"}]}]
    fitted = sees.fit({"messages": asked}, chat=True)
    (part, words), bare = fitted["messages"][0]["content"], [{"role": "user", "content": "t5"}]
    assert words == {"type": "text", "text": "t5"}
    assert np.array_equal(picture_of_url(part["image_url"]["url"]), np.full((16, 16, 3), RED))
    alone = sees.fit({"messages": bare}, chat=True)
    assert fitted["max_tokens"] == alone["max_tokens"] - 4
    assert alone["messages"][0]["content"] == [{"type": "text", "text": "t5"}]
    assert served.most_bytes == 4 << 20 and sees.most_bytes > 20_000_000 * 4 / 3


def test_pictures_give_way_with_their_turns_and_are_not_decoded(
    served: Served, tmp_path: Path
) -> None:
    sees = seeing(tmp_path)
    old = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}] * 5}
    new = {"role": "user", "content": [shown(RED)]}
    fitted = sees.fit({"messages": [old, turn("assistant", 2), new]}, chat=True)
    assert len(fitted["messages"]) == 1
    with pytest.raises(ConfigError, match="the message has .* tokens; the model has room"):
        sees.fit({"messages": [{"role": "user", "content": [shown(RED)] * 10}]}, chat=True)


@pytest.mark.parametrize(
    "part, words",
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "nothing is fetched"),
        ({"type": "image_url", "image_url": "/etc/passwd"}, "nothing is fetched"),
        ({"type": "text", "text": "t5 <|image|>"}, "special_token"),
    ],
)  # fmt: skip
def test_no_address_is_fetched_and_no_placeholder_spelt(
    served: Served, tmp_path: Path, part: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        seeing(tmp_path).fit({"messages": [{"role": "user", "content": [part]}]}, chat=True)


def test_a_model_without_a_template_is_not_talked_to(tmp_path: Path, served: Served) -> None:
    mute = Served(tmp_path / "mine", 40, 0.8, served.tokenizer, None, is_chat=False)
    with pytest.raises(ConfigError, match="no chat template.*/v1/completions"):
        mute.fit({"messages": [turn("user", 1)]}, chat=True)


def folder_with_tokenizer(folder: Path, **config: Any) -> Path:
    """A Llama of Hugging Face whose generation_config.json says how to draw, and where to stop."""
    write_llama(folder, eos_token_id=1, **config)
    chat_tokenizer(folder / "tokenizer.json")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2], "temperature": 9.0}')
    return folder


def test_a_folder_is_served_under_its_name_with_our_way_to_draw(tmp_path: Path) -> None:
    """Without do_sample transformers' server takes the likeliest token at every temperature."""
    source = folder_with_tokenizer(tmp_path / "my:model")
    (source / "tokenizer_config.json").write_text('{"chat_template": null}')  # as some are written
    (tmp_path / "scratch").mkdir()
    served = prepare(source, tmp_path / "scratch", temperature=0.0)
    assert (served.name, served.context, served.is_chat) == ("my-model", 64, False)
    assert served.tokenizer.eod == 0
    drawn = json.loads((served.folder / "generation_config.json").read_text())
    assert drawn["do_sample"] is True and drawn["temperature"] == 1.0 and drawn["top_k"] == 0
    assert served.temperature == 0.0
    assert drawn["eos_token_id"] == [0, 2] and drawn["pad_token_id"] == 0
    assert json.loads((source / "generation_config.json").read_text())["temperature"] == 9.0
    assert (served.folder / "model.safetensors").resolve() == source / "model.safetensors"


def test_a_folder_that_asks_for_more_than_its_files_is_not_served(tmp_path: Path) -> None:
    """transformers' server would ask the hub for the kernels of this one."""
    source = folder_with_tokenizer(tmp_path / "m", attn_implementation="somebody/kernels")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(CheckpointError, match="asks for code from elsewhere"):
        prepare(source, tmp_path / "scratch", temperature=0.5)
