"""A run for TensorBoard, runs/NAME/tensorboard/; the only user of tensorboard.

tensorboard --logdir runs      all runs beside each other
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.choices import XAxis
from pipeline.tracking.samples import Sample
from pipeline.tracking.tracker import At, Tracker


class TensorboardRun(Tracker):
    """Files of events: one for each start of the run, each time it is back, each failure."""

    name = "TensorBoard"
    takes_back = True

    def __init__(self, axis: XAxis, *, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Args: config: shown as a text, without secrets."""
        # A folder for each axis: a run that goes on with the other one is told there from its
        # beginning, where points by step and by tokens in one series would be a scrawl.
        self._axis, self._folder = axis, run_dir / "tensorboard" / f"by-{axis.name}"
        self._config = config
        self.mark = self._folder / "told.json"
        self._writer: Any = None

    def is_known(self) -> bool:
        """Never: the mark is as old as the files."""
        return False

    def open(self, after: At | None) -> None:
        """A new file, which hides what earlier ones have behind `after`."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            with contextlib.suppress(Exception):  # a failed one cannot be closed
                self._writer.close()
        self._writer = None
        _put_in_order(self._folder, int(time.time()))
        purge = None if after is None else self._x(after) + 1
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        if after is not None:
            self._text("config", after, _code(self._config))

    def log(self, at: At, values: Mapping[str, Any]) -> None:
        """The numbers among them, as one record: a full disk takes all of them or none."""
        from torch.utils.tensorboard.summary import scalar

        found = [scalar(key, value) for key, value in values.items() if _is_number(value)]
        if found:
            row = found[0]
            for one in found[1:]:
                row.MergeFrom(one)
            self._writer.file_writer.add_summary(row, self._x(at), walltime=at.time)
        self._writer.flush()

    def log_samples(self, at: At, samples: Sequence[Sample]) -> None:
        """A text for each prompt."""
        for number, sample in enumerate(samples):
            self._text(f"samples/{number}", at, _code(sample.prompt + sample.text))

    def summarize(self, at: At, values: Mapping[str, float | None]) -> None:
        """A table, as a text: TensorBoard knows no values of a whole run."""
        known = {key: "" if value is None else f"{value:.6g}" for key, value in values.items()}
        lines = [f"| {key} | {value} |" for key, value in known.items()]
        self._text("summary", at, "\n".join(["| | |", "|---|---|", *lines]))

    def keep_model(self, at: At, folder: Path, facts: Mapping[str, Any]) -> None:
        """Where it is, as a text: TensorBoard keeps no files."""
        self._text("model", at, _code({"folder": str(folder.absolute()), **facts}))

    def close(self, exit_code: int) -> None:
        """Close the file."""
        self._writer.close()

    def _text(self, tag: str, at: At, text: str) -> None:
        self._writer.add_text(tag, text, self._x(at), walltime=at.time)
        self._writer.flush()

    def _x(self, at: At) -> int:
        return at.tokens if self._axis is XAxis.tokens else at.step


def _put_in_order(folder: Path, now: int) -> None:
    """Rename files of events that would be read behind one that begins now.

    TensorBoard reads them by their names, which begin with the second: after a clock that was put
    back, a later start would come first, and what it hides be shown. A TensorBoard that is running
    sees it when it is started again.
    """
    for file in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        match = re.fullmatch(r"(events\.out\.tfevents\.)(\d{10})(\..*)", file.name)
        if match is None:
            continue
        if (second := int(match[2])) < now:
            break
        now = min(second, now) - 1
        file.rename(folder / f"{match[1]}{now:010d}{match[3]}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _code(content: Any) -> str:
    """Text as TensorBoard's Markdown shows it unchanged: four blanks before each line."""
    import json

    text = content if isinstance(content, str) else json.dumps(content, indent=1, default=str)
    return "\n".join(f"    {line}" for line in text.splitlines())
