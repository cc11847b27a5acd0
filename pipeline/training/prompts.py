"""What a run's samples continue, as ids; checked before anything starts. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.data.chat import ChatTemplate, Rejected
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config.training import TrainingConfig
    from pipeline.data.datasets import DataSummary


def prompt_rows(
    prompts: Sequence[str], tokenizer: Tokenizer, template: str | None
) -> list[list[int]]:
    """Ids of each prompt; of dialogues, up to where the assistant begins to speak.

    Args:
        prompts: texts; an empty one is the start of a document.
        tokenizer: of the data; it knows the id that ends a document.
        template: chat template of the data; None: they are no dialogues.

    Raises:
        ConfigError: the template refuses a prompt.
    """
    if template is None:
        return [tokenizer.encode(prompt) or [tokenizer.eod] for prompt in prompts]
    chat = ChatTemplate(template, tokenizer)
    try:
        return [chat.prompt_ids([{"role": "user", "content": prompt}]) for prompt in prompts]
    except Rejected as error:
        raise ConfigError(
            f"training.sample_prompts: the chat template of the data refuses one: {error.reason} "
            f"{error.detail}."
        ) from None


def misfitting_prompts(
    training: TrainingConfig, data: DataSummary, *, seq_len: int
) -> Iterator[str]:
    """What is wrong with the prompts of a run that draws samples."""
    if not training.sample_prompts:
        yield (
            f"training.sample_every ({training.sample_every}) has no training.sample_prompts. Give "
            '\'training.sample_prompts=["Once upon a time",""]\', or set it 0.'
        )
    tokenizer = Tokenizer(data.tokenizer_json, path="the data's tokenizer.json", eod=data.eod)
    template = data.chat.template if data.chat else None
    rows = prompt_rows(training.sample_prompts, tokenizer, template)
    for prompt, row in zip(training.sample_prompts, rows, strict=True):
        if len(row) + training.sample_tokens > seq_len:
            yield (
                f"training.sample_prompts: {prompt[:40]!r} has {len(row)} tokens, and with "
                f"training.sample_tokens ({training.sample_tokens}) more than the sequences "
                f"({seq_len}). Set training.sample_tokens={max(1, seq_len - len(row))}, or give a "
                "shorter prompt."
            )
