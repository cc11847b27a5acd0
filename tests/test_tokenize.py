"""data_prep/tokenize.py from end to end: what it writes, that the bytes never change, that it survives."""

import contextlib
import hashlib
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer as Backend

from data_prep import finalize
from data_prep.tokens.check import find_faults
from data_prep.tokens.split import digest_text, is_held_out
from data_prep.tokens.tokenize_job import TokenizeConfig, main
from pipeline import cli
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError, DataError
from tests.support.corpus import checksums, make_texts, make_tokenizer, write_jsonl
from tests.support.waiting import HANG_S, kill_after_new_names

ROOT = Path(__file__).resolve().parents[1]
TEXTS = make_texts(400)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four jsonl files that make sixteen units, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    make_tokenizer(folder / "tokenizer.json")
    for i in range(4):
        write_jsonl(folder / "in" / f"{i}.jsonl", TEXTS[100 * i : 100 * (i + 1)])
    return folder


def tokenize(folder, output, *words, source="in"):
    places = [f"input={folder}/{source}", f"output={output}", f"tokenizer={folder}/tokenizer.json"]
    main(cli.compose(TokenizeConfig, [*places, "unit_mb=0.02", *words], config="tokenize"))
    return Path(output)


def documents(folder):
    """Token ids of each document, in order, without end-of-document ids."""
    manifest = Manifest.load(folder)
    found = []
    for shard in range(manifest.num_shards):
        blocks = manifest.block_starts[shard + 1] - manifest.block_starts[shard]
        tokens = np.concatenate([manifest.map_block(shard, b)[0] for b in range(blocks)])
        ends = np.flatnonzero(tokens == manifest.tokenizer.eod)
        assert ends[-1] == len(tokens) - 1
        found += [part[:-1].tolist() for part in np.split(tokens, ends[:-1] + 1)]
    return found


def parts_in_order(texts, tokenizer):
    backend = Backend.from_file(str(tokenizer))
    backend.encode_special_tokens = True
    return [backend.encode(text).ids for text in texts]


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """One process, no tasks, Hugging Face's encoder."""
    return tokenize(corpus, tmp_path_factory.mktemp("reference") / "out", "workers=1", "encoder=hf")


def test_datasets_hold_each_document_once_with_the_ids_of_hugging_face(corpus, reference):
    for name, is_validation in (("train", False), ("validation", True)):
        expected = [
            text for text in TEXTS if is_held_out(digest_text(text), 0.005) == is_validation
        ]
        assert documents(reference / name) == parts_in_order(expected, corpus / "tokenizer.json")
        manifest = Manifest.load(reference / name)
        assert manifest.documents == len(expected)
        assert manifest.text_bytes == sum(len(text.encode()) for text in expected)
        assert (
            manifest.tokenizer.sha256
            == hashlib.sha256((corpus / "tokenizer.json").read_bytes()).hexdigest()
        )


def test_document_starts_follow_the_ends(reference):
    manifest = Manifest.load(reference / "train")
    tokens, starts, *_ = manifest.map_block(0, 0)
    ends = np.flatnonzero(tokens == manifest.tokenizer.eod)
    assert starts.tolist() == [0, *(ends[:-1] + 1).tolist()]


def test_hugging_face_decodes_documents_to_the_original_text(corpus, reference):
    backend = Backend.from_file(str(corpus / "tokenizer.json"))
    expected = [text for text in TEXTS if not is_held_out(digest_text(text), 0.005)]
    for ids, text in list(zip(documents(reference / "train"), expected, strict=True))[::13]:
        assert backend.decode(ids, skip_special_tokens=False) == text


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves files open
def test_stock_webdataset_yields_the_same_tokens(reference):
    import webdataset

    manifest = Manifest.load(reference / "train")
    urls = [f"{manifest.folder}/{path}" for path in manifest.paths]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    ours = [manifest.map_block(s, 0) for s in range(manifest.num_shards)]
    assert sum(len(sample["tokens.npy"]) for sample in samples) == manifest.tokens
    for sample, (tokens, starts, *_) in zip(samples, ours, strict=True):
        assert np.array_equal(sample["tokens.npy"], tokens)
        assert np.array_equal(sample["docs.npy"], starts)


@pytest.mark.parametrize(
    "words",
    [
        ["workers=2"],
        ["workers=4"],
        ["workers=1", "encoder=gigatoken"],
        ["workers=1", "encoder=tiktoken"],
    ],
    ids=lambda words: ",".join(words),
)
def test_bytes_do_not_depend_on_workers_or_encoder(corpus, reference, tmp_path, words):
    assert checksums(tokenize(corpus, tmp_path / "out", *words)) == checksums(reference)


@pytest.mark.parametrize("num_tasks", [3, 7])
def test_bytes_do_not_depend_on_array_tasks(corpus, reference, tmp_path, monkeypatch, num_tasks):
    """Tasks end in any order; the one that ends last makes the datasets."""
    order = random.Random(num_tasks).sample(range(num_tasks), num_tasks)
    for task in order:
        assert not (tmp_path / "out/train").exists()
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", str(num_tasks))
        tokenize(corpus, tmp_path / "out", "workers=1")
    assert checksums(tmp_path / "out") == checksums(reference)


def test_bytes_do_not_depend_on_ten_random_kills(corpus, reference, tmp_path):
    """Forked, so that the kill comes in the middle of the work and not of Python's start."""
    draw, output, expected = random.Random(5), tmp_path / "out", checksums(reference)
    for _ in range(10):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                tokenize(corpus, output, "workers=1")
            os._exit(0)
        kill_after_new_names(child, output, draw.randint(1, 12))
        for shard in output.glob("*/shards/*/*.tar"):  # whatever has its final name is whole
            assert (
                expected[str(shard.relative_to(output))]
                == hashlib.sha256(shard.read_bytes()).hexdigest()
            )
    tokenize(corpus, output, "workers=1")
    assert checksums(output) == expected
    assert not (output / ".work").exists()


def test_a_kill_while_the_job_is_claimed_leaves_nothing(corpus, tmp_path, monkeypatch):
    """What was unfinished lies in the work folder, which goes when the job is done."""
    output, link = tmp_path / "out", os.link

    def dies(source, target):
        os._exit(9)

    monkeypatch.setattr(os, "link", dies)
    child = os.fork()
    if not child:
        tokenize(corpus, output, "workers=1")
        os._exit(0)
    os.waitpid(child, 0)
    monkeypatch.setattr(os, "link", link)
    assert list(output.iterdir()) == [output / ".work"]
    tokenize(corpus, output, "workers=1")
    assert not list(output.rglob("*.tmp"))


def test_a_kill_while_the_datasets_are_made_loses_nothing(corpus, reference, tmp_path, monkeypatch):
    """Ends at every rename of the last stage, one after the other."""
    output, replace = tmp_path / "out", os.replace
    for limit in range(100):
        left = [limit]

        def dies(source, target, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= ".json" not in Path(target).name or Path(target).parent.name != "tokenize"
            replace(source, target)

        monkeypatch.setattr(os, "replace", dies)
        try:
            tokenize(corpus, output, "workers=1")
            break
        except KeyboardInterrupt:
            assert not (output / "summary.json").exists()
    assert limit > 8
    assert checksums(output) == checksums(reference)


def test_workers_end_with_their_parent_and_the_next_run_finishes(corpus, reference, tmp_path):
    command = [
        sys.executable, str(ROOT / "data_prep/tokenize.py"), f"input={corpus}/in", f"output={tmp_path}/out",
        f"tokenizer={corpus}/tokenizer.json", "unit_mb=0.02", "workers=2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "out").glob(".work/tokenize/*.json")):
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=HANG_S)
    assert not alive
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert checksums(tmp_path / "out") == checksums(reference)


def test_another_job_is_refused_the_folder(corpus, reference):
    before = checksums(reference)
    with pytest.raises(
        ConfigError, match="holds the result.*validation_fraction was 0.005, is 0.1.*another output"
    ):
        tokenize(corpus, reference, "validation_fraction=0.1")
    with pytest.raises(ConfigError, match="inputs_sha256"):
        tokenize(corpus, reference, source="in/0.jsonl")
    tokenize(corpus, reference)  # the same job: nothing to do
    assert checksums(reference) == before


def test_finalize_refuses_while_units_are_missing(corpus, tmp_path):
    tokenize(corpus, tmp_path / "out", "workers=1", "task=1", "num_tasks=3")
    with pytest.raises(DataError, match="units are not done, first .0, 2, 3.*Run the same command"):
        finalize.main(finalize.FinalizeConfig(output=str(tmp_path / "out")))
    assert not (tmp_path / "out/train").exists()


def test_a_full_disk_ends_in_a_message_and_the_next_run_finishes(corpus, reference, tmp_path):
    """RLIMIT_FSIZE makes write() fail like a disk that fills up."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    command = [
        sys.executable, "-m", "data_prep.tokenize", f"input={corpus}/in", f"output={tmp_path}/out",
        f"tokenizer={corpus}/tokenizer.json", "unit_mb=0.02", "workers=1",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert result.returncode == 2
    assert "error: no space is left to write below" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert checksums(tokenize(corpus, tmp_path / "out", "workers=1")) == checksums(reference)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validation_fraction=1"], "validation_fraction .1.0. must be at least 0 and below 1"),
        (["task=3"], "belong together"),
        (["task=3", "num_tasks=3"], "task .3. must be at least 0 and below num_tasks .3."),
        (["workers=-1"], "workers .-1. must be 0"),
        (["unit_mb=0"], "unit_mb .0.0. must be above 0"),
        (["encoder=morse"], "encoder"),
        (["inputt=x"], "no setting 'inputt'. Did you mean input"),
    ],
)
def test_impossible_settings_are_named(corpus, tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        tokenize(corpus, tmp_path / "out", *words)
    assert not (tmp_path / "out/train").exists()


def test_an_input_that_is_not_there_is_named(corpus, tmp_path):
    with pytest.raises(DataError, match="nowhere is not there"):
        tokenize(corpus, tmp_path / "out", source="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file was found"):
        tokenize(corpus, tmp_path / "out", f"input={tmp_path}/empty")


@pytest.mark.parametrize("name", [b"\xff.jsonl", "a,b [1]=größe.jsonl".encode()])
def test_odd_names_are_tokenized_and_verified(corpus, tmp_path, name):
    """Names may be no UTF-8; job.json, markers, provenance and rejects hold them."""
    (tmp_path / "in").mkdir()
    path = os.fsencode(tmp_path / "in") + b"/" + name
    with open(path, "wb") as file:
        file.write(b'{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    for place, source in (("file", os.fsdecode(path)), ("folder", tmp_path / "in")):
        words = [f"input={source}", "workers=1", "validation_fraction=0.1"]
        output = tokenize(corpus, tmp_path / place, *words)
        assert Manifest.load(output / "train").documents == 1
        assert list(find_faults(str(output / "train"), workers=1)) == []
        assert len((output / "rejects.jsonl").read_text().splitlines()) == 1


def test_without_validation_only_the_training_set_is_written(corpus, tmp_path):
    output = tokenize(corpus, tmp_path / "out", "validation_fraction=0", "workers=1")
    assert Manifest.load(output / "train").documents == len(TEXTS)
    assert not (output / "validation").exists()


def test_held_out_documents_stay_held_out_when_the_fraction_grows():
    chosen = [
        {text for text in TEXTS if is_held_out(digest_text(text), fraction)}
        for fraction in (0.01, 0.05, 0.2)
    ]
    assert chosen[0] < chosen[1] < chosen[2]
    assert 0.1 < len(chosen[2]) / len(TEXTS) < 0.3


@pytest.mark.parametrize(
    "start",
    [["data_prep/tokenize.py"], ["-m", "data_prep.tokenize"], ["tokenize.py"]],
    ids=["script", "module", "inside its folder"],
)
def test_the_file_does_not_shadow_the_standard_library(corpus, tmp_path, start):
    """Its name is that of a module that inspect, linecache and torch import; see data_prep/tokenize.py."""
    words = [
        f"input={corpus}/in",
        f"output={tmp_path}/out",
        f"tokenizer={corpus}/tokenizer.json",
        "workers=2",
    ]
    cwd = ROOT / "data_prep" if start == ["tokenize.py"] else ROOT
    result = subprocess.run(
        [sys.executable, *start, *words, "unit_mb=0.1"], cwd=cwd, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert Manifest.load(tmp_path / "out/train").documents > 390


def test_workers_do_not_import_torch(corpus, tmp_path):
    code = (
        "import sys; from tests.test_tokenize import tokenize; from pathlib import Path\n"
        f"tokenize(Path({str(corpus)!r}), {str(tmp_path / 'out')!r}, 'workers=1')\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
