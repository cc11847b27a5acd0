"""A picture that a model is asked about: the file, its pixels, and its placeholders in a prompt."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.files import read_file
from pipeline.huggingface.loading import load_processor

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES, MOST_PIXELS = 20 * 10**6, 50 * 10**6
KINDS = ["PNG", "JPEG", "WEBP"]


def open_picture(path: str) -> Image:
    """A png, jpeg or webp file, upright, in RGB, on white where it is transparent.

    Raises:
        ConfigError: it cannot be read, is none of these, is too large, or is damaged.
    """
    import PIL.Image
    import PIL.ImageOps

    try:
        content = read_file(path, most=MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"image={path} cannot be read: {error}.") from None
    try:
        with PIL.Image.open(io.BytesIO(content), formats=KINDS) as image:
            width, height = image.size  # of the header: nothing has been decoded yet
            if width * height > MOST_PIXELS:
                raise ConfigError(
                    f"image={path} has {width} x {height} pixels, more than {MOST_PIXELS:,}. Make "
                    "it smaller: the model sees it smaller still."
                )
            whole = PIL.ImageOps.exif_transpose(image)
            if whole.has_transparency_data:
                whole = whole.convert("RGBA")
                white = PIL.Image.new("RGBA", whole.size, "white")
                whole = PIL.Image.alpha_composite(white, whole)
            return whole.convert("RGB")
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise ConfigError(
            f"image={path} is no picture that can be shown ({', '.join(KINDS)}): "
            f"{type(error).__name__}: {error}."
        ) from None


def about_picture(prompt: str) -> dict[str, Any]:
    """What a user says who shows the picture and asks about it."""
    text = [{"type": "text", "text": prompt}] if prompt else []
    return {"role": "user", "content": [{"type": "image"}, *text]}


class ShownPicture:
    """The picture of a sampler's dialogues, each of which names it at most once."""

    def __init__(self, path: str, folder: Path, model: Any) -> None:
        """Read it as the model's own processor does.

        Args:
            folder: of the model.
            model: transformers', which reads pictures.

        Raises:
            ConfigError: the file is none.
        """
        config = model.config
        processor = load_processor(folder).image_processor
        pixels = processor(images=open_picture(path), return_tensors="pt")["pixel_values"]
        self._pixels = pixels.to(model.device, model.dtype)
        self._token, self._size = int(config.image_token_index), int(config.image_seq_length)

    def spread(self, ids: list[int]) -> list[int]:
        """The ids with a placeholder for each patch instead of the picture's one."""
        found: list[int] = []
        for token in ids:
            found += [token] * (self._size if token == self._token else 1)
        return found

    def given(self, rows: list[list[int]]) -> dict[str, Any]:
        """What the model is given beside rows of ids; turns may have been left out of them."""
        count = sum(row.count(self._token) for row in rows) // self._size
        return {"pixel_values": self._pixels.repeat(count, 1, 1, 1)} if count else {}
