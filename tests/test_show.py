"""data_prep.show shows what was tokenized."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import show
from data_prep.show import ShowConfig
from data_prep.tokens import browse
from data_prep.tokens.tokenize_job import TokenizeConfig
from data_prep.tokens.tokenize_job import main as tokenize
from pipeline import cli
from pipeline.data import shard_format as fmt
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError
from tests.support.corpus import edit_tokenizer, make_texts, make_tokenizer, write_jsonl
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {"web": make_texts(60), "code": make_texts(100)[60:]}
ALL = TEXTS["web"] + TEXTS["code"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, blocks of 1,000 tokens: documents run over blocks."""
    folder = tmp_path_factory.mktemp("show")
    tokenizer = make_tokenizer(folder / "tokenizer.json")
    for source, texts in TEXTS.items():
        write_jsonl(folder / f"{source}.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fmt, "BLOCK_TOKENS", 1000)
        words = [
            f"input={folder}/web.jsonl,{folder}/code.jsonl",
            f"output={folder}/out",
            f"tokenizer={tokenizer}",
        ]
        more = ["workers=1", "encoder=hf", "validation_fraction=0"]
        tokenize(cli.compose(TokenizeConfig, [*words, *more], config="tokenize"))
    return folder / "out"


@pytest.fixture(scope="module")
def manifest(output: Path) -> Manifest:
    manifest = Manifest.load(output / "train")
    assert manifest.block_starts[-1] > 10, "the test needs several blocks"
    return manifest


def test_every_document_is_read_back(manifest: Manifest, output: Path) -> None:
    tokenizer = Tokenizer.from_file(output / "train")
    for number, text in enumerate(ALL):
        ids = browse.read_document(manifest, number)
        assert ids[-1] == manifest.tokenizer.eod
        assert tokenizer.decode(ids[:-1]) == text


def test_lengths_are_those_of_the_documents(manifest: Manifest) -> None:
    expected = [len(browse.read_document(manifest, number)) for number in range(len(ALL))]
    assert browse.document_lengths(manifest).tolist() == expected


@pytest.mark.parametrize(
    "text",
    ["57: ", "naïve", "writes about <|endoftext|> in", "\n\n\ttabs", "x", "nowhere", "3: The"],
)
def test_search_finds_the_documents_that_a_plain_search_finds(
    manifest: Manifest, text: str
) -> None:
    assert list(browse.search(manifest, text)) == [
        n for n, document in enumerate(ALL) if text in document
    ]


def test_a_text_across_two_documents_is_no_match(manifest: Manifest) -> None:
    assert list(browse.search(manifest, ALL[4][-4:] + ALL[5][:4])) == []


def test_totals_by_source_and_histogram(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show.main(ShowConfig(dataset=str(output), histogram=str(tmp_path / "h.png")))
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert [int(lines[name][2]) for name in ("web", "code", "all")] == [60, 40, 100]
    tokens = [int(lines[name][3].replace(",", "")) for name in ("web", "code", "all")]
    assert tokens[0] + tokens[1] == tokens[2] == Manifest.load(output / "train").tokens
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"


def test_looking_leaves_nothing_behind(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left document_lengths.png in whatever folder it was called from."""
    monkeypatch.chdir(tmp_path)
    show.main(ShowConfig(dataset=str(output)))
    assert list(tmp_path.iterdir()) == []


def test_a_document_is_printed(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show.main(ShowConfig(dataset=str(output), document=61, max_chars=30))
    head, text = capsys.readouterr().out.split("\n", 1)
    assert "document 61" in head
    assert text.rstrip("\n") == ALL[61][:30].rstrip("\n")


def test_a_search_stops_at_its_limit(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show.main(ShowConfig(dataset=str(output), search="The", limit=2))
    out = capsys.readouterr().out
    assert out.count("--- document") == 2
    assert "stopped after limit=2" in out


def test_a_document_that_is_not_there_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match="documents 0 to 99"):
        browse.read_document(manifest, 100)


def test_the_command_shows_a_document(output: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "data_prep.show", str(output), "document=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert ALL[3].splitlines()[0] in run.stdout


def test_an_empty_dataset_has_no_lengths(tmp_path: Path) -> None:
    from tests.support.token_dataset import write_dataset

    write_dataset(tmp_path, [])
    assert np.array_equal(browse.document_lengths(Manifest.load(tmp_path)), np.zeros(0, np.int64))


def test_documents_of_a_tokenizer_whose_end_was_named_are_shown(tmp_path: Path) -> None:
    """The manifest says which token ends documents; it was guessed anew, and a guess may fail."""
    path = edit_tokenizer(make_tokenizer(tmp_path / "tokenizer.json"), added_tokens=[])
    write_jsonl(tmp_path / "in.jsonl", ["a cat", "a dog"])
    words = [f"input={tmp_path}/in.jsonl", f"output={tmp_path}/out", f"tokenizer={path}", "eod=0"]
    more = ["workers=1", "encoder=hf", "validation_fraction=0"]
    tokenize(cli.compose(TokenizeConfig, [*words, *more], config="tokenize"))
    assert list(browse.search(Manifest.load(tmp_path / "out" / "train"), "dog")) == [1]
