"""data_prep.shard_writer and finalize: tokens come back as they went in, wherever blocks and shards are cut."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.tokens.dataset_writer import _groups, write_dataset
from data_prep.tokens.shard_writer import Part, PartWriter, copy_parts
from data_prep.train_tokenizer import TrainTokenizerConfig
from data_prep.train_tokenizer import main as train_tokenizer
from pipeline import cli
from pipeline.data import shard_format as fmt
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError, DataError
from tests.support.corpus import make_texts, write_jsonl

U2 = fmt.ShardLayout(np.dtype("<u2"))
EOD = 0


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Blocks of 8 tokens, shards of 32."""
    monkeypatch.setattr(fmt, "BLOCK_TOKENS", 8)
    monkeypatch.setattr(fmt, "SHARD_TOKENS", 32)


def stream(lengths):
    """(tokens, starts) of documents with so many tokens before their EOD."""
    tokens = np.concatenate([np.append(np.arange(1, n + 1), EOD) for n in lengths])
    return tokens, np.concatenate([[0], np.cumsum(np.array(lengths) + 1)[:-1]])


def read_back(folder, parts):
    """(tokens, starts) of parts that were made a dataset."""
    for i, part in enumerate(parts):
        target = folder / fmt.shard_path(i)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / part.name).rename(target)
    facts = {"sha256": "0" * 64, "vocab_size": 100, "eod": EOD}
    write_dataset(
        folder, parts, facts={"tokenizer": facts}, raw=b"{}", text_bytes=0, scratch=folder
    )
    manifest = Manifest.load(folder)
    tokens, starts, place = [], [], 0
    for shard in range(manifest.num_shards):
        for block in range(manifest.block_starts[shard + 1] - manifest.block_starts[shard]):
            block_tokens, docs, *_ = manifest.map_block(shard, block)
            tokens.append(block_tokens)
            starts.append(docs.astype(int) + place)
            place += len(block_tokens)
    return np.concatenate(tokens), np.concatenate(starts)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batches=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), min_size=1, max_size=5)
)
def test_tokens_and_document_starts_come_back(tiny_blocks, tmp_path_factory, batches):
    folder = tmp_path_factory.mktemp("parts")
    with PartWriter(folder, stem="a", key=0, source="x", layout=U2) as writer:
        for lengths in batches:
            writer.add(*stream(lengths))
        parts = writer.close()
    expected = stream([n for lengths in batches for n in lengths])
    assert all(part.tokens == 32 for part in parts[:-1])
    tokens, starts = read_back(folder, parts)
    assert np.array_equal(tokens, expected[0])
    assert np.array_equal(starts, expected[1])


def test_joined_parts_have_the_tokens_of_all(tiny_blocks, tmp_path):
    groups = [[3, 9], [9], [1, 1]]
    parts = []
    for i, lengths in enumerate(groups):
        with PartWriter(tmp_path, stem=str(i), key=1000 * i, source="x", layout=U2) as writer:
            writer.add(*stream(lengths), [f"{i}.{k}" for k in range(len(lengths))])
            parts += writer.close()
    sources = [tmp_path / part.name for part in parts]
    joined = copy_parts(sources, parts, tmp_path / "joined.tar", layout=U2, scratch=tmp_path)
    assert (joined.key, joined.documents, joined.inputs) == (0, 5, ["0.0", "2.1"])
    tokens, starts = read_back(tmp_path, [joined])
    expected = stream([n for lengths in groups for n in lengths])
    assert np.array_equal(tokens, expected[0])
    assert np.array_equal(starts, expected[1])


def test_provenance_names_the_documents_that_start_in_each_part(tiny_blocks, tmp_path):
    with PartWriter(tmp_path, stem="a", key=0, source="x", layout=U2) as writer:
        writer.add(*stream([15, 15, 15, 40, 3]), ["a", "b", "c", "d", "e"])
        parts = writer.close()
    assert [part.inputs for part in parts] == [["a", "b"], ["c", "d"], ["e", "e"]]


def test_an_error_leaves_no_unfinished_part(tmp_path):
    with (
        pytest.raises(RuntimeError),
        PartWriter(tmp_path, stem="a", key=0, source="x", layout=U2) as writer,
    ):
        writer.add(*stream([10]), ["a"])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_only_small_neighbours_of_one_source_are_joined():
    parts = [Part(f"{i}", i, source, tokens) for i, (source, tokens) in enumerate(
        [("a", 3), ("a", 3), ("a", 5), ("a", 50), ("a", 2), ("b", 2), ("b", 8), ("b", 1)]
    )]  # fmt: skip
    assert [[part.name for part in group] for group in _groups(parts, 10)] == [
        ["0", "1"], ["2"], ["3"], ["4"], ["5", "6"], ["7"],
    ]  # fmt: skip


def train(tmp_path, *words):
    output = tmp_path / "tokenizer.json"
    words = (f"input={tmp_path}/a.jsonl", f"output={output}", *words)
    train_tokenizer(cli.compose(TrainTokenizerConfig, words, config="train_tokenizer"))
    return output.read_bytes()


@pytest.mark.parametrize("pretokenizer", ["llama3", "gpt2"])
def test_the_same_text_gives_the_same_tokenizer(tmp_path, pretokenizer):
    write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    words = ["vocab_size=400", f"pretokenizer={pretokenizer}"]
    assert train(tmp_path, *words) == train(tmp_path, *words)


def test_a_tokenizer_needs_room_for_the_bytes_and_some_text(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [""])
    with pytest.raises(ConfigError, match="vocab_size .100. must be at least 265"):
        train(tmp_path, "vocab_size=100")
    with pytest.raises(DataError, match="holds no text to train on"):
        train(tmp_path)
