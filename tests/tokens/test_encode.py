"""data_prep.encode: every engine gives Hugging Face's ids, or is not used."""

import io
import tarfile
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tokens import encode
from data_prep.tokens.check import find_faults
from data_prep.tokens.encode import LOOKED_UP, Encoder, EncoderName, is_disputed
from data_prep.tokens.tokenize_job import TokenizeConfig
from data_prep.tokens.tokenize_job import main as tokenize
from pipeline import cli
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError, DataError
from tests.support.corpus import TEXTS, edit_tokenizer, make_texts, make_tokenizer, write_jsonl
from tests.support.tokenizers_of_kinds import KINDS, SPECIAL, trained

ENGINES = [EncoderName.gigatoken, EncoderName.tiktoken, EncoderName.hf]
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.fixture(scope="module", params=["llama3", "gpt2"])
def tokenizer(request, tmp_path_factory):
    path = make_tokenizer(
        tmp_path_factory.mktemp(request.param) / "tokenizer.json", pattern=request.param
    )
    return Tokenizer.from_file(path)


@pytest.fixture(scope="module")
def encoders(tokenizer):
    return {name: Encoder(tokenizer, name) for name in ENGINES}


def tokens_of(folder):
    """The ids of each shard, read without our reader."""
    for path in sorted(folder.glob("shards/*/*.tar")):
        with tarfile.open(path) as tar:
            blocks = [np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar if m.name.endswith(".tokens.npy")]  # fmt: skip
        yield np.concatenate(blocks)


def rows(encoder, texts):
    ids, lengths = encoder.encode(texts)
    assert lengths.sum() == len(ids)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("name", ENGINES)
def test_engines_give_the_ids_of_hugging_face(tokenizer, encoders, name):
    texts = [*make_texts(60), *TEXTS]
    assert rows(encoders[name], texts) == [tokenizer.encode(text) for text in texts]


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(
        st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5
    )
)
def test_engines_agree_on_any_text(encoders, texts):
    expected = rows(encoders[EncoderName.hf], texts)
    assert rows(encoders[EncoderName.gigatoken], texts) == expected
    assert rows(encoders[EncoderName.tiktoken], texts) == expected


def test_code_points_that_engines_class_differently_go_to_the_reference(tokenizer, encoders):
    """U+088F, U+10940 and U+323B0 are letters since Unicode 17."""
    texts = ["plain", "the\u088fthe", "x \U00010940\U00010941 2", "日本\U000323b0", "plain too"]
    assert [is_disputed(text) for text in texts] == [False, True, True, True, False]
    for encoder in encoders.values():
        assert rows(encoder, texts) == [tokenizer.encode(text) for text in texts]


def test_auto_takes_the_fastest(tokenizer):
    assert Encoder(tokenizer).name is EncoderName.gigatoken


def test_ordinary_added_tokens_are_matched_in_text_and_special_ones_are_not(tmp_path):
    """GPT-NeoX has runs of spaces as ordinary added tokens."""
    path = make_tokenizer(tmp_path / "tokenizer.json")
    added = [
        {"id": 0, "content": "<|endoftext|>", "special": True, **ADDED},
        {"id": 408, "content": "<call>", "special": False, **ADDED},
        {"id": 409, "content": "<|pad|>", "special": True, **ADDED},
    ]
    edit_tokenizer(path, added_tokens=added)
    tokenizer = Tokenizer.from_file(path)
    encoder = Encoder(tokenizer)
    (ids,) = rows(encoder, ["x <call> <|pad|> <|endoftext|>"])
    assert 408 in ids and 409 not in ids and 0 not in ids
    assert ids == tokenizer.encode("x <call> <|pad|> <|endoftext|>")
    with pytest.raises(ConfigError, match="encoder=tiktoken does not fit.*ordinary added tokens"):
        Encoder(tokenizer, EncoderName.tiktoken)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_tokenized_is_whole_for_verify(tmp_path, kind):
    """Every kind of tokenizer, on documents that hold its special strings: on the disk they are text, too."""
    path = trained(kind, tmp_path / "t.json")
    texts = [f"hello {name} world{name}" for name in SPECIAL] * 3
    write_jsonl(tmp_path / "in.jsonl", texts)
    words = [
        f"input={tmp_path}/in.jsonl",
        f"output={tmp_path}/out",
        f"tokenizer={path}",
        "eod=</s>",
    ]
    more = ["workers=1", "validation_fraction=0"]
    tokenize(cli.compose(TokenizeConfig, [*words, *more], config="tokenize"))
    assert list(find_faults(str(tmp_path / "out/train"), workers=1)) == []
    assert Manifest.load(tmp_path / "out/train").documents == len(texts)
    tokenizer = Tokenizer.from_file(path, eod="</s>")
    (tokens,) = tokens_of(tmp_path / "out/train")
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eod) + 1)
    assert documents.pop().size == 0, "the last one ends"
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    assert sorted(map(np.ndarray.tolist, documents)) == sorted(expected)
    special = {tokenizer.backend.token_to_id(name) for name in SPECIAL}
    special -= {tokenizer.backend.token_to_id("[UNK]")}
    assert not special & {int(i) for document in documents for i in document[:-1]}


@pytest.mark.parametrize("eod", ["hello", "[UNK]"])
def test_an_end_mark_that_texts_hold_ends_the_job(tmp_path, eod):
    """The documents would be cut there; [UNK] is what every unknown word gives."""
    tokenizer = Tokenizer.from_file(trained("WordLevel", tmp_path / "t.json"), eod=eod)
    encoder = Encoder(tokenizer)
    assert encoder.encode(["the fox", "quick"])[1].tolist() == [2, 1]
    with pytest.raises(DataError, match=r"gives its '.*begins with 'hello zebra'.*eod=TOKEN"):
        encoder.encode(["the fox", "hello zebra"])


def test_an_engine_that_cannot_read_the_tokenizer_is_passed_over(tmp_path):
    """A normalizer is outside what tiktoken can do; the reference can do everything."""
    path = make_tokenizer(tmp_path / "tokenizer.json")
    edit_tokenizer(path, normalizer={"type": "Lowercase"})
    tokenizer = Tokenizer.from_file(path)
    encoder = Encoder(tokenizer)
    assert (
        rows(encoder, ["The FOX"]) == [tokenizer.encode("The FOX")] == [tokenizer.encode("the fox")]
    )
    with pytest.raises(ConfigError, match="encoder=tiktoken does not fit"):
        Encoder(tokenizer, EncoderName.tiktoken)


def wrong_engine(tokenizer):
    right = encode._hf(tokenizer)

    def wrong(texts):
        ids, lengths = right(texts)
        return np.where("zebra" in "".join(texts), ids[::-1], ids), lengths

    return wrong


def test_an_engine_that_errs_at_start_up_is_not_used(tokenizer, monkeypatch):
    monkeypatch.setitem(encode.ENGINES, EncoderName.gigatoken, wrong_engine)
    monkeypatch.setattr(encode, "HARD_TEXTS", ("a zebra",))
    assert Encoder(tokenizer).name is EncoderName.tiktoken
    with pytest.raises(
        ConfigError, match="it gives other ids than Hugging Face tokenizers for 'a zebra'"
    ):
        Encoder(tokenizer, EncoderName.gigatoken)


def test_an_engine_that_errs_later_ends_the_job(tokenizer, monkeypatch):
    monkeypatch.setitem(encode.ENGINES, EncoderName.gigatoken, wrong_engine)
    encoder = Encoder(tokenizer, EncoderName.gigatoken)
    with pytest.raises(
        DataError, match="begins with 'a zebra'. Prepare into another folder with encoder=tiktoken"
    ):
        encoder.encode(["a zebra"])


def test_engines_are_built_anew_so_that_their_caches_do_not_grow(tokenizer, monkeypatch):
    built = []
    monkeypatch.setitem(
        encode.ENGINES, EncoderName.gigatoken, lambda t: built.append(1) or encode._gigatoken(t)
    )
    monkeypatch.setattr(encode, "RECYCLE_BYTES", 10**6)
    encoder = Encoder(tokenizer, EncoderName.gigatoken)
    text = "the quick brown fox " * 10_000
    for _ in range(16):  # anew after 1.2 MB and 2.4 MB
        encoder.encode([text])
    assert len(built) == 3


def test_a_tokenizer_that_changes_while_the_job_runs_is_refused(tmp_path):
    path = make_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="was changed while the job ran"):
        encode.get_encoder(str(path), "0" * 64, 0, EncoderName.hf)


def test_special_tokens_of_a_huge_document_are_looked_for_in_pieces(tmp_path, monkeypatch):
    """Its answers are a byte an id, beside text and ids: a worker was killed."""
    encoder = Encoder(Tokenizer.from_file(make_tokenizer(tmp_path / "tokenizer.json")))
    ids = np.full(4 * LOOKED_UP, 300, np.uint32)
    monkeypatch.setattr(encoder, "_encode", lambda texts: (ids, np.array([len(ids)])))
    tracemalloc.start()
    try:
        encoder.encode(["huge"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * LOOKED_UP
    ids[-1] = 0
    with pytest.raises(DataError, match="special"):
        encoder.encode(["huge"])
