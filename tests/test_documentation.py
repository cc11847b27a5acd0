"""What the pages say works: their links lead somewhere, their commands compose, their targets and files exist."""

from __future__ import annotations

import ast
import functools
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from pipeline import cli, remote, sweep
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import ConfigError
from pipeline.pretrain import COMMANDS as FRONT_DOOR
from pipeline.sweeping.points import points_of
from tests.support.source_texts import texts_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "launch/*.md", ".github/**/*.*", "Dockerfile")
    for path in ROOT.glob(pattern)
)
SCRIPTS = sorted(
    path for path in ROOT.glob("launch/**/*") if path.suffix in (".sh", ".slurm", ".yaml")
)
COMMANDS = sorted(
    [
        *ROOT.glob("pipeline/*.py"),
        *ROOT.glob("pipeline/*/__main__.py"),
        *ROOT.glob("data_prep/*.py"),
    ]
)

OPTIONS = r"(?: +-[-\w]+(?:[= ][\w.-]+)?)*"
# What a line starts, and the command that its settings go to.
PROGRAMS = {
    r"python3? -m (?P<module>(?:pipeline|data_prep)\.\w+)": None,
    rf"torchrun{OPTIONS} -m (?P<module>pipeline\.\w+)": None,
    r"python data_prep/tokenize\.py": "data_prep.tokenize",
    rf"pretrain (?P<command>{'|'.join(FRONT_DOOR)})(?= )": None,
    r"(?:\S*/)?launch/local\.sh \d+": "pipeline.train",
    rf"sbatch{OPTIONS} launch/pretrain\.slurm": "pipeline.train",
    rf"sbatch{OPTIONS} launch/ladder\.slurm": "pipeline.scaling",
    rf"sbatch{OPTIONS} launch/sweep\.slurm": "pipeline.sweep",
    rf"sbatch{OPTIONS} launch/tokenize\.slurm": "data_prep.tokenize",
    rf"sbatch{OPTIONS} launch/clean\.slurm": "data_prep.clean",
}
TEXT_TO_MODEL = r"launch/text_to_model\.sh (?P<first>.*) -- (?P<second>.*)"


def written(path: Path) -> Iterator[str]:
    """The lines of a page, of a script's comments and last words, or of the docstring that a command prints as its help."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    if path in SCRIPTS:
        last_words = re.findall(r"^cat << END\n(.*?)^END$", text, re.MULTILINE | re.DOTALL)
        text = "\n".join([*re.findall(r"^ *# *(.*)", text, re.MULTILINE), *last_words])
        text = text.replace("$run", "runs/NAME")
    text = re.sub(r"\\\n(?:\s*#)?\s*", "", text)
    for line in text.splitlines():
        yield from re.findall(r"`([^`]+)`", line) if "`" in line else [line]


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """(module, its words) of every command that is written in a file."""
    found = []
    for line in written(path):
        if match := re.search(TEXT_TO_MODEL, line):
            found.append(("data_prep.tokenize", words(match["first"])))
            found.append(("pipeline.train", ["data.path=OUT", *words(match["second"])]))
        for program, module in PROGRAMS.items():
            for match in re.finditer(rf"(?<!\S){program}(?P<rest>.*)", line):
                if "--help" in match["rest"]:
                    continue
                given = match.groupdict()
                name, *first = FRONT_DOOR.get(given.get("command", ""), (module,))
                found.append((name or given["module"], [*first, *words(match["rest"])]))
    return found


def words(rest: str) -> list[str]:
    """The settings behind a program's name, with something in the place of what the reader fills in."""
    rest = re.split(r"  | #| [|>&]|\$", rest)[0]
    rest = rest.replace("model=mine", "model=tiny")  # the page makes that file in the line before
    rest = re.sub(r"=N\b", "=8", rest)
    rest = re.sub(r" \[([a-z]\w*=[^]]*)\]", r" \1", rest)  # [optional=this]
    found = [re.sub(r"^(\w+=\w+)(\|\w+)+$", r"\1", word) for word in shlex.split(rest)]
    return [word for word in found if word != "..." and not re.match(r"--?\w", word)]


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def compose(module: str, *settings: str) -> None:
    """What `python -m module settings` does before it begins to work, with that command's own schema.

    Each command once: every fifth stands on another page too.

    Raises:
        ConfigError: the command would refuse them.
    """

    if module == "pipeline.sweep":  # the others' settings may have several values here
        own, theirs = sweep.split_words(settings)
        for point in points_of(theirs):
            cli.compose(PretrainConfig, point.words, config="pretrain")
        cli.compose(sweep.SweepConfig, own, config="sweep")
        return

    def only_compose(main, schema, *, config, positional=()):
        cli.compose(schema, settings, config=config, positional=positional)
        composed.append(module)

    composed: list[str] = []
    with patch.object(cli, "run", only_compose), patch.object(sys, "path", list(sys.path)):
        runpy.run_path(str(file_of(module)), run_name="__main__")
    assert composed == [module]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    """A page that moved takes its readers with it."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_on_a_page_exist(page):
    """The six files to read first must be there; so must the test that shows a claim."""
    folders = "pipeline|data_prep|launch|conf|docs|tests|benchmarks"
    named = set(re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]*\.\w+)", page.read_text()))
    made_by_the_reader = {
        "conf/model/mine.yaml",
        "conf/clean/NAME.yaml",
        "conf/experiment/mine.yaml",
    }
    assert [name for name in sorted(named - made_by_the_reader) if not (ROOT / name).exists()] == []


def folders_of_tree(text: str) -> dict[str, str]:
    """Path of each folder that a tree of folders lists -> what it says of it."""
    found, above = {}, ""
    for indent, name, said in re.findall(r"^( *)([\w.-]+)/ +(.*)$", text, re.MULTILINE):
        above = above if indent else name
        found[f"{above}/{name}" if indent else name] = said
    return found


def missing_in_tree(text: str) -> set[str]:
    """Folders that a tree lists and that there are not, or the reverse; files it names in vain."""
    listed = folders_of_tree(text)
    ignored = set(re.findall(r"^/?([\w-]+)/$", (ROOT / ".gitignore").read_text(), re.MULTILINE))
    there = {
        str(path.relative_to(ROOT))
        for pattern in ("*", "pipeline/*", "data_prep/*")
        for path in ROOT.glob(pattern)
        if path.is_dir() and path.name[0] not in "._" and not path.name.endswith(".egg-info")
    }
    vain = {
        name
        for folder, said in listed.items()
        for name in re.findall(r"[\w./]+/(?= )|\w+\.(?:py|ipynb)", said)
        if not any((ROOT / at / name).exists() for at in ("", folder, folder.split("/")[0]))
    }
    return (set(listed) ^ (there - ignored)) | vain


def test_the_readme_lists_every_folder_and_none_that_is_not_there() -> None:
    """A stranger looks there for the room of a line."""
    text = (ROOT / "README.md").read_text().partition("## The folders")[2].split("```")[1]
    assert missing_in_tree(text) == set()
    wrong = text.replace("  probing/ ", "  probes/ ").replace("engine/deepspeed/", "engine/ds/")
    assert missing_in_tree(wrong) == {"pipeline/probing", "pipeline/probes", "engine/ds/"}


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_on_a_page_exist(page):
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^ *|`)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize(
    "path", [*PAGES, *SCRIPTS, *COMMANDS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_commands_of_a_page_compose(path):
    """A command that is copied from a page must not be refused."""
    for module, settings in commands(path):
        if not settings:  # a mention of the command, or one that has no settings
            assert file_of(module).exists()
            continue
        try:
            compose(module, *settings)
        except ConfigError as error:
            raise AssertionError(f"{module} {shlex.join(settings)}: {error}") from error


def test_commands_are_found_in_every_spelling(tmp_path):
    """The test above can fail: what is not found is not checked, and a misspelt setting is refused."""
    page = tmp_path / "page.md"
    page.write_text(
        "| here | `python -m pipeline.train model=tiny` or `launch/local.sh 4 seed=1` |\n"
        "sbatch --nodes=1-2 --gres=none launch/pretrain.slurm name=big ...    # on nodes\n"
        "    torchrun --nnodes=2 --node-rank 0 -m pipeline.evaluate runs/NAME     four ranks\n"
        "launch/text_to_model.sh --array=0-63 input='a b' -- --nodes=1 \\\n  seed=2\n"
        "python -m pipeline.export checkpoint=runs/NAME [dtype=bf16|fp32]\n"
        "pretrain chat runs/NAME temperature=0     and who pretrain language models\n"
    )
    assert commands(page) == [
        ("pipeline.train", ["model=tiny"]),
        ("pipeline.train", ["seed=1"]),
        ("pipeline.train", ["name=big"]),
        ("pipeline.evaluate", ["runs/NAME"]),
        ("data_prep.tokenize", ["input=a b"]),
        ("pipeline.train", ["data.path=OUT", "seed=2"]),
        ("pipeline.export", ["checkpoint=runs/NAME", "dtype=bf16"]),
        ("pipeline.generate", ["chat=true", "runs/NAME", "temperature=0"]),
    ]
    with pytest.raises(ConfigError, match="model"):
        compose("pipeline.train", "modle=tiny")
    with pytest.raises(ConfigError, match="output"):
        compose("data_prep.tokenize", "outptu=OUT")


def test_the_pages_have_commands():
    assert sum(len(commands(path)) for path in PAGES) > 40


def wrong_installations(text: str, extras: set[str]) -> list[str]:
    """What stands after `pip install` of extras in another spelling, or of extras that there are not."""
    line = r"""(?:--[\w-]+ )*(?:-c constraints\.txt )?-e "\.\[([\w,{}$]+)\]"\W*"""
    wrong = []
    for words in re.findall(r"pip install +([^\n`[]*\[[^]\n`]*\]\S*)", text):
        match = re.fullmatch(line, words)
        if match is None or not set(match[1].split(",")) <= extras | {"{}", "$EXTRAS"}:
            wrong.append(words)
    return wrong


def test_an_extra_is_installed_by_a_line_that_works() -> None:
    """Without quotes zsh takes the brackets for a pattern; without -e and the dot it is somebody else's package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    files = [path for name in ("pipeline", "data_prep") for path in (ROOT / name).rglob("*.py")]
    pages = [path for path in PAGES if path.name != "CHANGELOG.md"]  # which tells of old ones
    texts = {path: path.read_text() for path in [*pages, *SCRIPTS]}
    texts |= {path: "\n".join(texts_of(path)) for path in files}
    found = {
        str(path.relative_to(ROOT)): wrong_installations(text, extras)
        for path, text in texts.items()
    }
    assert {path: wrong for path, wrong in found.items() if wrong} == {}
    assert sum(text.count('pip install -e ".[') for text in texts.values()) > 10
    assert set(remote.EXTRAS.values()) <= extras
    for line in ("pretrain[hf]", "-e .[hf]", '-e ".[hg]"', '".[hf]"', "-e '.[hf]'"):
        assert wrong_installations(f"it needs x: pip install {line}, or not", extras), line
    assert not wrong_installations('pip install -e ".[hf,serve]".', extras)
