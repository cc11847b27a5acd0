"""What a run needs, takes and costs.

    Job, Device --Plan.of--> memory by stage, seconds by cause, tokens/s, days, device-hours, cost

Pure arithmetic on memory.py and step_time.py. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.config.step_shape import StepShape
from pipeline.planning.devices import Device
from pipeline.planning.flops import flops_per_token, mfu, num_parameters
from pipeline.planning.job import Job
from pipeline.planning.memory import StageMemory, memory_of_stages, most_loaded
from pipeline.planning.step_time import StepTime, step_time
from pipeline.planning.trained import num_trained_parameters

# fp32 weights and two moments in a checkpoint.
CHECKPOINT_BYTES_PER_PARAMETER = 12
# Real speed over the formula's: of the published runs that no constant was fitted on, nine in ten
# lie between these (docs/plan.md; a test counts them).
SLOWEST, FASTEST = 0.80, 1.15
# Power of the machine room over that of its devices: hosts, network, cooling.
PLANT_FACTOR = 1.3


@dataclass(frozen=True)
class Plan:
    """One run on so many devices."""

    job: Job
    device: Device

    @cached_property
    def memory(self) -> list[StageMemory]:
        """Of each pipeline rank, first to last."""
        return memory_of_stages(self.job)

    @cached_property
    def worst(self) -> StageMemory:
        """The stage that decides whether it fits."""
        return most_loaded(self.memory)

    @property
    def fits(self) -> bool:
        """Whether every stage fits the device."""
        return self.worst.total <= self.device.memory_gib * 2**30

    @cached_property
    def time(self) -> StepTime:
        """Of a step once every ramp has ended."""
        return step_time(self.job, self.device)

    @property
    def tokens_per_s(self) -> float:
        """Of all devices, once every ramp has ended."""
        return self.job.shape.at(self.job.shape.total_steps).tokens / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0 to 1."""
        job, shape = self.job, self.job.shape
        found = mfu(
            tokens_per_sec_per_device=self.tokens_per_s / shape.world_size,
            flops_per_token=flops_per_token(
                job.model,
                job.finetune,
                vocab_size=shape.vocab_size,
                seq_len=shape.seq_len,
                images_per_row=shape.images_per_row,
            ),
            peak_tflops=self.device.peak / 1e12,
        )
        assert found is not None
        return found

    @property
    def num_parameters(self) -> int:
        """Of the model, padding not counted."""
        return num_parameters(self.job.model, self.job.shape.vocab_size)

    @property
    def num_trained(self) -> int:
        """Numbers that the optimizer updates."""
        job = self.job
        return num_trained_parameters(job.model, job.finetune, job.shape.vocab_size)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint."""
        return CHECKPOINT_BYTES_PER_PARAMETER * self.num_trained

    @cached_property
    def hours(self) -> float:
        """Of the whole run, ramps at their own speed; without evaluations and restarts."""
        seconds, start = 0.0, 0
        for until, shape in self.job.shape.ramp:
            steps = max(0, min(until, self.job.shape.total_steps) - start)
            if steps:
                seconds += steps * self.at(shape).time.total
            start = min(until, self.job.shape.total_steps)
        return seconds / 3600

    @property
    def device_hours(self) -> float:
        """Hours of all devices."""
        return self.hours * self.job.shape.world_size

    @property
    def usd(self) -> float:
        """Rent of the devices."""
        return self.device_hours * self.device.usd_per_hour

    @property
    def megawatt_hours(self) -> float:
        """Of devices under load and what stands around them."""
        return self.device_hours * self.device.watts * PLANT_FACTOR / 1e6

    def at(self, step: StepShape) -> Plan:
        """The same run as if every step had this shape: of a ramp, for one."""
        shape = self.job.shape
        shape = replace(shape, seq_len=step.seq_len, ramp=((shape.total_steps, step),))
        return replace(self, job=replace(self.job, shape=shape))
