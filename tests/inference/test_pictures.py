"""A picture in a prompt: bad files end in words, and what is shown is what the model answers about."""

from __future__ import annotations

import base64
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.sources.pictures import decode
from pipeline import cli
from pipeline.errors import ConfigError
from pipeline.generate import main
from pipeline.inference.generation import GenerateConfig
from pipeline.inference.pictures import Sight, about_pictures, picture_of_url, read_picture, url_of
from pipeline.inference.samplers import TransformersSampler, open_sampler
from tests.engine.test_pictures import PATCHES, PLACEHOLDER, pictured
from tests.support.checkpoint_runs import Run
from tests.support.exported import save_models, tokenizer_file
from tests.support.layouts import MODELS, config
from tests.support.ranks import run_on_ranks
from tests.support.strange_pictures import frames, png_that_says

TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<|image|> ' if part.type == 'image' else part.text }}{% endfor %}{% endif %} t7 {% endfor %}"
)


def picture(path: Path, seed: int = 0, mode: str = "RGB") -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 16, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def test_bad_files_end_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="image=.*none.png cannot be read"):
        read_picture(str(tmp_path / "none.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ConfigError, match="text.png is no PNG, JPEG or WebP"):
        read_picture(str(tmp_path / "text.png"))
    whole = Path(picture(tmp_path / "whole.png")).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cut.png is damaged"):
        read_picture(str(tmp_path / "cut.png"))
    monkeypatch.setattr("pipeline.inference.pictures.MOST_PIXELS", 100)
    with pytest.raises(ConfigError, match="is too large: 16 x 24 pixels; 100 pixels are the most"):
        read_picture(str(tmp_path / "whole.png"))


def address(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def test_an_address_holds_the_picture_itself(tmp_path: Path) -> None:
    """And comes back with every pixel."""
    path = picture(tmp_path / "a.png")
    found = picture_of_url(address(Path(path).read_bytes()))
    assert np.array_equal(np.asarray(found), np.asarray(read_picture(path)))
    assert np.array_equal(np.asarray(picture_of_url(url_of(found))), np.asarray(found))


@pytest.mark.parametrize(
    "url, part",
    [
        ("http://127.0.0.1:1/a.png", "nothing is fetched"),
        ("https://images.example.org/a.png", "nothing is fetched"),
        ("file:///etc/passwd", "nothing is fetched"),
        ("/etc/passwd", "nothing is fetched"),
        ("iVBORw0KGgo=", "nothing is fetched"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "nothing is fetched"),
        ("data:text/html;base64,PHN2Zy8+", "nothing is fetched"),
        ("data:image/png;base64,!!!!", "is no base64"),
        (address(b"<html>"), "is no PNG, JPEG or WebP"),
        (address(png_that_says(60_000, 60_000)), "is too large"),
        (address(frames("WEBP"), "webp"), "has several frames"),
        (address(bytes(21_000_000)), "is too large: more than 20,000,000 bytes"),
    ],
    ids=lambda value: value[:40],
)
def test_other_addresses_are_refused(url: str, part: str) -> None:
    """transformers' server would fetch them, or open files of this machine."""
    with pytest.raises(ConfigError, match=part):
        picture_of_url(url)


def llava_folder(folder: Path, **pixels: Any) -> Path:
    folder.mkdir()
    config = {"model_type": "llava", "image_token_index": 7, "image_seq_length": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def test_a_model_sees_squashed_pictures_and_a_placeholder_a_patch(tmp_path: Path) -> None:
    siglip = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 16, "width": 16},
    }
    sight = Sight.of(llava_folder(tmp_path / "siglip", **siglip))
    assert sight == Sight(7, 4, (16, 16))
    path = picture(tmp_path / "a.png")
    pixels = np.asarray(sight.shown(read_picture(path))).transpose(2, 0, 1)
    assert np.array_equal(pixels, decode(Path(path).read_bytes(), size=16, most=10**6))
    assert sight.spread([1, 7, 2], 1) == [1, 7, 7, 7, 7, 2]
    with pytest.raises(ConfigError, match="shows 1 pictures, and has 2 placeholders"):
        sight.spread([7, 7], 1)
    crops = Sight.of(llava_folder(tmp_path / "clip", image_processor_type="CLIPImageProcessor"))
    assert crops == Sight(7, 4, None) and crops.shown(read_picture(path)).size == (16, 24)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert Sight.of(tmp_path) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_seq_length": 10**12}, {"image_seq_length": 0}, {"image_token_index": True},
        {"size": {"height": 10**9, "width": 16}}, {"size": {"height": 16}}, {"size": [16, 16]},
    ],
)  # fmt: skip
def test_a_folder_asks_for_no_more_than_memory_has(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """A picture of 10^12 ids, or of 10^9 pixels a side."""
    folder = llava_folder(tmp_path / "a", image_processor_type="SiglipImageProcessor", **wrong)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(ConfigError, match="does not say how pictures are read"):
        Sight.of(folder)


def test_a_bad_picture_is_heard_of_before_the_model_is_read(tmp_path: Path) -> None:
    cfg = cli.compose(
        GenerateConfig, [f"{tmp_path}/none", "x", f"image={tmp_path}/none.png"], config="generate",
        positional=("checkpoint", "prompt"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="image=.*none.png cannot be read"):
        main(cfg)


def save(root: Path) -> None:
    path = tokenizer_file(root)
    save_models({"blind": MODELS["gpt2"]}, root, path)
    path.write_text(path.read_text().replace("<|endoftext|>", "<|image|>"))
    cfg = config("modern-pictures")
    cfg.optimizer.lr, cfg.schedule.warmup_steps = 0.03, 0
    run = Run(
        cfg, root / "sees",
        attachments={"tokenizer.json": path.read_bytes(), "chat_template.jinja": TEMPLATE.encode()},
        ends={"eod": 0, "end_of_turn": 1, "image_token_id": PLACEHOLDER},
    )  # fmt: skip
    run.steps = pictured()
    run.train(0, 2)
    run.save(2)
    run.close()


def answers(root: Path) -> dict[str, str]:
    """Of the sampler, of our own forward pass, and of another picture."""
    from pipeline.checkpoint import folder as folders
    from pipeline.checkpoint.record import read_record
    from pipeline.huggingface.whole_model import open_model
    from pipeline.model.local_model import LocalModel

    warnings.simplefilter("ignore")
    found = {}
    for seed in (0, 1):
        file = picture(root / f"{seed}.png", seed)
        cfg = GenerateConfig(checkpoint=str(root / "sees"), image=file, temperature=0.0, max_new_tokens=6)  # fmt: skip
        with open_sampler(cfg) as sampler:
            assert isinstance(sampler, TransformersSampler) and sampler.sight is not None
            image = read_picture(file)
            found[f"picture {seed}"] = sampler.answer(
                [[about_pictures([image], "t5")]], on_text=None
            )[0]
            pixels = torch.from_numpy(np.array(sampler.sight.shown(image))).permute(2, 0, 1)
            tokenizer = sampler.tokenizer
    checkpoint = folders.find(root / "sees")
    tensors = open_model(checkpoint)
    model = LocalModel(
        read_record(checkpoint).model(), lambda name: tensors.tensor(f"weights/{name}")
    )
    ids = [*[PLACEHOLDER] * PATCHES, 5, 7]
    for _ in range(6):
        row = torch.tensor([ids])
        stands = row == PLACEHOLDER
        patches = torch.where(stands, stands.cumsum(1) - 1, -1)
        token = int(model.logits(row, pixels[None, None], patches)[0, -1].argmax())  # fmt: skip
        ids.append(token)
        if token in (0, 1):
            break
    found["own"] = str(tokenizer.decode(ids[PATCHES + 2 :], skip_special_tokens=True))
    cfg = GenerateConfig(checkpoint=str(root / "blind"), image=str(root / "0.png"))
    try:
        with open_sampler(cfg):
            pass
    except ConfigError as error:
        found["blind"] = str(error)
    return found


def test_the_model_answers_about_the_picture_that_is_shown(tmp_path: Path) -> None:
    """Through transformers as by our own forward pass, greedily."""
    run_on_ranks(save, 1, tmp_path)
    found = run_on_ranks(answers, 1, tmp_path)[0]
    assert found["picture 1"] == found["own"]
    assert "this model reads no pictures" in found["blind"]
