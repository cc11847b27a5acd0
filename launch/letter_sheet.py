"""What a model calls the letters of a tar, drawn as a sheet of pictures with their captions.

    python -m launch.letter_sheet RUN LETTERS.tar SHEET.png

The captions are greedy, by our own forward pass on the newest checkpoint. Right ones are green;
under a wrong one stands the letter's name.
"""

from __future__ import annotations

import random
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import torch

from data_prep.sources.pictures import decode
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import CHAT_TEMPLATE, attachment, read_record
from pipeline.data.chat import ChatTemplate
from pipeline.data.pictures import spread
from pipeline.data.shard_format import Pictures
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import CheckpointError, DataError
from pipeline.huggingface.whole_model import open_model
from pipeline.model.local_model import LocalModel

ROWS, COLUMNS = 4, 8
MOST_TOKENS = 40


def read_letters(path: Path) -> list[tuple[bytes, str]]:
    """(png, name) of some letters of a tar, the same ones every time."""
    with tarfile.open(path) as archive:
        content = {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]
    names = sorted(name for name in content if name.endswith(".png"))
    if len(names) < ROWS * COLUMNS:
        raise DataError(f"{path} has {len(names)} letters, a sheet {ROWS * COLUMNS}.")
    chosen = random.Random(1).sample(names, ROWS * COLUMNS)
    return [(content[name], content[name[:-4] + ".txt"].decode()) for name in chosen]


@torch.no_grad()
def captions(run: Path, files: list[bytes]) -> tuple[np.ndarray, list[str]]:
    """(pixels as the model sees them, what it says of each picture)."""
    folder = folders.find(run)
    tensors, record = open_model(folder), read_record(folder)
    raw, template = attachment(folder, "tokenizer.json"), attachment(folder, CHAT_TEMPLATE)
    if raw is None or template is None:
        raise CheckpointError(f"{folder} has no tokenizer or no chat template.")
    tokenizer = Tokenizer(raw, path=str(folder), eod=record.eod)
    chat = ChatTemplate(template.decode(), tokenizer)
    config = record.model()
    vision = config.vision
    token = tokenizer.backend.token_to_id("<|image|>")
    assert token is not None, "the tokenizer that the model was trained with"
    pictures = Pictures(vision.image_size, vision.patch_size, token)
    pixels = np.stack([decode(file, size=vision.image_size, most=10**6) for file in files])

    asked = np.array(chat.prompt_ids([{"role": "user", "content": [{"type": "image"}]}]))
    prompt, _ = spread(asked, np.zeros(len(asked), np.uint8), pictures)
    rows = torch.from_numpy(prompt).long().repeat(len(files), 1)
    images = torch.from_numpy(pixels)[:, None]
    model = LocalModel(config, lambda name: tensors.tensor(f"weights/{name}"))
    for _ in range(MOST_TOKENS):
        stands = rows == token
        patch_ids = torch.where(stands, stands.cumsum(1) - 1, -1)
        last = model.logits(rows, images=images, patch_ids=patch_ids)[:, -1]
        rows = torch.cat([rows, last.argmax(-1, keepdim=True).cpu()], 1)
    found = []
    for row in rows[:, len(prompt) :].tolist():
        ends = [row.index(end) for end in (record.end_of_turn, record.eod) if end in row]
        found.append(tokenizer.decode(np.array(row[: min(ends, default=len(row))])))
    return pixels, found


def draw(path: Path, pixels: np.ndarray, said: list[str], names: list[str]) -> None:
    """The sheet."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * COLUMNS, 2.1 * ROWS), layout="constrained")
    for axes, image, caption, name in zip(
        figure.subplots(ROWS, COLUMNS).flat, pixels, said, names, strict=True
    ):
        axes.imshow(image.transpose(1, 2, 0))
        axes.set_axis_off()
        is_right = caption == name
        words = textwrap.fill(caption, 24)
        if not is_right:
            words += "\n" + textwrap.fill(f"({name})", 24)
        axes.set_title(
            words, y=-0.1, va="top", size=7, color="tab:green" if is_right else "tab:red"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(run: Path, letters: Path, sheet: Path) -> None:
    """Ask, draw, count."""
    files, names = zip(*read_letters(letters), strict=True)
    pixels, said = captions(run, list(files))
    draw(sheet, pixels, said, list(names))
    for name, caption in list(zip(names, said, strict=True))[:8]:
        print(f"{name:<50} {caption if caption != name else 'right'}")
    right = sum(map(str.__eq__, said, names))
    print(f"{right} of {len(names)} names are right, letter for letter: {sheet}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
