"""A tokenizer.json as the rest of the project sees it.

    text --encode--> ids, ids --decode--> text; the id that ends a document; the bytes of an id

Hugging Face `tokenizers` is the definition of truth; data_prep/tokens/encode.py has faster engines,
which must agree. Literal special strings in text are ordinary text here: a web page that writes
about `<|endoftext|>` must not end.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.special_tokens import is_merged, without_special_tokens
from pipeline.errors import DataError
from pipeline.files import parse_json, read_file, sha256_of
from pipeline.shapes import misfits

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# The first of these that the file has as an added token ends documents, unless the caller names
# another.
EOD_NAMES = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend▁of▁sentence\uff5c>",  # DeepSeek: fullwidth bars
    "<eos>",
    "</s>",
    "[EOS]",
    "<|im_end|>",
]
# Texts whose bytes are hard to count from ids; in NFC, none begins with a space.
BYTE_TEXTS = [
    "The quick  brown\n\n\tfox   jumps, UPPER and lower.\r\n",
    "naïve Größe 数学 Ελλάδα 👩\u200d👩\u200d👧 ½ ﬁ … 12345",
    "don't (a.b) 'c' \"d\"  \n",
    "\u00a0\u2003\u200b\ue000𝔘\x01 end   ",
    "x",
]

PUBLISHED = (
    "fetch GPT-2's: curl -Lo T.json "
    "https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json"
)
"""What to say to who asks for `tokenizer=gpt2`; other models have theirs under the same address."""
MOST_BYTES = 1 << 28
"""Of a tokenizer.json; Gemma's, among the largest, has 33 MB."""
MOST_IDS = 1 << 24
"""Of a vocabulary: the largest published ones have 2^18."""
# What is read of the file beside what the library reads.
SHAPE = {
    "added_tokens?": ([{"id": range(2**32), "content": str, "special": bool}], None),
    "model": {"unk_id?": (range(2**32), None), "unk_token?": (str, None)},
}


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
            self.json: dict[str, Any] = parse_json(raw)
            self.backend = Backend.from_str(raw.decode())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises bare Exception; where Rust panics, worse
            raise DataError(
                f"{path} cannot be read as a tokenizer ({str(error)[:200]}). It must be a "
                "tokenizer.json of Hugging Face tokenizers; make one with: python -m "
                "data_prep.train_tokenizer input=... output=..."
            ) from error
        self.backend.no_truncation()
        self.backend.no_padding()
        if wrong := next(misfits(self.json, SHAPE), None):
            raise DataError(f"{path} is no tokenizer.json: {wrong}.")
        self._added = {token["content"]: token for token in self.json.get("added_tokens") or []}
        self.vocab_size = 1 + max(
            self.backend.get_vocab(with_added_tokens=True).values(), default=-1
        )
        if self.vocab_size > MOST_IDS:  # tables have a row for each id up to the largest
            raise DataError(
                f"{path} has the id {self.vocab_size - 1}; ids go up to {MOST_IDS - 1}."
            )
        self._check_added_ids()
        self.eod = self._find_eod(eod)

    @classmethod
    def from_file(cls, path: str | Path, *, eod: str | int | None = None) -> Tokenizer:
        """The tokenizer of a local tokenizer.json, or of the folder that holds one."""
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            return cls(read_file(file, most=MOST_BYTES), path=str(file), eod=eod)
        except OSError as error:
            raise DataError(
                f"{file} cannot be read ({error.strerror}). Give a tokenizer.json; make one with: "
                f"python -m data_prep.train_tokenizer input=... output=T.json, or {PUBLISHED}"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; no token is added before or after it."""
        return self.text_backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text may give: special tokens, but for unknown words, and the end mark.

        Where an ordinary word or the unknown one ends documents, a text that holds it is refused
        when it is tokenized.
        """
        model = self.json["model"]
        unknown = model.get("unk_id")
        if model.get("unk_token") is not None:
            unknown = self.backend.token_to_id(model["unk_token"])
        special = {token["id"] for token in self._added.values() if token["special"]}
        return frozenset(special - {unknown} | {self.eod})

    @cached_property
    def special_names(self) -> list[str]:
        """The special tokens, and the one that ends documents where it stands apart from words."""
        names = [name for name, token in self._added.items() if token["special"]]
        end = self.eod_token
        return names if end is None or end in names else [*names, end]

    @cached_property
    def text_json(self) -> dict[str, Any]:
        """The tokenizer.json with which texts are encoded: its special tokens cannot be spelt."""
        special = {name for name, token in self._added.items() if token["special"]}
        end = self.backend.id_to_token(self.eod)
        is_bpe = self.json["model"].get("merges") is not None
        if end in self._added or (end and is_bpe and not is_merged(self.json, end)):
            special.add(end)
        return without_special_tokens(self.json, special)

    @cached_property
    def text_backend(self) -> Backend:
        """What encodes texts: a literal special string is ordinary text to every kind of model."""
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(json.dumps(self.text_json))
        backend.no_truncation()
        backend.no_padding()
        return backend

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Text of ids, special tokens by name."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @property
    def eod_token(self) -> str | None:
        """Its name, where it stands apart from words (an added token); None: an ordinary word."""
        name: str | None = self.backend.id_to_token(self.eod)
        return name if name in self._added else None

    @cached_property
    def ids_sha256(self) -> str:
        """Equal for tokenizers that give every text the same ids.

        Templates, truncation and decoders do not count: they differ between a dataset's tokenizer
        and the one of a Hugging Face folder that was made from it.
        """
        whole = json.loads(self.backend.to_str())  # one spelling, whoever wrote the file
        parts = [whole[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
        return sha256_of(json.dumps(parts, sort_keys=True).encode())

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """(vocab_size,): bytes each id adds inside a text; none for special and unused ids."""
        return [inside for _, inside in self._bytes_at_start_and_inside]

    def token_byte_lengths(self, *, at_start: bool = False) -> np.ndarray:
        """(vocab_size,) int32: UTF-8 bytes each id adds to the text, 0 for special tokens.

        Args:
            at_start: as the first token of a document, without the space that some tokenizers put
                before the text.
        """
        which = 0 if at_start else 1
        return np.array([len(pair[which]) for pair in self._bytes_at_start_and_inside], np.int32)

    @cached_property
    def has_exact_bytes(self) -> bool:
        """Whether the bytes of a text's ids sum to the bytes of the text.

        They do not where words are unknown, or cut at spaces that are forgotten. Not looked at:
        other spellings of the same text (NFC), and a space that begins it.
        """
        start, inside = self.token_byte_lengths(at_start=True), self.token_byte_lengths()
        return all(
            start[ids[:1]].sum() + inside[ids[1:]].sum() == len(text.encode())
            for text in BYTE_TEXTS
            for ids in [self.encode(text)]
        )

    @cached_property
    def _bytes_at_start_and_inside(self) -> list[tuple[bytes, bytes]]:
        """(vocab_size,): what each id adds to the text as a document's first token, and later."""
        table = [(b"", b"")] * self.vocab_size
        steps = json.dumps([self.json.get("decoder"), self.json.get("pre_tokenizer")])
        vocab = self.backend.get_vocab(with_added_tokens=False)
        decoded: dict[str, int] = {}
        for text, token_id in vocab.items():
            if '"ByteLevel"' in steps:
                inside = _byte_level(text)
                start = inside.removeprefix(b" ") if '"add_prefix_space": true' in steps else inside
                table[token_id] = (start, inside)
            elif match := re.fullmatch("<0x([0-9A-F]{2})>", text):
                table[token_id] = (bytes.fromhex(match[1]),) * 2
            else:
                decoded[text] = token_id
        for token_id, pair in zip(decoded.values(), self._decoded(decoded), strict=True):
            table[token_id] = pair
        for text, token in self._added.items():
            if token["special"]:
                table[token["id"]] = (b"", b"")
            elif text not in vocab:  # runs of spaces are in Gemma's vocabulary, as runs of U+2581
                table[token["id"]] = (text.encode(),) * 2
        table[self.eod] = (b"", b"")
        return table

    def _decoded(self, vocab: dict[str, int]) -> list[tuple[bytes, bytes]]:
        """What each id adds to the decoded text, first and between two anchors.

        Decoders join words with spaces, strip a first one and drop marks (`##`, `</w>`, U+2581).
        """
        anchors = [name for name in vocab if re.fullmatch("▁?[A-Za-z0-9]+(</w>)?", name)]
        if not anchors:
            return [(name.encode(),) * 2 for name in vocab]
        a = vocab[min(anchors, key=len)]
        alone, tail = self.decode([a]), self.decode([a, a])
        tail = tail[len(alone) :]  # what the last anchor adds
        firsts = self.backend.decode_batch(
            [[i, a] for i in vocab.values()], skip_special_tokens=False
        )
        betweens = self.backend.decode_batch(
            [[a, i, a] for i in vocab.values()], skip_special_tokens=False
        )
        return [
            (
                first[: len(first) - len(tail)].encode(),
                between[len(alone) : len(between) - len(tail)].encode(),
            )
            for first, between in zip(firsts, betweens, strict=True)
        ]

    def _check_added_ids(self) -> None:
        """Refuse a file whose added tokens have other ids than the library gives them."""
        for name, token in self._added.items():
            actual = self.backend.token_to_id(name)
            if actual != token["id"]:
                raise DataError(
                    f"{self.path}: the added token {name!r} has the id {token['id']}, but the "
                    f"tokenizers library gives it {actual}: it counts on behind the vocabulary "
                    "without gaps. Fill the gap with added tokens that are not used, or give the "
                    "token the next id."
                )

    def _find_eod(self, eod: str | int | None) -> int:
        """The id that ends documents: the one asked for, or the one known by its name."""
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
    """Bytes of a token of GPT-2's vocabulary, in which each byte is a printable character."""
    return bytes(b for c in text for b in ([_BYTE_OF[c]] if c in _BYTE_OF else c.encode()))


def byte_characters() -> list[str]:
    """(256,): the character that stands for each byte in a byte-level vocabulary.

    Source: bytes_to_unicode in github.com/openai/gpt-2, src/encoder.py: printable bytes stand for
    themselves, the others for the code points from 256 up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}
