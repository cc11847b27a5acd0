"""Small texts, tokenizers and datasets that the data tests share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import orjson

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n",
    "def f(x):\n    return x + 1  # naïve\n\n",
    "Größe, 数学, Ελλάδα, 👩‍👩‍👧 and 12345.\r\n",
    "a document that writes about <|endoftext|> in passing",
    "x",
    "    indented\n\n\n\ttabs\u00a0and\u2003spaces   ",
]


def make_texts(count: int) -> list[str]:
    """`count` different documents, 1 to 40 of TEXTS long."""
    return [
        f"{i}: " + "".join(TEXTS[(i * 7 + k) % len(TEXTS)] for k in range(1 + i * i % 40))
        for i in range(count)
    ]


def make_tokenizer(path: Path, *, vocab_size: int = 408, pattern: str = "llama3") -> Path:
    """A byte-level BPE trained on make_texts, with `<|endoftext|>` as id 0."""
    from data_prep.train_tokenizer import Pretokenizer, build

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        build(
            iter(make_texts(50)), vocab_size=vocab_size, pretokenizer=Pretokenizer[pattern]
        ).to_str()
    )
    return path


def edit_tokenizer(path: Path, **changes: object) -> Path:
    """The tokenizer.json at `path` with top-level keys replaced."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def write_jsonl(path: Path, texts: list[str], **fields: object) -> Path:
    """One {"text": ...} line per document, with the same other fields in each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps({"text": text, **fields}) + b"\n" for text in texts))
    return path


def checksums(output: Path) -> dict[str, str]:
    """sha256 of every file below, by name; job.json says when and where, which may differ."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name != "job.json"
    }
