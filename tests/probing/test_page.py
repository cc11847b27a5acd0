"""The page of findings: whole, self-contained, and safe from what a tokenizer holds."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

from pipeline.probing.page import page


def findings() -> dict[str, Any]:
    """Two blocks of two heads on three tokens, one of which would end a script."""
    table, maps = (
        [[0.1, 0.2], [0.3, 0.4]],
        [[[[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]] * 2] * 2,
    )
    return {
        "checkpoint": "runs/<a>",
        "layers": 2,
        "heads": 2,
        "averages": {
            "tokens": 1234, "lens_loss": [3.0, 2.123456], "residual": [1.0, 2.0], "attention": [0.5, 0.6],
            "mlp": [0.7, 0.8], "entropy": table, "sink": table, "attribution": {"heads": table},
        },
        "kinds": {"previous": table, "duplicate": table, "induction": table},
        "text": {
            "tokens": ["</script>", " b", "c"],
            "attention": maps,
            "lens": {"tokens": [[["x", "y"]] * 3] * 2, "probabilities": [[[0.9, 0.1]] * 3] * 2},
        },
        "curve": {"steps": [0, 10], "previous": [table] * 2, "duplicate": [table] * 2, "induction": [table] * 2},
        "patching": {
            "answer": " z", "tokens": ["a", "b", "c"], "of_prompt": -0.1, "of_other": -5.0,
            "streams": [[-5.0, -4.0, -0.2]] * 2, "heads": table,
        },
    }  # fmt: skip


class Elements(HTMLParser):
    """Tags as a browser sees them, and what the findings' element holds."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self._is_data = ("id", "findings") in attrs

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self._is_data:
            self.data += data


def test_the_page_holds_the_findings_and_needs_no_other_file() -> None:
    """A token `</script>` would end the element and become part of the page."""
    found = Elements()
    text = page(findings())
    found.feed(text)
    assert found.tags.count("script") == 2 and not found.links
    data = json.loads(found.data)
    assert data["text"]["tokens"] == findings()["text"]["tokens"]
    assert data["averages"]["lens_loss"] == [3.0, 2.1235]
    assert "Inside runs/&lt;a&gt;" in text and "1,234 tokens" in text
    used = set(re.findall(r"getElementById\(" r'"(\w+)"\)', text))
    assert used == set(re.findall(r'id="(\w+)"', text))
