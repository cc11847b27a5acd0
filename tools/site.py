"""The pages as a site: a hook of mkdocs, which adds what does not lie in docs/.

    pip install -e ".[docs]"
    mkdocs build --strict        site/          mkdocs serve    while writing

README.md, launch/README.md, CONTRIBUTING.md, CHANGELOG.md become pages; links are turned to them; what leads to source becomes
its path; settings.md is made from the schema of every command. A link or an anchor that leads nowhere is an error.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Pages that lie elsewhere, by their name on the site.
ELSEWHERE = {
    "index.md": "README.md", "launching.md": "launch/README.md", "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md",
}  # fmt: skip
# What stands where; a page that no line names comes under the last heading.
SECTIONS = {
    "First hour": ["index.md", "your-text.md", "python.md", "troubleshooting.md"],
    "Data": ["data.md", "dialogues.md", "pictures.md", "cleaning.md", "loader.md", "privacy.md"],
    "Training": ["finetuning.md", "experts.md", "long-sequences.md", "muon.md", "watching.md"],
    "On a cluster": ["launching.md", "plan.md", "scaling.md", "performance.md", "load.md", "resilience.md", "checkpoints.md"],
    "Using a model": ["huggingface.md", "probing.md"],
    "Reference": ["settings.md", "changelog.md", "contributing.md", "security.md"],
}  # fmt: skip
WITHOUT_SETTINGS = {"pipeline.node_check"}
# What calls cli.run, where it is not the command's own module.
CALLERS = {"data_prep.tokenize": "data_prep.tokens.tokenize_job"}
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?!https?:|#)[^)\s]+)\)")


def on_config(config: Any) -> Any:
    """Give the pages their order."""
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    there = written | {*ELSEWHERE, "settings.md"}
    named = {page for pages in SECTIONS.values() for page in pages}
    sections = {title: [page for page in pages if page in there] for title, pages in SECTIONS.items()}  # fmt: skip
    sections["Reference"] += sorted(there - named)
    config.nav = [{title: pages} for title, pages in sections.items() if pages]
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that do not lie in docs/."""
    from mkdocs.structure.files import File

    pages = {page: (ROOT / source).read_text() for page, source in ELSEWHERE.items()}
    for page, text in (pages | {"settings.md": settings_page()}).items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn a page's links to where their targets are on the site."""
    name = page.file.src_uri
    return turned(markdown, folder=Path(ELSEWHERE.get(name, f"docs/{name}")).parent)


def turned(text: str, *, folder: Path) -> str:
    """Links of a page that lies in `folder` of the clone, as the site has them."""
    pages = {source: page for page, source in ELSEWHERE.items()}

    def turn(match: re.Match[str]) -> str:
        path, mark, anchor = match["target"].partition("#")
        place = os.path.normpath(folder / path)
        if place.startswith("docs/"):
            target = place.removeprefix("docs/")
        elif place in pages:
            target = pages[place]
        else:  # a file of the clone, which the site does not have
            return f"{match['text']} (`{place}`)"
        return f"{match['image']}[{match['text']}]({target}{mark}{anchor})"

    return LINK.sub(turn, text)


def settings_page() -> str:
    """Every setting of every command, with its value and its meaning."""
    sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
    from pipeline import pretrain

    lines = ["# Every setting", "", "Made from the source. `pretrain COMMAND --help` prints the same, with the values of the presets given beside it.", ""]  # fmt: skip
    shown: dict[str, str] = {}
    for name, (module, *_) in pretrain.COMMANDS.items():
        lines += [f"## {name}", "", pretrain.summary(name), ""]
        if (settings := command(module)) is None:
            continue
        schema, config, positional = settings
        rows = dict(setting_rows(schema, config, positional))
        same = {key for key, row in rows.items() if shown.get(key) == row}
        if config == "pretrain" and name != "plan" and same:  # the long list of a run stands once
            lines += [f"Those of a run ([plan](#plan) has them), {len(same)} in number.", ""]
            rows = {key: row for key, row in rows.items() if key not in same}
        shown |= rows if config == "pretrain" else {}
        if rows:
            lines += ["| setting | value | meaning |", "|---|---|---|", *rows.values(), ""]
    return "\n".join(lines)


def command(name: str) -> tuple[type, str, list[str]] | None:
    """A command's schema, config name, and what may be given without its name; None: no settings.

    Read from the call of cli.run in its module.
    """
    if name in WITHOUT_SETTINGS:
        return None
    module = importlib.import_module(CALLERS.get(name, name))
    (call,) = (
        node
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "cli.run"
    )
    given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    schema = getattr(module, ast.unparse(call.args[1]))
    return schema, given["config"], list(given.get("positional", ()))


def setting_rows(schema: type, config: str, positional: list[str]) -> Iterator[tuple[str, str]]:
    """(key, its row of the table)."""
    from pipeline import cli, help_page
    from pipeline import schema as schemas

    values = cli.composed_values(schema, [], config, positional)
    for key, field, owner in schemas.settings(schema):
        value = help_page.default_of(field) if "[]" in key else help_page.look_up(values, key)
        cells = [f"`{key}`" + (" (its name may be left out)" if key in positional else ""),
                 f"`{help_page.shown(value)}`".replace("``", ""),
                 meaning(schemas.documentation(field, owner))]  # fmt: skip
        yield key, "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def meaning(text: str) -> str:
    """A setting's line as markdown: what stands between backticks is code, nothing else is markup."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_])", r"\\\1", escape(part, quote=False)) for part in parts[::2]]
    return "`".join(parts)
