"""A LoRA run as a PEFT folder: peft computes what we compute; and merged, transformers does."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pipeline import export as command
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.adapters import delta
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.config.model import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.peft import adapter_difference, export_adapter
from pipeline.huggingface.writer import DType, export, logits_difference
from tests.inference.test_chat_models import CHATML, END, EOD
from tests.support.checkpoint_runs import Run
from tests.support.exported import EXPORTED, tokenizer_file
from tests.support.layouts import config
from tests.support.ranks import run_on_ranks

NAMES = ["gpt2", "llama", "qwen3"]


def opened_by_s_token(folder: Path) -> Path:
    """A tokenizer.json whose template puts t9 before every text, as Llama's puts `<s>`."""
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {
        "t9": {"id": "t9", "ids": [9], "tokens": ["t9"]}}, "single": [
        {"SpecialToken": {"id": "t9", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}  # fmt: skip
    path = tokenizer_file(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template}))
    return path


def save_adapters(names: list[str], root: Path, tokenizer: Path) -> None:
    """A base and a LoRA run beside it, far enough from it to be seen, for each model; norms too for one."""
    for name in [*names, "norms"]:
        for kind in ("base", "adapter"):
            model = ModelConfig(**EXPORTED.get(name, EXPORTED["gpt2"]))
            train = "*" if kind == "base" else "*.lora_?" + (" *norm.*" if name == "norms" else "")
            cfg = config(train=train, lora_rank=0 if kind == "base" else 4)
            cfg.model, cfg.optimizer.lr, cfg.schedule.warmup_steps = model, 0.03, 0
            base = None if kind == "base" else folders.find(root / name / "base")
            files = {"tokenizer.json": tokenizer.read_bytes()}
            ends = {"eod": EOD}
            if kind == "adapter":  # that learned dialogues, of a base that has read text
                files["chat_template.jinja"], ends["end_of_turn"] = CHATML.encode(), END
            run = Run(cfg, root / name / kind, attachments=files, base=base, ends=ends)
            run.train(0, 4)
            run.save(4)
            run.close()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    run_on_ranks(save_adapters, 1, NAMES, root, opened_by_s_token(root))
    return root


def merged_differences(root: Path, output: Path) -> dict[str, float]:
    warnings.simplefilter("ignore")  # transformers warns about its own future
    found = {}
    for name in [*NAMES, "norms"]:
        checkpoint = folders.find(root / name / "adapter")
        export(checkpoint, output / name, dtype=DType.fp32)
        found[name] = logits_difference(checkpoint, output / name, dtype=DType.fp32)
    return found


def test_merged_folders_have_our_logits(adapters: Path, tmp_path: Path) -> None:
    """Base plus product, in transformers' own classes; the card says how it was merged."""
    found = run_on_ranks(merged_differences, 1, adapters, tmp_path)[0]
    assert max(found.values()) < 1e-4, found
    card = (tmp_path / "llama" / "README.md").read_text()
    assert "rank 4, alpha 8; merged in fp32, then rounded" in card


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_holds_the_product_of_every_matrix(
    name: str, adapters: Path, tmp_path: Path
) -> None:
    """Without peft: what its files add to each of their matrices is what ours add to ours."""
    checkpoint = folders.find(adapters / name / "adapter")
    export_adapter(checkpoint, tmp_path, dtype=DType.fp32)
    files = load_file(tmp_path / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8.0)
    assert settings["fan_in_fan_out"] is (name == "gpt2")
    assert Path(settings["base_model_name_or_path"]) == tmp_path / "base"
    own, checked = CheckpointTensors(checkpoint), 0
    for rule in mapping_for(ModelConfig(**{**EXPORTED[name], "vocab_size": 250})).rules:
        stem = rule.name.removesuffix(".weight")
        if f"{stem}.lora_a" not in own.parameters:
            continue
        pair = (own.tensor(f"weights/{stem}.lora_{n}") for n in "ab")
        for theirs, expected in zip(rule.theirs, rule.split(delta(*pair, alpha=8.0)), strict=True):
            at = f"base_model.model.{theirs.removesuffix('.weight')}.lora_"
            found = 2.0 * files[f"{at}B.weight"] @ files[f"{at}A.weight"]
            torch.testing.assert_close(found.t() if name == "gpt2" else found, expected)
            checked += 1
    assert checked == len(settings["target_modules"]) == len(files) // 2
    assert not any("mlp.experts" in name for name in files)
    # Its tokenizer gives the ids of training: the template stays out, as in every export.
    assert AutoTokenizer.from_pretrained(tmp_path)("t1 t2").input_ids == [1, 2]


def test_an_adapter_of_a_chat_stops_where_its_turn_ends(adapters: Path, tmp_path: Path) -> None:
    """peft generates by the base's settings, and that of text ended at documents only."""
    export_adapter(folders.find(adapters / "llama" / "adapter"), tmp_path, dtype=DType.fp32)
    for folder in (tmp_path, tmp_path / "base"):
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [EOD, END]
        assert (folder / "chat_template.jinja").read_text() == CHATML


def test_more_than_low_rank_matrices_is_refused(adapters: Path, tmp_path: Path) -> None:
    for kind, reason in (
        ("norms/adapter", "final_norm.* was trained too"),
        ("norms/base", "it is no adapter"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            export_adapter(folders.find(adapters / kind), tmp_path / "out", dtype=DType.fp32)
        assert not (tmp_path / "out").exists()


def peft_differences(root: Path, output: Path) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found = {}
    for name in NAMES:
        checkpoint = folders.find(root / name / "adapter")
        export_adapter(checkpoint, output / name, dtype=DType.fp32)
        found[name] = adapter_difference(checkpoint, output / name, dtype=DType.fp32)
    return found


@pytest.mark.slow
def test_peft_computes_what_we_compute(adapters: Path, tmp_path: Path) -> None:
    """GPT-2, Llama and Qwen3; an adapter that is not loaded differs by more than 1e-2."""
    for name, (difference, moved) in run_on_ranks(peft_differences, 1, adapters, tmp_path)[
        0
    ].items():
        assert difference < 1e-4 and moved > 1e-2, (name, difference, moved)


def spoil(folder: Path, fault: str) -> None:
    """One mistake in a folder of peft that is right."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    settings, matrices = json.loads(config.read_text()), load_file(weights)
    if fault == "wrong alpha":
        settings["lora_alpha"] *= 2
    for name in list(matrices):
        if fault == "A transposed" and name.endswith("lora_A.weight"):
            matrices[name] = matrices[name].t().contiguous()
        if fault == "gate and up exchanged" and "gate_proj.lora_B" in name:
            up = name.replace("gate_proj", "up_proj")
            matrices[name], matrices[up] = matrices[up], matrices[name]
    config.write_text(json.dumps(settings))
    save_file(matrices, weights)


def told_of(root: Path, output: Path, fault: str) -> str:
    """What the export command says of a folder with a mistake."""
    warnings.simplefilter("ignore")

    def wrong(checkpoint: Path, output: Path, **kwargs: Any) -> None:
        export_adapter(checkpoint, output, **kwargs)
        spoil(output, fault)

    command.export_adapter = wrong
    cfg = command.ExportConfig(str(root / "llama/adapter"), str(output), DType.fp32, adapter=True)
    with pytest.raises(CheckpointError) as caught:
        command.main(cfg)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("wrong alpha", "the exported model's logits differ from ours by"),
        ("gate and up exchanged", "the exported model's logits differ from ours by"),
        ("A transposed", "peft could not compute what was exported .*size mismatch"),
    ],
)
def test_a_wrong_adapter_folder_is_not_called_good(
    fault: str, said: str, adapters: Path, tmp_path: Path
) -> None:
    """The proof must be able to fail, and then peft must find no adapter there."""
    message = run_on_ranks(told_of, 1, adapters, tmp_path / "out", fault)[0]
    assert re.search(said, message, re.DOTALL), message
    assert "was left without its adapter_config.json" in message
    assert not (tmp_path / "out/adapter_config.json").exists()
