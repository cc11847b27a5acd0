"""Pictures of letters with their names, for `make caption`; nothing is downloaded.

    python launch/letters.py OUT      OUT/train.tar, OUT/held.tar, OUT/wrong.tar, OUT/names.txt

matplotlib brings the twelve faces of DejaVu, Unicode has a name for every letter: "greek small
letter alpha with tonos". Ten faces are learned from. Of the other two, whose letters nobody has
seen in that shape, a thousand are held out: their names have been seen, their pictures have not.
`wrong.tar` has the same names under pictures of other letters: how much better the right picture
is, is what a model has seen in it.
"""

from __future__ import annotations

import io
import random
import sys
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

SIZE = 32
SCRIPTS = {"latin", "greek", "cyrillic", "armenian", "digit"}
HELD_FACES = ("DejaVuSansMono-Bold", "DejaVuSerif-Italic")
NUM_HELD = 1000


class Letter(NamedTuple):
    """One letter in one face."""

    face: str
    code: int
    name: str
    picture: bytes
    """png."""


def draw_letters() -> Iterator[Letter]:
    """All of them, face by face."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for path in sorted(folder.glob("DejaVu*.ttf")):
        if "Display" in path.name:  # a few letters of one of the others
            continue
        with TTFont(path) as file:
            codes = sorted(file.getBestCmap())
        font = ImageFont.truetype(str(path), int(SIZE * 0.72))
        for code in codes:
            name = unicodedata.name(chr(code), "").lower()
            is_letter = unicodedata.category(chr(code)) not in ("Mn", "Me", "Cf")
            if is_letter and name.split(" ")[0] in SCRIPTS and (picture := _draw(chr(code), font)):
                yield Letter(path.stem, code, name, picture)


def _draw(letter: str, font: ImageFont.FreeTypeFont) -> bytes:
    """White on black, in the middle; empty where the face shows nothing."""
    image = Image.new("L", (SIZE, SIZE), 0)
    ImageDraw.Draw(image).text((SIZE / 2, SIZE / 2), letter, 255, font, anchor="mm")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue() if image.getbbox() else b""


def write_tar(path: Path, letters: Sequence[Letter]) -> None:
    """A WebDataset tar: a png and a txt each."""
    with tarfile.open(path, "w") as archive:
        for letter in letters:
            stem = f"{letter.face}-{letter.code:05x}"
            for suffix, content in (("png", letter.picture), ("txt", letter.name.encode())):
                info = tarfile.TarInfo(f"{stem}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def main(output: Path) -> None:
    """Draw, hold out, write."""
    output.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    letters = list(draw_letters())
    train = [letter for letter in letters if letter.face not in HELD_FACES]
    known = {letter.name for letter in train}
    held = [one for one in letters if one.face in HELD_FACES and one.name in known]
    held = draw.sample(held, NUM_HELD)
    # Rows hold neighbours; a step of neighbours would be a step of one script.
    draw.shuffle(train)
    # By name, half the list further on: no name is there more than twice, so it is another one's.
    by_name = sorted(held, key=lambda letter: letter.name)
    others = by_name[NUM_HELD // 2 :] + by_name[: NUM_HELD // 2]
    pairs = zip(by_name, others, strict=True)
    wrong = [letter._replace(picture=other.picture) for letter, other in pairs]
    for name, part in (("train", train), ("held", held), ("wrong", wrong)):
        write_tar(output / f"{name}.tar", part)
    (output / "names.txt").write_text("".join(f"{name}\n" for name in sorted(known)))
    print(f"{len(train):,} pictures of {len(known):,} letters, {len(held):,} of unseen faces")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
