"""Records with pictures that cannot be used: each is named with its place and a reason, or ends the job."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, DataError
from tests.support.corpus import make_tokenizer
from tests.support.picture_talks import (
    IMAGE,
    colour,
    convert,
    dialogues,
    fill,
    interleaved,
    picture,
    write_tar,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_tokenizer(folder / "tokenizer.json")
    fill(folder / "in")
    return folder


BAD: dict[str, tuple[str, Any]] = {
    "places without pictures": ("pictures_mismatch", {"messages": interleaved(1, 2), "image": "in/small/200.png"}),
    "a picture without a place": ("pictures_mismatch", {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "image": "in/small/200.png"}),
    "a picture beside no pictures": ("pictures_mismatch", {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "images": None, "image": "in/small/200.png"}),
    "pictures beside a picture": ("pictures_mismatch", {"text": "words", "images": ["in/small/200.png"], "image": "in/small/201.png"}),
    "a caption without a picture": ("picture_missing", {"text": "words"}),
    "a file that is not there": ("picture_missing", {"image": "none.png", "text": "words"}),
    "a path that leads out": ("picture_place", {"image": "../../../../etc/passwd", "text": "words"}),
    "a part of another type": ("not_a_dialogue", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}),
    "words that spell a placeholder": ("special_token", {"image": "in/small/200.png", "text": "<|image|>"}),
    "an answer of a picture alone": ("nothing_learned", {"messages": [{"role": "assistant", "content": [IMAGE], "learn": False}], "image": "in/small/200.png"}),
    "more pictures than a row holds": ("too_long", {"images": ["in/small/200.png"] * 30, "text": "words"}),
    "bytes in a line, which has none": ("picture_missing", {"image": {"bytes": "iVBORw0KGgo="}, "text": "words"}),
    "an object without a place": ("picture_missing", {"image": {"image": {"image": {}}}, "text": "words"}),
    "a list in a list": ("picture_missing", {"images": [["in/small/200.png"]], "text": "words"}),
    "yes": ("picture_missing", {"image": True, "text": "words"}),
    "data as OpenAI's clients send them": ("picture_place", {"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]},
        {"role": "assistant", "content": "words"}]}),
    "no words": ("not_a_dialogue", {"image": "in/small/200.png"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_quarantined_with_its_place(
    corpus: Path, tmp_path: Path, kind: str
) -> None:
    """Or ends the job, as on_error says."""
    reason, record = BAD[kind]
    good = json.dumps({"image": "in/small/201.png", "text": "201"}) + "\n"
    (corpus / "bad.jsonl").write_text(good + json.dumps(record) + "\n" + good)
    run = partial(convert, corpus, source="bad.jsonl")
    output = run(tmp_path / "out", "on_error=quarantine", "max_rejected_fraction=0.5")
    (row,) = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
    assert (row["reason"], row["line"]) == (reason, 2)
    with pytest.raises(DataError, match=f"line 2.*{reason}: "):
        run(tmp_path / "fails")


def test_bad_samples_of_a_tar_are_named(corpus: Path, tmp_path: Path) -> None:
    """Too large by the header, without a text, with words that are none; the good ones stay."""
    big = picture(1) + bytes(3000)
    members = {
        "a.png": picture(101), "a.txt": b"101", "big.png": big, "big.txt": b"1", "bare.png": picture(1),
        "odd.png": picture(1), "odd.txt": b"\xff", "json.png": picture(1), "json.json": b"{", "list.png": picture(1),
        "list.json": b"[]", "cut.png": picture(1)[:50], "cut.txt": b"1", "alone.txt": b"1", "z.png": picture(102), "z.txt": b"102",
        "many.txt": b"1", **{f"many.{n}.png": b"" for n in range(1030)},
    }  # fmt: skip
    write_tar(
        corpus / "bad.tar",
        [*members.items(), *[("twice.png", picture(1))] * 2, ("twice.txt", b"1")],
    )
    words = (
        "on_error=quarantine",
        "max_rejected_fraction=0.9",
        "max_image_mb=0.002",
        "validation_fraction=0",
    )
    output = convert(corpus, tmp_path / "out", *words, source="bad.tar")
    rows = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
    assert {row["member"]: row["reason"] for row in rows} == {
        "big": "picture_too_large", "bare": "missing_field", "odd": "invalid_utf8", "json": "broken_json",
        "list": "not_an_object", "cut": "damaged_picture", "alone": "picture_missing", "many": "too_long", "twice": "ambiguous",
    }  # fmt: skip
    assert len(dialogues(output / "train")) == 2


def test_odd_cells_of_a_table_are_named(corpus: Path, tmp_path: Path) -> None:
    """Objects whose parts are null, no bytes, cut bytes, a path that leads out; a path alone is one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [
        {"bytes": None, "path": None}, {"bytes": b"", "path": "in/small/200.png"}, {"bytes": picture(1)[:50], "path": None},
        None, {"bytes": None, "path": "../../x.png"}, {"bytes": b"GIF89a" + bytes(20), "path": "a.png"},
        {"bytes": None, "path": "in/small/201.png"},
    ]  # fmt: skip
    kind = pa.struct({"bytes": pa.large_binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(cells, kind), "caption": ["201"] * len(cells)})
    pq.write_table(table, corpus / "odd.parquet")
    words = ("on_error=quarantine", "max_rejected_fraction=0.95", "validation_fraction=0")
    output = convert(corpus, tmp_path / "out", *words, source="odd.parquet")
    rows = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
    assert [row["reason"] for row in rows] == [
        "picture_missing", "picture_missing", "damaged_picture", "picture_missing", "picture_place", "not_a_picture",
    ]  # fmt: skip
    ((words_, images),) = dialogues(output / "train")
    assert "201" in words_ and tuple(images[0, :, 0, 0].tolist()) == colour(201)


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = {"/a/gone.png": 404, "/a/secret.png": 403, "/a/down.png": 500}.get(self.path, 200)
        body = picture(7) if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_pictures_are_fetched_from_where_image_urls_says(
    corpus: Path, tmp_path: Path, address: str, monkeypatch: Any
) -> None:
    """What is gone is quarantined; what may come back ends the job: else the bytes depended on the weather."""
    monkeypatch.setattr("data_prep.sources.pictures.PAUSES_S", ())
    names = ["a/x.png", "a/gone.png", "a/secret.png", "b/x.png"]
    lines = [{"image": f"{address}/{name}", "text": "7"} for name in names]
    (corpus / "urls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = (
        "on_error=quarantine",
        "max_rejected_fraction=0.9",
        "validation_fraction=0",
        f"image_urls={address}/a/",
    )
    output = convert(corpus, tmp_path / "out", *words, source="urls.jsonl")
    ((_, images),) = dialogues(output / "train")
    assert tuple(images[0, :, 0, 0].tolist()) == colour(7)
    rows = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
    assert [row["reason"] for row in rows] == [
        "picture_missing",
        "picture_missing",
        "picture_place",
    ]
    (corpus / "down.jsonl").write_text(json.dumps({"image": f"{address}/a/down.png", "text": "7"}))
    with pytest.raises(
        DataError, match="down.png could not be fetched.*run the same command again"
    ):
        convert(corpus, tmp_path / "down", *words, source="down.jsonl")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["template=chatml"], "does not render a content that is a list"),
        (["image_token=<|nothing|>"], "is no special token of .* there are .*<.image.>"),
        (["image_token=<|endoftext|>"], "with which rows are filled up"),
        (["image_size=6"], "a multiple of patch_size"),
        (["row_tokens=4"], "leaves no room for text"),
        (["format=text"], "from WebDataset tars of pictures"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    corpus: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    """Before a picture is read."""
    with pytest.raises(ConfigError, match=said):
        convert(corpus, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_without_image_size_a_list_of_parts_says_what_takes_it(
    corpus: Path, tmp_path: Path
) -> None:
    """Nobody shall look for the reason in the template."""
    (corpus / "list.jsonl").write_text(json.dumps({"messages": interleaved(1, 2)}))
    with pytest.raises(DataError, match="not_a_dialogue.*image_size=... takes lists"):
        convert(corpus, tmp_path / "out", "image_size=null", source="list.jsonl")
