"""Text from a model: transformers' sampler on an exported folder, or our own forward pass.

transformers samples with its key/value cache; a checkpoint is exported to a temporary folder first.
A model that no transformers class computes is sampled through our own forward pass, which computes
the whole prefix for every token.
"""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import CHAT_TEMPLATE, attachment, read_record
from pipeline.data.chat import ChatTemplate, Messages
from pipeline.errors import CheckpointError, ConfigError
from pipeline.huggingface.loading import load_tokenizer, load_transformers
from pipeline.huggingface.writer import DType, export
from pipeline.inference.drawing import choose
from pipeline.inference.pictures import ShownPicture
from pipeline.inference.streaming import cut_at_stop, stop_at, streamer
from pipeline.inference.turns import fitting
from pipeline.log import logger

NO_TEMPLATE = (
    "this model has no chat template: it was not trained on dialogues (data_prep.conversations). "
    "Give it a prompt= instead."
)


@dataclass
class GenerateConfig:
    """Sample text."""

    checkpoint: str = "???"
    """A run folder (its newest checkpoint), one checkpoint, or a Hugging Face folder."""
    prompt: str = ""
    """Text to continue; empty: the start of a document."""
    image: str | None = None
    """A png, jpeg or webp file that the prompt, or the first turn of a chat, is about."""
    file: str | None = None
    """Text file with one prompt a line; replaces `prompt`."""
    interactive: bool = False
    """Ask for prompts on the terminal until end of file."""
    chat: bool = False
    """Talk on the terminal until end of file, by the model's chat template."""
    max_new_tokens: int = 128
    """Longest continuation, tokens; it ends earlier with the document."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token every time."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability; 1: all."""
    num_samples: int = 1
    """Continuations of each prompt."""
    batch_size: int = 16
    """Continuations that are computed together."""
    stop: list[str] = field(default_factory=list)
    """A continuation ends with the first of these strings."""
    seed: int = 1234
    """Of what is drawn."""


class TextSampler(Protocol):
    """Continues prompts."""

    def drawing(self, cfg: GenerateConfig) -> TextSampler:
        """The same model with other settings of how to draw."""

    def sample(self, prompts: list[str], *, on_text: Callable[[str], None] | None) -> list[str]:
        """The prompts' continuations; on_text gets a single one's text piece by piece."""

    def answer(
        self, dialogues: Sequence[Messages], *, on_text: Callable[[str], None] | None
    ) -> list[str]:
        """What the assistant says next in each dialogue; on_text as above.

        Raises:
            ConfigError: the model has no chat template, or it refuses a dialogue.
        """


class _Drawing:
    """What both samplers have."""

    cfg: GenerateConfig

    def drawing(self, cfg: GenerateConfig) -> Self:
        """The same model with other settings of how to draw."""
        other = copy.copy(self)
        other.cfg = cfg
        return other


def check_drawing(cfg: GenerateConfig) -> None:
    """Raise ConfigError where nothing can be drawn so."""
    if not 0 <= cfg.temperature < math.inf or not 0 < cfg.top_p <= 1 or cfg.top_k < 0:
        raise ConfigError(
            f"temperature ({cfg.temperature}) and top_k ({cfg.top_k}) must be at least 0, "
            f"top_p ({cfg.top_p}) in (0, 1]."
        )
    if min(cfg.num_samples, cfg.batch_size, cfg.max_new_tokens) < 1:
        raise ConfigError(
            f"num_samples ({cfg.num_samples}), batch_size ({cfg.batch_size}) and max_new_tokens "
            f"({cfg.max_new_tokens}) must be at least 1."
        )


def check_model(cfg: GenerateConfig) -> None:
    """Raise CheckpointError or ConfigError where, by its files' names, no such model is there."""
    path = Path(cfg.checkpoint)
    if (path / "config.json").is_file():
        return
    folder = folders.find(path)
    if cfg.chat and not (folder / CHAT_TEMPLATE).is_file():
        raise ConfigError(NO_TEMPLATE)


@contextlib.contextmanager
def open_sampler(cfg: GenerateConfig) -> Iterator[TextSampler]:
    """The sampler that can compute the model."""
    path = Path(cfg.checkpoint)
    if (path / "config.json").is_file():
        yield TransformersSampler(path, cfg)
        return
    folder = folders.find(path)
    if problems := folders.damage(folder):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}.")
    logger.info("sampling from %s", folder)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            import transformers  # noqa: F401

            export(folder, Path(scratch), dtype=DType.fp32)
        except (ConfigError, ImportError) as error:
            logger.warning(
                "%s Sampling with our own forward pass, which is slower.",
                str(error).partition(". It can be")[0] + ".",
            )
            yield LocalSampler(folder, cfg)
            return
        yield TransformersSampler(Path(scratch), cfg)


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
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends: list[int] = [end for end in ends if type(end) is int]
        # Of the folder's generation_config.json nothing else counts: our settings say how to draw.
        self.model.generation_config = GenerationConfig(eos_token_id=self.ends or None)
        self.max_seq_len = int(self.model.config.get_text_config().max_position_embeddings)
        self.shown = ShownPicture(cfg.image, folder, self.model) if cfg.image else None

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
        if self.tokenizer.chat_template is None:
            raise ConfigError(NO_TEMPLATE)

        def ids(messages: Messages) -> list[int]:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            row = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            return row if self.shown is None else self.shown.spread(row)

        return self._continue([fitting(m, ids, self._room) for m in dialogues], on_text)

    @property
    def _room(self) -> int:
        """Tokens that a prompt may have."""
        return self.max_seq_len - min(self.cfg.max_new_tokens, self.max_seq_len // 2)

    def _continue(self, rows: list[list[int]], on_text: Callable[[str], None] | None) -> list[str]:
        """Texts after rows of ids, padded on the left to one batch."""
        import torch

        cfg = self.cfg
        length, pad = max(map(len, rows)), (self.ends or [0])[0]
        padded = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        options: dict[str, Any] = {"do_sample": cfg.temperature > 0}
        if cfg.temperature > 0:
            options |= {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}
        if cfg.stop:
            options["stopping_criteria"] = [stop_at(cfg.stop, self.tokenizer, length)]
        if self.shown is not None:
            options |= self.shown.given(rows)
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
    """Our own forward pass on a checkpoint."""

    def __init__(self, folder: Path, cfg: GenerateConfig) -> None:
        from pipeline.data.tokenizer import Tokenizer
        from pipeline.huggingface.whole_model import open_model
        from pipeline.model.local_model import LocalModel

        if cfg.image:
            raise ConfigError(
                f"image={cfg.image} needs transformers and a model that it computes: our own "
                "forward pass samples text. Leave it out."
            )
        tensors = open_model(folder)
        self.cfg = cfg
        record = read_record(folder)
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
        self.model = LocalModel(
            record.model(),
            lambda name: tensors.tensor(f"weights/{name}"),
        )

    def sample(self, prompts: list[str], *, on_text: Callable[[str], None] | None) -> list[str]:
        """The prompts' continuations; on_text gets a single one's text piece by piece."""
        rows = [self.tokenizer.encode(prompt) or [self.tokenizer.eod] for prompt in prompts]
        return [self._continue(row, on_text or (lambda _: None)) for row in rows]

    def answer(
        self, dialogues: Sequence[Messages], *, on_text: Callable[[str], None] | None
    ) -> list[str]:
        """What the assistant says next in each dialogue."""
        if self.template is None:
            raise ConfigError(NO_TEMPLATE)
        room = self.model.model.max_seq_len // 2
        rows = [fitting(messages, self.template.prompt_ids, room) for messages in dialogues]
        return [self._continue(row, on_text or (lambda _: None)) for row in rows]

    def _continue(self, prefix: list[int], on_text: Callable[[str], None]) -> str:
        """Text after a row of ids, a token at a time; `on_text` hears each whole character."""
        import torch

        cfg, text = self.cfg, ""
        tokens: list[int] = []
        while len(tokens) < cfg.max_new_tokens:
            window = torch.tensor([[*prefix, *tokens][-self.model.model.max_seq_len :]])
            logits = self.model.logits(window)[0, -1]
            token = int(
                choose(logits, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
            )
            if token in self.ends:
                break
            tokens.append(token)
            so_far = self.tokenizer.decode(tokens)
            if so_far.endswith("\ufffd"):  # in the middle of a character
                continue
            before, text = text, cut_at_stop(so_far, cfg.stop)
            on_text(text[len(before) :])
            if len(text) < len(so_far):
                break
        return text
