"""Check every device, link and clock of an allocation.

    srun python -m pipeline.node_check        by hand, over the nodes of an allocation

pipeline.train runs the same checks (resilience/node_check.py) before it builds the model.
"""

from __future__ import annotations

import sys
import time

from pipeline.distributed.ranks import RankHost
from pipeline.errors import PipelineError, printed
from pipeline.log import logger
from pipeline.resilience.node_check import check


def main() -> int:
    """Check the nodes of this allocation."""
    import os

    from pipeline import log
    from pipeline.config.parallel_sizes import ParallelSizes
    from pipeline.distributed.layout import connect, disconnect
    from pipeline.distributed.ranks import ranks_from_environment

    ranks = ranks_from_environment()
    log.setup(global_rank=ranks.global_rank)
    try:
        layout = connect(ranks, ParallelSizes(data=ranks.world_size), timeout_s=120.0)
        found = check(
            RankHost(ranks.global_rank, ranks.node, os.getpid(), time.time()), layout.device
        )
    except PipelineError as error:
        if ranks.is_main:
            log.say(printed(error))
        return error.exit_code
    finally:
        disconnect()
    logger.info(
        "%d ranks on %d nodes compute, are linked, and agree on the time",
        len(found),
        len({f.node for f in found}),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
