"""How long a test waits for what must come."""

HANG_S = 600.0
"""Only a hang lasts so long. A tighter bound fails what is right on a busy machine."""
