"""What a command has logged, as it was said."""

from __future__ import annotations

import re

CONTINUED = re.compile(r"\n\d\d:\d\d:\d\d (?:\[rank \d+\] )?[A-Z]   ")
"""Where pipeline.log has broken a message."""


def unbroken(text: str) -> str:
    """Lines of a log, each message on one."""
    return CONTINUED.sub(" ", text)
