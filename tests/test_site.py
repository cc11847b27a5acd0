"""The pages as a site: every setting and page is on it, its links hold, and troubleshooting quotes real messages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from pipeline import pretrain
from pipeline import schema as schemas
from tests.support.browser import browser
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


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as a reader builds it, with warnings as errors."""
    for name in ("mkdocs", "material"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is missing: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("built") / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(
        words, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_the_site_is_built_without_a_warning(built: Path) -> None:
    """Every page is reached, no link or anchor leads nowhere, nothing is fetched from elsewhere."""
    for page in [*(ROOT / "docs").glob("*.md")]:
        text = (built / page.stem / "index.html").read_text()
        assert not re.search(r'(?:src|rel="stylesheet" href)="https?://', text), page
    assert "Pretraining GPT models" in (built / "index.html").read_text()
    assert "optimizer.lr" in (built / "settings" / "index.html").read_text()


class Quiet(SimpleHTTPRequestHandler):
    """Says nothing of each request."""

    def log_message(self, *_: object) -> None:
        """To nobody."""


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    """Where the site is served, as on the web: a search does not read files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=built)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


LINKS = "[...document.querySelectorAll('a[href]')].map(a => a.href)"
STATUS = "performance.getEntriesByType('navigation')[0].responseStatus"
WIDER = "document.documentElement.scrollWidth"


@pytest.mark.slow
def test_every_page_opens_from_the_first_and_fits_a_telephone(address: str, tmp_path: Path) -> None:
    """Page after page as its links lead on; each link's place on its page is there."""
    wanted, seen = {address}, set()
    ids: dict[str, set[str]] = {}
    leads: dict[str, list] = {}
    with browser(tmp_path / "profile") as page:
        while todo := sorted(wanted - seen):
            for url in todo:
                seen.add(url)
                page.open(url, width=1300)
                assert page.value(STATUS) == 200, url
                assert page.value(WIDER) <= 1300, url
                ids[url] = set(page.value("[...document.querySelectorAll('[id]')].map(e => e.id)"))
                inside = [link for link in page.value(LINKS) if link.startswith(address)]
                places = [urldefrag(link) for link in inside]
                wanted |= {target for target, _ in places}
                leads[url] = places
                page.open(url, width=400)
                assert page.value(WIDER) <= 400, url
        assert page.said == []
    lost = [(url, place) for url, places in leads.items() for target, place in places
            if place and unquote(place) not in ids[target] | {"__top"}]  # fmt: skip
    assert lost == [] and len(seen) > len([*(ROOT / "docs").glob("*.md")])


@pytest.mark.slow
def test_a_search_finds_what_a_setting_does_and_an_error_by_its_words(
    address: str, tmp_path: Path
) -> None:
    """Typed into the field at the top of a page; a click on what is found leads to the place."""
    found = "document.querySelectorAll('.md-search-result__link')"
    with browser(tmp_path / "profile") as page:
        for words, target in (
            ("micro_batch_size", "settings"),
            ("has no checkpoint yet", "troubleshooting"),
        ):
            page.open(address, width=1300)
            page.click(".md-search__input")
            page.type(words)
            page.wait_for(f"[...{found}].some(a => a.href.includes('/{target}/'))")
            page.click(f".md-search-result__link[href*='/{target}/']")
            page.wait_for(f"location.pathname.startsWith('/{target}/')")
            page.wait_for(f"document.body?.innerText.includes({json.dumps(words)})")
        assert page.said == []
