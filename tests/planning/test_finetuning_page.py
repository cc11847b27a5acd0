"""docs/finetuning.md: what it says published models need is what the plan says of their config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.huggingface.settings import read_model_config
from pipeline.planning.job import Job
from pipeline.planning.memory import memory_of_stages, most_loaded
from pipeline.planning.trained import num_trained_parameters
from pipeline.rehearsal.dry_run import GPT2_VOCABULARY

PAGE = (Path(__file__).resolve().parents[2] / "docs/finetuning.md").read_text()
COMMON = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "intermediate_size": 14336,
}  # fmt: skip
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama 3.1 8B": {
        **COMMON, "model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 131072,
        "rope_scaling": SCALING,
    },
    "Qwen2.5 7B": {
        **COMMON, "model_type": "qwen2", "vocab_size": 152064, "rope_theta": 1e6, "max_position_embeddings": 131072,
        "use_sliding_window": False, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "hidden_size": 3584, "intermediate_size": 18944,
    },
    "Mistral 7B v0.3": {
        **COMMON, "model_type": "mistral", "vocab_size": 32768, "rope_theta": 1e6, "max_position_embeddings": 32768,
        "sliding_window": None,
    },
}  # fmt: skip
LORA = ["finetune=lora", "finetune.lora_rank=16"]


def rows() -> dict[str, list[str]]:
    """The first cell of each row of the page's table to the others."""
    heading = "| | " + " | ".join(MODELS) + " |\n"
    table = PAGE.split(heading)[1].split("\n\n")[0].splitlines()[1:]
    cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in table)
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize("name", MODELS)
def test_the_page_says_what_the_plan_says(name: str, tmp_path: Path) -> None:
    """A number that was copied once is wrong as soon as the plan learns something."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    model, column = read_model_config(tmp_path), list(MODELS).index(name)
    for first, values in rows().items():
        if first.startswith("numbers"):
            cfg = cli.compose(PretrainConfig, LORA, config="pretrain")
            trained = num_trained_parameters(model, cfg.finetune, model.vocab_size or 0)
            assert values[column] == f"{trained:,}"
            continue
        words = re.search("`([^`]+)`", first)[1].split()  # type: ignore[index]
        if words != ["finetune=full"]:
            masks = ["data.mask_documents=true", "data.reset_positions=true"]
            words = [*LORA, *[word for word in words if word not in LORA], *masks]
        given = ["training.total_steps=100", "training.seq_len=2048", "training.micro_batch_size=1"]
        given += ["data.path=x", "training.global_batch_size=64", *words]
        cfg = cli.compose(PretrainConfig, given, config="pretrain")
        cfg.model = model
        shape = derive(cfg, world_size=16, tokenizer_vocab_size=model.vocab_size)
        worst = most_loaded(memory_of_stages(Job.of(cfg, shape)))
        assert values[column] == f"{worst.total / 2**30:.1f}", first
    assert len(rows()) == 6


def test_the_table_of_what_is_trained_says_what_the_plan_says() -> None:
    """The same of the first table, of modern-7b on 8 devices, part by part."""
    table = PAGE.split("| | numbers trained |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 5
    for row in table:
        first, trained, *gib = (cell.strip() for cell in row.strip("|").split("|"))
        words = re.search("`([^`]+)`", first)[1].split()  # type: ignore[index]
        given = ["model=modern-7b", "training.seq_len=2048", "training.micro_batch_size=1"]
        given += [
            "data.path=x",
            "training.global_batch_size=64",
            "training.total_steps=100",
            *words,
        ]
        cfg = cli.compose(PretrainConfig, given, config="pretrain")
        shape = derive(cfg, world_size=8, tokenizer_vocab_size=GPT2_VOCABULARY)
        numbers = num_trained_parameters(cfg.model, cfg.finetune, shape.vocab_size)
        assert trained.split()[0] == f"{numbers:,}"
        worst = most_loaded(memory_of_stages(Job.of(cfg, shape)))
        parts = (worst.weights, worst.gradients, worst.optimizer, worst.activations)
        parts += (worst.temporaries, worst.total)
        assert gib == [f"{part / 2**30:.1f}" for part in parts], first
