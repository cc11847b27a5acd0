"""pipeline.data.manifest: what a manifest says, and how hostile or damaged ones are refused."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.data import manifest
from pipeline.data import shard_format as fmt
from pipeline.data.datasets import open_datasets
from pipeline.data.manifest import Manifest
from pipeline.data.reader import Reader
from pipeline.errors import DataError, ShardError
from pipeline.files import regular_file
from tests.support.token_dataset import write_dataset


def manifest_content(num_shards: int, **changes: Any) -> dict[str, Any]:
    rows = [
        [fmt.shard_path(s), 2**25 - s, 2**26, 7, f"{s:064x}", "web", 1000 * s]
        for s in range(num_shards)
    ]
    return {
        "format": "gpt-shards",
        "version": 1,
        "dtype": "<u2",
        "block_tokens": 2**20,
        "tokenizer": {"sha256": "0" * 64, "vocab_size": 100, "eod": 0},
        "tokens": sum(row[1] for row in rows),
        "documents": 7 * num_shards,
        "text_bytes": 5,
        "index_sha256": "0" * 64,
        "checksum": fmt.UNSEALED,
        "columns": fmt.SHARD_COLUMNS,
        "shards": rows,
    } | changes


def write(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    seals = text.count(f'"checksum": "{fmt.UNSEALED}"') == 1
    (folder / "manifest.json").write_bytes(fmt.seal(text.encode()) if seals else text.encode())
    return folder


def row(**changes: Any) -> list[list[Any]]:
    """One shard's row, changed by column."""
    values = dict(zip(fmt.SHARD_COLUMNS, manifest_content(1)["shards"][0], strict=True)) | changes
    return [list(values.values())]


def test_manifest_gives_back_what_was_written(tmp_path):
    manifest = Manifest.load(write(tmp_path, manifest_content(3)))
    assert manifest.tokens == 3 * 2**25 - 3
    assert manifest.shard_tokens.tolist() == [2**25, 2**25 - 1, 2**25 - 2]
    assert manifest.block_starts.tolist() == [0, 32, 64, 96]
    assert manifest.paths[1] == "shards/00000/tok-00000001.tar"
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.eod) == (100, 0)
    assert len(manifest.identity) == 64


def test_a_dataset_without_shards_loads(tmp_path):
    manifest = Manifest.load(write(tmp_path, manifest_content(0)))
    assert (manifest.num_shards, manifest.tokens, manifest.block_starts.tolist()) == (0, 0, [0])


TOKENIZER = {"sha256": "0" * 64, "vocab_size": 100, "eod": 0}
REFUSED = {
    "json": ("{", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "list": ("[1]", "not the manifest of a token dataset"),
    "format": (manifest_content(1, format="other"), "not the manifest of a token dataset"),
    "version": (
        manifest_content(1, version=9),
        "has version 9; this release reads versions 1 to 3",
    ),
    "unsealed": (manifest_content(1, checksum="0"), "has changed since it was written"),
    "no tokenizer": (manifest_content(1, tokenizer={}), "'sha256'"),
    "tokenizer list": (manifest_content(1, tokenizer=[1]), "TypeError"),
    "totals": (manifest_content(1, tokens=3), "its shards add up to 33554432 tokens"),
    "big endian": (manifest_content(1, dtype=">u2"), "dtype '>u2' for a vocab_size of 100"),
    "object": (manifest_content(1, dtype="|O"), "dtype"),
    "wide": (manifest_content(1, dtype="<u4"), "dtype"),
    "blocks of none": (manifest_content(1, block_tokens=0), "block_tokens is 0"),
    "blocks of a half": (manifest_content(1, block_tokens=0.5), "block_tokens is 0.5"),
    "true documents": (manifest_content(0, documents=False), "documents is False"),
    "negative bytes of text": (manifest_content(1, text_bytes=-1), "text_bytes is -1"),
    "eod outside": (manifest_content(1, tokenizer={**TOKENIZER, "eod": 100}), "eod 100 is not"),
    "eod negative": (manifest_content(1, tokenizer={**TOKENIZER, "eod": -1}), "eod is -1"),
    "eod text": (manifest_content(1, tokenizer={**TOKENIZER, "eod": "0"}), "eod is '0'"),
    "no vocabulary": (
        manifest_content(1, tokenizer={**TOKENIZER, "vocab_size": 0}),
        "vocab_size is 0",
    ),
    "huge vocabulary": (
        manifest_content(1, tokenizer={**TOKENIZER, "vocab_size": 2**40}),
        "vocab_size is",
    ),
    "tokenizer sha": (
        manifest_content(1, tokenizer={**TOKENIZER, "sha256": "../x"}),
        "is not a sha256",
    ),
    "index sha": (manifest_content(1, index_sha256=None), "is not a sha256"),
    "absolute": (manifest_content(1, shards=row(path="/etc/passwd")), "is called '/etc/passwd'"),
    "upwards": (manifest_content(1, shards=row(path="../../x.tar")), "is called"),
    "upwards inside": (
        manifest_content(1, shards=row(path="shards/../../tok-00000000.tar")),
        "is called",
    ),
    "nul": (manifest_content(1, shards=row(path="shards/00000/tok-00000000.tar\0")), "is called"),
    "another number": (manifest_content(1, shards=row(path=fmt.shard_path(1))), "is called"),
    "path a number": (manifest_content(1, shards=row(path=7)), "is called 7"),
    "negative tokens": (manifest_content(1, shards=row(tokens=-1), tokens=-1), "negative size"),
    "tokens text": (manifest_content(1, shards=row(tokens="9")), "TypeError"),
    "tokens huge": (manifest_content(1, shards=row(tokens=2**80), tokens=2**80), "OverflowError"),
    "shard sha": (manifest_content(1, shards=row(sha256="z" * 64)), "is not a sha256"),
    "source a list": (manifest_content(1, shards=row(source=["web"])), "TypeError"),
    "short row": (manifest_content(1, shards=[row()[0][:-1]]), "ValueError"),
    "rows a number": (manifest_content(1, shards=5), "TypeError"),
    "rows text": (manifest_content(1, shards="shards"), "ValueError"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path, content, message):
    with pytest.raises(DataError) as caught:
        Manifest.load(write(tmp_path, content))
    assert message in str(caught.value)


def test_a_wrong_name_in_a_later_folder_is_refused() -> None:
    """They are compared a folder at a time."""
    names = [*fmt.shard_paths(0), *fmt.shard_paths(1)[:5]]
    manifest._check_names(names)
    names[1003] = "../x.tar"
    with pytest.raises(ValueError, match="shard 1003 is called '../x.tar', not '.*01003.tar'"):
        manifest._check_names(names)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(key=st.sampled_from([*manifest_content(0)]), value=JSON)
@settings(deadline=None, max_examples=150)
def test_no_value_of_any_field_gets_past_or_ends_in_a_traceback(tmp_path_factory, key, value):
    """A sealed manifest with anything in one field loads as a Manifest or raises DataError."""
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        manifest = Manifest.load(write(folder, manifest_content(2) | {key: value}))
    except DataError:
        return
    assert manifest.paths == [fmt.shard_path(0), fmt.shard_path(1)] or manifest.num_shards == 0


def test_any_flipped_bit_of_a_manifest_is_found(tmp_path):
    raw = (write_dataset(tmp_path / "d", [np.arange(200)]) / "manifest.json").read_bytes()
    for place in range(0, len(raw), 7):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << (place % 8)
        (tmp_path / "d" / "manifest.json").write_bytes(flipped)
        with pytest.raises(DataError):
            Manifest.load(tmp_path / "d")


def test_a_text_in_the_place_of_a_dataset_is_named_with_the_way_to_make_one(tmp_path):
    """The first data.path of a newcomer is the text itself; the answer began with NotADirectoryError."""
    (tmp_path / "text.txt").touch()
    with pytest.raises(
        DataError, match=r"text\.txt is a file, .* data_prep\.tokenize .*text\.txt OUT"
    ):
        Manifest.load(str(tmp_path / "text.txt" / "train"))


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(
        DataError, match="nowhere/manifest.json cannot be read: there is no such file"
    ):
        Manifest.load(tmp_path / "nowhere")


def npy(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **options)
    return stream.getvalue()


INDEXES = {
    "short": (npy(np.zeros(31, fmt.INDEX_DTYPE)), "the manifest asks for 32 rows of 32 bytes"),
    "other numbers": (npy(np.ones(32, fmt.INDEX_DTYPE)), "the manifest says 000000000000"),
    "empty": (b"", "cannot be read"),
    "not npy": (b"x" * 5000, "cannot be read"),
    "header": (npy(np.zeros(32, fmt.INDEX_DTYPE)).replace(b"descr", b"des(r"), "header is damaged"),
    "objects": (npy(np.array([{}] * 32), allow_pickle=True), "not rows of 32 bytes"),
    "table": (npy(np.zeros((4, 8), fmt.INDEX_DTYPE)), "not rows of 32 bytes"),
    "cut": (npy(np.zeros(32, fmt.INDEX_DTYPE))[:-5], "its header says 32 rows"),
}


@pytest.mark.parametrize(("raw", "message"), INDEXES.values(), ids=INDEXES)
def test_an_index_that_is_not_the_manifests_is_refused(tmp_path, raw, message):
    write(tmp_path, manifest_content(1))
    (tmp_path / "index.npy").write_bytes(raw)
    with pytest.raises(DataError) as caught:
        Manifest.load(tmp_path).index  # noqa: B018
    assert message in str(caught.value)


def test_a_missing_shard_is_named(tmp_path):
    write_dataset(tmp_path, [np.arange(100)])
    (tmp_path / fmt.shard_path(0)).unlink()
    with pytest.raises(ShardError, match="tok-00000000.tar is missing or truncated"):
        Manifest.load(tmp_path).map_block(0, 0)


@pytest.mark.parametrize("name", ["manifest.json", "index.npy", fmt.shard_path(0)])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_pipe_or_a_link_out_of_the_dataset_is_refused_not_followed(tmp_path, name, kind):
    """A pipe would be waited for, for ever; a link shows whatever this user may read."""
    file = write_dataset(tmp_path / "d", [np.arange(100)]) / name
    outside = tmp_path / "outside"
    file.rename(outside)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(outside)
    with pytest.raises(DataError, match="not an ordinary file|leads out of its folder"):
        read_everything(tmp_path / "d")


def test_links_inside_a_dataset_and_to_a_dataset_are_followed(tmp_path):
    folder = write_dataset(tmp_path / "d", [np.arange(100)])
    shard = folder / fmt.shard_path(0)
    shard.rename(folder / "elsewhere.tar")
    shard.symlink_to(folder / "elsewhere.tar")
    (tmp_path / "link").symlink_to(folder)
    assert read_everything(tmp_path / "link") == list(range(97))
    assert regular_file(tmp_path / "link" / "manifest.json").exists()


def read_everything(folder: Path) -> list[int]:
    cfg = DataConfig(train=[DatasetConfig(path=str(folder))])
    reader = Reader(open_datasets(cfg.train, cfg=cfg, cache_dir=folder), seq_len=96)
    zero = np.zeros(1, np.int64)
    return reader.gather(zero, zero, zero, documents=True).ids[0].tolist()


def rewritten(folder: Path, **changes: int) -> Path:
    """The dataset with other numbers in the first row of its index, consistently sealed."""
    index = np.load(folder / "index.npy")
    for key, value in changes.items():
        index[key][0] = value
    np.save(folder / "index.npy", index)
    content = json.loads((folder / "manifest.json").read_text())
    content["checksum"] = fmt.UNSEALED
    content["index_sha256"] = hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()
    return write(folder, content)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_offset": 2**40},
        {"tokens_offset": 2**64 - 2},
        {"num_tokens": 3},
        {"num_tokens": 2**32 - 1},
        {"num_docs": 2**32 - 1},
        {"docs_offset": 2**63},
    ],
    ids=str,
)
def test_an_index_that_contradicts_its_shards_is_refused(tmp_path, changes):
    """Its author sealed it well and means ill, or made a mistake."""
    folder = rewritten(write_dataset(tmp_path, [np.arange(100)]), **changes)
    with pytest.raises(ShardError, match="contradicts the manifest"):
        read_everything(folder)


@pytest.mark.parametrize("skip", [False, True])
def test_an_id_outside_the_vocabulary_is_found_at_first_touch(tmp_path, skip):
    """On one rank it is an index error, on tensor-parallel ranks a wrong row without a word."""
    tokens = np.arange(200) % 50
    tokens[150] = 50
    folder = write_dataset(tmp_path, [tokens], vocab_size=50, block_tokens=128)
    cfg = DataConfig(train=[DatasetConfig(path=str(folder))])
    reader = Reader(
        open_datasets(cfg.train, cfg=cfg, cache_dir=folder), seq_len=64, skip_corrupt=skip
    )
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    assert reader.gather(zero, zero, zero).num_corrupt == 0
    if skip:
        assert reader.gather(zero, zero, 2 * one).num_corrupt == 1
        return
    with pytest.raises(ShardError, match="block 1 holds the id 50; .* the ids 0 to 49"):
        reader.gather(zero, zero, 2 * one)


def test_document_starts_outside_their_block_are_refused(tmp_path):
    folder = write_dataset(tmp_path, [np.arange(100)], starts=[np.array([0, 9, 9])])
    with pytest.raises(ShardError, match="not ascending below 64"):
        read_everything(folder)
