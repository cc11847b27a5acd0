"""What a picture is opened as; tests/sources/test_pictures.py has every kind of bad and good one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.data.picture_files import BadPicture, open_picture, squashed
from tests.support.strange_pictures import BLUE, RED, WHITE, file_of, png_that_says, two


def test_a_picture_is_opened_whole_in_rgb_and_on_white() -> None:
    assert open_picture(file_of(two()), most=256).tobytes() == two().tobytes()
    clear = open_picture(file_of(Image.new("RGBA", (2, 2), (0, 0, 0, 0))), most=4)
    assert clear.mode == "RGB" and clear.getpixel((0, 0)) == WHITE


def test_its_size_is_judged_before_a_pixel_is_decoded() -> None:
    with pytest.raises(BadPicture, match="256"):
        open_picture(png_that_says(256, 1), most=255)


def test_it_is_squashed_to_the_size_of_the_model() -> None:
    small = np.asarray(squashed(two().resize((16, 8)), 4, 4))
    assert small.shape == (4, 4, 3) and tuple(small[0, 0]) == RED and tuple(small[3, 3]) == BLUE
