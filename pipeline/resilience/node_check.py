"""Every device computes, every link carries, every clock agrees, or the bad node is named.

A GEMM of small integers has one right answer on any hardware: a device is judged by itself, not by
the majority.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.distributed.ranks import RankHost, gather_hosts
from pipeline.errors import MachineError
from pipeline.log import logger

MAX_CLOCK_SKEW_S = 5.0  # log lines and checkpoint times of different nodes stay comparable
SLOW = 2.0  # times the median: named in a warning, not refused
LINK_BYTES = 1 << 22


@dataclass(frozen=True)
class Finding:
    """What one rank found."""

    computes: bool
    gemm_ms: float
    left_ok: bool
    """The block from the rank before arrived whole."""
    left_ms: float
    sum_ok: bool
    clock: float


def check(host: RankHost, device: torch.device) -> list[RankHost]:
    """Where every rank lives, when all is well. Collective: call on every rank.

    Raises:
        MachineError: on every rank alike; the message names the bad ranks and nodes.
    """
    hosts = gather_hosts(host)
    left_ok, left_ms = _link(device)
    computes, gemm_ms = _compute(device)
    finding = Finding(computes, gemm_ms, left_ok, left_ms, _sum(device), time.time())
    findings: list[Finding] = [finding] * len(hosts)
    dist.all_gather_object(findings, finding)
    bad, slow = find_bad_ranks(findings, hosts)
    if host.global_rank == 0:
        for line in slow:
            logger.warning(line)
    if bad:
        nodes = ",".join(sorted({hosts[rank].node for rank in bad}))
        lines = [
            f"rank {rank} on {hosts[rank].node}: {why}" for rank, why in sorted(bad.items())[:16]
        ]
        raise MachineError(
            "the node check failed:\n  "
            + "\n  ".join(lines)
            + f"\nLeave the node out: sbatch --exclude={nodes} ..."
        )
    return hosts


def find_bad_ranks(
    findings: list[Finding], hosts: list[RankHost]
) -> tuple[dict[int, str], list[str]]:
    """(bad rank to reason, warnings about slow ranks); pure."""
    bad, slow = {}, []
    typical_clock = _median([f.clock for f in findings])
    for rank, f in enumerate(findings):
        before = hosts[rank - 1]
        if not f.computes:
            bad[rank] = "the device computed a wrong matrix product"
        elif not f.left_ok:
            bad[rank] = f"data from rank {before.global_rank} on {before.node} arrived damaged"
        elif not f.sum_ok:
            bad[rank] = "an all-reduce over all ranks gave a wrong sum"
        elif abs(f.clock - typical_clock) > MAX_CLOCK_SKEW_S:
            bad[rank] = (
                f"the clock is {f.clock - typical_clock:+.0f} s off; start chrony or ntpd there"
            )
    for what, values in (
        ("GEMM", [f.gemm_ms for f in findings]),
        ("link from the rank before", [f.left_ms for f in findings]),
    ):
        typical = _median(values)
        slow += [
            f"node check: rank {rank} on {hosts[rank].node}: "
            f"{what} took {ms:.1f} ms, median {typical:.1f} ms"
            for rank, ms in enumerate(values)
            if len(values) > 2 and ms > SLOW * typical and ms - typical > 5.0
        ]
    return bad, slow[:16]


def _compute(device: torch.device) -> tuple[bool, float]:
    """(right?, milliseconds) of a product of integers; the host checks (A B) v = A (B v), int64."""
    size = 2048 if device.type == "cuda" else 256
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-3, 4, (size, size), generator=generator) for _ in range(2))
    vector = torch.randint(1, 100, (size,), generator=generator)
    # |sum| <= 9 * 2048 < 2^24: exact in fp32 whatever the order of the additions.
    a, b = left.to(device, torch.float32), right.to(device, torch.float32)
    torch.mm(a, b)  # load the kernel
    start = time.perf_counter()
    product = torch.mm(a, b).cpu()
    elapsed_ms = (time.perf_counter() - start) * 1e3
    return torch.equal(product.long() @ vector, left @ (right @ vector)), elapsed_ms


def _link(device: torch.device) -> tuple[bool, float]:
    """(whole?, milliseconds) of a block passed round the ring of all ranks, over every link."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return True, 0.0
    own = torch.full((LINK_BYTES // 4,), float(rank), device=device)
    got = torch.empty_like(own)
    before, after = (rank - 1) % world_size, (rank + 1) % world_size
    elapsed_ms = 0.0
    for _ in range(2):  # the first pass connects
        start = time.perf_counter()
        for request in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, own, after), dist.P2POp(dist.irecv, got, before)]
        ):
            request.wait()
        is_whole = bool((got == before).all())  # also waits for the device
        elapsed_ms = (time.perf_counter() - start) * 1e3
    return is_whole, elapsed_ms


def _sum(device: torch.device) -> bool:
    world_size = dist.get_world_size()
    numbers = torch.full((1024,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(numbers)
    return bool((numbers == world_size * (world_size + 1) / 2).all())


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
