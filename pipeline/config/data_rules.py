"""The rules of what is read: masks, positions, packed rows; see `rules`."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.data import DataConfig
from pipeline.config.training import TrainingConfig


def positions(data: DataConfig) -> Iterator[str]:
    """Positions start again where documents do."""
    if data.reset_positions and not data.mask_documents:
        yield "data.reset_positions=true needs data.mask_documents=true."


def held_out(data: DataConfig) -> Iterator[str]:
    """Held-out datasets are evaluated one by one, once each time."""
    for index, dataset in enumerate(data.validation or []):
        for name in ("weight", "max_epochs"):
            if getattr(dataset, name) is not None:
                yield (
                    f"data.validation[{index}].{name} ({getattr(dataset, name)}) has no effect: "
                    "held-out datasets are evaluated one by one. Leave it out."
                )


def packed_rows(data: DataConfig, row_tokens: int | None, name: str, seq_len: int) -> Iterator[str]:
    """A sequence of packed data is a row, whole and with its own mask.

    Args:
        name: of the setting that seq_len comes from.
    """
    if row_tokens is None:
        return
    if seq_len != row_tokens:
        yield (
            f"the data are packed in rows of {row_tokens} tokens, and {name} is {seq_len}. "
            f"Set {name}={row_tokens} (model.max_seq_len at least that), or prepare the data "
            f"again with row_tokens={seq_len}."
        )
    if data.mask_eod_loss:
        yield (
            "data.mask_eod_loss=true has no effect on packed rows, which say themselves what is "
            "learned. Set it false."
        )


def ramp_of_rows(training: TrainingConfig, row_tokens: int | None) -> Iterator[str]:
    """No ramp cuts packed rows."""
    if row_tokens and any(stage.seq_len not in (None, row_tokens) for stage in training.ramp):
        yield (
            "training.ramp[].seq_len would cut packed rows in the middle of a dialogue. Leave it "
            "out; global_batch_size may ramp."
        )
