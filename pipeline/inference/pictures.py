"""Pictures that a model is asked about: file or address, how it sees them, their placeholders.

image=FILE, /image FILE, a data: address --the rules of the data--> Image --Sight.shown--> pixels
ids of a dialogue, one placeholder a picture --Sight.spread--> one a patch
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.chat import Messages
from pipeline.data.picture_files import (
    MOST_MB,
    MOST_MEGAPIXELS,
    BadPicture,
    open_picture,
    squashed,
)
from pipeline.data.shard_format import MOST_IMAGE_SIZE
from pipeline.errors import ConfigError
from pipeline.files import parse_json, read_file
from pipeline.huggingface.processor import PREPROCESSOR, PROCESSOR

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MOST_BYTES, MOST_PIXELS = int(MOST_MB * 1e6), int(MOST_MEGAPIXELS * 1e6)
WHY = {
    "picture_too_large": "is too large",
    "not_a_picture": "is no PNG, JPEG or WebP",
    "damaged_picture": "is damaged",
    "animated_picture": "has several frames",
}
MOST_PATCHES = 1 << 16
"""Of a picture; the ids of a dialogue have one each."""
BLIND = "this model reads no pictures"


def read_picture(path: str) -> Image:
    """A png, jpeg or webp file, upright, in RGB, on white where it is transparent.

    Raises:
        ConfigError: it cannot be read, is none of these, is too large, or is damaged.
    """
    try:
        content = read_file(path, most=MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"image={path} cannot be read: {error}.") from None
    return _opened(content, f"image={path}")


def picture_of_url(url: str) -> Image:
    """The picture in a data: address; nothing is fetched, from nowhere.

    Raises:
        ConfigError: it is another address, or no picture as above.
    """
    head = re.match(r"data:image/[a-z]+;base64,", url[:100])
    if head is None:
        raise ConfigError(
            f"image_url is {url[:60]!r}: only pictures in the request itself are read, as "
            "data:image/png;base64,... (jpeg, webp); nothing is fetched."
        )
    if len(url) > MOST_BYTES * 4 / 3 + 100:
        raise ConfigError(f"image_url is too large: more than {MOST_BYTES:,} bytes.")
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"image_url is no base64: {error}.") from None
    return _opened(content, "image_url")


def _opened(content: bytes, name: str) -> Image:
    """By the rules that training data were read by."""
    try:
        return open_picture(content, most=MOST_PIXELS)
    except BadPicture as error:
        most = f"; {MOST_PIXELS:,} pixels are the most" if "large" in error.reason else ""
        raise ConfigError(f"{name} {WHY[error.reason]}: {error.detail}{most}.") from None


def url_of(image: Image) -> str:
    """The picture as a data: address, without loss."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def about_pictures(images: Sequence[Image], prompt: str) -> dict[str, Any]:
    """What a user says who shows pictures and asks about them."""
    text = [{"type": "text", "text": prompt}] if prompt else []
    return {"role": "user", "content": [*({"type": "image", "image": i} for i in images), *text]}


def parts_of(messages: Messages) -> list[dict[str, Any]]:
    """Parts of all contents that are lists, in order."""
    return [
        part for message in messages if isinstance(message["content"], list)
        for part in message["content"]
    ]  # fmt: skip


def pictures_in(messages: Messages) -> list[Image]:
    """The pictures of a dialogue, in order."""
    return [part["image"] for part in parts_of(messages) if part["type"] == "image"]


@dataclass(frozen=True)
class Sight:
    """How a Llava model sees."""

    token: int
    """Of its vocabulary, the one that stands for a patch."""
    patches: int
    """Of a picture."""
    size: tuple[int, int] | None
    """(width, height) that its pictures are squashed to; None: its processor does otherwise."""

    @classmethod
    def of(cls, folder: Path) -> Sight | None:
        """Of a Hugging Face folder; None: its model reads no pictures.

        Raises:
            ConfigError: the folder says it in another way.
        """
        try:
            config = parse_json(read_file(folder / "config.json"))
            if config.get("model_type") != "llava":
                return None
            # What transformers' LlavaConfig takes where a folder says nothing.
            token, patches = (
                config.get("image_token_index", 32000),
                config.get("image_seq_length", 576),
            )
            pixels = _pixels_of(folder)
            is_squashed = pixels.get("image_processor_type") == "SiglipImageProcessor"
            size = (pixels["size"]["width"], pixels["size"]["height"]) if is_squashed else None
            # A list of 10^12 ids and a picture of 10^9 pixels a side take all memory.
            counts = {"token": (token, 2**31), "patches": (patches, MOST_PATCHES)}
            counts |= {f"side {n}": (side, MOST_IMAGE_SIZE) for n, side in enumerate(size or ())}
            for name, (count, most) in counts.items():
                if type(count) is not int or not (name != "token") <= count <= most:
                    raise ValueError(f"{name} ({count!r}) is not within {most:,}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{folder} does not say how pictures are read: {type(error).__name__}: {error}."
            ) from None
        return cls(token, patches, size)

    def shown(self, image: Image) -> Image:
        """As the model reads it: the pixels that preparing data would have made."""
        return image if self.size is None else squashed(image, *self.size)

    def spread(self, ids: Sequence[int], count: int) -> list[int]:
        """The ids with a placeholder for each patch instead of each picture's one.

        Raises:
            ConfigError: `count` pictures are shown, and the ids have other placeholders.
        """
        written = list(ids).count(self.token)
        if written != count:
            raise ConfigError(
                f"the dialogue shows {count} pictures, and has {written} placeholders: its words "
                "must not spell one, and the model's chat template must write one a picture."
            )
        return [
            token for one in ids for token in [one] * (self.patches if one == self.token else 1)
        ]

    def given(self, images: Sequence[Image], processor: Any) -> Tensor:
        """(pictures, 3, height, width) that a model is given, as its own processor makes them."""
        shown = [self.shown(image) for image in images]
        pixels: Tensor = processor(images=shown, return_tensors="pt")["pixel_values"]
        return pixels


def _pixels_of(folder: Path) -> dict[str, Any]:
    """What a folder says of pixels; transformers 5 writes it into the processor's file."""
    for name, key in ((PREPROCESSOR, None), (PROCESSOR, "image_processor")):
        if (folder / name).is_file():
            found = parse_json(read_file(folder / name))
            found = found.get(key, {}) if key else found
            if found:
                return dict(found)
    return {}
