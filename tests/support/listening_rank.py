"""A rank of two, by the environment: it connects, says at which addresses it listens, and ends."""

import os
import sys
from pathlib import Path

import torch.distributed as dist

from pipeline.config.parallel_sizes import ParallelSizes
from pipeline.distributed.layout import connect, disconnect
from pipeline.distributed.ranks import ranks_from_environment
from pipeline.errors import MachineError

try:
    connect(ranks_from_environment(), ParallelSizes(tensor=2, pipeline=1, data=1))
except MachineError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
own = {
    os.readlink(f"/proc/self/fd/{name}")
    for name in os.listdir("/proc/self/fd")
    if os.path.islink(f"/proc/self/fd/{name}")
}
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
        _, local, _, state, *rest = line.split()
        if state == "0A" and f"socket:[{rest[5]}]" in own:  # 0A: listening
            print("listens", local.split(":")[0])
dist.barrier()
disconnect()
