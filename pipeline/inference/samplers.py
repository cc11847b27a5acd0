"""Text from a model: our own decoder on a checkpoint, transformers' sampler on its folders.

Both keep the keys and values of what was read. A checkpoint that is shown a picture, or may be in a
chat, is exported to a temporary folder, for transformers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import CHAT_TEMPLATE, attachment, read_record
from pipeline.data.chat import ChatTemplate, Messages
from pipeline.errors import CheckpointError, ConfigError
from pipeline.huggingface.loading import load_processor, load_tokenizer, load_transformers
from pipeline.huggingface.writer import DType, export
from pipeline.inference.drawing import check_numbers, choose, numbers_alone
from pipeline.inference.generation import NO_TEMPLATE, GenerateConfig, check_model
from pipeline.inference.pictures import BLIND, Sight, pictures_in
from pipeline.inference.streaming import Outlet, cut_at_stop, stop_at, streamer
from pipeline.inference.turns import fitting_turns
from pipeline.log import logger

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.data.tokenizer import Tokenizer


class TextSampler(Protocol):
    """Continues prompts."""

    sight: Sight | None
    """How it sees; None: it is shown no pictures."""
    has_template: bool
    """Whether it answers in dialogues; else it only goes on with a text."""

    def drawing(self, cfg: GenerateConfig) -> TextSampler:
        """The same model with other settings of how to draw."""

    def sample(self, prompts: list[str], *, on_text: Callable[[str], None] | None) -> list[str]:
        """The prompts' continuations; on_text gets a single one's text piece by piece."""

    def answer(
        self, dialogues: Sequence[Messages], *, on_text: Callable[[str], None] | None
    ) -> list[str]:
        """What the assistant says next in each dialogue; on_text as above.

        Args:
            dialogues: pictures in them are parts as `about_pictures` makes them.

        Raises:
            ConfigError: the model has no chat template, it refuses a dialogue, or pictures are
                shown to a model that reads none.
        """


class _Drawing:
    """What both samplers have."""

    cfg: GenerateConfig
    max_seq_len: int

    @property
    def _room(self) -> int:
        """Tokens that a prompt may have."""
        return self.max_seq_len - min(self.cfg.max_new_tokens, self.max_seq_len // 2)

    def drawing(self, cfg: GenerateConfig) -> Self:
        """The same model with other settings of how to draw."""
        other = copy.copy(self)
        other.cfg = cfg
        return other


@contextlib.contextmanager
def open_sampler(cfg: GenerateConfig, *, needs_template: bool = False) -> Iterator[TextSampler]:
    """The sampler that can compute the model, and one that answers where that is needed."""
    check_model(cfg, needs_template=needs_template)
    path = Path(cfg.checkpoint)
    if (path / "config.json").is_file():
        yield TransformersSampler(path, cfg)
        return
    folder = folders.find(path)
    if problems := folders.damage(folder):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}.")
    logger.info("sampling from %s", folder)
    if cfg.image is None and not (cfg.chat and _may_be_shown(folder)):
        yield LocalSampler(folder, cfg)
        return
    with tempfile.TemporaryDirectory() as scratch:
        export(folder, Path(scratch), dtype=DType.fp32)
        yield TransformersSampler(Path(scratch), cfg)


def _may_be_shown(folder: Path) -> bool:
    """Whether a chat with a checkpoint can have pictures."""
    sees = bool(read_record(folder).model().vision.num_layers)
    return sees and importlib.util.find_spec("transformers") is not None


class TransformersSampler(_Drawing):
    """transformers' generate on a Hugging Face folder."""

    def __init__(self, folder: Path, cfg: GenerateConfig) -> None:
        import torch

        self.cfg = cfg
        on_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if on_cuda else "cpu")
        dtype = torch.bfloat16 if on_cuda else torch.float32
        from transformers import GenerationConfig

        self.model = load_transformers(folder, dtype, self.device)
        self.tokenizer: Any = load_tokenizer(folder)
        self.has_template = self.tokenizer.chat_template is not None
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends: list[int] = [end for end in ends if type(end) is int]
        # Of the folder's generation_config.json nothing else counts: our settings say how to draw.
        self.model.generation_config = GenerationConfig(eos_token_id=self.ends or None)
        self.max_seq_len = int(self.model.config.get_text_config().max_position_embeddings)
        self.sight, self._folder = Sight.of(folder), folder

    def sample(self, prompts: list[str], *, on_text: Callable[[str], None] | None) -> list[str]:
        """The prompts' continuations; on_text gets a single one's text piece by piece."""
        # An empty prompt begins a document, which its end does; a long one loses its beginning.
        start = self.ends[:1]
        rows = [self.tokenizer(p)["input_ids"][-self._room :] or start for p in prompts]
        if not all(rows):
            raise ConfigError("this model names no token that begins a text: give a prompt.")
        return self._continue(rows, on_text)

    def answer(
        self, dialogues: Sequence[Messages], *, on_text: Callable[[str], None] | None
    ) -> list[str]:
        """What the assistant says next in each dialogue."""
        if not self.has_template:
            raise ConfigError(NO_TEMPLATE)

        def ids(messages: Messages) -> list[int]:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            row = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            count = len(pictures_in(messages))
            if self.sight is None and count:
                raise ConfigError(f"{BLIND}: show it none.")
            return row if self.sight is None else self.sight.spread(row, count)

        fitted = [fitting_turns(messages, ids, self._room) for messages in dialogues]
        images = [image for messages, _ in fitted for image in pictures_in(messages)]
        return self._continue([row for _, row in fitted], on_text, images)

    @functools.cached_property
    def _processor(self) -> Any:
        """Of pictures."""
        return load_processor(self._folder).image_processor

    def _continue(
        self,
        rows: list[list[int]],
        on_text: Callable[[str], None] | None,
        images: Sequence[Image] = (),
    ) -> list[str]:
        """Texts after rows of ids, padded on the left to one batch, and the pictures in them."""
        import torch

        cfg = self.cfg
        length, pad = max(map(len, rows)), (self.ends or [0])[0]
        padded = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        options: dict[str, Any] = {
            "do_sample": cfg.temperature > 0,
            "logits_processor": [numbers_alone()],
        }
        if cfg.temperature > 0:
            options |= {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}
        if cfg.stop:
            options["stopping_criteria"] = [stop_at(cfg.stop, self.tokenizer, length)]
        if images and self.sight is not None:
            pixels = self.sight.given(images, self._processor)
            options["pixel_values"] = pixels.to(self.device, self.model.dtype)
        if on_text is not None:
            options["streamer"] = streamer(self.tokenizer, on_text, stop=cfg.stop, ends=self.ends)
        with torch.no_grad():
            output = self.model.generate(
                input_ids=padded.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=min(cfg.max_new_tokens, self.max_seq_len - length),
                pad_token_id=pad,
                **options,
            )
        texts = [self._text(row) for row in output[:, length:].tolist()]
        return [cut_at_stop(text, cfg.stop) for text in texts]

    def _text(self, ids: list[int]) -> str:
        """Up to the end of the document or turn, special tokens left out."""
        places = [ids.index(end) for end in self.ends if end in ids]
        ids = ids[: min(places)] if places else ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class LocalSampler(_Drawing):
    """Our own decoder on a checkpoint; needs torch alone, whose import is most of its start."""

    sight: Sight | None = None

    def __init__(self, folder: Path, cfg: GenerateConfig) -> None:
        from pipeline.data.tokenizer import Tokenizer
        from pipeline.huggingface.whole_model import open_model
        from pipeline.model.decoder import Decoder

        tensors, record = open_model(folder), read_record(folder)
        self.cfg = cfg
        raw = attachment(folder, "tokenizer.json")
        if raw is None:
            raise CheckpointError(f"{folder} has no tokenizer.json: it can be asked nothing.")
        self.tokenizer = Tokenizer(raw, path=str(folder / "tokenizer.json"), eod=record.eod)
        self.ends = {self.tokenizer.eod, record.end_of_turn}
        self.template: ChatTemplate | None = None
        if (source := attachment(folder, CHAT_TEMPLATE)) is not None:
            try:
                template = source.decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(
                    f"{folder / CHAT_TEMPLATE} cannot be read: {error}."
                ) from None
            self.template = ChatTemplate(template, self.tokenizer)
        self.has_template = self.template is not None
        self.decoder = Decoder(record.model(), lambda name: tensors.tensor(f"weights/{name}"))
        self.max_seq_len = record.model().max_seq_len

    def sample(self, prompts: list[str], *, on_text: Callable[[str], None] | None) -> list[str]:
        """The prompts' continuations; on_text gets a single one's text piece by piece."""
        # An empty prompt begins a document, which its end does; a long one loses its beginning.
        rows = [self.tokenizer.encode(p)[-self._room :] or [self.tokenizer.eod] for p in prompts]
        return self._continue(rows, on_text)

    def answer(
        self, dialogues: Sequence[Messages], *, on_text: Callable[[str], None] | None
    ) -> list[str]:
        """What the assistant says next in each dialogue."""
        if self.template is None:
            raise ConfigError(NO_TEMPLATE)
        if any(map(pictures_in, dialogues)):
            raise ConfigError("our own decoder samples text: pictures are shown by transformers.")
        ids = self.template.prompt_ids
        rows = [fitting_turns(messages, ids, self._room)[1] for messages in dialogues]
        return self._continue(rows, on_text)

    def _continue(self, rows: list[list[int]], on_text: Callable[[str], None] | None) -> list[str]:
        """Texts after rows of ids, a token of each at a time."""
        import torch

        cfg, hears = self.cfg, on_text or (lambda _: None)
        texts = [_Text(self.tokenizer, stop=cfg.stop, ends=self.ends, on_text=hears) for _ in rows]
        logits, memory = self.decoder.begin(rows)
        for left in reversed(range(min(cfg.max_new_tokens, self.max_seq_len - memory.length))):
            check_numbers(logits)
            drawn = [
                choose(row, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
                for row in logits
            ]
            tokens = torch.stack(drawn)
            for text, token in zip(texts, tokens.tolist(), strict=True):
                text.add(token)
            if not left or all(text.is_over for text in texts):
                break
            logits = self.decoder.read(tokens[:, None], memory)
        for text in texts:
            text.close()
        return [text.text for text in texts]


class _Text:
    """A continuation as it grows; `on_text` hears each whole character once."""

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str], ends: set, on_text: Callable
    ) -> None:
        self._tokenizer, self._stop, self._ends = tokenizer, stop, ends
        self._outlet = Outlet(on_text, stop)
        self._tokens: list[int] = []
        self.text, self.is_over = "", False

    def add(self, token: int) -> None:
        """Go on with a token, unless the text is over."""
        self.is_over |= token in self._ends
        if self.is_over:
            return
        self._tokens.append(token)
        so_far = self._tokenizer.backend.decode(self._tokens, skip_special_tokens=True)
        if so_far.endswith("\ufffd"):  # in the middle of a character
            return
        self.text = cut_at_stop(so_far, self._stop)
        self._outlet.show(so_far, is_whole=False)
        self.is_over = len(self.text) < len(so_far)

    def close(self) -> None:
        """No token follows: what could have begun a stop string is text."""
        self._outlet.show(self.text, is_whole=True)
