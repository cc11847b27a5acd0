"""Documents are found where they lie, and in exactly those steps whose batches hold one of their tokens."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import trace as find_command
from data_prep.tokens.browse import document_lengths, read_document, tokenizer_of
from data_prep.tokens.tokenize_job import TokenizeConfig
from data_prep.tokens.tokenize_job import main as tokenize
from pipeline import cli
from pipeline import trace as run_command
from pipeline.checkpoint.record import RECORD
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.config.training import RampStage
from pipeline.data import shard_format as fmt
from pipeline.data.manifest import Manifest
from pipeline.errors import CheckpointError, ConfigError, DataError, MachineError
from pipeline.trace import TraceConfig
from tests.support.checkpoint_runs import record_of
from tests.support.corpus import make_texts, make_tokenizer, write_jsonl
from tests.support.loading import SEQ_LEN, loaders, shape_of

TEXTS = make_texts(60)
ASKED = [TEXTS[3], TEXTS[17], TEXTS[40], TEXTS[59]]  # one of 10 tokens, some of several windows
RAMP = (RampStage(until_step=5, global_batch_size=8),)
STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of 200 tokens, five sources that are shards of their own; document 17 is there twice."""
    folder = tmp_path_factory.mktemp("trace")
    tokenizer = make_tokenizer(folder / "tokenizer.json")
    names = [folder / f"{i}.jsonl" for i in range(5)]
    for i, name in enumerate(names):
        write_jsonl(name, TEXTS[12 * i : 12 * i + 12] + [TEXTS[17]] * (i == 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fmt, "BLOCK_TOKENS", 200)
        words = [f"input={','.join(map(str, names))}", f"output={folder}/out"]
        more = [f"tokenizer={tokenizer}", "workers=1", "encoder=hf", "validation_fraction=0"]
        tokenize(cli.compose(TokenizeConfig, [*words, *more], config="tokenize"))
    write_jsonl(folder / "remove.jsonl", [*ASKED, "a text that is nowhere"])
    return folder


def found(data: Path, capsys: pytest.CaptureFixture) -> dict:
    words = [f"dataset={data}/out", f"input={data}/remove.jsonl", f"places={data}/places.json"]
    assert find_command.main(cli.compose(find_command.TraceConfig, words, config="trace")) == 1
    assert "4 of 5 documents are in" in (printed := capsys.readouterr().out)
    assert "not found" in printed
    return json.loads((data / "places.json").read_text())


def test_places_are_where_the_dataset_has_the_text(
    data: Path, capsys: pytest.CaptureFixture
) -> None:
    manifest = Manifest.load(data / "out/train")
    assert manifest.num_shards > 3 and manifest.block_starts[-1] > 20
    places = found(data, capsys)["places"]
    assert sorted(place["document"] for place in places) == [3, 17, 40, 59, 60]
    begins = np.cumsum(document_lengths(manifest)) - document_lengths(manifest)
    shards = np.concatenate([[0], np.cumsum(manifest.shard_tokens)])
    for place in places:
        number = place["document"]
        whole = [shards[s["shard"]] + np.arange(s["begin"], s["end"]) for s in place["spans"]]
        expected = begins[number] + np.arange(len(read_document(manifest, number)))
        np.testing.assert_array_equal(np.concatenate(whole), expected)


def save(runs: Path, step: int, cfg: DataConfig, **parts: Any) -> None:
    """A checkpoint's record in a run folder."""
    settings = {"training": {"global_batch_size": 4, "ramp": [dataclasses.asdict(RAMP[0])]},
                "data": cli.to_dict(cfg), **parts.pop("config", {})}  # fmt: skip
    folder = runs / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    record = dataclasses.replace(record_of(step), config=settings, **parts)
    (folder / RECORD).write_text(record.to_json())


def checkpoints(data: Path, runs: Path) -> tuple[Path, list[set[int]]]:
    """A run folder with a checkpoint after each step; and the (shard, token) places that each step has read."""
    cfg = DataConfig(path=str(data / "out"), lanes=2, window=2)
    loader = loaders(cfg, shape_of(1, batch=4, ramp=RAMP))[0]
    manifest = loader.datasets[0].manifest
    base = np.concatenate([[0], np.cumsum(manifest.shard_tokens)])
    tokens = np.concatenate([read_document(manifest, n) for n in range(manifest.documents)])
    read, seen = [], 0
    for step in range(STEPS):
        if step:
            batches = loader.next_step()
            samples = loader._samples
            assert samples is not None
            shard, sequence = loader.sampler.addresses(samples)
            begin_of = dict(zip(samples.number.tolist(), base[shard] + sequence * SEQ_LEN))
            for batch in batches:
                rows = np.concatenate([batch.tokens.numpy(), batch.labels.numpy()[:, -1:]], axis=1)
                for sample, row in zip(batch.sample_ids.tolist(), rows):
                    begin = begin_of[sample]
                    np.testing.assert_array_equal(row, tokens[begin : begin + SEQ_LEN + 1])
            read.append({int(t) for b in begin_of.values() for t in range(b, b + SEQ_LEN + 1)})
            seen += len(begin_of)
        save(runs, step, cfg, loader=loader.state(), state={"samples_seen": seen})
    loader.close()
    return runs, read


def changed_run(data: Path, runs: Path) -> None:
    """A run whose data became others at step 4, as data.allow_dataset_change lets it; three steps more."""
    shape = shape_of(1, batch=4, ramp=RAMP)
    before = DataConfig(path=str(data / "out"))
    after = DataConfig(
        train=[DatasetConfig(path=str(data / "other/train"))], allow_dataset_change=True
    )
    loader, state = loaders(before, shape)[0], None
    for step, cfg in [(4, before), (7, after)]:
        if state is not None:
            loader = loaders(cfg, shape, state)[0]
        for _ in range(step if state is None else 3):
            loader.next_step()
        state = loader.state()
        loader.close()
        save(runs, step, cfg, loader=state, state={"samples_seen": state["samples_seen"]},
             config={"checkpoint": {"init_from": "runs/before"}})  # fmt: skip


def test_what_was_read_before_the_data_were_changed_is_not_forgotten(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The order begins anew there, and the newest checkpoint alone would say that nothing was read."""
    write_jsonl(data / "other.jsonl", [f"other {text}" for text in make_texts(30)])
    words = [f"input={data}/other.jsonl", f"output={data}/other", "encoder=hf", "workers=1"]
    more = [f"tokenizer={data}/tokenizer.json", "validation_fraction=0"]
    tokenize(cli.compose(TokenizeConfig, [*words, *more], config="tokenize"))
    content, places = found(data, capsys), tmp_path / "all.json"
    changed_run(data, tmp_path / "run")
    manifest = Manifest.load(data / "out/train")
    everything = [{"shard": i, "begin": 0, "end": int(n)} for i, n in enumerate(manifest.shard_tokens)]  # fmt: skip
    place = {"given": "all of it", "document": 0, "spans": everything}
    places.write_text(json.dumps(content | {"places": [place]}))
    assert run_command.main(TraceConfig(str(tmp_path / "run"), str(places))) == 1
    printed = capsys.readouterr().out
    assert "read 32 times, in 4 steps: 1, 2, 3, 4\n" in printed
    assert "the run began with the weights of runs/before: trace that one too" in printed
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    with pytest.raises(DataError, match="has not been trained on") as refused:
        run_command.main(TraceConfig(str(tmp_path / "run"), str(places)))
    assert "no checkpoint is left that says" in str(refused.value)
    places.write_text(json.dumps(content | {"dataset": Manifest.load(data / "other/train").identity, "places": []}))  # fmt: skip
    assert run_command.main(TraceConfig(str(tmp_path / "run"), str(places))) == 1
    assert "the data were changed at sample 32" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_know_its_data_is_refused(data: Path, tmp_path: Path) -> None:
    save(tmp_path, 3, DataConfig(), state={"samples_seen": 12})
    with pytest.raises(CheckpointError, match="does not say where its run stood in the data"):
        run_command.main(TraceConfig(str(tmp_path), str(data / "places.json")))


def test_steps_are_those_whose_batches_hold_a_token(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = found(data, capsys)
    manifest = Manifest.load(data / "out/train")
    base = np.concatenate([[0], np.cumsum(manifest.shard_tokens)])
    run, read = checkpoints(data, tmp_path / "run")
    seen_or_not = set()
    for place in content["places"]:
        (data / "one.json").write_text(json.dumps(content | {"places": [place]}))
        tokens = {int(base[s["shard"]]) + t for s in place["spans"] for t in range(s["begin"], s["end"])}  # fmt: skip
        steps = [step for step, batch in enumerate(read, 1) if batch & tokens]
        code = run_command.main(TraceConfig(str(run), str(data / "one.json")))
        printed = capsys.readouterr().out
        assert named_windows(printed) == {
            (s["shard"], window)
            for s in place["spans"]
            for window in range((int(manifest.shard_tokens[s["shard"]]) - 1) // SEQ_LEN)
            if window * SEQ_LEN < s["end"] and (window + 1) * SEQ_LEN >= s["begin"]
        }
        assert code == bool(steps)
        seen_or_not.add(code)
        if steps:
            assert f"in {len(steps)} steps: {', '.join(map(str, steps))}\n" in printed
            assert (
                f"before the first of them: {run}/checkpoints/step-{steps[0] - 1:08d}\n" in printed
            )
    assert 1 in seen_or_not


def named_windows(printed: str) -> set[tuple[int, int]]:
    """(shard, number) of every window that the command says."""
    found = set()
    for name in re.findall(r"(\d+:[-\d]+)", printed.split("shard:number: ")[1].split("\n")[0]):
        shard, first, last = re.fullmatch(r"(\d+):(\d+)-?(\d*)", name).groups()  # type: ignore[union-attr]
        found |= {(int(shard), n) for n in range(int(first), int(last or first) + 1)}
    return found


def test_places_of_another_dataset_and_damaged_ones_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = found(data, capsys)
    run, _ = checkpoints(data, tmp_path / "run")
    for change, message in [
        ({"dataset": "0" * 64}, "has not been trained on"),
        ({"places": 7}, "is not what data_prep.trace writes"),
        ({"places": [{"given": "x", "document": 0, "spans": [{"shard": 999, "begin": 0, "end": 5}]}]}, "shard 999"),
    ]:  # fmt: skip
        (tmp_path / "bad.json").write_text(json.dumps(content | change))
        with pytest.raises(DataError, match=message):
            run_command.main(TraceConfig(str(run), str(tmp_path / "bad.json")))


def test_a_record_that_tells_of_endless_samples_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A hostile checkpoint kept the command busy for ever, computing the order of 2^61 samples."""
    found(data, capsys)
    run, _ = checkpoints(data, tmp_path / "run")
    newest = max((run / "checkpoints").iterdir()) / RECORD
    content = json.loads(newest.read_text())
    content["loader"]["samples_seen"] = 2**45
    newest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="35,184,372,088,832 samples were read, in 11 steps"):
        run_command.main(TraceConfig(str(run), str(data / "places.json")))


def test_places_that_name_the_whole_dataset_over_and_over_cost_their_number(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Each was written out as all of its windows: 20,000 times a shard of a million would take the machine's memory."""
    content = found(data, capsys)
    run, _ = checkpoints(data, tmp_path / "run")
    manifest = Manifest.load(data / "out/train")
    spans = [{"shard": s, "begin": 0, "end": 2**61} for s in range(manifest.num_shards)]
    place = {"given": "x", "document": 0, "spans": spans}
    (tmp_path / "all.json").write_text(json.dumps(content | {"places": [place] * 2000}))
    assert run_command.main(TraceConfig(str(run), str(tmp_path / "all.json"))) == 1
    windows = sum((n - 1) // SEQ_LEN for n in manifest.shard_tokens.tolist())
    printed = capsys.readouterr().out
    assert f"in {windows:,} windows of" in printed and "and more" not in printed
    assert len(named_windows(printed)) == windows


def test_an_empty_list_and_packed_rows_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    words = [f"dataset={data}/out", f"input={tmp_path}/empty.jsonl"]
    cfg = cli.compose(find_command.TraceConfig, words, config="trace")
    with pytest.raises(DataError, match="no document in it"):
        find_command.main(cfg)
    load = Manifest.load.__func__
    packed = classmethod(lambda cls, folder: dataclasses.replace(load(cls, folder), row_tokens=8))
    monkeypatch.setattr(Manifest, "load", packed)
    with pytest.raises(ConfigError, match="packed rows"):
        find_command.main(cfg)


def test_what_cannot_be_read_or_written_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A document that was asked for and not looked for would pass for one that is not there to be removed."""
    (tmp_path / "remove.jsonl").write_text(json.dumps({"text": TEXTS[3]}) + "\n{\n")
    words = [f"dataset={data}/out", f"input={tmp_path}/remove.jsonl"]
    cfg = cli.compose(find_command.TraceConfig, [*words, "on_error=quarantine"], config="trace")
    assert find_command.main(cfg) == 1
    printed = capsys.readouterr().out
    assert "1 of 1 documents are in" in printed
    assert "not looked for, as it cannot be read: {" in printed and "broken_json" in printed
    cfg.places = f"{tmp_path}/remove.jsonl/places.json"
    with pytest.raises(MachineError, match="cannot be written .*with places="):
        find_command.main(cfg)
    assert "documents are in" not in capsys.readouterr().out


def test_a_dataset_made_without_them_is_another_and_holds_the_rest(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = ",".join(f"{data}/{i}.jsonl" for i in range(5))
    words = [f"input={names}", f"output={tmp_path}/out", f"tokenizer={data}/tokenizer.json"]
    more = ["workers=1", "encoder=hf", "validation_fraction=0", f"remove={data}/remove.jsonl"]
    tokenize(cli.compose(TokenizeConfig, [*words, *more], config="tokenize"))
    before, after = Manifest.load(data / "out/train"), Manifest.load(tmp_path / "out/train")
    assert before.identity != after.identity
    assert json.loads((tmp_path / "out/summary.json").read_text())["rejects"] == {"removed": 5}
    rows = map(json.loads, (tmp_path / "out/rejects.jsonl").read_text().splitlines())
    lines = {i: (data / f"{i}.jsonl").read_bytes().splitlines(keepends=True) for i in range(5)}
    removed = {
        f"{i}.jsonl@{len(b''.join(lines[i][:line]))}"
        for i, line in [(0, 3), (1, 5), (3, 4), (4, 11), (4, 12)]  # the last one is text 17 again
    }
    assert {(row["reason"], Path(row["file"]).name) for row in rows} == {
        ("removed", p) for p in removed
    }
    backend = tokenizer_of(after)
    left = [backend.decode(read_document(after, n)[:-1]) for n in range(after.documents)]
    assert left == [text for text in TEXTS if text not in ASKED]
    words = [f"dataset={tmp_path}/out", f"input={data}/remove.jsonl"]
    assert find_command.main(cli.compose(find_command.TraceConfig, words, config="trace")) == 1
    assert "0 of 5 documents are in" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="removed_sha256"):  # the same folder, another list
        tokenize(cli.compose(TokenizeConfig, [*words_without(more, "remove"), f"input={names}",
                 f"output={tmp_path}/out", f"tokenizer={data}/tokenizer.json"], config="tokenize"))  # fmt: skip


def words_without(words: list[str], name: str) -> list[str]:
    return [word for word in words if not word.startswith(name)]
