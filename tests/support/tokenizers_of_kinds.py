"""A small tokenizer.json of each kind of model, whose vocabulary holds its special tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Backend

KINDS = ["WordLevel", "WordPiece", "Unigram", "BPE", "BPE, whole words", "BPE, no pretokenizer"]

SPECIAL = ["<|endoftext|>", "</s>", "[UNK]", "eos", "<unk>"]


def trained(kind: str, path: Path) -> Path:
    """A tokenizer.json of each kind of model, trained on texts that hold its special strings."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    unknown = {"unk_token": "[UNK]"}
    options = {"special_tokens": SPECIAL, "show_progress": False}
    words = pre_tokenizers.WhitespaceSplit()
    model, trainer, before = {
        "WordLevel": (models.WordLevel(**unknown), trainers.WordLevelTrainer(**options), words),
        "WordPiece": (models.WordPiece(**unknown), trainers.WordPieceTrainer(vocab_size=90, **options), words),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=60, **options, **unknown), pre_tokenizers.Metaspace()),
        "BPE": (models.BPE(), trainers.BpeTrainer(vocab_size=300, **options), words),
        "BPE, whole words": (models.BPE(ignore_merges=True), trainers.BpeTrainer(vocab_size=300, **options), words),
        "BPE, no pretokenizer": (models.BPE(), trainers.BpeTrainer(vocab_size=300, **options), None),
    }[kind]  # fmt: skip
    backend = Backend(model)
    if before is not None:
        backend.pre_tokenizer = before
    backend.decoder = decoders.Metaspace() if kind == "Unigram" else decoders.Fuse()
    texts = [" ".join(SPECIAL), "hello world", "x</s>y", "the quick brown fox"] * 30
    backend.train_from_iterator(texts, trainer)
    backend.save(str(path))
    return path
