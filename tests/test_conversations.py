"""data_prep.conversations from end to end: rows hold the dialogues, and their bytes never change."""

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import show
from data_prep.conversations import main
from data_prep.sources.rejects import DIALOGUE_REASONS
from data_prep.tokens.check import find_faults
from data_prep.tokens.conversation_job import TEMPLATES, ConversationConfig, read_template
from pipeline import cli
from pipeline.data.chat import ChatTemplate
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError, DataError
from tests.support.arrow import save_dataset
from tests.support.corpus import checksums, make_tokenizer
from tests.support.waiting import kill_after_new_names

ROW = 192


def talk(number: int) -> list[dict[str, str]]:
    """One to three turns about a number."""
    messages = []
    for turn in range(1 + number % 3):
        messages += [
            {"role": "user", "content": f"What follows {number + turn}?"},
            {
                "role": "assistant",
                "content": f"The fox says {number + turn + 1}" + "." * (number % 5),
            },
        ]
    return messages


TALKS = [talk(n) for n in range(400)]


def write_talks(path: Path, talks, **fields) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({"messages": messages, **fields}, ensure_ascii=False) + "\n"
        for messages in talks
    )
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three jsonl files that make several units, and a tokenizer."""
    folder = tmp_path_factory.mktemp("talks")
    make_tokenizer(folder / "tokenizer.json")
    for i in range(3):
        write_talks(folder / "in" / f"{i}.jsonl", TALKS[i * 140 : (i + 1) * 140])
    return folder


def convert(folder, output, *words, source="in", row_tokens=ROW):
    places = [f"input={folder}/{source}", f"output={output}", f"tokenizer={folder}/tokenizer.json"]
    words = [f"row_tokens={row_tokens}", "unit_mb=0.01", "validation_fraction=0.1", *words]
    main(cli.compose(ConversationConfig, [*places, *words], config="conversations"))
    return Path(output)


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    return convert(corpus, tmp_path_factory.mktemp("reference") / "out", "workers=1")


def dialogues(folder) -> list[tuple[list[int], list[int]]]:
    """(ids, loss) of every dialogue, padding left out."""
    manifest, found = Manifest.load(folder), []
    for shard in range(manifest.num_shards):
        for block in range(int(np.diff(manifest.block_starts)[shard])):
            tokens, starts, loss, _ = manifest.map_block(shard, block)
            bounds = [*starts.tolist(), len(tokens)]
            for a, b in zip(bounds, bounds[1:]):
                if loss[a:b].any():
                    found.append((tokens[a:b].tolist(), loss[a:b].tolist()))
                else:
                    assert set(tokens[a:b].tolist()) == {manifest.tokenizer.eod}
    return found


def template_of(folder) -> ChatTemplate:
    manifest = Manifest.load(folder)
    tokenizer = Tokenizer.from_file(Path(folder, "tokenizer.json"), eod=manifest.tokenizer.eod)
    return ChatTemplate(manifest.chat.template, tokenizer)


def test_rows_hold_every_dialogue_whole_and_once(corpus, reference):
    """And verify finds no fault; nothing was cut, nothing lost, and the held-out ones are apart."""
    template = template_of(reference / "train")
    expected = sorted(
        (encoded.ids.tolist(), encoded.loss.tolist()) for encoded in map(template.encode, TALKS)
    )
    parts = [dialogues(reference / split) for split in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == expected
    assert 20 < len(parts[1]) < 70
    for split in ("train", "validation"):
        assert list(find_faults(str(reference / split), workers=1)) == []
        manifest = Manifest.load(reference / split)
        assert manifest.row_tokens == ROW and manifest.layout.version == 2
        assert manifest.chat.end_of_turn == template.end_of_turn
        used = sum(len(ids) for ids, _ in dialogues(reference / split))
        assert used / manifest.tokens > 0.7
    counted = sum(Manifest.load(reference / s).text_bytes for s in ("train", "validation"))
    assert counted == sum(len(template.encode(messages).text.encode()) for messages in TALKS)


@pytest.mark.parametrize("workers", [3, 8])
def test_bytes_do_not_depend_on_workers(corpus, reference, tmp_path, workers):
    assert checksums(convert(corpus, tmp_path / "out", f"workers={workers}")) == checksums(
        reference
    )


def test_bytes_do_not_depend_on_array_tasks(corpus, reference, tmp_path, monkeypatch):
    for task in (2, 0, 1):
        assert not (tmp_path / "out/train").exists()
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
        convert(corpus, tmp_path / "out", "workers=1")
    assert checksums(tmp_path / "out") == checksums(reference)


def test_bytes_do_not_depend_on_kills(corpus, reference, tmp_path):
    draw, output = random.Random(5), tmp_path / "out"
    for _ in range(5):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                convert(corpus, output, "workers=1")
            os._exit(0)
        kill_after_new_names(child, output, draw.randint(1, 12))
    convert(corpus, output, "workers=1")
    assert checksums(output) == checksums(reference)
    assert not (output / ".work").exists()


def test_tables_and_prompts_with_completions_give_the_same_dialogues(corpus, tmp_path):
    """Parquet, and the folder that Hugging Face's save_to_disk writes."""
    pairs = [messages for messages in TALKS if len(messages) == 2][:50]
    write_talks(tmp_path / "a.jsonl", pairs)
    rows = [{"prompt": a["content"], "completion": b["content"]} for a, b in pairs]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learned = [[a, b | {"learn": True}] for a, b in pairs]
    pq.write_table(pa.Table.from_pylist([{"messages": m} for m in learned]), tmp_path / "c.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    save_dataset(tmp_path / "e", {"messages": learned})
    (tmp_path / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    found = [
        sorted(dialogues(convert(tmp_path, tmp_path / f"{name}", "workers=1", source=source) / "train"))
        for name, source in enumerate(("a.jsonl", "b.jsonl", "c.parquet", "d.parquet", "e"))
    ]  # fmt: skip
    assert len(found[0]) > 30
    assert found.count(found[0]) == 5


QUESTION = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "That."}
BAD = {
    "too_long": {"messages": [QUESTION, ANSWER | {"content": "long " * 300}]},
    "nothing_learned": {"messages": [QUESTION, ANSWER | {"learn": False}]},
    "no_assistant": {"messages": [QUESTION]},
    "special_token": {"messages": [QUESTION | {"content": "<|im_end|>"}, ANSWER]},
    "boundary_inside_token": {"messages": [QUESTION, ANSWER | {"content": "\n\nThat."}]},
    "template_error": {"messages": [QUESTION | {"role": "tool"}, ANSWER]},
    "not_a_dialogue": {"prompt": "What?"},
    "nul": {"messages": [QUESTION, ANSWER | {"content": "a\0b"}]},
}


def reject_row(folder, name, *words):
    """The one line of rejects.jsonl of a bad dialogue between good ones."""
    source = folder / f"{name}.jsonl"
    good = json.dumps({"messages": [QUESTION, ANSWER]}) + "\n"
    source.write_text(good + json.dumps(BAD[name]) + "\n" + good)
    template = (Path(show.__file__).parent / "chat/chatml.jinja").read_text()
    refusing = (
        "{%- for m in messages if m.role == 'tool' %}{{ raise_exception('no tools') }}{%- endfor %}"
    )
    (folder / "own.jinja").write_text(refusing + template)
    output = folder / f"out-{name}"
    convert(folder, output, "workers=1", f"template={folder}/own.jinja", *words, source=source.name)
    (row,) = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
    return row, output


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_learned_is_rejected_with_place_and_reason(corpus, tmp_path, name):
    """Never cut, never dropped in silence: by default the job ends, and says where."""
    (tmp_path / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    row, output = reject_row(tmp_path, name, "on_error=quarantine", "max_rejected_fraction=0.5")
    assert row["reason"] == name and row["line"] == 2
    assert sum(len(dialogues(output / s)) for s in ("train", "validation")) == 2
    with pytest.raises(DataError, match=f"line 2.*{name}: "):
        reject_row(tmp_path, name, f"output={tmp_path}/fails")


@pytest.mark.parametrize(
    "extra", [{"tools": ["\ud800"]}, {"tools": json.loads("[" * 400 + "]" * 400)}]
)
def test_fields_for_the_template_are_looked_at_too(corpus, tmp_path, extra):
    """What no UTF-8 can hold, or is too deep to go through, ended the unit in a traceback."""
    (tmp_path / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    good = json.dumps({"messages": [QUESTION, ANSWER]}) + "\n"
    bad = json.dumps({"messages": [QUESTION, ANSWER], **extra}) + "\n"
    (tmp_path / "in.jsonl").write_text(good + bad + good)
    template = (Path(show.__file__).parent / "chat/chatml.jinja").read_text()
    (tmp_path / "own.jinja").write_text("{{ tools | tojson if tools else '' }}" + template)
    words = ["on_error=quarantine", "max_rejected_fraction=0.9", f"template={tmp_path}/own.jinja"]
    output = convert(tmp_path, tmp_path / "out", "workers=1", *words, source="in.jsonl")
    kept = sum(len(dialogues(output / split)) for split in ("train", "validation"))
    rejects = (output / "rejects.jsonl").read_text().splitlines()
    assert kept >= 2 and kept + len(rejects) == 3


def test_a_template_is_kept_word_for_word(corpus, tmp_path):
    """ "basic questions" looks like the name of a key: redacted, the model were asked otherwise."""
    template = (Path(show.__file__).parent / "chat/chatml.jinja").read_text()
    own = "{#- You answer basic questions_of_all_kinds; password: never -#}" + template
    (tmp_path / "own.jinja").write_text(own)
    output = convert(corpus, tmp_path / "out", f"template={tmp_path}/own.jinja")
    assert json.loads((output / "train/manifest.json").read_text())["chat_template"] == own


def test_a_saved_dataset_without_dialogues_is_refused_in_words(corpus, tmp_path):
    """A text dataset that was meant for tokenize: which row, and which fields it lacks."""
    (tmp_path / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    save_dataset(tmp_path / "saved", {"text": ["one", "two", "three", "four"]})
    with pytest.raises(
        DataError, match=r"saved/data-.*no messages, and no prompt and no completion"
    ):
        convert(tmp_path, tmp_path / "out", "workers=1", source="saved")


def test_the_template_is_chatml_where_the_tokenizer_has_its_tokens(corpus, tmp_path):
    """Else headings of ordinary text."""
    tokenizer = Tokenizer.from_file(corpus / "tokenizer.json")
    assert read_template(None, tokenizer) == (TEMPLATES / "chatml.jinja").read_text()
    words = tokenizer.raw.decode().replace("<|im_start|>", "<|open|>")
    (tmp_path / "tokenizer.json").write_text(words)
    other = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert read_template(None, other) == read_template("plain", tokenizer)
    assert read_template("plain", tokenizer) == (TEMPLATES / "plain.jinja").read_text()


def test_every_reason_of_a_dialogue_is_tested():
    assert set(BAD) - {"nul"} == set(DIALOGUE_REASONS)


def test_too_many_rejects_end_the_job(corpus, tmp_path):
    """Of dialogues, not of documents: the padding of rows would dilute them."""
    (tmp_path / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="1 of 3 documents were rejected"):
        reject_row(tmp_path, "too_long", "on_error=quarantine", "max_rejected_fraction=0.3")


def test_a_few_dialogues_have_a_held_out_one_too(corpus, tmp_path):
    """The one that comes next by its hash, though it lies elsewhere in the rows than in the input."""
    (tmp_path / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    write_talks(tmp_path / "few.jsonl", TALKS[:9])
    output = convert(
        tmp_path, tmp_path / "out", "workers=1", "validation_fraction=1e-6", source="few.jsonl"
    )
    held_out, train = dialogues(output / "validation"), dialogues(output / "train")
    template = template_of(output / "train")
    texts = [template.encode(messages).text for messages in TALKS[:9]]
    from data_prep.tokens.split import digest_text

    ids = template.encode(TALKS[texts.index(min(texts, key=digest_text))]).ids.tolist()
    assert [i for i, _ in held_out] == [ids] and len(train) == 8
    for split in ("train", "validation"):
        assert list(find_faults(str(output / split), workers=1)) == []
    bytes_of = {s: Manifest.load(output / s).text_bytes for s in ("train", "validation")}
    assert bytes_of["validation"] == len(min(texts, key=digest_text).encode())
    assert sum(bytes_of.values()) == sum(len(text.encode()) for text in texts)


def shown(capsys, *words) -> str:
    show.main(
        cli.compose(show.ShowConfig, [*map(str, words)], config="show", positional=["dataset"])
    )
    return capsys.readouterr().out


def test_show_prints_a_row_with_what_is_learned_marked(reference, capsys, monkeypatch):
    out = shown(capsys, reference / "train", "row=0")
    assert out.startswith("--- row 0: ")
    assert "<|im_start|>assistant\n⟦The fox says " in out and "<|im_end|>⟧\n" in out
    assert "⟦<|im_start|>" not in out and "user⟦" not in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[32mThe fox says " in shown(capsys, reference / "train", "row=0")
    rows = Manifest.load(reference / "train").tokens // ROW
    with pytest.raises(ConfigError, match=f"has the rows 0 to {rows - 1}"):
        shown(capsys, reference / "train", f"row={rows}")


def test_show_finds_documents_and_totals_of_rows(reference, capsys):
    out = shown(capsys, reference / "train", "search=What follows 7?")
    assert "What follows 7?<|im_end|>" in out and "documents hold 'What follows 7?'" in out
    assert "<|im_start|>user" in shown(capsys, reference / "train", "document=0")
    assert f"rows of {ROW} tokens" in shown(capsys, reference / "train", "histogram=null")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["row_tokens=1"], "row_tokens .1. must be from 2 to 1048576"),
        (
            ["template=nowhere.jinja"],
            "template=nowhere.jinja cannot be read.*one of chatml, chatml-pictures, plain,",
        ),
        (["text_field=body"], "text_field .body. .* no effect"),
        (["format=text"], "dialogues are read from jsonl, parquet and arrow"),
    ],
)
def test_settings_that_cannot_work_are_refused(corpus, tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        convert(corpus, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_another_template_in_the_same_folder_is_refused(corpus, reference):
    with pytest.raises(ConfigError, match="chat_template was"):
        convert(corpus, reference, "template=plain")


def test_dialogues_are_prepared_without_torch_and_transformers():
    code = (
        "import data_prep.conversations, sys; print({'torch', 'transformers'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"
