"""A picture in a prompt: bad files end in words, and what is shown is what the model answers about."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import cli
from pipeline.errors import ConfigError
from pipeline.generate import main
from pipeline.inference.generation import GenerateConfig
from pipeline.inference.pictures import about_picture, open_picture
from pipeline.inference.samplers import TransformersSampler, open_sampler
from tests.engine.test_pictures import PATCHES, PLACEHOLDER, pictured
from tests.support.checkpoint_runs import Run
from tests.support.exported import save_models, tokenizer_file
from tests.support.layouts import MODELS, config
from tests.support.ranks import run_on_ranks

TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<|image|> ' if part.type == 'image' else part.text }}{% endfor %}{% endif %} t7 {% endfor %}"
)


def picture(path: Path, seed: int = 0, mode: str = "RGB") -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 16, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def test_bad_files_end_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        open_picture(str(tmp_path / "none.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ConfigError, match="is no picture that can be shown .PNG, JPEG, WEBP."):
        open_picture(str(tmp_path / "text.png"))
    whole = Path(picture(tmp_path / "whole.png")).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cut.png is no picture that can be shown"):
        open_picture(str(tmp_path / "cut.png"))
    Image.new("RGB", (4, 4)).save(tmp_path / "other.gif")
    with pytest.raises(ConfigError, match="is no picture that can be shown"):
        open_picture(str(tmp_path / "other.gif"))
    monkeypatch.setattr("pipeline.inference.pictures.MOST_PIXELS", 100)
    with pytest.raises(ConfigError, match="16 x 24 pixels, more than 100"):
        open_picture(str(tmp_path / "whole.png"))


def test_a_bad_picture_is_heard_of_before_the_model_is_read(tmp_path: Path) -> None:
    cfg = cli.compose(
        GenerateConfig, [f"{tmp_path}/none", "x", f"image={tmp_path}/none.png"], config="generate",
        positional=("checkpoint", "prompt"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="image=.*none.png cannot be read"):
        main(cfg)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(open_picture(str(tmp_path / "clear.png"))).min() == 255


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
            assert isinstance(sampler, TransformersSampler) and sampler.shown is not None
            found[f"picture {seed}"] = sampler.answer([[about_picture("t5")]], on_text=None)[0]
            pixels = (sampler.shown._pixels + 1) * 127.5
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
        token = int(model.logits(row, pixels.round().to(torch.uint8)[None], patches)[0, -1].argmax())  # fmt: skip
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
