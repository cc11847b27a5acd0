"""What a larger run will reach, said before it is made: a number, an interval, a course.

    Fit, runs, target --predict--> Prediction <--json--> runs/LADDER/TARGET/prediction.json
    a run's history --misses--> where it leaves what was predicted

The interval is of the held-out loss after the last step. The course is of the training loss on the
way there: a run that has not ended lies above the law, whose losses are those of ended runs, by as
much as the ladder's runs lay above it at the same part of their length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import DataError
from pipeline.scaling.ladder import Rung
from pipeline.scaling.law import Fit, Law
from pipeline.scaling.runs import COURSE, Run, course
from pipeline.shapes import COUNT, read_object
from pipeline.tracking.history import History

FILE = "prediction.json"
"""In the folder of the run that it speaks of."""
SHAPE = {
    "ladder": str,
    "target": str,
    "num_parameters": COUNT,
    "parameters": COUNT,
    "tokens": COUNT,
    "flops": float,
    "times_largest": float,
    "loss": float,
    "low": float,
    "high": float,
    "level": float,
    "course": [{"part": float, "low": float, "high": float}],
    "datasets": [str],
}


@dataclass(frozen=True)
class Prediction:
    """The loss of a run that is not made yet."""

    ladder: str
    """Name of the ladder it comes from."""
    target: str
    """Name of the run."""
    num_parameters: int
    """All parameters, as the run itself counts them: by this it is known."""
    parameters: int
    """N."""
    tokens: int
    """D."""
    flops: float
    times_largest: float
    """Its operations over those of the ladder's largest run."""
    loss: float
    """Held out, after the last step, nats per token."""
    low: float
    high: float
    level: float
    """Probability that the loss lies between low and high."""
    course: list[dict[str, float]]
    """Parts of the run, 0 to 1, and the least and the most training loss just before each."""
    datasets: list[str]
    """Identities of the training data."""

    def to_json(self) -> bytes:
        """The file."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def load(cls, folder: Path) -> Prediction | None:
        """Of the run in this folder; None: there is none.

        Raises:
            DataError: the file is not what pipeline.scaling writes.
        """
        path = folder / FILE
        if not path.exists():
            return None
        misfit = "is not what pipeline.scaling writes"
        content = read_object(path, SHAPE, error=DataError, misfit=misfit, inside=folder)
        spans = [content, *content["course"]]
        if not all(0 < span["low"] <= span["high"] < math.inf for span in spans):
            raise DataError(f"{path} {misfit}: an interval is none.")
        return cls(**{key: content[key] for key in SHAPE})

    def misses(self, history: History) -> Iterator[str]:
        """Where a run, ended or not, is another one than predicted, or leaves the prediction."""
        found = history.facts.get("num_parameters")
        if found != self.num_parameters:
            yield (
                f"the prediction is of a model of {self.num_parameters:,} parameters, this one "
                f"has {found}"
            )
        read = set(history.facts.get("datasets", {}))
        if read != set(self.datasets):
            yield "the prediction is of a run on other data"
        if history.steps[-1]["tokens"] > self.tokens:
            yield f"the prediction is of a run of {self.tokens:,} tokens; this one is longer"
            return
        parts = [row["part"] for row in self.course]
        losses = course(history, total_tokens=self.tokens, parts=parts)
        for row, loss in zip(self.course, losses):
            low, high = row["low"], row["high"]
            if loss < low or loss > high:  # neither where nothing is logged
                yield (
                    f"at {row['part']:.0%} of its tokens the training loss, {loss:.4f}, is "
                    f"{'below' if loss < low else 'above'} the predicted {low:.4f} to {high:.4f}"
                )
        for name, loss in self.ends(history).items():
            if not self.low <= loss <= self.high:
                yield (
                    f"the last held-out loss ({name}), {loss:.4f}, is not within the predicted "
                    f"{self.low:.4f} to {self.high:.4f}"
                )

    def ends(self, history: History) -> dict[str, float]:
        """Dataset to held-out loss after the last step; empty before."""
        return {
            name: rows[-1]["loss"]
            for name, rows in history.evaluations.items()
            if rows[-1]["tokens"] >= self.tokens
        }


def predict(
    fit: Fit, runs: Sequence[Run], target: Rung, *, ladder: str, num_parameters: int, level: float
) -> Prediction:
    """The prediction of a target.

    Args:
        fit: of the runs.
        runs: of the ladder.
        num_parameters: all of the target's.
        level: probability of the interval.
    """
    low, high = fit.interval(target.parameters, target.tokens, level=level)
    loss = fit.law.loss(target.parameters, target.tokens)
    return Prediction(
        ladder=ladder,
        target=target.name,
        num_parameters=num_parameters,
        parameters=target.parameters,
        tokens=target.tokens,
        flops=target.flops,
        times_largest=target.flops / max(run.flops for run in runs),
        loss=loss,
        low=low,
        high=high,
        level=level,
        course=list(_course(fit.law, runs, target, low / loss, high / loss)),
        datasets=sorted(runs[0].datasets),
    )


def _course(
    law: Law, runs: Sequence[Run], target: Rung, low: float, high: float
) -> Iterator[dict[str, float]]:
    """Where the training loss lies on its way: above the law by as much as the ladder's runs did.

    By as much as the least and the most of them, and the interval's width (`low` to `high`, as
    parts of the predicted loss) on top. Parts at which no run logged anything are left out.
    """
    for number, part in enumerate(COURSE):
        above = [
            run.course[number] / law.loss(run.parameters, part * run.tokens)
            for run in runs
            if not math.isnan(run.course[number])
        ]
        if above:
            there = law.loss(target.parameters, part * target.tokens)
            yield {
                "part": part,
                "low": there * min(above) * low,
                "high": there * max(above) * high,
            }
