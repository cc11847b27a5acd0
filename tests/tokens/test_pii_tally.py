"""What data_prep.clean would replace is counted by source and kind; a job with too much of it makes no dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.clean import CleanConfig
from data_prep.clean import main as clean
from data_prep.sources.pii import count_pii
from data_prep.tokens.pii_tally import CLEAN
from data_prep.tokens.tokenize_job import TokenizeConfig
from data_prep.tokens.tokenize_job import main as tokenize
from pipeline import cli
from pipeline.config.data import DataConfig
from pipeline.data import pii_report
from pipeline.errors import ConfigError, DataError
from tests.support.corpus import make_texts, make_tokenizer, write_jsonl
from tests.support.loading import loaders, shape_of

MAIL, ADDRESS = "write to ada@lovelace.uk", "from 8.8.8.8 or 9.9.9.9, not 192.0.2.1"


def prepare(folder: Path, output: str, *words: str) -> Path:
    make_tokenizer(folder / "tokenizer.json")
    write_jsonl(folder / "web.jsonl", [*make_texts(17), MAIL, ADDRESS + ", " + MAIL])
    write_jsonl(folder / "book.jsonl", make_texts(20)[17:])
    names = f"input=web={folder}/web.jsonl,book={folder}/book.jsonl"
    more = [f"output={folder}/{output}", f"tokenizer={folder}/tokenizer.json", "workers=1"]
    words = (names, *more, "encoder=hf", "validation_fraction=0", *words)
    tokenize(cli.compose(TokenizeConfig, list(words), config="tokenize"))
    return folder / output


def test_things_found_are_counted_by_kind_and_stand_ins_are_not() -> None:
    assert count_pii(f"{MAIL}, {ADDRESS}, call +49 30 12345678") == {"emails": 1, "ips": 2, "phones": 1}  # fmt: skip
    assert count_pii("email@example.com 192.0.2.1 +1 555 0100 REDACTED") == {}
    assert count_pii("hf_" + "a1" * 17) == {"secrets": 1}


def test_the_report_has_sources_and_kinds_and_the_gate_holds(tmp_path: Path) -> None:
    output = prepare(tmp_path, "out", "pii_max_rate=0.1")
    found = pii_report.parse((output / pii_report.NAME).read_bytes())
    assert found["sources"] == {
        "web": {"documents": 19, "with_any": 2, "found": {"emails": 2, "ips": 2}},
        "book": {"documents": 3, "with_any": 0, "found": {}},
    }
    (loader,) = loaders(DataConfig(path=str(output)), shape_of(1))
    assert pii_report.parse(loader.attachments()[pii_report.NAME]) == found  # for a checkpoint
    loader.close()
    assert pii_report.summary(found) == (
        "0 secrets, 2 emails, 2 ips, 0 phones left in 9.091% of 22 documents"
    )
    with pytest.raises(DataError, match=r"9.091% of the documents .* in source 'web'") as refused:
        prepare(tmp_path, "other", "pii_max_rate=0.05")
    assert "pii_max_rate=0.05 (5.000%)" in str(refused.value) and CLEAN in str(refused.value)
    assert not (tmp_path / "other/summary.json").exists()
    plain = prepare(tmp_path, "plain")
    (loader,) = loaders(DataConfig(path=str(plain)), shape_of(1))
    assert not (plain / pii_report.NAME).exists() and pii_report.NAME not in loader.attachments()
    loader.close()
    with pytest.raises(ConfigError, match="at most 1"):
        prepare(tmp_path, "more", "pii_max_rate=2")


def test_the_way_out_leaves_nothing_that_is_counted(tmp_path: Path) -> None:
    """The message named a setting that does not exist, and the default recipe lets telephone numbers be."""
    words = CLEAN.removeprefix("python -m data_prep.clean ").split()
    texts = [*make_texts(3), f"{MAIL} or call +49 30 12345678", ADDRESS, "key hf_" + "a1" * 17]
    corpus = write_jsonl(tmp_path / "web.jsonl", texts)
    words += [f"input={corpus}", f"output={tmp_path}/clean", "workers=1"]
    clean(cli.compose(CleanConfig, words, config="clean"))
    make_tokenizer(tmp_path / "tokenizer.json")
    words = [f"input={tmp_path}/clean/documents", f"output={tmp_path}/out", "encoder=hf"]
    words += [f"tokenizer={tmp_path}/tokenizer.json", "workers=1", "pii_max_rate=0"]
    tokenize(cli.compose(TokenizeConfig, words, config="tokenize"))
    found = pii_report.parse((tmp_path / "out" / pii_report.NAME).read_bytes())
    assert pii_report.rate(found) == 0 and found["sources"]["documents"]["documents"] == 6


def test_reports_of_several_datasets_add_up(tmp_path: Path) -> None:
    row = {"documents": 3, "with_any": 1, "found": {"ips": 2}}
    for name in "ab":
        (tmp_path / name).write_bytes(pii_report.to_json({"web": row, name: row}))
    merged = pii_report.parse(pii_report.merged([tmp_path / "a", tmp_path / "b"]))
    assert merged["sources"]["web"] == {"documents": 6, "with_any": 2, "found": {"ips": 4}}
    assert set(merged["sources"]) == {"web", "a", "b"}
    assert "; not looked for" not in pii_report.summary(merged)
    some = pii_report.parse(pii_report.merged([tmp_path / "a"], without=2))
    assert pii_report.summary(some).endswith("of 6 documents; not looked for in 2 more datasets")
    with pytest.raises(DataError, match="is not what data_prep"):
        pii_report.parse(b'{"sources": 1}')
