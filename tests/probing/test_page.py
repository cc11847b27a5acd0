"""The page of findings: whole, self-contained, and safe from what a tokenizer holds."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.probing.page import page
from tests.support.browser import browser


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


def alpha(colour: str) -> float:
    """How dark a cell is, of what a browser says of its background."""
    numbers = re.findall(r"[\d.]+", colour)
    assert numbers[:3] in (["68", "119", "170"], ["0", "0", "0"]), colour
    return float(numbers[3]) if len(numbers) == 4 else 1.0


def test_the_page_answers_the_mouse_on_a_telephone(tmp_path: Path) -> None:
    """In a browser. The sink of a prompt of two tokens is no number: the page stood empty."""
    found, later = findings(), [[0.5, 0.6], [0.7, 0.8]]
    text = found["text"]
    first = [[1.0, 0, 0], [1.0, 0, 0], [0.9, 0.1, 0]]
    text["attention"] = [[text["attention"][0][0]] * 2, [first, text["attention"][0][0]]]
    text |= {"tokens": ["</script>", " b", "\n\n"], "tuned": text["lens"]}
    found["averages"]["sink"] = [[float("nan"), 0.2], [0.3, 0.4]]
    found["ablation"] = {"none": [4.0], "heads": [[4.0, 4.5], [5.0, 4.25]]}
    found["curve"] = {"steps": [0, 1_000_000]} | {
        k: [found["kinds"][k], later] for k in found["kinds"]
    }
    found["patching"]["tokens"] = ["a_token_of_a_certain_length"] * 3
    (tmp_path / "index.html").write_text(page(found))
    with browser(tmp_path / "profile") as tab:
        tab.open((tmp_path / "index.html").as_uri(), width=400, height=900)
        assert tab.said == [] and tab.value("document.documentElement.scrollWidth") <= 400
        looked = "[...document.querySelectorAll('#text span')].map(s => [s.title, s.className])"
        assert tab.value("document.getElementById('which').textContent") == "head 0.0"
        tab.hover("#text span:nth-child(3)")
        assert tab.value(looked) == [["0.200", ""], ["0.300", ""], ["0.500", "looks"]]
        tab.click('.map:nth-child(4) [data-head="1.0"]')
        assert tab.value("document.getElementById('which').textContent") == "head 1.0"
        assert tab.value(looked) == [["0.900", ""], ["0.100", ""], ["0.000", "looks"]]
        assert (
            tab.value("document.querySelector('#text').innerText") == "</script> b\u23ce\n\u23ce\n"
        )
        tab.screenshot(tmp_path / "page.png")
        chosen = tab.value("[...document.querySelectorAll('.chosen')].map(c => c.dataset.head)")
        assert chosen == ["1.0"] * 8
        cells = "[c.title, getComputedStyle(c).backgroundColor]"
        maps = dict(
            tab.value(
                "[...document.querySelectorAll('.map')].map(m => [m.firstChild.textContent,"
                f"[...m.querySelectorAll('td')].map(c => {cells})])"
            )
        )
        lens = tab.value(
            "[...document.querySelectorAll('#lens td')].map(c => [c.textContent, c.title])"
        )
        assert tab.said == []
    assert lens == [["x", '"x" 90.0 %\n"y" 10.0 %']] * 12
    darkness = {name: [alpha(colour) for _, colour in row] for name, row in maps.items()}
    said = {name: [title for title, _ in row] for name, row in maps.items()}
    heads = ["head 1.0", "head 1.1", "head 0.0", "head 0.1"]
    assert said["previous"] == [
        f"{h}: {v}000" for h, v in zip(heads, (0.3, 0.4, 0.1, 0.2), strict=True)
    ]
    assert darkness["previous"] == pytest.approx([0.3, 0.4, 0.1, 0.2], abs=1e-2)
    assert said["sink"][2] == "head 0.0: no number" and darkness["sink"][2] == 0
    assert darkness["entropy, nats"] == pytest.approx([0.75, 1, 0.25, 0.5], abs=1e-2)
    assert darkness["attribution"] == pytest.approx([2 / 3, 1, 0, 1 / 3], abs=1e-2)
    assert said["ablation"][0] == "head 1.0: 1.0000" and darkness["ablation"][0] == 1
    steps = [f"step {head} at {step}" for head in ("1.1", "1.0") for step in (0, 1000000)]
    assert said["induction by step"][:4] == [
        f"{step}: {value}000" for step, value in zip(steps, (0.4, 0.8, 0.3, 0.7), strict=True)
    ]
    assert [len(maps[f"{name} by step"]) for name in found["kinds"]] == [8, 8, 8]
    assert said["patching: stream"][2] == "place 1.2: -0.2000" and len(maps) == 12
    assert darkness["patching: stream"] == pytest.approx([0, 1 / 4.9, 4.8 / 4.9] * 2, abs=1e-2)
