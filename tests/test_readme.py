"""The README and the guides: their links lead somewhere and their settings exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    """A page that moved takes its readers with it."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_files_named_in_the_readme_exist():
    """The six files to read first must be there."""
    text = (ROOT / "README.md").read_text()
    named = set(
        re.findall(r"`?((?:pipeline|data_prep|launch|conf|docs|tests)/[\w./-]*\.\w+)", text)
    )
    assert "pipeline/config/pretrain.py" in named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_settings_of_training_commands_compose():
    """A command that is copied from the page must not be refused."""
    text = "\n".join(page.read_text() for page in PAGES)
    start = r"(?:-m pipeline\.train|launch/local\.sh \d+)"
    commands = re.findall(rf"{start}((?: [\w.]+=[^\s'`|]+)+)", text)
    assert commands
    for settings in commands:
        if "model=mine" in settings:  # the page makes that file in the line before
            continue
        cli.compose(PretrainConfig, settings.split(), config="pretrain")
