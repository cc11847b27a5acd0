"""What the model writes while it is trained, at any layout.

    prompts --engine.next_logits--> the next token of each --again--> texts

Nothing is kept between tokens: each is a forward pass over all that is written so far, as an
evaluation makes it, so that no weight is gathered and training never knows of it. The rows are as
short as the texts allow.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.tokenizer import Tokenizer
from pipeline.inference.drawing import choose
from pipeline.model.stage_io import StageSchema
from pipeline.tracking.samples import Sample
from pipeline.training.prompts import prompt_rows

if TYPE_CHECKING:
    from pipeline.config.training import TrainingConfig
    from pipeline.data.loader import Loader
    from pipeline.engine.engine import Engine

ROUNDED = 64
"""Rows are a multiple of so many tokens long: few shapes, whatever a prompt's length."""


class TextSamples:
    """Continues the prompts of a run. Methods are collective: call on every rank."""

    def __init__(
        self,
        cfg: TrainingConfig,
        *,
        engine: Engine,
        schema: StageSchema,
        loader: Loader,
        seed: int,
    ) -> None:
        """Read the tokenizer of the data.

        Args:
            cfg: which prompts, how many tokens, at which temperature.
            schema: which fields the engine's batches have.
            loader: of the data that the model learns from.
            seed: of what is drawn.

        Raises:
            ConfigError: the chat template refuses a prompt.
        """
        self.cfg, self.engine, self.schema, self.seed = cfg, engine, schema, seed
        files, ends = loader.attachments(), loader.special_ids()
        self.tokenizer = Tokenizer(
            files["tokenizer.json"], path=str(loader.tokenizer_path), eod=ends["eod"]
        )
        self.ends = {ends["eod"], ends["end_of_turn"]}
        template = files.get("chat_template.jinja")
        self.prompts = prompt_rows(
            cfg.sample_prompts, self.tokenizer, template.decode() if template else None
        )

    def draw(self, step: int, *, alive: Callable[[], None] = lambda: None) -> list[Sample]:
        """A sample of each prompt, the same on every rank.

        Args:
            step: of the run; another step draws other numbers.
            alive: called between tokens.
        """
        # Streams of their own: a text does not depend on where another one ends, and the streams
        # of dropout do not move.
        streams = [
            torch.Generator().manual_seed(zlib.crc32(repr((self.seed, step, number)).encode()))
            for number in range(len(self.prompts))
        ]
        texts: list[list[int]] = [[] for _ in self.prompts]
        has_ended = [False] * len(texts)
        for _ in range(self.cfg.sample_tokens):
            if all(has_ended):
                break
            rows = [prompt + text for prompt, text in zip(self.prompts, texts, strict=True)]
            for number, logits in enumerate(self._next_logits(rows).cpu()):
                if has_ended[number]:
                    continue
                token = int(
                    choose(
                        logits,
                        temperature=self.cfg.sample_temperature,
                        generator=streams[number],
                    )
                )
                has_ended[number] = token in self.ends
                if not has_ended[number]:
                    texts[number].append(token)
            alive()
        return [
            Sample(prompt, self.tokenizer.decode(text))
            for prompt, text in zip(self.cfg.sample_prompts, texts, strict=True)
        ]

    def _next_logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(rows, vocab_size): what follows each row, in micro-batches no larger than training's."""
        size, length = self.engine.shape.micro_batch_size, self._length(max(map(len, rows)))
        found = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            # Compiled blocks know training's shape: another one would be compiled for.
            height = size if self.engine.model.compile else len(part)
            ids = torch.zeros(height, length, dtype=torch.int64)
            counts = torch.zeros(height, length)
            counts[:, 0] = 1.0
            for number, row in enumerate(part):
                ids[number, : len(row)] = torch.tensor(row)
                counts[number, 0], counts[number, len(row) - 1] = 0.0, 1.0
            batch = Batch.of_whole_sequences(
                ids.to(self.engine.layout.device),
                loss_mask=counts.to(self.engine.layout.device),
                documents=self.schema.documents,
                positions=self.schema.positions,
            )
            found.append(self.engine.next_logits(batch)[: len(part)])
        return torch.cat(found)

    def _length(self, needed: int) -> int:
        """Tokens of a row: enough, and a whole number for the ranks that share sequences."""
        seq_len = self.engine.shape.seq_len
        unit = ROUNDED * self.schema.sequence_ranks * self.schema.context_ranks
        return seq_len if self.engine.model.compile else min(seq_len, -(-needed // unit) * unit)
