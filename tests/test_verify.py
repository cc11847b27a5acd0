"""Any flipped byte is found, wherever it is, and named."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import verify
from data_prep.tokens import check
from data_prep.tokens.tokenize_job import TokenizeConfig
from data_prep.tokens.tokenize_job import main as tokenize
from data_prep.verify import VerifyConfig
from pipeline import cli
from pipeline.data import shard_format as fmt
from pipeline.data.manifest import Manifest
from tests.support.corpus import make_texts, make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, one shard each, blocks of 4,096 tokens, so that documents run over blocks."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = make_tokenizer(folder / "tokenizer.json")
    write_jsonl(folder / "web.jsonl", make_texts(120))
    write_jsonl(folder / "code.jsonl", make_texts(40)[20:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fmt, "BLOCK_TOKENS", 4096)
        words = [
            f"input={folder}/web.jsonl,{folder}/code.jsonl",
            f"output={folder}/out",
            f"tokenizer={tokenizer}",
        ]
        tokenize(
            cli.compose(
                TokenizeConfig,
                [*words, "workers=1", "encoder=hf", "validation_fraction=0.1"],
                config="tokenize",
            )
        )
    return folder / "out"


@pytest.fixture
def dataset(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared / "train", tmp_path / "dataset"))


def faults(dataset: Path, *, quick: bool = False) -> list[str]:
    return list(check.find_faults(str(dataset), quick=quick, workers=1))


def flip(path: Path, place: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def members(dataset: Path, shard: int = 0) -> tuple[Path, list[tuple[int, int, int, int]]]:
    """The tar, and (tokens offset, bytes, docs offset, bytes) of each block."""
    manifest = Manifest.load(dataset)
    rows = manifest.index[manifest.block_starts[shard] : manifest.block_starts[shard + 1]]
    size = manifest.dtype.itemsize
    places = [
        (
            int(r["tokens_offset"]),
            int(r["num_tokens"]) * size,
            int(r["docs_offset"]),
            int(r["num_docs"]) * 4,
        )
        for r in rows
    ]
    return dataset / manifest.paths[shard], places


def test_a_fresh_dataset_is_whole(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Manifest.load(prepared / "train").block_starts[-1] > 4, "the test needs several blocks"
    assert verify.main(VerifyConfig(dataset=str(prepared), workers=1)) == 0
    out = capsys.readouterr().out
    assert "train: whole" in out
    assert "validation: whole" in out


# class of byte -> (file, place in it), given the tar, its blocks and a random generator
TAR_BYTES: dict[str, Callable[[bytes, list, random.Random], int]] = {
    "name in a tar header": lambda tar, blocks, rng: blocks[1][0] - 640 + rng.randrange(8),
    "mode in a tar header": lambda tar, blocks, rng: blocks[1][0] - 640 + 100 + rng.randrange(8),
    "unused field of a tar header": lambda tar, blocks, rng: (
        blocks[1][2] - 640 + 345 + rng.randrange(150)
    ),
    "tar header checksum": lambda tar, blocks, rng: blocks[0][0] - 640 + 148 + rng.randrange(6),
    "npy header": lambda tar, blocks, rng: blocks[1][0] - 128 + rng.randrange(128),
    "token": lambda tar, blocks, rng: blocks[2][0] + rng.randrange(blocks[2][1]),
    "last token": lambda tar, blocks, rng: blocks[-1][0] + blocks[-1][1] - 1,
    "padding after tokens": lambda tar, blocks, rng: blocks[-1][2] - 640 - 1,
    "document start": lambda tar, blocks, rng: blocks[1][2] + rng.randrange(blocks[1][3]),
    "padding after document starts": lambda tar, blocks, rng: blocks[1][0] - 640 - 1,
    "end of archive": lambda tar, blocks, rng: len(tar) - 1 - rng.randrange(1024),
}


@pytest.mark.parametrize("kind", TAR_BYTES)
@pytest.mark.parametrize("bit", [1, 128])
def test_a_flipped_byte_of_a_shard_is_found_and_named(dataset: Path, kind: str, bit: int) -> None:
    path, blocks = members(dataset)
    tar = path.read_bytes()
    flip(path, TAR_BYTES[kind](tar, blocks, random.Random(kind)), bit)
    found = faults(dataset)
    assert "sha256 is not the manifest's" in found[0]
    assert len(found) > 1, "the checks of the structure must find it without the sha256"
    assert str(path) in found[0]


@pytest.mark.parametrize(
    "name", ["manifest.json", "index.npy", "tokenizer.json", "provenance.jsonl"]
)
def test_a_flipped_byte_anywhere_in_the_small_files_is_found(dataset: Path, name: str) -> None:
    """Every 7th byte or 300 random ones, each alone; quick finds them too."""
    path = dataset / name
    whole = path.read_bytes()
    places = random.Random(0).sample(range(len(whole)), min(300, len(whole)))
    for place in places:
        flip(path, place, 1 << place % 8)
        assert faults(dataset, quick=True), f"byte {place}"
        path.write_bytes(whole)
    assert not faults(dataset, quick=True)


def test_random_flips_of_a_shard_are_all_found(dataset: Path) -> None:
    manifest = Manifest.load(dataset)
    path = dataset / manifest.paths[1]
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(60):
        flip(path, rng.randrange(len(whole)), 1 << rng.randrange(8))
        assert list(check.check_shard(Manifest.load(dataset), 1))
        path.write_bytes(whole)
    assert not list(check.check_shard(Manifest.load(dataset), 1))


def test_quick_finds_sizes_and_strangers_but_reads_no_shard(dataset: Path) -> None:
    path, blocks = members(dataset)
    flip(path, blocks[0][0])
    assert faults(dataset, quick=True) == []
    path.write_bytes(path.read_bytes() + b"x")
    (dataset / "shards" / "00000" / "tok.tmp").write_bytes(b"")
    (dataset / members(dataset, 1)[0]).unlink()
    found = " ".join(faults(dataset, quick=True))
    assert "the manifest says" in found
    assert "is missing" in found
    assert "tok.tmp is not part of the dataset" in found


def rewrite(dataset: Path, change: Callable[[dict], None]) -> None:
    """A manifest with other content and a checksum that fits: what only a wrong writer makes."""
    content = json.loads((dataset / "manifest.json").read_text())
    change(content)
    content["checksum"] = fmt.UNSEALED
    (dataset / "manifest.json").write_bytes(fmt.seal(json.dumps(content).encode()))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["tokenizer"].update(vocab_size=100), "is not below vocab_size"),
        (lambda c: c["tokenizer"].update(eod=7), "start after an EOD"),
        (lambda c: c["tokenizer"].update(eod=5000), "is not below vocab_size"),
        (lambda c: c.update(block_tokens=2048), "rows of 32 bytes"),
        (lambda c: c.update(block_tokens=4097), "every block but the last"),
        (lambda c: c.update(tokens=c["tokens"] + 1), "contradicts itself"),
        (lambda c: c["shards"][0].__setitem__(6, 12), "tar or npy header is damaged"),
    ],
)
def test_a_writer_that_contradicts_itself_is_found(
    dataset: Path, change: Callable, message: str
) -> None:
    """Checksums alone would accept these."""
    rewrite(dataset, change)
    assert any(message in fault for fault in faults(dataset))


def test_counts_that_are_swapped_between_shards_are_found(dataset: Path) -> None:
    def swap(content: dict) -> None:
        rows = content["shards"]
        rows[0][3], rows[1][3] = rows[0][3] - 1, rows[1][3] + 1

    rewrite(dataset, swap)
    assert sum("the index counts" in fault for fault in faults(dataset)) == 2


def test_a_document_without_end_is_found(dataset: Path) -> None:
    """All checksums fit, but the last token of the dataset is no EOD."""
    manifest = Manifest.load(dataset)
    path, blocks = members(dataset, 1)
    data = np.fromfile(path, np.uint8)
    offset, size = blocks[-1][:2]
    data[offset + size - 2 : offset + size].view("<u2")[0] = 1
    path.write_bytes(data.tobytes())
    assert any(
        "last document does not end" in fault
        for fault in check.find_faults(str(dataset), workers=1)
    )
    assert manifest.tokenizer.eod != 1


def test_exit_code_and_list_of_faults(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, blocks = members(dataset)
    flip(path, blocks[0][0])
    assert verify.main(VerifyConfig(dataset=str(dataset), workers=1, max_faults=1)) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.startswith("fault: ") for line in out] == [True, False]
    assert "2 faults" in out[1] or "3 faults" in out[1]


def test_several_processes_find_the_same(dataset: Path) -> None:
    path, blocks = members(dataset)
    flip(path, blocks[0][0])
    assert list(check.find_faults(str(dataset), workers=2)) == faults(dataset)


def test_a_missing_dataset_is_a_fault(tmp_path: Path) -> None:
    assert "there is no such file" in faults(tmp_path / "nowhere")[0]


def test_a_dataset_in_object_storage_is_read_through_fsspec(dataset: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/verify/dataset", recursive=True)
    assert list(check.find_faults("memory://verify/dataset", workers=1)) == []
    shard = f"/verify/dataset/{Manifest.load(dataset).paths[0]}"
    data = bytearray(memory.cat_file(shard))
    data[5000] ^= 4
    memory.pipe_file(shard, bytes(data))
    found = list(check.find_faults("memory://verify/dataset", workers=1))
    assert "sha256 is not the manifest's" in found[0]
    assert "crc32" in found[1]
    memory.rm("/verify", recursive=True)
