"""Which collectives this process waits in, as torch's flight recorder knows them.

NCCL's and gloo's groups write every collective into a ring in memory (connect() says how many).
Asked by the watchdog: a stack shows that a rank waits, this shows for what, and its number within
the group, in which ranks that have gone different ways differ.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MOST = 8  # of a rank, the oldest first


def waiting_collectives() -> list[str]:
    """Collectives that were begun and are not done: `all_reduce number 7 of group 0 (...)`.

    Empty where torch is not loaded, or too old to tell; never waits for a device.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return []
    library, found = torch._C._distributed_c10d, []
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # NCCL's ring, and the others'
        if dump := getattr(library, name, None):
            found += unfinished(json.loads(dump(includeCollectives=True, onlyActive=False)))
    return found[:MOST]


def unfinished(trace: dict[str, Any]) -> list[str]:
    """The entries of a flight recorder's dump that are not done, in words."""
    found = []
    for entry in trace.get("entries", []):
        if entry.get("retired") or entry.get("state") == "completed":
            continue
        number = entry["p2p_seq_id"] if entry.get("is_p2p") else entry["collective_seq_id"]
        group, description = (*entry["process_group"], "")[:2]
        sizes = ", ".join("x".join(map(str, shape)) or "1" for shape in entry["input_sizes"])
        types = "/".join(sorted(set(entry.get("input_dtypes", []))))
        name = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
        found.append(
            f"{name} number {number} of group {group} {description}: "
            f"{sizes or 'nothing'} {types}, {entry['state']}".rstrip()
        )
    return found
