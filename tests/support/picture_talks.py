"""Dialogues with pictures in every form of input: each picture is of the colour of its number."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.conversations import main
from data_prep.tokens.browse import blocks, tokenizer_of
from data_prep.tokens.conversation_job import ConversationConfig
from data_prep.tokens.rows import documents_of
from pipeline import cli
from pipeline.data.manifest import Manifest
from pipeline.data.pictures import gathered

ROW, SIZE, PATCH = 96, 8, 4


def colour(number: int) -> tuple[int, int, int]:
    return number % 256, number * 7 % 256, number * 31 % 256


def picture(number: int, kind: str = "PNG", **options: Any) -> bytes:
    """One colour for each number; all kinds but JPEG are lossless here."""
    out = io.BytesIO()
    Image.new("RGB", (12, 9), colour(number)).save(out, kind, lossless=True, **options)
    return out.getvalue()


IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def interleaved(first: int, second: int, **sources: Any) -> list[dict[str, Any]]:
    """A question that shows a picture, an answer that shows another."""
    one, two = (IMAGE | {key: value[n] for key, value in sources.items()} for n in (0, 1))
    question = {"role": "user", "content": [text("Is this "), one, text(f"{first}?")]}
    return [question, {"role": "assistant", "content": [text("No, "), two, text(f"{second}")]}]


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def fill(folder: Path) -> None:
    """Every form of input; a dialogue names the colours of its pictures by their numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "small").mkdir(parents=True)
    members = {}
    for n in range(100, 140):
        if n % 4:
            kind = "png" if n % 2 else "webp"
            members |= {f"s/{n}.{kind}": picture(n, kind.upper()), f"s/{n}.txt": f"{n}".encode()}
        else:
            story = json.dumps({"messages": interleaved(n, n + 1), "image": "ignored.png"}).encode()
            members |= {
                f"s/{n}.0.png": picture(n),
                f"s/{n}.1.png": picture(n + 1),
                f"s/{n}.json": story,
            }
    write_tar(folder / "a.tar", members)
    lines: list[dict[str, Any]] = []
    for n in range(200, 232, 4):
        for k in range(n, n + 4):
            (folder / "small" / f"{k}.png").write_bytes(picture(k))
        paths = [f"small/{k}.png" for k in range(n, n + 4)]
        lines += [
            {"messages": interleaved(n, n + 1, path=paths)},
            {"messages": interleaved(n + 1, n + 2), "images": paths[1:3]},
            {"image": paths[3], "text": f"{n + 3}"},
            {"prompt": f"{n}", "completion": f"{n + 1}", "images": paths[:2]},
            {"prompt": "no picture", "completion": "The fox."},
        ]
    (folder / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {"image": {"bytes": picture(n), "path": "x.png"}, "caption": f"{n}"}
        for n in range(300, 340)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet")
    more = [{"messages": json.loads(json.dumps(interleaved(n, n + 1))), "images": [picture(n), picture(n + 1)]}
            for n in range(400, 410)]  # fmt: skip
    plain = [
        {"prompt": "Two?", "completion": f"{n} {n + 1}", "images": row["images"]}
        for n, row in zip(range(400, 410), more)
    ]
    pq.write_table(pa.Table.from_pylist(plain), folder / "d.parquet")


def convert(folder: Path, output: Path, *words: str, source: str = "in") -> Path:
    places = [f"input={folder}/{source}", f"output={output}", f"tokenizer={folder}/tokenizer.json"]
    sizes = [f"row_tokens={ROW}", f"image_size={SIZE}", f"patch_size={PATCH}"]
    words = (
        *places,
        *sizes,
        "unit_mb=0.004",
        "workers=1",
        "validation_fraction=0.1",
        "include=tar,jsonl,parquet",
        *words,
    )
    main(cli.compose(ConversationConfig, list(words), config="conversations"))
    return output


def dialogues(folder: Path) -> list[tuple[str, np.ndarray]]:
    """(text with one <|image|> a picture, pictures) of every dialogue, padding left out."""
    manifest, found = Manifest.load(folder), []
    assert manifest.pictures is not None
    tokenizer = tokenizer_of(manifest)
    for block in blocks(manifest, 0):
        for document in documents_of(block, manifest.layout):
            if document.loss.any():
                assert document.images is not None
                is_image = document.ids == manifest.pictures.image_token_id
                assert (
                    is_image.sum() == len(document.images) * 4 and not document.loss[is_image].any()
                )
                found.append(
                    (
                        tokenizer.decode(document.ids[gathered(document.ids, manifest.pictures)]),
                        document.images,
                    )
                )
    return found
