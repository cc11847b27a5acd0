"""A byte-level BPE tokenizer.json from text.

    python -m data_prep.train_tokenizer input=corpus.jsonl output=tokenizer.json vocab_size=32768

Input is what data_prep/tokenize.py reads: files, folders or globs, separated by commas. The same
input gives the same file. `<|endoftext|>` is id 0; the tokens of chats and pictures, and spare
ones, follow it, so that a base model needs no new embeddings to be fine-tuned.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING
from tqdm import tqdm

from data_prep.sources.documents import read_documents
from data_prep.sources.inputs import InputConfig, find_units
from data_prep.sources.rejects import Rejects
from pipeline import cli
from pipeline.errors import ConfigError, DataError
from pipeline.files import check_writable, write_durably

if TYPE_CHECKING:
    import tokenizers

EOD = "<|endoftext|>"
SPECIAL = [EOD, "<|im_start|>", "<|im_end|>", "<|image|>", *(f"<|spare_{i}|>" for i in range(5))]
LEAST = len(SPECIAL) + 256
Pretokenizer = Enum("Pretokenizer", ["gpt2", "llama3"])
# What may merge: pieces of this. Digits by threes, line ends apart, contractions of either case;
# from Llama 3's tokenizer.json. gpt2's rule is built into Hugging Face's ByteLevel.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass
class TrainTokenizerConfig(InputConfig):
    """Settings of data_prep.train_tokenizer."""

    output: str = MISSING
    """The tokenizer.json to write."""
    vocab_size: int = 32768
    """Ids in all, with the 256 bytes and the nine special tokens; 265: a token is a byte."""
    pretokenizer: Pretokenizer = Pretokenizer.llama3
    """Rule that cuts text into pieces before merging: gpt2, llama3."""
    sample_mb: float = 1000.0
    """Text that is used at most, MB; evenly over the work units of the input."""


def main(cfg: TrainTokenizerConfig) -> None:
    """Train and write.

    Raises:
        ConfigError: vocab_size has no room for the bytes.
        DataError: the input holds no text.
    """
    if cfg.vocab_size < LEAST:
        raise ConfigError(
            f"vocab_size ({cfg.vocab_size}) must be at least {LEAST}: 256 bytes and "
            f"{len(SPECIAL)} special tokens ({', '.join(SPECIAL)})."
        )
    check_writable(Path(cfg.output), "output=")
    tokenizer = build(_texts(cfg), vocab_size=cfg.vocab_size, pretokenizer=cfg.pretokenizer)
    if tokenizer.get_vocab_size() <= LEAST < cfg.vocab_size:
        raise DataError(f"input={cfg.input} holds no text to train on. --help lists what is read.")
    output = Path(cfg.output)
    write_durably(output, tokenizer.to_str(pretty=True).encode())
    print(f"{output}: {tokenizer.get_vocab_size()} tokens")


def build(
    texts: Iterator[str], *, vocab_size: int, pretokenizer: Pretokenizer
) -> tokenizers.Tokenizer:
    """The BPE that the texts give; ids are SPECIAL, the 256 bytes, merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if pretokenizer is Pretokenizer.gpt2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        pattern = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pattern, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _texts(cfg: TrainTokenizerConfig) -> Iterator[str]:
    """Documents of all units, an equal share of the sample from each."""
    units = find_units(cfg)
    share = cfg.sample_mb * 1e6 / len(units)
    rejects = Rejects(cfg.on_error)
    for unit in tqdm(units, "reading", unit="unit", disable=None):
        used = 0
        for document in read_documents(unit, cfg, rejects):
            if used >= share:
                break
            used += len(document.text)
            yield document.text
    if rejects.rows:
        counts = Counter(row["reason"] for row in rejects.rows)
        print(f"{len(rejects.rows)} documents were left out: {dict(counts)}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, TrainTokenizerConfig, config="train_tokenizer", positional=["input", "output"])
