"""Pictures of strangers: each kind of bad one has its reason, and what is accepted is what one sees."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.pictures import PictureConfig, check_pictures_config, decode, load_picture
from data_prep.sources.rejects import PICTURE_REASONS
from pipeline.data.picture_files import BadPicture
from pipeline.errors import ConfigError
from tests.support.strange_pictures import (
    BLACK,
    BLUE,
    RED,
    WHITE,
    changed,
    file_of,
    frames,
    noise,
    png_that_says,
    two,
    with_a_text_bomb,
    with_many_scans,
)  # fmt: skip

SIZE = 8


BAD: dict[str, tuple[Callable[[], object], str]] = {
    # what it is: (what makes it, its reason)
    "a bomb: 60,000 x 60,000 pixels in a header": (lambda: png_that_says(60_000, 60_000), "picture_too_large"),
    "more pixels than max_image_megapixels": (lambda: png_that_says(3_000, 1_000), "picture_too_large"),
    "a file above max_image_mb": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(400_000), "picture_too_large"),
    "a note that inflates to 100 MB": (with_a_text_bomb, "damaged_picture"),
    "a JPEG of a thousand passes over its pixels": (lambda: with_many_scans(1000), "picture_too_large"),
    "no bytes": (lambda: b"", "picture_missing"),
    "null": (lambda: None, "picture_missing"),
    "a number": (lambda: 7, "picture_missing"),
    "an empty path": (lambda: "", "picture_missing"),
    "a file that is not there": (lambda: "none.png", "picture_missing"),
    "a folder": (lambda: "folder", "picture_missing"),
    "a pipe, which would be waited for": (lambda: "pipe.png", "picture_missing"),
    "a NUL in the name": (lambda: "a\0.png", "picture_missing"),
    "a path that leads out": (lambda: "../outside.png", "picture_place"),
    "an absolute path": (lambda: "/etc/passwd", "picture_place"),
    "a link that leads out": (lambda: "link.png", "picture_place"),
    "an address that nobody allowed": (lambda: "http://169.254.169.254/latest/a.png", "picture_place"),
    "a chain of file systems": (lambda: "https://good.example/a::file:///etc/passwd", "picture_place"),
    "an address that only begins alike": (lambda: "https://good.example.evil.example/a.png", "picture_place"),
    "an address that leads up": (lambda: "https://good.example/photos/../a.png", "picture_place"),
    "the same, encoded": (lambda: "https://good.example/photos/%2e%2E?a.png", "picture_place"),
    "the same, with what clients leave out": (lambda: "https://good.example/photos/.\t./a.png", "picture_place"),
    "a file of this machine as an address": (lambda: "file:///etc/passwd", "picture_place"),
    "data in the address": (lambda: "data:image/png;base64,iVBORw0KGgo=", "picture_place"),
    "words": (lambda: b"<html>404 not found</html>", "not_a_picture"),
    "a GIF": (lambda: file_of(two(), "GIF"), "not_a_picture"),
    "a BMP": (lambda: file_of(two(), "BMP"), "not_a_picture"),
    "a TIFF": (lambda: file_of(two(), "TIFF"), "not_a_picture"),
    "an SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_a_picture"),
    "a PNG that ends in its middle": (lambda: file_of(noise())[:6000], "damaged_picture"),
    "a JPEG that ends in its middle": (lambda: file_of(noise(), "JPEG")[:1500], "damaged_picture"),
    "a WebP that ends in its middle": (lambda: file_of(noise(), "WEBP")[:1500], "damaged_picture"),
    "a PNG of its first bytes": (lambda: file_of(two())[:20], "damaged_picture"),
    "a PNG with a changed pixel": (lambda: changed(file_of(noise()), 300), "damaged_picture"),
    "a PNG in motion": (lambda: frames("PNG"), "animated_picture"),
    "a WebP in motion": (lambda: frames("WEBP"), "animated_picture"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, with one outside of it."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "in" / "folder").mkdir(parents=True)
    (root / "outside.png").write_bytes(file_of(two()))
    (root / "in" / "a.png").write_bytes(file_of(two()))
    (root / "in" / "link.png").symlink_to("../outside.png")
    (root / "in" / "near.png").symlink_to("a.png")
    os.mkfifo(root / "in" / "pipe.png")
    return root / "in"


def config(**fields: Any) -> PictureConfig:
    small: dict[str, Any] = {
        "max_image_mb": 0.3,
        "max_image_megapixels": 1.0,
        "image_urls": "https://good.example/",
    }
    return PictureConfig(**{"image_size": SIZE, "patch_size": 4} | small | fields)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_has_its_reason(folder: Path, kind: str) -> None:
    """Whatever a stranger puts there: no crash, no other file read, no gigabyte taken."""
    make, reason = BAD[kind]
    with pytest.raises(BadPicture) as caught:
        load_picture(make(), str(folder), config())
    assert caught.value.reason == reason
    assert reason in PICTURE_REASONS and caught.value.detail


def halves(picture: np.ndarray) -> list[tuple[int, ...]]:
    """Colours far from the edge: left and right, or above and below, of (3, 8, 8)."""
    assert picture.shape == (3, SIZE, SIZE) and picture.dtype == np.uint8
    return [tuple(picture[:, 4, 1].tolist()), tuple(picture[:, 4, 6].tolist())]


def palette_with_a_hole() -> bytes:
    """A palette's picture whose second colour is transparent."""
    image = Image.new("P", (16, 16), 0)
    image.putpalette([*RED, *BLACK])
    image.paste(1, (8, 0, 16, 16))
    return file_of(image, transparency=1)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def with_broken_exif() -> bytes:
    return file_of(two(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")


GOOD: dict[str, tuple[Callable[[], bytes], list[tuple[int, ...]]]] = {
    "RGB": (lambda: file_of(two()), [RED, BLUE]),
    "grey": (lambda: file_of(two("L", 0, 255)), [BLACK, WHITE]),
    "black and white": (lambda: file_of(two("1", 0, 1)), [BLACK, WHITE]),
    "16 bits of grey: the upper 8": (
        lambda: file_of(Image.fromarray(np.repeat([[0x2000] * 8 + [0xFFFF] * 8], 16, 0).astype(np.uint16))),
        [(32, 32, 32), WHITE],
    ),
    "a palette": (lambda: file_of(two().quantize(2)), [RED, BLUE]),
    "a palette with a transparent colour: on white": (palette_with_a_hole, [RED, WHITE]),
    "transparent: on white": (lambda: file_of(two("RGBA", (*RED, 255), (*BLUE, 0))), [RED, WHITE]),
    "half transparent grey: on white": (lambda: file_of(two("LA", (0, 255), (0, 0))), [BLACK, WHITE]),
    "lossless WebP": (lambda: file_of(two(), "WEBP", lossless=True), [RED, BLUE]),
    "EXIF that mirrors": (lambda: file_of(two(), exif=exif(2)), [BLUE, RED]),
    "EXIF that turns over": (lambda: file_of(two(), exif=exif(3)), [BLUE, RED]),
    "RGB with a transparent colour: on white": (lambda: file_of(two(), transparency=BLUE), [RED, WHITE]),
    "black and white with transparent white: on white": (lambda: file_of(two("1", 0, 1), transparency=1), [BLACK, WHITE]),
    "progressive JPEG": (lambda: file_of(two("L", 0, 255), "JPEG", progressive=True, quality=100), [BLACK, WHITE]),
    "damaged EXIF: as it is stored": (with_broken_exif, [RED, BLUE]),
    "a suffix of another kind: by content": (lambda: file_of(two(), "WEBP", lossless=True), [RED, BLUE]),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_what_is_accepted_is_what_one_sees(kind: str) -> None:
    """Each mode and direction, as docs/pictures.md says it."""
    make, expected = GOOD[kind]
    assert halves(decode(make(), size=SIZE, most=10**6)) == expected


def test_a_jpeg_in_four_inks_is_read_as_red_green_and_blue() -> None:
    """CMYK by the plain formula; a profile is not applied."""
    content = file_of(two().convert("CMYK"), "JPEG", quality=100)
    found = np.array(halves(decode(content, size=SIZE, most=10**6)))
    assert np.abs(found - np.array([RED, BLUE])).max() < 12


def test_exif_of_a_phone_held_upright_turns_the_picture() -> None:
    """Orientation 6: what is stored at the left is seen above."""
    found = decode(file_of(two(), "JPEG", quality=100, exif=exif(6)), size=SIZE, most=10**6)
    assert found[0, 1, 4] > 200 > 60 > found[0, 6, 4]


def test_resizing_is_bicubic_to_the_square() -> None:
    """Pinned, as the pixels of an exported model's processor must be ours: SiglipImageProcessor's."""
    image = noise().crop((0, 0, 64, 20))
    ours = decode(file_of(image), size=SIZE, most=10**6)
    theirs = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(ours, theirs)


def test_paths_are_relative_to_the_file_that_names_them_or_to_image_root(folder: Path) -> None:
    """A link inside is followed: download caches consist of them."""
    for name in ("a.png", "near.png", "folder/../a.png", str(folder / "a.png")):
        assert halves(load_picture(name, str(folder), config())) == [RED, BLUE]
    assert halves(load_picture("in/a.png", str(folder), config(image_root=str(folder.parent)))) == [
        RED,
        BLUE,
    ]


@pytest.mark.parametrize("name", ["../x.png", "a/..", "a/%2e%2e/x.png", ".\n./x.png", "/x.png"])
def test_a_remote_folder_is_not_left(name: str) -> None:
    """Its client would fold the dots."""
    for root in ("https://good.example/a", "s3://bucket/a"):
        with pytest.raises(BadPicture, match="leads out"):
            load_picture(name, root, config())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_size": 10}, "a multiple of patch_size"),
        ({"image_size": 0}, "from 1 to 4096"),
        ({"image_size": 8192}, "from 1 to 4096"),
        ({"patch_size": 1}, "takes 64 tokens .* leaves no room"),
        ({"max_image_mb": 0}, "above 0"),
        ({"max_image_megapixels": float("nan")}, "above 0"),
        ({"max_image_megapixels": 200}, "Pillow decodes no larger"),
        ({"image_urls": "https://"}, "no beginning of an address"),
        ({"image_urls": "https://good.example"}, "and a slash"),
        ({"image_urls": "file:///etc/"}, "no beginning of an address"),
        ({"image_urls": "https://user@host/"}, "no beginning of an address"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, object], said: str) -> None:
    """Before a picture is read."""
    check_pictures_config(config(), 64)
    with pytest.raises(ConfigError, match=said):
        check_pictures_config(config(**fields), 64)


def test_every_reason_is_met_by_a_bad_picture_or_named_elsewhere() -> None:
    """A reason that nothing gives is none; pictures_mismatch is a fault of the record."""
    assert {reason for _, reason in BAD.values()} | {"pictures_mismatch"} == set(PICTURE_REASONS)
    assert len(BAD) >= 20 and all(re.match(r"[a-z_]+$", reason) for reason in PICTURE_REASONS)
