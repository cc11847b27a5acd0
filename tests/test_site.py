"""The pages as a site: every setting and page is on it, its links hold, and troubleshooting quotes real messages."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import pretrain
from pipeline import schema as schemas
from tests.support.source_texts import texts_of
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("site_hook", ROOT / "tools" / "site.py")
assert SPEC is not None and SPEC.loader is not None
site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)


def test_the_reference_has_every_setting_of_every_command() -> None:
    """Of a command that takes a run's settings, those that it alone has stand under its own name."""
    page = site.settings_page()
    parts = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert list(parts) == list(pretrain.COMMANDS)
    for name, (module, *_) in pretrain.COMMANDS.items():
        if (settings := site.command(module)) is None:
            continue
        schema, config, _positional = settings
        there = parts[name] + (parts["plan"] if config == "pretrain" else "")
        assert [key for key, *_ in schemas.settings(schema) if f"| `{key}`" not in there] == []
    assert page.count("| `optimizer.lr`") == 1


def test_links_of_a_page_are_turned_to_where_their_targets_are() -> None:
    text = "[a](docs/data.md#x) [b](launch/README.md) ![c](docs/quickstart.png) [d](https://x.y) [e](#z)"
    assert site.turned(text, folder=Path()) == (
        "[a](data.md#x) [b](launching.md) ![c](quickstart.png) [d](https://x.y) [e](#z)"
    )
    inside = "[names](../pipeline/model/names.py) [data](data.md) [launch](../launch/README.md)"
    assert site.turned(inside, folder=Path("docs")) == (
        "names (`pipeline/model/names.py`) [data](data.md) [launch](launching.md)"
    )


def test_the_messages_of_the_page_are_those_that_commands_print() -> None:
    """A reader looks for what the terminal shows."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    sources = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("data_prep/**/*.py")]
    everything = "\0".join(text for path in sources for text in texts_of(path))
    assert len(messages) > 12
    assert [message for message in messages if message not in everything] == []


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Every page is reached, no link or anchor leads nowhere, nothing is fetched from elsewhere."""
    for name in ("mkdocs", "material"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is missing: pip install -e '.[docs]'")
    words = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(
        words, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for page in [*(ROOT / "docs").glob("*.md")]:
        text = (tmp_path / "site" / page.stem / "index.html").read_text()
        assert not re.search(r'(?:src|rel="stylesheet" href)="https?://', text), page
    assert "Pretraining GPT models" in (tmp_path / "site" / "index.html").read_text()
    assert "optimizer.lr" in (tmp_path / "site" / "settings" / "index.html").read_text()
