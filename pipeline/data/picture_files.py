"""Pictures of strangers as what one sees: upright, RGB, on white; or refused with a reason.

    bytes --kind by content; pixels and frames by the header--> decoded --upright, on white--> Image
          --bicubic--> (side, side)

The header is judged before a pixel is decoded. Data, and those who ask a model about a picture,
read pictures here. Needs Pillow and numpy.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_SIGNATURES = {"PNG": rb"\x89PNG\r\n\x1a\n", "JPEG": rb"\xff\xd8\xff", "WEBP": rb"RIFF....WEBP"}
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
_TURNS |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
MOST_MB, MOST_MEGAPIXELS = 20.0, 50.0
"""Of a picture, where nobody says otherwise."""
MOST_SCANS = 100
"""Of a JPEG; a progressive one has some ten. Each is a pass over all pixels, of few bytes too."""
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""Of a JPEG's segments; within a scan's data a byte of ones is followed by 0 or a restart."""


class BadPicture(Exception):
    """A picture that cannot be shown."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def open_picture(content: bytes, *, most: int) -> Image.Image:
    """The picture of a png, jpeg or webp file of at most `most` pixels, RGB.

    Raises:
        BadPicture: it is none, has more pixels or several frames, or is damaged.
    """
    import PIL.Image

    kinds = [k for k, begin in _SIGNATURES.items() if re.match(begin, content, re.DOTALL)]
    if not kinds:
        raise BadPicture("not_a_picture", f"it begins with {content[:12]!r}")
    if kinds == ["JPEG"] and (scans := _num_scans(content)) > MOST_SCANS:
        raise BadPicture("picture_too_large", f"{scans} scans")
    try:
        with PIL.Image.open(io.BytesIO(content), formats=kinds) as image:
            width, height = image.size
            if width * height > most:
                raise BadPicture("picture_too_large", f"{width} x {height} pixels")
            if kinds != ["JPEG"] and (frames := getattr(image, "n_frames", 1)) > 1:
                raise BadPicture("animated_picture", f"{frames} frames")
            image.load()
            return _on_white(_upright(image))
    except (BadPicture, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise BadPicture("picture_too_large", str(error)) from None
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise BadPicture("damaged_picture", f"{type(error).__name__}: {error}") from None


def _num_scans(content: bytes) -> int:
    """Scans of a JPEG, of its first picture if there are several."""
    at, scans = 2, 0
    while (found := _MARKER.search(content, at)) and found[0] != b"\xff\xd9":
        scans += found[0] == b"\xff\xda"
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    return scans


def squashed(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture at the size that a model reads, as SigLIP's processor brings it there."""
    import PIL.Image

    return image.resize((width, height), PIL.Image.Resampling.BICUBIC)


def _upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF says that it was seen; damaged EXIF says nothing."""
    import PIL.Image

    turn = None
    with contextlib.suppress(Exception):
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return image.transpose(PIL.Image.Transpose[turn]) if turn else image


def _on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB; where it is transparent, on white."""
    import PIL.Image

    # 16 bits of grey: Pillow would cut off what is above 255.
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64) >> 8
        image = PIL.Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")
