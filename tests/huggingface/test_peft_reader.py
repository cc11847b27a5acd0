"""A folder of peft's to go on training: its function is kept at every layout, and what does not fit is refused."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import folder as folders
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.huggingface.loading import load_transformers
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.peft import export_adapter
from pipeline.huggingface.peft_reader import PeftMatrices
from pipeline.huggingface.writer import DType
from tests.support.checkpoint_runs import History, Run
from tests.support.exported import EXPORTED, tokenizer_file
from tests.support.layouts import VOCAB, batches, config, rank_batches
from tests.support.ranks import run_on_ranks

NAMES = ["gpt2", "qwen3"]
SCALE = 2.0


def model_of(name: str) -> ModelConfig:
    return ModelConfig(**{**EXPORTED[name], "vocab_size": VOCAB})


def run_config(name: str, *, rank: int = 4, **layout: Any) -> Any:
    cfg = config(train="*.lora_?", lora_rank=rank, **layout)
    cfg.finetune.lora_alpha = SCALE * rank
    cfg.model, cfg.optimizer.lr, cfg.schedule.warmup_steps = ModelConfig(**EXPORTED[name]), 0.03, 0
    return cfg


# ---- there and back ------------------------------------------------------------------------------


def train_and_export(root: Path, tokenizer: bytes) -> dict[str, History]:
    """For each model a base, an adapter of four steps as a folder of peft, and what its fifth step said."""
    found, files = {}, {"tokenizer.json": tokenizer}
    for name in NAMES:
        for kind in ("base", "adapter"):
            cfg, base = run_config(name), None
            if kind == "base":
                cfg.finetune = FinetuneConfig()
            else:
                base = folders.find(root / name / "base")
            run = Run(cfg, root / name / kind, attachments=files, base=base)
            run.train(0, 4)
            run.save(4)
            found[name] = run.train(4, 5)
            run.close()
        checkpoint = folders.find(root / name / "adapter")
        export_adapter(checkpoint, root / name / "peft", dtype=DType.fp32)
    return found


def go_on(root: Path, layouts: list[dict[str, Any]]) -> list[tuple[str, History]]:
    """(model, its fifth step) from the exported folders, at each layout; collective."""
    from pipeline.training.initial_weights import load_adapter

    found = []
    for name in NAMES:
        for layout in layouts:
            cfg, folder = run_config(name, **layout), root / name / "peft"
            run = Run(cfg, root / "unused", base=folder / "base")
            assert run.base is not None
            load_adapter(run.engine, folder, cfg.finetune, base=run.base)
            found.append((name, run.train(4, 5)))
            run.close()
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, History]]:
    root = tmp_path_factory.mktemp("peft")
    return root, run_on_ranks(train_and_export, 1, root, tokenizer_file(root).read_bytes())[0]


def test_an_exported_adapter_goes_on_where_it_was(
    exported: tuple[Path, dict[str, History]],
) -> None:
    """Export, import: the next loss and gradient norm are those of the run that was not left, at any layout."""
    root, expected = exported
    found = run_on_ranks(go_on, 2, root, [dict(tp=2, sp=True), dict(zero=3), dict(pp=2)])[0]
    for name, history in found:
        assert history[0] == pytest.approx(expected[name][0], rel=1e-5), name


def test_more_rank_than_the_folder_has_adds_nothing_yet(
    exported: tuple[Path, dict[str, History]],
) -> None:
    """The loss is the same; the gradient has more numbers, as the rest of A is drawn and of B 0."""
    root, expected = exported
    for name, history in run_on_ranks(go_on, 1, root, [dict(rank=6)])[0]:
        assert history[0][0] == pytest.approx(expected[name][0][0], rel=1e-5)
        assert history[0][1] > 1.01 * expected[name][0][1]


# ---- folders that peft wrote ---------------------------------------------------------------------

TARGETS = {
    "gpt2": ["attn.c_attn", "mlp.c_proj"],
    "qwen3": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
    "llama": ["self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"],
}
# What our settings must be for r=2, lora_alpha=3 and those modules: (rank, alpha).
ROOM = {"gpt2": (2, 3.0), "qwen3": (4, 6.0), "llama": (4, 6.0)}


def peft_folder(folder: Path, name: str, base: Path | None = None, **settings: Any) -> Path:
    """As peft leaves one: random matrices, an A for each of their linears, in every layer."""
    mapping, generator = mapping_for(model_of(name)), torch.Generator().manual_seed(5)
    tensors = {}
    for rule in mapping.rules:
        if not rule.name.endswith(".weight") or "linear_" not in rule.name:
            continue
        rows, columns = shape_of(name, rule.name)
        parts = rule.split(torch.empty(rows, columns, device="meta"))
        for theirs, part in zip(rule.theirs, parts, strict=True):
            module = theirs.removesuffix(".weight")
            if module.endswith(tuple(TARGETS[name])):
                out, into = part.shape[::-1] if mapping.is_transposed else part.shape
                for kind, shape in (("A", (2, into)), ("B", (out, 2))):
                    matrix = torch.randn(shape, generator=generator) * 0.1
                    tensors[f"base_model.model.{module}.lora_{kind}.weight"] = matrix
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "bias": "none", "lora_dropout": 0.1,
        "target_modules": [target.rpartition(".")[2] for target in TARGETS[name]], "use_dora": False, "rank_pattern": {},
        "base_model_name_or_path": str(base), "fan_in_fan_out": mapping.is_transposed, "init_lora_weights": True,
        **settings,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def shape_of(name: str, weight: str) -> tuple[int, int]:
    from pipeline.config.parameter_names import linear_shapes

    return linear_shapes(model_of(name))[weight.removesuffix(".weight")]


def finetune_of(name: str, **changes: Any) -> FinetuneConfig:
    rank, alpha = ROOM[name]
    return replace(FinetuneConfig(["*.lora_?"], lora_rank=rank, lora_alpha=alpha), **changes)


@pytest.mark.parametrize("name", TARGETS)
def test_the_product_is_that_of_their_matrices(name: str, tmp_path: Path) -> None:
    """Query and value with an A each, gate and up, Conv1D: scale * B A of ours is theirs, row by row."""
    folder = peft_folder(tmp_path / "a", name)
    theirs, finetune = load_file(folder / "adapter_model.safetensors"), finetune_of(name)
    matrices = PeftMatrices(folder, model_of(name), finetune)
    mapping, checked = mapping_for(model_of(name)), 0
    for rule in mapping.rules:
        stem = rule.name.removesuffix(".weight")
        if stem not in matrices.stems:
            continue
        parts = rule.split(torch.zeros(shape_of(name, rule.name)))
        for number, weight in enumerate(rule.theirs):
            at = f"base_model.model.{weight.removesuffix('.weight')}.lora_"
            if f"{at}A.weight" in theirs:
                product = 1.5 * theirs[f"{at}B.weight"] @ theirs[f"{at}A.weight"]
                parts[number] = product.t() if mapping.is_transposed else product
                checked += 1
        a, b = matrices.pair(stem)
        ours = finetune.lora_alpha / finetune.lora_rank * b @ a
        torch.testing.assert_close(ours, rule.join(parts))
    assert checked == len(theirs) // 2 == 4 * len(TARGETS[name])


def losses_of_both(root: Path) -> dict[str, tuple[float, float, float]]:
    """(ours, peft's, the base's alone) of one batch for each model."""
    from peft import PeftModel

    from pipeline.training.initial_weights import load_adapter

    warnings.simplefilter("ignore")
    found = {}
    for name in NAMES:
        base = root / name / "peft/base"
        folder = peft_folder(root / name / "foreign", name, base)
        cfg = run_config(name)
        cfg.finetune = finetune_of(name)
        run = Run(cfg, root / "unused", base=base)
        assert run.base is not None
        load_adapter(run.engine, folder, cfg.finetune, base=run.base)
        step = batches()[7]
        scores = run.engine.evaluate(rank_batches(step, run.shape, run.layout))
        run.close()
        model = load_transformers(base, torch.float32, torch.device("cpu"))
        said = []
        for one in (model, None):
            one = one or PeftModel.from_pretrained(model, str(folder)).eval()
            with torch.no_grad():
                logits = one(input_ids=step["tokens"]).logits[..., :VOCAB]
            said.append(float(F.cross_entropy(logits.flatten(0, 1), step["labels"].flatten())))
        found[name] = (float(scores.nats / scores.tokens), said[1], said[0])
    return found


@pytest.mark.slow
def test_what_goes_on_is_what_peft_computes(exported: tuple[Path, dict[str, History]]) -> None:
    """GPT-2 and Qwen3 with some of their linears; an A that were left out would be seen."""
    for name, (ours, theirs, alone) in run_on_ranks(losses_of_both, 1, exported[0])[0].items():
        assert ours == pytest.approx(theirs, rel=1e-5) and abs(alone - theirs) > 1e-3, name


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "has use_dora=True"),
    ({"bias": "all"}, "has bias=all"),
    ({"modules_to_save": ["lm_head"]}, "has modules_to_save="),
    ({"rank_pattern": {"q_proj": 8}}, "has rank_pattern="),
    ({"alpha_pattern": {"q_proj": 8}}, "has alpha_pattern="),
    ({"init_lora_weights": "pissa"}, "has init_lora_weights=pissa"),
    ({"peft_type": "LOHA"}, "has peft_type=LOHA"),
    ({"something_new": 1}, "has something_new=1"),
    ({"r": 0}, "adapter_config.json is damaged: r is 0"),
    ({"r": 3}, "r is 3"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_what_is_not_computed_here_is_refused_by_name(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Read without its extras, an adapter would be another function, and nothing would say so."""
    folder = peft_folder(tmp_path / "a", "qwen3", **settings)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        PeftMatrices(folder, model_of("qwen3"), finetune_of("qwen3"))


def test_other_tensors_are_refused_by_name(tmp_path: Path) -> None:
    def holding(name: str, change: dict[str, torch.Tensor], *, without: str = "-") -> Path:
        folder = peft_folder(tmp_path / name, "qwen3")
        path = folder / "adapter_model.safetensors"
        tensors = {k: v for k, v in load_file(path).items() if without not in k}
        save_file(tensors | change, path)
        return folder

    head = "base_model.model.lm_head.lora_A.weight"
    wide = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    cut = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for folder, said in (
        (holding("head", {head: torch.ones(2, 64)}), "holds base_model.model.lm_head"),
        (holding("whole", {"base_model.model.lm_head.weight": torch.ones(2)}), "holds base_model"),
        (holding("wide", {wide: torch.ones(2, 65)}), "Is this the model that the adapter belongs"),
        (holding("quantised", {wide: torch.ones(2, 64, dtype=torch.int8)}), "is of type I8"),
        (holding("lone", {}, without="layers.0.mlp.down_proj.lora_B"), "only one matrix of the two"),
        (holding("none", {}, without="lora"), "holds no matrices"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=said):
            PeftMatrices(folder, model_of("qwen3"), finetune_of("qwen3"))
    short = PeftMatrices(
        holding("short", {cut: torch.ones(1, 2)}), model_of("qwen3"), finetune_of("qwen3")
    )
    with pytest.raises(CheckpointError, match="has 1 rows, the linear 64"):
        short.pair("layers.0.self_attention.linear_qkv")
    damaged = peft_folder(tmp_path / "damaged", "qwen3") / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="adapter_model.safetensors cannot be read"):
        PeftMatrices(damaged.parent, model_of("qwen3"), finetune_of("qwen3"))
    with pytest.raises(CheckpointError, match="nowhere is no folder of peft"):
        PeftMatrices(tmp_path / "nowhere", model_of("qwen3"), finetune_of("qwen3"))


def test_settings_that_have_no_room_are_told_the_ones_that_have(tmp_path: Path) -> None:
    """r=2 and two matrices A beside one linear of ours are rank 4; rsLoRA's scale is another."""
    folder, model = peft_folder(tmp_path / "a", "qwen3"), model_of("qwen3")
    attention = ["*.self_attention.linear_proj"]
    for changes, said in (
        ({"lora_rank": 0}, "2 matrices A .* set finetune.lora_rank=4$"),
        ({"lora_rank": 2}, "set finetune.lora_rank=4$"),
        ({"lora_alpha": 5.0}, "set finetune.lora_alpha=6$"),
        ({"lora_rank": 8}, "set finetune.lora_alpha=12$"),
        (
            {"lora_targets": attention, "lora_alpha": 1.0},
            r"lora_targets='\[\*.self_attention.linear_qkv,\*.mlp.linear_fc2\]' finetune.lora_alpha=6$",
        ),
    ):
        with pytest.raises(CheckpointError, match=f"(?s){said.removesuffix('$')}\\.$"):
            PeftMatrices(folder, model, finetune_of("qwen3", **changes))
    rooted = peft_folder(tmp_path / "rooted", "qwen3", use_rslora=True)
    with pytest.raises(CheckpointError, match="finetune.lora_alpha=8.48528137"):
        PeftMatrices(rooted, model, finetune_of("qwen3"))
    PeftMatrices(rooted, model, finetune_of("qwen3", lora_alpha=3 * 2**0.5 * 2))


def bases(root: Path) -> list[str]:
    """What is said where the folder names another base that is there, and one that is not."""
    from pipeline.training.initial_weights import load_adapter

    said = []
    for number, other in enumerate((root / "gpt2/peft/base", Path("hub/name"))):
        folder = peft_folder(root / f"beside-{number}", "qwen3", other)
        cfg = run_config("qwen3")
        cfg.finetune = finetune_of("qwen3")
        run = Run(cfg, root / "unused", base=root / "qwen3/peft/base")
        assert run.base is not None
        try:
            load_adapter(run.engine, folder, cfg.finetune, base=run.base)
            said.append("went on")
        except CheckpointError as error:
            said.append(str(error))
        run.close()
    return said


def test_an_adapter_of_another_base_is_refused(exported: tuple[Path, dict[str, History]]) -> None:
    """Of one that is not there nobody can tell: the log says so."""
    other, unknown = run_on_ranks(bases, 1, exported[0])[0]
    assert "is not the base of this adapter" in other and unknown == "went on"
