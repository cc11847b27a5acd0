"""Dialogues to training rows: OUT/train and OUT/validation, packed, with what is learned marked.

    python -m data_prep.conversations input=talks.jsonl output=OUT tokenizer=T.json row_tokens=2048

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}

A row holds whole dialogues; one that is too long is rejected, never cut. Killed, workers, tasks and
the result are as in data_prep/tokenize.py. docs/dialogues.md has the details.
"""

from __future__ import annotations

from data_prep.tokens.conversation_job import ConversationConfig, prepare
from pipeline import cli, log


def main(cfg: ConversationConfig) -> None:
    """Prepare the dialogues.

    Raises:
        PipelineError: see docs/dialogues.md.
    """
    log.setup()
    prepare(cfg)


if __name__ == "__main__":
    cli.run(main, ConversationConfig, config="conversations", positional=["input", "output"])
