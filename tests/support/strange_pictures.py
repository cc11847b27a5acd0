"""Files that are pictures, or say so: whole, in motion, damaged, and bombs."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The picture as a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def two(mode: str = "RGB", left: object = RED, right: object = BLUE) -> Image.Image:
    """16 x 16 pixels: a half of each colour."""
    image = Image.new(mode, (16, 16), left)
    image.paste(right, (8, 0, 16, 16))
    return image


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def png_that_says(width: int, height: int) -> bytes:
    """A few hundred bytes that claim any size: what comes of decoding them is not tried."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def with_a_text_bomb() -> bytes:
    """A PNG whose compressed note is 100 MB long."""
    body = b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9)
    chunk = (
        struct.pack(">I", len(body))
        + b"zTXt"
        + body
        + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    )
    whole = file_of(two())
    return whole[:33] + chunk + whole[33:]


def with_many_scans(count: int, side: int = 64) -> bytes:
    """A progressive JPEG of one colour whose last scan comes again and again: every time a pass over all pixels."""
    whole = file_of(Image.new("RGB", (side, side), RED), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * count + whole[-2:]


def changed(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def frames(kind: str) -> bytes:
    return file_of(two(), kind, save_all=True, append_images=[two(left=BLACK)], duration=100)
