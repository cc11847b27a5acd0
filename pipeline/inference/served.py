"""A model as `transformers serve` gets it, and requests cut to what it has room for.

    checkpoint --export--> SCRATCH/NAME    a Hugging Face folder, of links --> the same
    request --Served.fit--> as many last turns, or as long an end of the text, as fit; pictures in
                            them decoded by the rules of the data, at the size that the model reads

`transformers serve` hands a model whatever it is sent: more tokens than a model has positions end
in an index error, and a small model's context is full after some turns. A picture it would fetch
from any address, or open as a file of this machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import CHAT_TEMPLATE, read_record
from pipeline.data.chat import ChatTemplate, Messages, Rejected
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.files import read_file
from pipeline.huggingface.json_files import read_json, write_json
from pipeline.huggingface.loading import check_folder, holds_template
from pipeline.huggingface.writer import DType, export
from pipeline.inference.generation import NO_TEMPLATE
from pipeline.inference.pictures import BLIND, Sight, picture_of_url, pictures_in, url_of
from pipeline.inference.turns import fitting_turns
from pipeline.log import logger

MOST_TOKENS = 1024
"""Of an answer where a request names no number."""


@dataclass(frozen=True)
class Served:
    """A folder that is served, under the name of the folder."""

    folder: Path
    context: int
    """Positions of the model."""
    temperature: float
    """Where a request names none."""
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None: it has none, or one that cannot be rendered here: then dialogues are not cut."""
    is_chat: bool
    sight: Sight | None = None
    """None: it reads no pictures."""

    @property
    def most_bytes(self) -> int:
        """Of a request: words, or a few pictures of the largest size."""
        return (4 if self.sight is None else 64) << 20

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.folder.name

    def fit(self, request: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        """The request with no more than the model has room for.

        Raises:
            ConfigError: what is asked is of the wrong type, or its last message alone is too long.
        """
        wanted = request.get("max_completion_tokens", request.get("max_tokens"))
        if wanted is not None and (type(wanted) is not int or wanted < 1):
            raise ConfigError(f"max_tokens ({wanted!r}) must be a whole number of at least 1.")
        wanted = wanted or MOST_TOKENS
        heat = request.get("temperature")
        heat = self.temperature if heat is None else heat
        if type(heat) not in (int, float) or not 0 <= heat < math.inf:
            raise ConfigError(f"temperature ({heat!r}) must be a number of at least 0.")
        rest = {key: value for key, value in request.items() if key != "max_completion_tokens"}
        room = self.context - min(wanted, self.context // 2)
        if chat:
            more, used = self._fit_turns(request.get("messages"), room)
        else:
            more, used = self._fit_text(request.get("prompt"), room)
        room = max(1, min(wanted, self.context - used))
        return rest | more | {"max_tokens": room, "temperature": heat}

    def _fit_text(self, prompt: Any, room: int) -> tuple[dict[str, Any], int]:
        """The end of a prompt that fits, and its tokens; an empty one begins a document."""
        if not isinstance(prompt, str):
            raise ConfigError("prompt must be a text.")
        if not prompt:
            if (begins := self.tokenizer.eod_token) is None:
                raise ConfigError(
                    "this model names no token that begins a text: give it a beginning."
                )
            return {"prompt": begins}, 1
        backend = self.tokenizer.backend
        added = backend.num_special_tokens_to_add(False)  # such as <s>, which transformers adds
        ids, room = backend.encode(prompt, add_special_tokens=False).ids, room - added
        if len(ids) > room:
            # Tokens of a cut text need not be its old ones: a few are left free, and all counted.
            ids = ids[-max(1, room - min(8, room // 2)) :]
            prompt = backend.decode(ids, skip_special_tokens=False)
            ids = backend.encode(prompt, add_special_tokens=False).ids
        return {"prompt": prompt}, len(ids) + added

    def _fit_turns(self, messages: Any, room: int) -> tuple[dict[str, Any], int]:
        """The last turns that fit, and their tokens."""
        if not self.is_chat:
            raise ConfigError(f"{NO_TEMPLATE} Programs ask it at /v1/completions.")
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise ConfigError(
                "messages must be a list of {role: ..., content: ...}, a content a text or a list "
                "of {type: text, text: ...} and {type: image_url, image_url: {url: ...}}."
            )
        turns = [self._read(message) for message in messages]
        used = 0
        if self.template is not None:
            turns, ids = fitting_turns(turns, self._prompt_ids, room)
            used = len(ids)
        return {"messages": [self._sendable(turn) for turn in turns]}, used

    def _read(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message as templates have it: parts for a model with pictures, else one text.

        A picture stays an address until it is known whether its turn has room.
        """
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if self.sight is None:
            if any(part["type"] != "text" for part in parts):
                raise ConfigError(f"{BLIND}: leave image_url out.")
            return message | {"content": "\n".join(part["text"] for part in parts)}
        shown = [
            {"type": "text", "text": part["text"]}
            if part["type"] == "text"
            else {"type": "image", "image": _address(part)}
            for part in parts
        ]
        return message | {"content": shown}

    def _prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of a dialogue, each picture as many as its patches."""
        assert self.template is not None
        if self.sight is None:
            return self.template.prompt_ids(messages)
        bare = [
            {**m, "content": [{k: v for k, v in p.items() if k != "image"} for p in m["content"]]}
            for m in messages
        ]  # an address is no word of the dialogue
        return self.sight.spread(self.template.prompt_ids(bare), len(pictures_in(messages)))

    def _sendable(self, turn: dict[str, Any]) -> dict[str, Any]:
        """The turn for transformers' server, which is shown only what was decoded here."""
        if self.sight is None:
            return turn
        parts = []
        for part in turn["content"]:
            if part["type"] == "image":
                image = self.sight.shown(picture_of_url(part["image"]))
                part = {"type": "image_url", "image_url": {"url": url_of(image)}}
            parts.append(part)
        return turn | {"content": parts}


def _is_message(message: Any) -> bool:
    """Whether it has a role, and texts or pictures."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or isinstance(content, list) and all(map(_is_part, content))


def _is_part(part: Any) -> bool:
    """Whether it is a text or a picture, as OpenAI's clients send them."""
    if not isinstance(part, dict):
        return False
    if part.get("type") == "text":
        return isinstance(part.get("text"), str)
    return part.get("type") == "image_url" and isinstance(_address(part), str)


def _address(part: dict[str, Any]) -> Any:
    """Of a picture's part; its `detail` says nothing to a model of one size."""
    named = part.get("image_url")
    return named.get("url") if isinstance(named, dict) else named


def prepare(checkpoint: Path, scratch: Path, *, temperature: float) -> Served:
    """The model in a folder of `scratch` that has its name.

    Raises:
        CheckpointError: it is damaged, or asks for more than its files.
        ConfigError: no transformers class computes it.
    """
    if (checkpoint / "config.json").is_file():
        folder = scratch / _spelt(checkpoint.resolve().name)
        _link(checkpoint, folder)
    else:
        found = folders.find(checkpoint)
        if problems := folders.damage(found):
            raise CheckpointError(f"{found} is damaged: {'; '.join(problems)}.")
        folder = scratch / _spelt(str(read_record(found).config.get("name") or checkpoint.name))
        logger.info("exporting %s", found)
        export(found, folder, dtype=_dtype())
    settings = _settings(folder / "config.json")
    context = _positions(settings)
    if type(context) is not int or context < 2:
        raise CheckpointError(f"{folder.name}/config.json names no number of positions.")
    ends = [*_ends(folder, settings)]
    _say_how_to_draw(folder, ends)
    tokenizer = Tokenizer.from_file(folder, eod=ends[0] if ends else None)
    is_chat, template = _template(folder, tokenizer)
    sight = Sight.of(folder)
    served = Served(folder, context, temperature, tokenizer, template, is_chat, sight)
    if sight is not None and template is not None:
        picture = {"type": "image", "image": ""}
        try:
            served._prompt_ids([{"role": "user", "content": [picture]}])
        except (ConfigError, Rejected) as error:
            raise ConfigError(f"{folder.name} cannot be shown pictures: {error}") from None
    return served


def _positions(settings: dict[str, Any]) -> Any:
    """How many a config.json names, a Llava's of its text model."""
    text = settings.get("text_config", settings)
    return (
        text.get("max_position_embeddings", text.get("n_positions"))
        if isinstance(text, dict)
        else None
    )


def _spelt(name: str) -> str:
    """A name that transformers takes for a folder: no `:`, `@` or `/`."""
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII).lstrip(".-") or "model"


def _dtype() -> DType:
    import torch

    return DType.bf16 if torch.cuda.is_available() else DType.fp32


def _link(source: Path, folder: Path) -> None:
    """A folder of links to a Hugging Face folder's files: its generation_config is replaced."""
    check_folder(source)
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.name != "generation_config.json":
            (folder / path.name).symlink_to(path.resolve())
    if (source / "generation_config.json").is_file():
        written = read_file(source / "generation_config.json")
        (folder / "generation_config.json").write_bytes(written)


def _settings(path: Path) -> dict[str, Any]:
    """A file's settings; empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def _ends(folder: Path, settings: dict[str, Any]) -> Iterator[int]:
    """Ids at which an answer ends: of a document first, then of a turn."""
    named = _settings(folder / "generation_config.json").get("eos_token_id")
    named = settings.get("eos_token_id") if named is None else named
    yield from (end for end in (named if isinstance(named, list) else [named]) if type(end) is int)


def _say_how_to_draw(folder: Path, ends: list[int]) -> None:
    """Replace generation_config.json: without do_sample every temperature would be 0.

    The temperature is each request's: where it is 0 transformers' server takes the likeliest.
    """
    drawn: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if ends:
        drawn |= {"bos_token_id": ends[0], "eos_token_id": ends, "pad_token_id": ends[0]}
    write_json(folder / "generation_config.json", drawn)


def _template(folder: Path, tokenizer: Tokenizer) -> tuple[bool, ChatTemplate | None]:
    """Whether it answers, and the template where it can be rendered here."""
    path = folder / CHAT_TEMPLATE
    if not path.is_file():
        return holds_template(folder), None
    try:
        return True, ChatTemplate(read_file(path).decode(), tokenizer)
    except (ConfigError, UnicodeDecodeError) as error:
        logger.warning("long dialogues are not cut: %s", error)
        return True, None
