"""To Hugging Face and back: the same logits, whatever the sizes."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.tensors import CheckpointTensors
from pipeline.config.choices import RopeScaling
from pipeline.config.model import ModelConfig, MoeConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.export import ExportConfig, main
from pipeline.huggingface import writer as export_module
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.reader import HuggingFaceWeights, read_model_config
from pipeline.huggingface.writer import DType, export, logits_difference
from tests.support.checkpoint_runs import Run
from tests.support.layouts import MODELS, VOCAB, config
from tests.support.ranks import run_on_ranks

TOLERANCE = 1e-4

# Beyond tests/layouts.MODELS: sizes and switches that change the spelling.
EXPORTED: dict[str, dict[str, Any]] = {
    "gpt2": MODELS["gpt2"],
    "gpt2-untied": MODELS["gpt2-untied"],
    "gpt2-without-biases": {**MODELS["gpt2"], "bias": False, "hidden_size": 60, "num_attention_heads": 3},
    "qwen3": MODELS["modern"],
    "llama": {**MODELS["modern"], "qk_norm": False, "tied_embeddings": True},
    "llama-one-group": {
        **MODELS["modern"], "qk_norm": False, "num_query_groups": 1, "rope_scaling": RopeScaling.llama3,
        "rope_scaling_factor": 4.0, "rope_original_max_seq_len": 16, "head_dim": 24,
    },
    "llama-linear-rope": {
        **MODELS["modern"], "qk_norm": False, "rope_scaling": RopeScaling.linear, "rope_scaling_factor": 2.0,
    },
    "llama-biases": {**MODELS["modern"], "qk_norm": False, "bias": True},
    "qwen2-biases": {**MODELS["modern"], "qk_norm": False, "qkv_bias": True},
    "mixtral": {**MODELS["modern"], "qk_norm": False, "moe": MoeConfig(num_experts=4, top_k=2)},
    "qwen3-moe": {**MODELS["modern"], "moe": MoeConfig(num_experts=4, top_k=2)},
    "qwen3-moe-switch": {**MODELS["modern"], "moe": MoeConfig(num_experts=4, top_k=1)},
}  # fmt: skip


def tokenizer_file(folder: Path) -> Path:
    """A tokenizer.json of VOCAB words: t0 t1 ..., the last one ends documents."""
    words = {f"t{i}": i for i in range(VOCAB - 1)} | {"<|endoftext|>": VOCAB - 1}
    backend = Backend(WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens(["<|endoftext|>"])
    path = folder / "tokenizer.json"
    backend.save(str(path))
    return path


def save_models(models: dict[str, dict[str, Any]], root: Path, tokenizer: Path) -> None:
    """A checkpoint of each model, trained for a step so that biases and norms are not 0 and 1. Collective."""
    for name, settings in models.items():
        cfg = config()
        cfg.model = ModelConfig(**settings)
        cfg.optimizer.lr = 0.03
        cfg.schedule.warmup_steps = 0
        run = Run(cfg, root / name, attachments={"tokenizer.json": tokenizer})
        run.train(0, 1)
        run.save(1)
        run.close()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of every model of EXPORTED, written by one process."""
    root = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(
        save_models, 1, {**EXPORTED, "capped": MODELS["capped"]}, root, tokenizer_file(root)
    )
    return root


def export_and_compare(
    names: list[str], root: Path, output: Path, dtype: DType
) -> dict[str, float]:
    """Largest difference of logits for each model; runs in a process of its own, which has the model's groups."""
    warnings.simplefilter("ignore")  # transformers warns about its own future
    found = {}
    for name in names:
        checkpoint = folders.find(root / name)
        export(checkpoint, output / name, dtype=dtype)
        found[name] = logits_difference(checkpoint, output / name, dtype=dtype)
    return found


@pytest.fixture(scope="module")
def exported(
    checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    """The exported folders in fp32, and how far their logits are from ours."""
    output = tmp_path_factory.mktemp("exported")
    return output, run_on_ranks(
        export_and_compare, 1, list(EXPORTED), checkpoints, output, DType.fp32
    )[0]


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_model_has_our_logits(name: str, exported: tuple[Path, dict[str, float]]) -> None:
    """Against transformers' own classes, in fp32."""
    assert exported[1][name] <= TOLERANCE


def test_bf16_export_has_our_logits_with_the_same_rounding(
    checkpoints: Path, tmp_path: Path
) -> None:
    """The usual export; only the rounding of the weights may differ from fp32."""
    names = ["gpt2", "qwen3"]
    found = run_on_ranks(export_and_compare, 1, names, checkpoints, tmp_path, DType.bf16)[0]
    assert max(found.values()) <= TOLERANCE
    for name in names:
        size = (tmp_path / name / "model.safetensors").stat().st_size
        whole = sum(CheckpointTensors(folders.find(checkpoints / name)).tensor(f"weights/{p}").numel()
                    for p in CheckpointTensors(folders.find(checkpoints / name)).parameters)  # fmt: skip
        assert 2 * whole < size < 2 * whole + 20_000, (
            "padding rows or a copy of the tied head were written"
        )


@pytest.mark.parametrize("name", EXPORTED)
def test_imported_weights_are_bitwise_those_exported(
    name: str, checkpoints: Path, exported: tuple[Path, dict]
) -> None:
    """Folder -> our names and layouts -> the checkpoint the folder was made from."""
    folder = exported[0] / name
    model = replace(ModelConfig(**EXPORTED[name]), vocab_size=VOCAB)
    if name == "gpt2-without-biases":  # GPT-2 always has biases; zeros are as good
        with pytest.raises(CheckpointError, match="model.bias=true"):
            HuggingFaceWeights(folder, model)
        return
    weights, tensors = (
        HuggingFaceWeights(folder, model),
        CheckpointTensors(folders.find(checkpoints / name)),
    )
    for parameter in tensors.parameters:
        whole = tensors.tensor(f"weights/{parameter}")
        assert torch.equal(weights.tensor(parameter, tuple(whole.shape)), whole), parameter


def loss_after_import(cfg: Any, folder: Path, root: Path) -> float:
    run = Run(cfg, root)
    from pipeline.training.initial_weights import load_weights

    load_weights(run.engine, folder)
    loss = run.train(0, 1)[0][0]
    run.close()
    return loss


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_training_starts_from_a_hugging_face_folder_at_any_layout(
    name: str, exported: tuple[Path, dict], tmp_path: Path
) -> None:
    """The first loss on four ranks is transformers' loss, tied copies of a pipeline included."""
    from transformers import AutoModelForCausalLM

    from tests.support.layouts import batches

    folder = exported[0] / name
    cfg = config("gpt2" if name == "gpt2" else "modern", tp=2, pp=2)
    ours = run_on_ranks(loss_after_import, 4, cfg, folder, tmp_path)[0]
    step = batches()[0]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            step["tokens"]
        ).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), step["labels"].flatten())
    assert ours == pytest.approx(float(theirs), rel=1e-5)


def test_folder_with_other_sizes_is_refused_with_the_settings_to_change(
    exported: tuple[Path, dict],
) -> None:
    """The message is what to type."""
    with pytest.raises(CheckpointError, match="model.num_layers=4 model.qk_norm=true"):
        HuggingFaceWeights(
            exported[0] / "qwen3",
            ModelConfig(**{**EXPORTED["llama"], "num_layers": 2, "tied_embeddings": False}),
        )


@pytest.mark.parametrize("name", EXPORTED)
def test_settings_read_from_a_folder_map_back_to_it(name: str, exported: tuple[Path, dict]) -> None:
    """pipeline.hf_import prints settings that train the same architecture."""
    model = read_model_config(exported[0] / name)
    written = json.loads((exported[0] / name / "config.json").read_text())
    again = mapping_for(model)
    free = {"architectures", "bos_token_id", "eos_token_id", "torch_dtype", "initializer_range"}
    assert {k: v for k, v in again.config.items() if k not in free} == {
        k: v for k, v in written.items() if k not in free
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt1", "norm_placement=post"),
        ("parallel", "parallel_residual"),
        ("capped", "logit_softcap=5.0"),
        ("mqa", "position=none"),
    ],
)
def test_model_that_no_class_computes_is_refused_with_the_reason(name: str, reason: str) -> None:
    """Gibberish after conversion is what makes people distrust exports."""
    with pytest.raises(ConfigError, match=reason):
        mapping_for(replace(ModelConfig(**MODELS[name]), vocab_size=VOCAB))


def wrong_export(root: Path, output: Path) -> str:
    warnings.simplefilter("ignore")
    right = export_module.mapping_for

    def wrong(model: ModelConfig) -> Any:
        mapping = right(model)
        return replace(mapping, config={**mapping.config, "layer_norm_epsilon": 0.1})

    export_module.mapping_for = wrong
    with pytest.raises(CheckpointError) as caught:
        main(ExportConfig(checkpoint=str(root / "gpt2"), output=str(output)))
    return str(caught.value)


def test_wrong_export_is_not_called_good(checkpoints: Path, tmp_path: Path) -> None:
    """The parity check must be able to fail, and then no folder may look usable."""
    message = run_on_ranks(wrong_export, 1, checkpoints, tmp_path / "wrong")[0]
    assert "the export is wrong" in message
    assert not (tmp_path / "wrong" / "config.json").exists()


def test_large_models_are_written_in_shards_with_an_index(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers finds every tensor through the index."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(export_module, "SHARD_BYTES", 100_000)
    export(folders.find(checkpoints / "llama"), tmp_path, dtype=DType.fp32)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3 and all(f.stat().st_size < 110_000 for f in files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    embedding = CheckpointTensors(folders.find(checkpoints / "llama")).tensor(
        "weights/embedding.word.weight"
    )
    assert torch.equal(model.model.embed_tokens.weight.detach(), embedding)


def test_tokenizer_and_card_travel_with_the_model(exported: tuple[Path, dict]) -> None:
    """AutoTokenizer without remote code gives our ids; the card says what the model was trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported[0] / "gpt2")
    assert tokenizer("t5 t17 t3")["input_ids"] == [5, 17, 3]
    assert tokenizer.eos_token_id == VOCAB - 1 and tokenizer.eos_token == "<|endoftext|>"
    card = (exported[0] / "gpt2" / "README.md").read_text()
    assert "512 tokens in 1 steps" in card and "GPT2LMHeadModel" in card
    generation = json.loads((exported[0] / "gpt2" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == VOCAB - 1


LM_EVAL_TASK = """
task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["t5", "t250"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_lm_eval_scores_an_exported_folder(exported: tuple[Path, dict], tmp_path: Path) -> None:
    """Any lm-eval task is one command away; here a local one of four questions, offline."""
    questions = "".join(json.dumps({"prompt": f"t{i} t{i + 1}"}) + "\n" for i in range(4))
    (tmp_path / "questions.jsonl").write_text(questions)
    (tmp_path / "counting.yaml").write_text(LM_EVAL_TASK.format(file=tmp_path / "questions.jsonl"))
    options = {
        "model": "hf", "model_args": f"pretrained={exported[0] / 'gpt2'}", "device": "cpu", "tasks": "counting",
        "include_path": str(tmp_path), "output_path": str(tmp_path / "scores.json"),
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        *(word for key, value in options.items() for word in (f"--{key}", value)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [scores] = [json.loads(path.read_text()) for path in tmp_path.glob("scores*.json")]
    assert 0.0 <= scores["results"]["counting"]["acc,none"] <= 1.0
    assert scores["n-samples"]["counting"]["effective"] == 4
