"""Parameter counts against the presets and the built model; FLOPs and MFU against published numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pipeline import cli
from pipeline.config.choices import Precision
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.training import ParallelConfig
from pipeline.planning.flops import flops_per_token, mfu, num_parameters, peak_tflops
from tests.support.ranks import run_on_ranks

PRESETS = sorted((cli.CONF_DIR / "model").glob("*.yaml"))


def preset(name: str, *overrides: str) -> ModelConfig:
    return cli.compose(PretrainConfig, [f"model={name}", *overrides], config="pretrain").model


def stated(path: Path) -> tuple[int, int | None]:
    """Parameter count and vocabulary that the preset's comment gives."""
    number = r"(\d[\d,]*)"
    comment = path.read_text().split("name:")[0]
    count = re.search(rf"{number} parameters", comment)
    vocab = re.search(rf"vocabulary of {number}", comment)
    assert count, f"{path} states no parameter count"
    return int(count[1].replace(",", "")), int(vocab[1].replace(",", "")) if vocab else None


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_states_its_parameter_count(path):
    """Who picks a preset picks by this number."""
    model, (count, vocab_size) = preset(path.stem), stated(path)
    assert num_parameters(model, model.vocab_size or vocab_size) == count


VARIANTS = [
    [],
    ["model.norm_placement=post"],
    [
        "model.position=rope",
        "model.normalization=rmsnorm",
        "model.activation=swiglu",
        "model.bias=false",
    ],
    ["model.qk_norm=true", "model.num_query_groups=2", "model.tied_embeddings=false"],
    ["model.qk_norm=true", "model.normalization=rmsnorm", "model.head_dim=16"],
    ["model.bias=false", "model.qkv_bias=true", "model.activation=swiglu"],
    ["model.parallel_residual=true"],
    [
        "model.bias=false",
        "model.moe.num_experts=4",
        "model.moe.ffn_hidden_size=64",
        "model.activation=swiglu",
    ],
    ["model.bias=false", "model.moe.num_experts=4", "model.moe.shared_expert_ffn_hidden_size=32"],
    ["model.bias=false", "model.vision.num_layers=2", "model.vision.image_size=32"],
]


VISION = (
    "model.vision.num_layers=2", "model.vision.hidden_size=32", "model.vision.num_attention_heads=4",
    "model.vision.image_size=16", "model.vision.patch_size=8",
)  # fmt: skip


def count_built(models: list[tuple[ModelConfig, int]]) -> list[int]:
    """Parameters of each (model, vocab_size), built by pipeline.model on the meta device."""
    from pipeline.config.parallel_sizes import ParallelSizes
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.model.architecture import Architecture
    from pipeline.model.gpt import GPT

    layout = connect(ranks_from_environment({}), ParallelSizes())
    counts = []
    for model, vocab_size in models:
        architecture = Architecture(model, ParallelConfig(), Precision.fp32, vocab_size, vocab_size)
        with torch.device("meta"):
            gpt = GPT(architecture, layout.tensor.group)
        counts.append(sum(parameter.numel() for parameter in gpt.parameters()))
    return counts


def test_every_preset_and_option_counts_what_is_built():
    """The formula, the presets' comments and the model that is trained must not drift apart."""
    models = {path.stem: (preset(path.stem), stated(path)[1]) for path in PRESETS}
    models |= {",".join(overrides): (preset("tiny", *overrides), 512) for overrides in VARIANTS}
    wanted = [(model, model.vocab_size or vocab_size) for model, vocab_size in models.values()]
    (built,) = run_on_ranks(count_built, 1, wanted)
    expected = [num_parameters(model, vocab_size) for model, vocab_size in wanted]
    assert dict(zip(models, built)) == dict(zip(models, expected))


def test_flops_equal_megatrons_formula_for_gpt3_175b():
    """Narayanan et al. 2021, section 3, without recomputation: 72 B s l h^2 (1 + s / 6h + V / 12lh)."""
    layers, hidden, seq_len, vocab = 96, 12288, 2048, 51200
    expected = (
        72 * layers * hidden**2 * (1 + seq_len / (6 * hidden) + vocab / (12 * layers * hidden))
    )
    assert flops_per_token(
        preset("gpt3-175b"), FinetuneConfig(), vocab_size=vocab, seq_len=seq_len
    ) == pytest.approx(expected, rel=1e-12)


def test_mfu_of_megatron_gpt3_is_the_one_palm_published():
    """PaLM's appendix B and table 3 put Megatron-Turing NLG 530B at 30.2 %: 2,240 A100, 65.43 K tokens/s.

    105 layers of width 20,480; they leave attention out of the 29.7 % and count it in the 30.2 %.
    """
    layers, hidden, seq_len = 105, 20480, 2048
    model = ModelConfig(
        name="mtnlg", num_layers=layers, hidden_size=hidden, num_attention_heads=128
    )
    flops = flops_per_token(model, FinetuneConfig(), vocab_size=51200, seq_len=seq_len)
    rate = 65.43e3 / 2240
    share = mfu(tokens_per_sec_per_device=rate, flops_per_token=flops, peak_tflops=312.0)
    assert share == pytest.approx(0.302, abs=0.002)


def test_pictures_cost_what_their_matrices_and_scores_do():
    """A patch is counted as a token; the row's tokens share what its pictures cost, whether blank or not."""
    text = preset("tiny")
    model = preset("tiny", *VISION)
    layers, width, patches, inputs, hidden = 2, 32, 4, 3 * 8 * 8, text.hidden_size
    matrices = layers * 12 * width**2 + inputs * width + width * hidden + hidden**2
    picture = patches * (6 * matrices - 2 * inputs * width + 12 * layers * width * patches)
    sizes = dict(vocab_size=512, seq_len=64)
    assert flops_per_token(model, FinetuneConfig(), images_per_row=3, **sizes) == pytest.approx(
        flops_per_token(text, FinetuneConfig(), **sizes) + 3 / 64 * picture, rel=1e-12
    )
    projector = FinetuneConfig(train=["vision.linear_?.*"])
    forward = patches * (2 * (matrices - width * hidden - hidden**2) + 4 * layers * width * patches)
    both = patches * (4 * width * hidden + 6 * hidden**2)
    frozen = flops_per_token(text, FinetuneConfig(train=["embedding.position.*"]), **sizes)
    found = flops_per_token(model, projector, images_per_row=1, **sizes) - frozen
    assert found == pytest.approx((forward + both) / 64, rel=1e-9)


def test_only_the_experts_a_token_visits_cost_flops():
    """A mixture's size and its cost are different numbers."""
    sparse = preset("tiny", "model.bias=false", "model.moe.num_experts=8", "model.moe.top_k=2")
    dense = preset("tiny", "model.bias=false", "model.ffn_hidden_size=1024")
    router = 6 * sparse.num_layers * sparse.hidden_size * 8
    sizes = {"vocab_size": 512, "seq_len": 128}
    assert flops_per_token(sparse, FinetuneConfig(), **sizes) == (
        flops_per_token(dense, FinetuneConfig(), **sizes) + router
    )


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("x86_64", None),
    ],
)
def test_peak_is_found_by_the_name_torch_gives(device, peak):
    """A name that contains another ("H200", "H20") must not take the other's peak."""
    assert peak_tflops(device) == peak


def test_mfu_is_none_where_the_peak_is_unknown():
    """A CPU has no datasheet number that would mean anything."""
    assert mfu(tokens_per_sec_per_device=1e3, flops_per_token=1e9, peak_tflops=None) is None
