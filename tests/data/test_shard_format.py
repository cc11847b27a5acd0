"""pipeline.data.shard_format: what a manifest says, and how it refuses."""

import io
import json
import tarfile

import numpy as np
import pytest

from pipeline.data import shard_format
from pipeline.data.shard_format import INDEX_DTYPE, SHARD_COLUMNS, Manifest
from pipeline.errors import DataError, ShardError


def manifest_content(num_shards, **changes):
    rows = [
        [shard_format.shard_path(s), 2**25 - s, 2**26, 7, f"{s:064x}", "web", 1000 * s]
        for s in range(num_shards)
    ]
    return {
        "format": "gpt-shards", "version": 1, "dtype": "<u2", "block_tokens": 2**20,
        "tokenizer": {"sha256": "0" * 64, "vocab_size": 100, "eod": 0},
        "tokens": sum(row[1] for row in rows), "documents": 7 * num_shards, "text_bytes": 5, "index_sha256": "0" * 64,
        "columns": SHARD_COLUMNS, "shards": rows,
    } | changes  # fmt: skip


def write(folder, content):
    (folder / "manifest.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    return folder


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "not the manifest of a token dataset"),
        (manifest_content(1, format="other"), "not the manifest of a token dataset"),
        (manifest_content(1, version=9), "has version 9; this release reads version 1"),
        (manifest_content(1, tokenizer={}), "is incomplete"),
        (manifest_content(1, tokens=3), "contradicts itself: its shards add up to 33554432 tokens"),
    ],
    ids=["json", "list", "format", "version", "fields", "totals"],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        Manifest.load(write(tmp_path, content))


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(
        DataError, match="nowhere/manifest.json cannot be read: there is no such file"
    ):
        Manifest.load(tmp_path / "nowhere")


def test_an_index_of_the_wrong_length_is_refused(tmp_path):
    write(tmp_path, manifest_content(1))
    np.save(tmp_path / "index.npy", np.zeros(31, INDEX_DTYPE))
    with pytest.raises(DataError, match="the manifest asks for 32 rows of 32 bytes"):
        Manifest.load(tmp_path).index  # noqa: B018


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, manifest_content(1))
    np.save(tmp_path / "index.npy", np.ones(32, INDEX_DTYPE))
    with pytest.raises(ShardError, match="tok-00000000.tar is missing or truncated"):
        Manifest.load(tmp_path).map_block(0, 0)


def test_headers_are_those_of_numpy_and_tar():
    array = np.arange(5, dtype="<u2")
    member = shard_format.npy_header(array.dtype, 5) + array.tobytes()
    assert np.array_equal(np.load(io.BytesIO(member)), array)
    tar = (
        shard_format.tar_header("00000000-0000.tokens.npy", len(member))
        + member.ljust(512, b"\0")
        + bytes(1024)
    )
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        (info,) = archive.getmembers()
    assert (info.name, info.size, info.mtime, info.uid, info.gid) == (
        "00000000-0000.tokens.npy",
        138,
        0,
        0,
        0,
    )


def test_dtype_holds_every_id():
    assert shard_format.token_dtype(65_536) == np.dtype("<u2")
    assert shard_format.token_dtype(65_537) == np.dtype("<u4")
