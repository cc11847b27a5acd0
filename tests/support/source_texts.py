"""What a source file says: its texts, as a reader of the terminal sees them."""

from __future__ import annotations

import ast
from pathlib import Path


def texts_of(path: Path) -> list[str]:
    """Every text of a Python file; pieces of f-strings are joined, with {} for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found
