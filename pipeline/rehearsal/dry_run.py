"""Any rank of a job of any size, on one machine without a GPU: does it start, what does it hold?

    rehearse(cfg, rank=0, world_size=1024)  --a process of its own-->  Report
    with RankProcess() as process: rehearse(..., process=process)  many, whose imports are made once

The rank's own code runs, from connect() to the optimizer's step, on tensors that have a shape, a
dtype and a device, and no numbers (fake_cuda.py). Needs no torch in this process.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from pipeline import cli
from pipeline.config.choices import PipelineSchedule
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.errors import ConfigError
from pipeline.rehearsal import fake_cuda

GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in the last step."""

    group: str
    """data, tensor, pipeline, world, or a number of ranks."""
    operation: str
    dtype: str
    count: int
    num_bytes: int
    """Of all calls, each counted by what its group handles together on one rank."""


@dataclass(frozen=True)
class Report:
    """What one rank did; bytes are those of tensors on the device (watch.py)."""

    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    device: str
    num_parameters: int
    """That this rank holds; before ZeRO-3 shares them."""
    num_micro_batches: int
    """Of a step here: no more than the schedule needs to reach its peak."""
    built_bytes: int
    """Live when the engine is built."""
    build_peak_bytes: int
    step_peak_bytes: list[int]
    """Of each step; the first one makes the optimizer's state."""
    live_bytes: int
    """After the last step."""
    collectives: list[Collective]
    host_reads: dict[str, int]
    """Where the host read a number back in the last step -> how often."""
    host_waits: dict[str, int]
    """Where the host waited for the device, a stream or an event in the last step -> how often."""
    host_tensors: dict[str, int]
    """Operators of the last step that left tensors on the host."""
    attention_kernels: dict[str, int]
    devices: list[str]
    """Of parameters, optimizer state, loss, norm and verdict; one, unless something is misplaced.
    """
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """The most that is live at a time."""
        return max(self.build_peak_bytes, *self.step_peak_bytes)


class RankProcess:
    """Rehearses one rank after the other, each in a copy of a process that has imported all."""

    def __enter__(self) -> RankProcess:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.rehearsal.one_rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._errors.close()

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """The report of one rank.

        Raises:
            RuntimeError: the rank failed; its traceback is the message.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then nothing is answered
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        if answer := self._process.stdout.readline():
            report: dict[str, Any] = json.loads(answer)
        else:
            self._errors.seek(0)
            report = {"failed": self._errors.read().decode()[-8000:]}
        if "failed" in report:
            place = f"rank {request['rank']} of {request['world_size']}"
            raise RuntimeError(f"{place} failed:\n{report['failed']}")
        return report


def rehearse(
    cfg: PretrainConfig,
    *,
    rank: int,
    world_size: int,
    tokenizer_vocab_size: int = GPT2_VOCABULARY,
    num_micro_batches: int | None = None,
    steps: int = 2,
    process: RankProcess | None = None,
) -> Report:
    """One rank of a run, from its process groups to the end of a step. About 10 s of one core.

    Args:
        cfg: of the run; nothing of its data is read.
        rank: the global rank.
        world_size: ranks of the job.
        num_micro_batches: of a step; None: the run's, or fewer where more would change no peak.
        steps: the second one has the optimizer's state from its beginning.
        process: that runs it; None: one that begins and ends with this rank.

    Raises:
        ConfigError: a rule of the run is broken, or it cannot be rehearsed.
        MachineError: no C++ compiler, or torch is built for a device.
        RuntimeError: the rank failed; its traceback is the message.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank} must be from 0 to world_size - 1 = {world_size - 1}.")
    # Without what a command adds to the settings of a run, and without compilation: speed only.
    cfg = PretrainConfig(
        **{field.name: getattr(cfg, field.name) for field in fields(PretrainConfig)}
    )
    cfg = replace(cfg, model=replace(cfg.model, compile=False))
    shape = derive(cfg, world_size=world_size, tokenizer_vocab_size=tokenizer_vocab_size)
    if problems := list(_problems(cfg, shape)):
        raise ConfigError("\n".join(problems))
    fake_cuda.check_machine()
    count = num_micro_batches or _enough_micro_batches(cfg, shape)
    request = {
        "settings": cli.to_dict(cfg), "world_size": world_size, "rank": rank, "steps": steps,
        "tokenizer_vocab_size": tokenizer_vocab_size, "num_micro_batches": count,
    }  # fmt: skip
    if process is not None:
        return _parse(process.run(request))
    with RankProcess() as process:
        return _parse(process.run(request))


def _problems(cfg: PretrainConfig, shape: RunShape) -> Iterator[str]:
    """Why a run cannot be rehearsed although it can be run."""
    if shape.zero_stage == 3:
        yield "parallel.zero_stage=3 cannot be rehearsed: it decides by numbers. Rehearse 2."
    if cfg.parallel.expert_parallel_size > 1:
        yield (
            f"parallel.expert_parallel_size={cfg.parallel.expert_parallel_size} cannot be "
            "rehearsed: how many tokens a rank sends to which expert is decided by numbers. "
            "Rehearse 1."
        )
    elif cfg.model.moe.num_experts and (tensor := shape.sizes.tensor) > 1:
        yield (
            f"experts split over parallel.tensor_parallel_size={tensor} ranks cannot be rehearsed: "
            "how many tokens they gather is decided by numbers. Rehearse 1."
        )
    if cfg.parallel.offload_optimizer:
        yield (
            "parallel.offload_optimizer=true cannot be rehearsed: the update runs on the host. "
            "Rehearse without it."
        )


def _enough_micro_batches(cfg: PretrainConfig, shape: RunShape) -> int:
    """Micro-batches after which a step's peak is reached, of those that a step has.

    1F1B holds one for each stage from here to the last, DualPipeV two; the second one finds the
    gradients of the first.
    """
    is_dual = cfg.parallel.pipeline_schedule is PipelineSchedule["dualpipev"]
    most = shape.at(shape.total_steps).num_micro_batches  # once every ramp has ended, as a plan
    return min(most, max(2, shape.sizes.pipeline * (1 + is_dual)))


def _parse(report: dict[str, Any]) -> Report:
    collectives = [Collective(**values) for values in report.pop("collectives")]
    return Report(collectives=collectives, **report)
