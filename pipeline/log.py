"""Console messages: one logger for both packages; rank 0 speaks, other ranks only warn."""

from __future__ import annotations

import logging
import sys
import warnings

logger = logging.getLogger("pretrain")


def setup(*, global_rank: int = 0) -> None:
    """Send messages to standard error; of ranks above 0 only warnings, marked with the rank."""
    handler = logging.StreamHandler(sys.stderr)
    mark = f"[rank {global_rank}] " if global_rank else ""
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s {mark}%(levelname).1s %(message)s", "%H:%M:%S")
    )
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if global_rank == 0 else logging.WARNING)
    logger.propagate = False
    # Advice to developers, repeated by every rank.
    for library in ("torch", "deepspeed", "megatron", "hydra"):
        warnings.filterwarnings("ignore", module=rf"{library}\.")
