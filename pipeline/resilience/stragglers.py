"""Which rank holds the others up: own work, measured apart from waiting.

In synchronous training every rank's step takes as long as the slowest one's: wall time names
nobody. So every n steps each rank times a fixed piece of arithmetic on its device, which no other
rank can delay, and reports it with the time its own loader made it wait.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.distributed.ranks import RankHost, describe_ranks

PATIENCE = 3  # reports in a row that make a slow rank a straggler
NOISE_MS = 1.0  # differences below this are not worth a line


@dataclass(frozen=True)
class Report:
    """The slowest rank of one report."""

    slowest_rank: int
    slowest_ms: float
    median_ms: float
    stragglers: list[int]
    """Ranks that were straggler_ratio slower than the median in PATIENCE reports in a row."""

    def metrics(self) -> dict[str, float]:
        """Values for metrics.jsonl."""
        return {
            "resilience/slowest_rank": float(self.slowest_rank),
            "resilience/slowest_ms": self.slowest_ms,
            "resilience/median_ms": self.median_ms,
        }

    def warning(self, hosts: list[RankHost]) -> str:
        """One line for the log, with the node."""
        return (
            f"{describe_ranks(self.stragglers, hosts)}: {self.slowest_ms / self.median_ms:.1f} "
            f"times slower than the median in {PATIENCE} reports in a row (data wait + a fixed "
            f"GEMM: {self.slowest_ms:.1f} ms, median {self.median_ms:.1f} ms)"
        )


class Stragglers:
    """Counts, on every rank alike, how often a rank was slow."""

    def __init__(
        self, *, ratio: float, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> None:
        self.ratio, self.device, self.group = ratio, device, group
        size = 4096 if device.type == "cuda" else 256
        self._matrix = torch.ones(
            size,
            size,
            device=device,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
        self._slow: Counter[int] = Counter()

    def report(self, *, data_wait_ms: float) -> Report:
        """The slowest rank since the last report. Collective over `group`, every n steps.

        Args:
            data_wait_ms: time this rank's last step waited for its loader.
        """
        own = torch.tensor([data_wait_ms + self.probe_ms()], dtype=torch.float64)
        times = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(times, own, group=self.group)
        return self.find_stragglers([float(t) for t in times])

    def find_stragglers(self, times_ms: list[float]) -> Report:
        """The report on every rank's time; pure but for the counts."""
        median = statistics.median_low(times_ms)
        for rank, ms in enumerate(times_ms):
            is_slow = ms > self.ratio * median and ms - median > NOISE_MS
            self._slow[rank] = self._slow[rank] + 1 if is_slow else 0
        slowest = max(range(len(times_ms)), key=times_ms.__getitem__)
        return Report(
            slowest,
            times_ms[slowest],
            median,
            [rank for rank, count in sorted(self._slow.items()) if count >= PATIENCE],
        )

    def probe_ms(self) -> float:
        """Milliseconds of the fixed GEMM on this rank's device, the best of three."""
        best = float("inf")
        for _ in range(3):
            self._wait()
            start = time.perf_counter()
            torch.mm(self._matrix, self._matrix)
            self._wait()
            best = min(best, (time.perf_counter() - start) * 1e3)
        return best

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
