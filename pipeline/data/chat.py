"""Dialogues to text and to token ids by a chat template, as transformers renders it.

    messages --Jinja's sandbox--> text, spans of {% generation %} --tokenizer--> ids, loss

A template is checked once, when it is loaded: each check is a mistake that others have trained
with. The whole text is tokenized at once, as it will be when the model is asked. Needs no torch and
no transformers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np

from pipeline.data.chat_sandbox import MARK, TooLong, bounded, sandbox
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

Messages = list[dict[str, Any]]
PROBE: Messages = [
    {"role": "user", "content": "How does one say cat in German?"},
    {"role": "assistant", "content": "Katze."},
    {"role": "user", "content": "And in French?"},
    {"role": "assistant", "content": "One says chat."},
]


class Rejected(Exception):
    """A dialogue that cannot be learned from."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Rendered(NamedTuple):
    """A dialogue as text."""

    text: str
    spans: list[tuple[int, int]]
    """[begin, end) characters that are learned, in order."""


class Encoded(NamedTuple):
    """A dialogue as tokens."""

    text: str
    ids: np.ndarray
    """(n,) int64."""
    loss: np.ndarray
    """(n,) uint8: 1 where the token is to be predicted."""


class ChatTemplate:
    """One template with the tokenizer whose tokens it spells."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, name: str = "the chat template"):
        """Parse and check it.

        Raises:
            ConfigError: it cannot be parsed, or a model trained with it could not be used.
        """
        self.source, self.tokenizer, self.name = source, tokenizer, name
        try:
            with bounded():  # constants are computed here already
                self._template = sandbox().from_string(source)
        except (
            jinja2.TemplateError,
            SyntaxError,
            ValueError,
            ArithmeticError,
            RecursionError,
            MemoryError,
            TooLong,
        ) as error:
            kind = type(error).__name__
            raise ConfigError(f"{name} is not a Jinja template ({kind}: {error}).") from None
        self.end_of_turn = self._check()

    def render(
        self, messages: Messages, *, tools: Any = None, add_generation_prompt: bool = False
    ) -> Rendered:
        """The text of a dialogue.

        Args:
            messages: each with `role` and `content`.
            tools: handed to the template.
            add_generation_prompt: end where the assistant begins to speak.

        Raises:
            Rejected: the template refuses these messages.
        """
        end = self.tokenizer.eod_token or ""
        try:
            with bounded():
                marked = self._template.render(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    bos_token=end,
                    eos_token=end,
                    add_generation_prompt=add_generation_prompt,
                )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            ArithmeticError,
            RecursionError,
            MemoryError,
            TooLong,
        ) as error:
            # What the sandbox's Python raises on a field that is missing or of another type.
            raise Rejected("template_error", f"{type(error).__name__}: {error}") from None
        pieces, spans, place = marked.split(MARK), [], 0
        for number, piece in enumerate(pieces):
            if number % 2:  # between two marks
                spans.append((place, place + len(piece)))
            place += len(piece)
        return Rendered("".join(pieces), spans)

    def encode(self, messages: Messages, *, tools: Any = None) -> Encoded:
        """Ids of a dialogue, and which of them are to be predicted.

        Args:
            messages: each with `role`, `content` and perhaps `learn` (of an assistant's message;
                default true).
            tools: handed to the template.

        Raises:
            Rejected: with one of the reasons in data_prep/sources/rejects.py.
        """
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers:
            raise Rejected("no_assistant")
        if found := self._spelt_special(messages, tools):
            raise Rejected("special_token", found)
        bare = [{k: v for k, v in message.items() if k != "learn"} for message in messages]
        text, spans = self.render(bare, tools=tools)
        if len(spans) != len(answers):
            raise Rejected("template_error", f"{len(spans)} learned parts, {len(answers)} answers")
        ids, begins, ends = self._tokenize(text)
        loss = np.zeros(len(ids), np.uint8)
        for message, (begin, end) in zip(answers, spans, strict=True):
            for edge in (begin, end):
                if ((begins < edge) & (edge < ends)).any():
                    raise Rejected("boundary_inside_token", repr(text[max(edge - 9, 0) : edge + 9]))
            if message.get("learn", True):
                loss[(begins >= begin) & (ends <= end)] = 1
        loss[:1] = 0  # nothing comes before it to predict it from
        if not loss.any():
            raise Rejected("nothing_learned")
        return Encoded(text, ids, loss)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of a dialogue up to where the assistant begins to speak.

        Raises:
            Rejected: the template refuses it, or it spells a special token.
        """
        if found := self._spelt_special(messages):
            raise Rejected("special_token", found)
        return self._tokenize(self.render(messages, add_generation_prompt=True).text)[0].tolist()

    @functools.cached_property
    def _backend(self) -> Backend:
        """The tokenizer with its special tokens, without what it would add around a text.

        Its post-processor may also trim spaces off the places of tokens: a token over the edge of
        what is learned would look as if it were not.
        """
        from tokenizers import Tokenizer as Backend

        content = self.tokenizer.json | {"post_processor": None}
        backend = Backend.from_str(json.dumps(content))
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _tokenize(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, first character, character after the last) of each token, (n,) int64 each."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.array(encoding.ids, np.int64), places[:, 0], places[:, 1]

    def _spelt_special(self, *values: Any) -> str:
        """The first special token that a dialogue's own words spell; empty: none.

        The text is tokenized as a whole, so it would become a real one: a user could end his turn
        and speak as the assistant.
        """
        names = self.tokenizer.special_names
        return next((n for text in _strings(values) for n in names if n in text), "")

    def _check(self) -> int:
        """The id that ends an answer, once the template is known to be one that trains a chat.

        Raises:
            ConfigError: it is not.
        """
        whole = self._render_probe(len(PROBE))
        answers = [m["content"] for m in PROBE if m["role"] == "assistant"]
        if not whole.spans or not any(b < e for b, e in whole.spans):
            raise ConfigError(
                f"{self.name} marks nothing as learned: put what the assistant says, and the token "
                "that ends its turn, between {% generation %} and {% endgeneration %}."
            )
        if len(whole.spans) != len(answers):
            raise ConfigError(
                f"{self.name} marks {len(whole.spans)} parts of a dialogue with {len(answers)} "
                "answers: {% generation %} must come once for each message of the assistant."
            )
        for count in (2, 4):
            cut = self._render_probe(count)
            if not whole.text.startswith(cut.text):
                raise ConfigError(
                    f"{self.name} renders a dialogue that ends after answer {count // 2} in "
                    f"another way than the beginning of a longer one: {cut.text[-60:]!r}. Turns "
                    "would be learned in one form and used in another."
                )
            asked = self._render_probe(count - 1, add_generation_prompt=True).text
            learned = whole.text[: whole.spans[count // 2 - 1][0]]
            if asked != learned:
                raise ConfigError(
                    f"{self.name} with add_generation_prompt ends in {asked[-30:]!r}; in training "
                    f"an answer follows {learned[-30:]!r}. Make them equal, or the model is asked "
                    "in a way that it never saw."
                )
        return self._find_end(whole, answers)

    def _render_probe(self, count: int, *, add_generation_prompt: bool = False) -> Rendered:
        """The first messages of PROBE."""
        try:
            return self.render(PROBE[:count], add_generation_prompt=add_generation_prompt)
        except Rejected as error:
            raise ConfigError(
                f"{self.name} cannot render a dialogue of user and assistant: {error.detail}."
            ) from None

    def _find_end(self, whole: Rendered, answers: list[str]) -> int:
        """The special token that ends every learned part: without it a model never stops."""
        ids, begins, ends = self._tokenize(whole.text)
        found: set[int | None] = set()
        for (begin, end), answer in zip(whole.spans, answers, strict=True):
            after = begin + whole.text[begin:end].rfind(answer) + len(answer)
            inside = ids[(begins >= after) & (ends <= end)].tolist()
            special = [i for i in inside if i in self.tokenizer.special_ids]
            found.add(special[-1] if special else None)
        (end_of_turn, *others) = found
        if others or end_of_turn is None:
            raise ConfigError(
                f"{self.name} does not learn where an answer ends: between the answer and "
                "{% endgeneration %} there must be a special token of the tokenizer "
                f"({', '.join(sorted(self.tokenizer.special_names)[:8])}), or the model never "
                "stops. Tokenizers of data_prep.train_tokenizer have <|im_end|>; template=plain "
                "needs none but the one that ends documents."
            )
        return end_of_turn


def _strings(value: Any) -> Iterator[str]:
    """Every text in nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
