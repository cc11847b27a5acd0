"""Text to token ids, as fast as exactness allows.

    hf          Hugging Face tokenizers: the definition of truth, 3 MB/s a core
    tiktoken    built from the merges of tokenizer.json, 20 MB/s a core
    gigatoken   150 MB/s a core

auto takes the fastest engine that gives the reference's ids on a fixed list of hard texts; every
engine is compared with the reference again on documents of the job, and a difference ends it.
Literal special strings (`<|endoftext|>`) are ordinary text in all of them. Texts with code points
that engines class differently go to the reference, so that the bytes of a dataset never depend on
the engine.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

import numpy as np

from data_prep.sources.text import slices
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError, DataError
from pipeline.log import logger

EncoderName = Enum("EncoderName", ["auto", "gigatoken", "tiktoken", "hf"])
EncodeFunction = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
"""Texts to (ids of all texts, uint32; number of ids of each, int64)."""

CHECK_EVERY_BYTES = 32 * 2**20  # between documents that are compared with the reference
CHECK_CHARACTERS = 16 * 2**10  # longer documents are not compared: the reference needs 0.3 s a MB
LOOKED_UP = 2**20  # ids that are searched for special ones at once
RECYCLE_BYTES = 2**30  # an engine is built anew after so much text: their caches of words only grow
# Pretokenizer of GPT-2: github.com/openai/gpt-2, src/encoder.py; the form is tiktoken's, its
# meaning the same.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Encoder:
    """One engine, verified; holds the reference too."""

    def __init__(self, tokenizer: Tokenizer, name: EncoderName = EncoderName.auto) -> None:
        """Choose, build and verify the engine.

        Raises:
            ConfigError: the engine that was asked for cannot do this tokenizer, or gives other ids.
        """
        self._tokenizer = tokenizer
        self._reference = _hf(tokenizer)
        self._since_check = self._since_built = 0
        order = (
            [EncoderName.gigatoken, EncoderName.tiktoken, EncoderName.hf]
            if name is EncoderName.auto
            else [name]
        )
        for choice in order:
            reason = self._try(choice)
            if not reason:
                break
            if name is not EncoderName.auto:
                raise ConfigError(
                    f"encoder={name.name} does not fit {tokenizer.path}: {reason}. Use "
                    "encoder=auto."
                )
            logger.info(f"encoder {choice.name} is not used with {tokenizer.path}: {reason}")
        self._since_check = CHECK_EVERY_BYTES  # the first text of the job is compared
        self._is_special = np.zeros(tokenizer.vocab_size, bool)
        self._is_special[list(tokenizer.special_ids)] = True

    def _try(self, name: EncoderName) -> str:
        """Why the engine cannot be used; empty: it is in use now."""
        try:
            engine = self._reference if name is EncoderName.hf else ENGINES[name](self._tokenizer)
        except Exception as error:
            # Whatever a foreign parser raises, it cannot read this tokenizer.
            return " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        self.name, self._engine = name, engine
        texts = list(_hard_texts(self._tokenizer))
        for text, ours, theirs in zip(
            texts, _split(*self._encode(texts)), _split(*self._reference(texts)), strict=True
        ):
            if not np.array_equal(ours, theirs):
                return f"it gives other ids than Hugging Face tokenizers for {text[:60]!a}"
        return ""

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts in a row, uint32; ids of each text, int64); no end-of-document.

        Raises:
            DataError: the engine gave other ids than the reference for a text, or a text holds the
                token that ends documents.
        """
        ids, lengths = self._encode(texts)
        # One look-up an id, 3 % of gigatoken's time: an end mark inside would cut the document.
        # In pieces: of a huge document the answers were a byte a token.
        pieces = (ids[i : i + LOOKED_UP] for i in range(0, len(ids), LOOKED_UP))
        if any(self._is_special[piece].any() for piece in pieces):
            self._refuse_special(texts, ids, lengths)
        return ids, lengths

    def _refuse_special(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        """Name the first text that gives a special token."""
        for text, mine in zip(texts, _split(ids, lengths)):
            found = mine[self._is_special[mine]]
            if len(found):
                name = self._tokenizer.backend.id_to_token(int(found[0]))
                raise DataError(
                    f"{self._tokenizer.path} gives its {name!r} (id {found[0]}), which ends "
                    f"documents or is special, for the ordinary text of the document that begins "
                    f"with {text[:80]!a}. Name a token that no text holds: eod=TOKEN."
                )

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """What encode gives, unchecked for special tokens."""
        if self._engine is self._reference:
            return self._reference(texts)
        size = sum(map(len, texts))
        self._since_built += size
        if self._since_built > RECYCLE_BYTES:
            self._engine, self._since_built = ENGINES[self.name](self._tokenizer), 0
        odd = [i for i, text in enumerate(texts) if is_disputed(text)]
        if odd:
            return self._encode_with_odd(texts, odd)
        ids, lengths = self._engine(texts)
        self._since_check += size
        if self._since_check >= CHECK_EVERY_BYTES:
            self._check(texts, ids, lengths)
        return ids, lengths

    def _encode_with_odd(self, texts: list[str], odd: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The disputed texts by the reference, the others by the engine, in their order."""
        plain = sorted(set(range(len(texts))) - set(odd))
        parts: list[np.ndarray] = [np.empty(0, np.uint32)] * len(texts)
        for numbers, engine in ((plain, self._engine), (odd, self._reference)):
            if numbers:
                for i, ids in zip(numbers, _split(*engine([texts[i] for i in numbers]))):
                    parts[i] = ids
        return np.concatenate(parts), np.array([len(part) for part in parts], np.int64)

    def _check(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        """Compare the first text of reasonable length with the reference."""
        for text, ours in zip(texts, _split(ids, lengths)):
            if len(text) <= CHECK_CHARACTERS:
                self._since_check = 0
                if not np.array_equal(ours, self._reference([text])[0]):
                    raise DataError(
                        f"encoder {self.name.name} gives other ids than Hugging Face tokenizers "
                        f"for the document that begins with {text[:80]!a}. Prepare into another "
                        "folder with encoder=tiktoken or encoder=hf; please report the text."
                    )
                return


@lru_cache(maxsize=1)
def get_encoder(path: str, sha256: str, eod: int, name: EncoderName) -> Encoder:
    """The encoder of this process for the tokenizer.json at `path`, built once.

    Raises:
        DataError: the file is not the one the job was planned with.
    """
    tokenizer = Tokenizer.from_file(path, eod=eod)
    if tokenizer.sha256 != sha256:
        raise DataError(
            f"{path} was changed while the job ran: sha256 {tokenizer.sha256[:12]}, planned "
            f"{sha256[:12]}."
        )
    return Encoder(tokenizer, name)


def _hf(tokenizer: Tokenizer) -> EncodeFunction:
    """Hugging Face tokenizers, the reference."""
    # One thread a process: processes are the parallelism here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    backend = tokenizer.text_backend

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(row) for row in rows], np.int64)
        return np.fromiter((i for row in rows for i in row), np.uint32, int(lengths.sum())), lengths

    return encode


def _gigatoken(tokenizer: Tokenizer) -> EncodeFunction:
    """gigatoken, which reads a tokenizer.json itself."""
    import gigatoken

    # Without its special tokens: it looks for them in text, under whatever name.
    added = tokenizer.text_json["added_tokens"]
    ordinary = [token for token in added if "\0" not in token["content"]]
    unlimited = {"added_tokens": ordinary, "truncation": None, "padding": None}
    content = tokenizer.text_json | unlimited
    engine = gigatoken.Tokenizer.from_json(json.dumps(content))

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        layout = engine.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets).astype(
            np.int64
        )

    return encode


def _tiktoken(tokenizer: Tokenizer) -> EncodeFunction:
    """tiktoken, built from the merges."""
    import tiktoken

    model, added = tokenizer.text_json["model"], tokenizer.text_json["added_tokens"]
    if (
        model["type"] != "BPE"
        or tokenizer.json.get("normalizer")
        or any("\0" not in token["content"] for token in added)
    ):
        raise ValueError(
            "it knows only byte-level BPE without normalizer and without ordinary added tokens"
        )
    pattern = _pattern(tokenizer.json.get("pre_tokenizer") or {})
    # tiktoken merges in the order of ranks, Hugging Face in the order of the list of merges.
    merged = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    pieces = [left + right for left, right in merged]
    vocab = model["vocab"]
    by_id = sorted(vocab.values())
    single = [i for i in by_id if len(tokenizer.token_bytes[i]) == 1]
    rest = by_id if model.get("ignore_merges") else []
    ids = list(dict.fromkeys([*single, *(vocab[piece] for piece in pieces), *rest]))
    ranks = {
        tokenizer.token_bytes[i]: rank for rank, i in enumerate(ids) if tokenizer.token_bytes[i]
    }
    engine = tiktoken.Encoding(
        "tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    )
    id_of_rank = np.array(ids, np.uint32)

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [engine.encode_to_numpy(text, disallowed_special=()) for text in texts]
        lengths = np.array([len(row) for row in rows], np.int64)
        return id_of_rank[np.concatenate(rows)] if rows else np.empty(0, np.uint32), lengths

    return encode


def _pattern(pre_tokenizer: dict[str, Any]) -> str:
    """The regular expression that cuts text into pieces.

    Raises:
        ValueError: the pretokenizer is not one regular expression over bytes.
    """
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *splits, last = steps
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if not splits and last.get("use_regex", True):
            return GPT2_PATTERN
        if (
            len(splits) == 1
            and not last.get("use_regex", True)
            and splits[0].get("behavior") == "Isolated"
        ):
            return str(splits[0]["pattern"]["Regex"])
    raise ValueError("its pretokenizer is not one regular expression over bytes")


ENGINES: dict[EncoderName, Callable[[Tokenizer], EncodeFunction]] = {
    EncoderName.gigatoken: _gigatoken,
    EncoderName.tiktoken: _tiktoken,
    EncoderName.hf: _hf,
}


def _split(ids: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    ends = np.cumsum(lengths)
    return (ids[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist()))


def _hard_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts that told engines apart before, every added token, and 200 random mixtures."""
    yield from HARD_TEXTS
    for token in (tokenizer.json.get("added_tokens") or [])[:1000]:
        yield f"a{token['content']}b {token['content']} {token['content']}{token['content']}"
    draw = random.Random(1)
    for _ in range(200):
        yield "".join(_random_piece(draw) for _ in range(draw.randint(1, 40)))


def _random_piece(draw: random.Random) -> str:
    if draw.random() < 0.25:
        return draw.choice(
            [" ", "  ", "\n", "\r\n", "\t", "'s", "'RE", "123", "4567", "the", " of"]
        )
    low, high = draw.choice(RANGES) if draw.random() < 0.6 else RANGES[0]
    return chr(draw.randint(low, high))


HARD_TEXTS: Sequence[str] = (
    "", "\n", "\r\n\r\n", "   x", "\u00a0\u2003x", "e\u0301\u0300", "١٢٣٤", "👩‍👩‍👧‍👦 ok",
    "\u200d\u200c", "ſ'S 'LL’s",
    "a" * 5000, "0" * 3001, " " * 1000 + "x", "\x01\x7f",
    "汉字漢字かなカナ한국어", "ไทย", "ǅ ʰ ⅷ ² ½",
    "\u0b95\u0bcd\u0bb7", "😀" * 50, "\ufeffBOM", "\r", "\t\t x", "\u2028\u2029",
    "\u0085 x", "\u180e",
    "\u1e9e'ſ", "K't", "<|endoftext|>", "</s> <s>[INST]",
    "def f(x):\n    return x\n\n\n", "https://a.b/c?d=e&f=1", "I'm you'LL don't",
    "x\n \n  \n\ty", "1,234,567.89",
)  # fmt: skip
RANGES: Sequence[tuple[int, int]] = (
    (0x20, 0x7F), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF),
    (0x900, 0xDFF), (0xE00, 0x10FF), (0x1680, 0x180F), (0x1E00, 0x206F), (0x2070, 0x218B),
    (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFF00, 0xFFEF), (0x10000, 0x10FFF),
    (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0xE0000, 0xE01EF), (0x11000, 0x11FFF),
    (0x1E900, 0x1E95F),
)  # fmt: skip
# Letters and digits that Unicode 17 added: gigatoken 0.10 knows them, Hugging Face's regular
# expressions do not yet. From a comparison of all code points, 26 ranges; the astral ones are here
# by the first three bytes of their UTF-8.
DISPUTED = "\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1"
DISPUTED_ASTRAL = re.compile(
    rb"\xf0(?:\x90[\xa5\xbb]|\x91[\xb6\xb7]|\x96[\xba\xbb\xbf]|\x98[\x9f\xb4\xb6\xb7]|\x9e\x9b|\xab\x9c|\xac\xba"
    rb"|\xb2[\x8e-\xbf]|\xb3[\x80-\x91])"
)


def is_disputed(text: str) -> bool:
    """True if engines may disagree on the text, by its code points; 2 GB/s."""
    return not text.isascii() and any(map(_is_disputed, slices(text)))


def _is_disputed(text: str) -> bool:
    """is_disputed of a slice."""
    if text.isascii():
        return False
    # CPython stores a text with code points above U+FFFF in four bytes a character; others need no
    # second look.
    is_astral = text.__sizeof__() >= 4 * len(text)
    return (
        any(c in text for c in DISPUTED)
        or is_astral
        and DISPUTED_ASTRAL.search(text.encode()) is not None
    )
