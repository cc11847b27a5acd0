"""Pictures of strangers, brought to one size; what cannot be is refused with a reason.

a record's path, address or bytes --fetch--> bytes
bytes --pipeline.data.picture_files--> (3, image_size, image_size) uint8
"""

from __future__ import annotations

import errno
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.picture_files import (
    MOST_MB,
    MOST_MEGAPIXELS,
    BadPicture,
    open_picture,
    squashed,
)
from pipeline.data.shard_format import MOST_IMAGE_SIZE
from pipeline.errors import ConfigError, DataError
from pipeline.files import read_file
from pipeline.remote import TooLarge, connect, read_small, reason_of

SUFFIXES = ("png", "jpg", "jpeg", "webp")
SCHEMES = ("http", "https", "s3", "s3a", "gs", "gcs")
_GONE = (401, 403, 410, 451)  # of http, beside 404: it will not be there later
PAUSES_S = (1.0, 5.0)
LARGEST_MEGAPIXELS = 178  # PIL.Image.MAX_IMAGE_PIXELS, twice
# http's client folds these (RFC 3986, 5.2.4), encoded or with a line break in between, so that
# https://host/photos/../x begins with https://host/photos/ and is fetched from elsewhere.
_LEADS_UP = re.compile(r"(?:^|/)(?:\.|%2e){2}(?:[/?#]|$)|[\x00-\x1f]", re.IGNORECASE)


@dataclass
class PictureConfig:
    """What becomes of the pictures of dialogues."""

    image_size: int | None = None
    """Side of the square that every picture is resized to, pixels; null: dialogues are text."""
    patch_size: int = 16
    """Side of a patch, pixels, as model.vision.patch_size; a picture takes
    (image_size / patch_size)^2 tokens of its row.
    """
    image_token: str = "<|image|>"
    """Special token of the tokenizer that stands for a patch in the rows."""
    image_root: str | None = None
    """Folder that the paths of pictures are relative to and must not leave; null: that of the file
    that names them.
    """
    image_urls: str = ""
    """Beginnings of the addresses that pictures are fetched from, separated by commas
    (`https://images.example.org/,s3://bucket/photos/`); empty: none are.
    """
    max_image_mb: float = MOST_MB
    """Larger files are rejected as picture_too_large."""
    max_image_megapixels: float = MOST_MEGAPIXELS
    """Pictures of more pixels are rejected before they are decoded; bounds the memory of a worker,
    at 8 bytes a pixel.
    """


def check_pictures_config(cfg: PictureConfig, row_tokens: int) -> None:
    """Raise ConfigError for what cannot be, of a config with an image_size."""
    size, patch = cfg.image_size or 0, cfg.patch_size
    if not (1 <= size <= MOST_IMAGE_SIZE and 1 <= patch <= size and size % patch == 0):
        raise ConfigError(
            f"image_size ({size}) must be from 1 to {MOST_IMAGE_SIZE} and a multiple of patch_size "
            f"({patch})."
        )
    if (patches := (size // patch) ** 2) >= row_tokens:
        raise ConfigError(
            f"a picture of image_size={size} takes {patches} tokens (patch_size={patch}), and "
            f"row_tokens={row_tokens} leaves no room for text beside it."
        )
    if 3 * patch**2 * row_tokens > 1 << 30:
        raise ConfigError(
            f"row_tokens ({row_tokens}) patches of {patch} x {patch} pixels are more than 1 GiB a "
            "row. Make rows shorter, or patches smaller."
        )
    for name in ("max_image_mb", "max_image_megapixels"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise ConfigError(f"{name} ({getattr(cfg, name)}) must be above 0 and finite.")
    if cfg.max_image_megapixels > LARGEST_MEGAPIXELS:
        raise ConfigError(
            f"max_image_megapixels ({cfg.max_image_megapixels}) must be at most "
            f"{LARGEST_MEGAPIXELS}: Pillow decodes no larger ones."
        )
    for prefix in _prefixes(cfg):
        match = re.fullmatch(r"(\w+)://[^/@?#\\]+/[^?#\\]*", prefix)
        if match is None or match[1] not in SCHEMES:
            raise ConfigError(
                f"image_urls: {prefix} is no beginning of an address: {', '.join(SCHEMES)}, then "
                "://, the host or bucket, and a slash."
            )


def load_picture(source: Any, folder: str, cfg: PictureConfig) -> np.ndarray:
    """(3, image_size, image_size) uint8 of one picture.

    Args:
        source: its bytes; or a path below `folder` or an address; or the problem that it already
            has.
        folder: of the file that names it; cfg.image_root comes before it.
        cfg: with an image_size.

    Raises:
        BadPicture: with one of the reasons in data_prep/sources/rejects.py.
        DataError: it could not be fetched this time.
    """
    if isinstance(source, BadPicture):
        raise source
    content = source if isinstance(source, bytes) else _content_of(source, folder, cfg)
    if not content:
        raise BadPicture("picture_missing", "no bytes")
    if len(content) > cfg.max_image_mb * 1e6:
        raise BadPicture("picture_too_large", f"{len(content)} bytes")
    assert cfg.image_size is not None
    return decode(content, size=cfg.image_size, most=int(cfg.max_image_megapixels * 1e6))


def decode(content: bytes, *, size: int, most: int) -> np.ndarray:
    """(3, size, size) uint8 of a png, jpeg or webp file of at most `most` pixels.

    Raises:
        BadPicture: it is none, has more pixels or several frames, or is damaged.
    """
    whole = squashed(open_picture(content, most=most), size, size)
    return np.ascontiguousarray(np.asarray(whole).transpose(2, 0, 1))


def _content_of(source: Any, folder: str, cfg: PictureConfig) -> bytes:
    """The bytes of a picture that is named by its place."""
    if not isinstance(source, str) or not source:
        raise BadPicture("picture_missing", f"{type(source).__name__} instead of a path or bytes")
    most = int(cfg.max_image_mb * 1e6)
    if "::" in source or source.startswith("data:"):
        raise BadPicture("picture_place", source[:100])
    if "://" in source:
        if not source.startswith(tuple(_prefixes(cfg))) or _LEADS_UP.search(source):
            raise BadPicture("picture_place", f"{source} is at none of image_urls")
        return _fetch(source, most)
    root = folder if cfg.image_root is None else cfg.image_root.rstrip("/")
    if "://" in root:
        if source.startswith("/") or _LEADS_UP.search(source):
            raise BadPicture("picture_place", f"{source} leads out of {root}")
        return _fetch(f"{root}/{source}", most)
    # By its words: whether there is such a file outside is nobody's business.
    if not Path(os.path.abspath(Path(root, source))).is_relative_to(os.path.abspath(root)):
        raise BadPicture("picture_place", f"{source} leads out of {root}")
    try:
        return read_file(Path(root, source), most=most, inside=root)
    except OSError as error:
        reason = {errno.ELOOP: "picture_place", errno.EFBIG: "picture_too_large"}
        missing = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.ENAMETOOLONG, errno.EISDIR)
        reason |= dict.fromkeys(missing, "picture_missing")
        if error.errno not in reason:
            raise
        detail = f"{source}: {error.strerror}"
        raise BadPicture(reason[error.errno], detail) from None


def _fetch(address: str, most: int) -> bytes:
    """The body at an address; what is gone for good is rejected, other failures end the job."""
    for pause in (*PAUSES_S, None):
        try:
            return read_small(*connect(address), most=most)
        except TooLarge as error:
            raise BadPicture("picture_too_large", str(error)) from None
        except FileNotFoundError:
            raise BadPicture("picture_missing", address) from None
        except ConfigError:
            raise
        except Exception as error:  # every fsspec file system raises its own
            if getattr(error, "status", None) in _GONE:
                raise BadPicture("picture_missing", f"{address}: {reason_of(error)}") from None
            if pause is None:
                raise DataError(
                    f"{address} could not be fetched: {reason_of(error)}. Nothing of its work unit "
                    "was written; run the same command again."
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try has returned or raised")


def _prefixes(cfg: PictureConfig) -> list[str]:
    return [word.strip() for word in cfg.image_urls.split(",") if word.strip()]


def folder_of(path: str) -> str:
    """The folder, or the address of one, that holds a file."""
    return path.rpartition("/")[0] if "://" in path else os.path.dirname(path) or "."


def decoder_version() -> str:
    """What the pixels of a job depend on beside its input: another release may round otherwise."""
    import PIL

    return f"Pillow {PIL.__version__}"
