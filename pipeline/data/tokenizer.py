"""A tokenizer.json as the project sees it: text to ids, ids to text, the end-of-document id.

Hugging Face `tokenizers` is the definition of truth; data_prep/tokens/encode.py has faster engines,
which must agree.
Literal special strings in text are ordinary text here: a web page that writes about `<|endoftext|>`
must not end.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.files import sha256_of

# The first of these that the file has as an added token ends documents, unless the caller names
# another.
EOD_NAMES = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<eos>",
    "</s>",
    "[EOS]",
    "<|im_end|>",
]


class Tokenizer:
    """One tokenizer.json; `from_file` makes it."""

    def __init__(self, raw: bytes, *, path: str, eod: str | int | None = None) -> None:
        """Parse the bytes of a tokenizer.json.

        Args:
            raw: the file.
            path: for messages.
            eod: end-of-document token or its id; None: the first of EOD_NAMES that is there, else
                the only special token of the file.

        Raises:
            DataError: not a tokenizer.json, or no rule gives the end-of-document token.
        """
        from tokenizers import Tokenizer as Backend

        self.path = path
        self.raw = raw
        self.sha256 = sha256_of(raw)
        try:
            self.json: dict[str, Any] = json.loads(raw)
            self.backend = Backend.from_str(raw.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"{path} cannot be read as a tokenizer ({str(error)[:200]}). It must be a "
                "tokenizer.json of Hugging Face tokenizers; make one with: python -m "
                "data_prep.train_tokenizer input=... output=..."
            ) from error
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self._added = {token["content"]: token for token in self.json.get("added_tokens") or []}
        self.vocab_size = 1 + max(
            self.backend.get_vocab(with_added_tokens=True).values(), default=-1
        )
        self.eod = self._find_eod(eod)

    @classmethod
    def from_file(cls, path: str | Path, *, eod: str | int | None = None) -> Tokenizer:
        """The tokenizer of a local tokenizer.json, or of the folder that holds one."""
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            return cls(file.read_bytes(), path=str(file), eod=eod)
        except OSError as error:
            raise DataError(
                f"{file} cannot be read ({error.strerror}). Give a tokenizer.json; make one with: "
                "python -m data_prep.train_tokenizer input=... output=..."
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; no token is added before or after it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Text of ids, special tokens by name."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """(vocab_size,): bytes each id stands for; none for special tokens and unused ids."""
        table = [b""] * self.vocab_size
        is_byte_level = '"ByteLevel"' in json.dumps(
            [self.json.get("decoder"), self.json.get("pre_tokenizer")]
        )
        for text, token_id in self.backend.get_vocab(with_added_tokens=False).items():
            table[token_id] = _byte_level(text) if is_byte_level else _sentencepiece(text)
        for text, token in self._added.items():
            table[token["id"]] = b"" if token["special"] else text.encode()
        table[self.eod] = b""
        return table

    def token_byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int32: bytes each id stands for, 0 if special; for bits per byte."""
        return np.array([len(token) for token in self.token_bytes], np.int32)

    def _find_eod(self, eod: str | int | None) -> int:
        vocab = self.backend.get_vocab(with_added_tokens=True)
        special = [name for name, token in self._added.items() if token["special"]]
        if eod is None:
            candidates = [name for name in EOD_NAMES if name in self._added] or special[
                : len(special) == 1
            ]
            eod = candidates[0] if candidates else None
        if eod in vocab:
            return int(vocab[str(eod)])
        if str(eod).isdecimal() and int(str(eod)) < self.vocab_size:
            return int(str(eod))
        wish = (
            "none of its tokens is known to do so"
            if eod is None
            else f"{eod!r} is not one of its tokens"
        )
        raise DataError(
            f"{self.path}: every document must end with a token, and {wish}. Name it with "
            f"eod=TOKEN or eod=ID (below {self.vocab_size}); its special tokens are: "
            f"{', '.join(special[:20]) or '(none)'}."
        )


def _byte_level(text: str) -> bytes:
    """Bytes of a token of GPT-2's vocabulary, which writes each byte as a printable character."""
    return bytes(b for c in text for b in ([_BYTE_OF[c]] if c in _BYTE_OF else c.encode()))


def _sentencepiece(text: str) -> bytes:
    """Bytes of a token of a sentencepiece-like vocabulary: `▁` is a space, `<0x0A>` a byte."""
    if match := re.fullmatch("<0x([0-9A-F]{2})>", text):
        return bytes.fromhex(match[1])
    return text.replace("▁", " ").encode()


def byte_characters() -> list[str]:
    """(256,): the character that stands for each byte in a byte-level vocabulary.

    Source: bytes_to_unicode in github.com/openai/gpt-2, src/encoder.py: printable bytes stand for
    themselves, the others for the code points from 256 up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}
