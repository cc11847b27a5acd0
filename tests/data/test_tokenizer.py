"""pipeline.data.tokenizer: ids, bytes and the end-of-document rule of a tokenizer.json."""

import json

import pytest
from tokenizers import Tokenizer as Backend

from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import DataError
from tests.support.corpus import edit_tokenizer, make_texts, make_tokenizer
from tests.support.tokenizers_of_kinds import KINDS, SPECIAL, trained


@pytest.fixture
def path(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer.json")


def test_ids_are_those_of_hugging_face_and_decode_to_the_text(path):
    tokenizer, reference = Tokenizer.from_file(path), Backend.from_file(str(path))
    for text in (t for t in make_texts(60) if "<|endoftext|>" not in t):
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_literal_special_string_is_ordinary_text(path):
    tokenizer = Tokenizer.from_file(path)
    ids = tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == "a <|endoftext|> b"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eod", ["<|endoftext|>", "</s>", "eos"])
def test_a_literal_special_string_is_ordinary_text_for_every_kind_of_model(tmp_path, kind, eod):
    """A page that writes about </s> would end there, and verify would refuse the dataset."""
    tokenizer = Tokenizer.from_file(trained(kind, tmp_path / "t.json"), eod=eod)
    special = {tokenizer.backend.token_to_id(name) for name in SPECIAL}
    unknown = tokenizer.backend.token_to_id("[UNK]")
    for name in SPECIAL:
        for text in (name, f"hello {name} world", f"x{name}y", f"{name}{name}", f"{name} " * 3):
            assert not set(tokenizer.encode(text)) & special - {unknown}, text


@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_special_strings_have_the_ids_of_hugging_face(tmp_path, kind):
    tokenizer = Tokenizer.from_file(trained(kind, tmp_path / "t.json"), eod="</s>")
    reference = Backend.from_file(str(tmp_path / "t.json"))
    for text in ("hello world", "the quick brown fox", "quick hello", "zzz", "fox\nworld"):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_added_tokens_behind_a_gap_are_refused_in_words(path):
    """The library counts on behind the vocabulary; the file's ids were looked up beyond the end."""
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    old = json.loads(path.read_text())["added_tokens"]
    for special in (True, False):
        far = {"id": 5000, "content": "<|far|>", "special": special, **added}
        edit_tokenizer(path, added_tokens=[*old, far])
        with pytest.raises(
            DataError, match="'<|far|>' has the id 5000.* gives it 408.*Fill the gap"
        ):
            Tokenizer.from_file(path)


def test_truncation_and_padding_in_the_file_are_not_applied(path):
    """Published tokenizers of chat models often carry them; they would cut every document."""
    whole = Tokenizer.from_file(path).encode("one two three four five")
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit_tokenizer(path, truncation=truncation)
    assert Tokenizer.from_file(path).encode("one two three four five") == whole


def test_token_byte_lengths_add_up_to_the_bytes_of_the_text(path):
    """Bits per byte divides by them."""
    tokenizer = Tokenizer.from_file(path)
    lengths = tokenizer.token_byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.eod] == 0
    for text in make_texts(60):
        ids = tokenizer.encode(text)
        assert lengths[ids].sum() == len(text.encode())
        assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()


def test_end_of_document_token_follows_the_rule_and_can_be_named(path):
    assert Tokenizer.from_file(path).eod == 0
    assert Tokenizer.from_file(path, eod="x").eod == Backend.from_file(str(path)).token_to_id("x")
    assert Tokenizer.from_file(path, eod="17").eod == 17
    with pytest.raises(DataError, match="'nothing' is not one of its tokens.*<|endoftext|>"):
        Tokenizer.from_file(path, eod="nothing")
    with pytest.raises(DataError, match="'408' is not one of its tokens"):
        Tokenizer.from_file(path, eod="408")


def test_a_file_without_special_tokens_asks_for_eod(path):
    edit_tokenizer(path, added_tokens=[])
    with pytest.raises(DataError, match="none of its tokens is known to do so. Name it with eod="):
        Tokenizer.from_file(path)


def test_gpt2_is_no_file_and_is_told_where_one_is():
    """`tokenizer=gpt2` is what every other program takes."""
    with pytest.raises(DataError, match=r"^gpt2 cannot be read .*openai-community/gpt2/resolve"):
        Tokenizer.from_file("gpt2")


def test_unreadable_files_end_in_a_message(tmp_path):
    with pytest.raises(DataError, match="nowhere.json cannot be read.*train_tokenizer"):
        Tokenizer.from_file(tmp_path / "nowhere.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        Tokenizer.from_file(tmp_path / "bad.json")


def test_deepseeks_end_of_sentence_ends_documents(path):
    """Its bars are fullwidth (U+FF5C)."""
    name = "<\uff5cend▁of▁sentence\uff5c>"
    added = [
        {"id": 408 + i, "content": content, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, content in enumerate(["<\uff5cbegin▁of▁sentence\uff5c>", name])
    ]  # fmt: skip
    edit_tokenizer(path, added_tokens=added)
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.eod == tokenizer.backend.token_to_id(name)


def test_templates_do_not_make_another_tokenizer_and_other_merges_do(path):
    """A dataset's tokenizer and the Hugging Face folder's may differ in what changes no id."""
    ours = Tokenizer.from_file(path)
    edit_tokenizer(path, truncation=None, post_processor={"type": "ByteLevel", "add_prefix_space": True,
                                                          "trim_offsets": True, "use_regex": True})  # fmt: skip
    same = Tokenizer.from_file(path)
    assert same.sha256 != ours.sha256 and same.ids_sha256 == ours.ids_sha256
    edit_tokenizer(path, normalizer={"type": "Lowercase"})
    assert Tokenizer.from_file(path).ids_sha256 != ours.ids_sha256
