"""Small tokenizers of every family that people use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from pipeline.data.tokenizer import Tokenizer
from tests.support.corpus import make_texts

END = "</s>"
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def train(backend: Backend, kind: Any, **options: Any) -> Backend:
    trainer = kind(vocab_size=600, show_progress=False, special_tokens=[END, "<unk>"], **options)
    backend.train_from_iterator(make_texts(40), trainer)
    return backend


def byte_level(*, prefix: bool = False, normalizer: Any = None) -> Backend:
    backend = Backend(models.BPE())
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return train(backend, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def with_byte_fallback(backend: Backend) -> Backend:
    """The same BPE with a token for each byte."""
    model = json.loads(backend.model.__getstate__())
    vocab = model["vocab"]
    for name in BYTES:
        vocab.setdefault(name, len(vocab))
    merges = [tuple(merge) for merge in model["merges"]]
    backend.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    return backend


def llama2() -> Backend:
    """SentencePiece-BPE as converted from Llama 2: a space is put before the text, bytes fall back."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*|[^▁]+"), "isolated")  # training only
    train(backend, trainers.BpeTrainer)
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return with_byte_fallback(backend)


def gemma() -> Backend:
    """No space before the text; runs of spaces are ordinary added tokens, spelt with U+2581."""
    backend = llama2()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    model = json.loads(backend.model.__getstate__())
    vocab, merges = model["vocab"], [tuple(m) for m in model["merges"]]
    runs = ["▁▁", "▁▁▁", "▁▁▁▁"]
    for run in runs:
        vocab.setdefault(run, len(vocab))
    merges = [("▁", "▁"), ("▁▁", "▁"), ("▁▁", "▁▁"), *merges]
    merges = list(dict.fromkeys(merges))
    backend.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend.add_tokens([AddedToken(run, normalized=False) for run in runs])
    return backend


def unigram(*, fallback: bool) -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    )
    pieces = [(f"▁{c}", -3.0) for c in "abcdefgx"] + [
        (c, -4.0) for c in "▁abcdefghijklmnopqrstuvwxyz.,"
    ]
    vocab = [
        ("<unk>", -20.0),
        (END, -20.0),
        *pieces,
        *((name, -15.0) for name in BYTES if fallback),
    ]
    backend.model = models.Unigram(vocab, unk_id=0, byte_fallback=fallback)
    backend.add_special_tokens([END, "<unk>"])
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return train(backend, trainers.WordPieceTrainer)


def gpt1() -> Backend:
    """BPE with an end-of-word suffix."""
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return train(backend, trainers.BpeTrainer, end_of_word_suffix="</w>")


def word_level() -> Backend:
    backend = Backend(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return train(backend, trainers.WordLevelTrainer)


EXACT: dict[str, Callable[[], Backend]] = {
    "byte-level": byte_level,
    "byte-level with a space before the text": lambda: byte_level(prefix=True),
    "byte-level after NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "llama2": llama2,
    "gemma": gemma,
    "unigram with byte fallback": lambda: unigram(fallback=True),
}
FORGETFUL: dict[str, Callable[[], Backend]] = {
    "byte-level after NFKC": lambda: byte_level(normalizer=normalizers.NFKC()),
    "unigram": lambda: unigram(fallback=False),
    "word piece": word_piece,
    "end-of-word suffix": gpt1,
    "word level": word_level,
}


def build(kind: Callable[[], Backend], folder: Path) -> Tokenizer:
    kind().save(str(folder / "tokenizer.json"))
    return Tokenizer.from_file(folder)
