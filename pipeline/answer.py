"""Answers of a model of dialogues to held-out questions, beside what guessing would score.

    python -m pipeline.answer runs/chat held.jsonl
    python -m pipeline.answer FOLDER held.jsonl limit=200 output=predictions.jsonl

Data are dialogues as data_prep.conversations takes them, in jsonl; every answer of the assistant is
a question, with the dialogue before it as it stands there. Decoding is greedy. Exact match, F1 of
words and chrF (where sacrebleu is installed: extra `answers`) are printed for all and for each
`group`, always beside base rates: the commonest answer, a copy of the source, another question's
answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import cli, log
from pipeline.errors import ConfigError
from pipeline.evaluation.answers import Question, read_questions, score_all
from pipeline.files import check_writable, write_durably
from pipeline.inference.generation import GenerateConfig
from pipeline.inference.samplers import TextSampler, open_sampler


@dataclass
class AnswerConfig:
    """Score answers."""

    checkpoint: str = "???"
    """A run folder (its newest checkpoint), one checkpoint, or a Hugging Face folder."""
    data: str = "???"
    """jsonl of dialogues; `group` and an answer's `source` are for the scores."""
    output: str | None = None
    """Where question, reference and answer go, a line each; null: predictions.jsonl in the folder
    of the checkpoint or run.
    """
    limit: int = 0
    """Ask the first so many questions only; 0: all."""
    batch_size: int = 16
    """Questions that are answered together."""
    max_new_tokens: int = 64
    """Longest answer, tokens."""


def main(cfg: AnswerConfig) -> int:
    """Ask, score, print.

    Raises:
        DataError: no question is there.
        ConfigError: the model has no chat template, or it refuses a dialogue.
    """
    log.setup()
    if cfg.batch_size < 1 or cfg.max_new_tokens < 1 or cfg.limit < 0:
        raise ConfigError(
            f"batch_size ({cfg.batch_size}) and max_new_tokens ({cfg.max_new_tokens}) must be at "
            f"least 1, limit ({cfg.limit}) at least 0."
        )
    output = Path(cfg.output or Path(cfg.checkpoint) / "predictions.jsonl")
    check_writable(output, "output=")
    questions = read_questions(Path(cfg.data))[: cfg.limit or None]
    generation = GenerateConfig(
        checkpoint=cfg.checkpoint, chat=True, temperature=0.0, max_new_tokens=cfg.max_new_tokens
    )
    with open_sampler(generation, needs_template=True) as sampler:
        answers = ask(sampler, questions, batch_size=cfg.batch_size)
    lines = [
        json.dumps(asdict(question) | {"answer": answer}, ensure_ascii=False) + "\n"
        for question, answer in zip(questions, answers, strict=True)
    ]
    write_durably(output, "".join(lines).encode("utf-8", "backslashreplace"))
    print_scores(score_all(answers, questions), len(questions))
    print(f"predictions: {output}")
    return 0


def ask(sampler: TextSampler, questions: Sequence[Question], *, batch_size: int) -> list[str]:
    """The model's answers in order; questions of about one length share a batch."""
    length = [sum(len(m["content"]) for m in question.messages) for question in questions]
    # The longest first: one without room is refused before an hour of answers is lost.
    order = sorted(range(len(questions)), key=lambda number: -length[number])
    answers = [""] * len(questions)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        found = sampler.answer([questions[n].messages for n in numbers], on_text=None)
        for number, answer in zip(numbers, found, strict=True):
            answers[number] = answer
    return answers


def print_scores(scores: dict[str, dict[str, dict[str, float]]], count: int) -> None:
    """A table: a line for the model and for each base rate of each group."""
    names = list(scores["all"]["model"])
    print(f"{count} questions" + "".join(f"{name:>10}" for name in names))
    for group, rows in scores.items():
        for row, values in rows.items():
            print(f"{group:<14}{row:<12}" + "".join(f"{values[name]:>10.1f}" for name in names))
    if "chrf" not in names:
        print('chrF was not computed: pip install -e ".[answers]"')


if __name__ == "__main__":
    cli.run(main, AnswerConfig, config="answer", positional=("checkpoint", "data"))
