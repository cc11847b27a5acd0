"""An adapter checkpoint as a folder that `peft` loads beside its base, and the proof of it.

    lora_a, lora_b --one linear at a time--> adapter_model.safetensors, adapter_config.json
    base + FOLDER --peft--> logits on fixed tokens == our own forward pass, or the export fails

Our query, key and value (gate and up) are one linear and share A: each of theirs gets a copy of A,
and the rows of B that its weight has of ours.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.adapters import find_base, recorded_base
from pipeline.checkpoint.record import read_record
from pipeline.config.parameter_names import is_lora, parameter_shapes
from pipeline.errors import CheckpointError, ConfigError
from pipeline.files import write_durably
from pipeline.huggingface.loading import load_transformers
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.rules import Mapping
from pipeline.huggingface.writer import (
    DTYPES,
    DType,
    copy_tokenizer,
    export,
    fixed_tokens,
    model_card,
    write_chat,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.checkpoint.tensors import CheckpointTensors

PREFIX = "base_model.model."
BASE = "base"
"""Folder beside the adapter with its base, where that was no Hugging Face folder."""


def export_adapter(
    checkpoint: Path, output: Path, *, dtype: DType, base: Path | None = None
) -> None:
    """Write the adapter, and its base where that is a checkpoint of ours; all but the proof.

    Raises:
        CheckpointError: the checkpoint is no adapter, or more than low-rank matrices was trained.
        ConfigError: no transformers class computes the model.
    """
    import torch

    from pipeline.checkpoint.safetensors_file import write_safetensors
    from pipeline.checkpoint.tensors import CheckpointTensors
    from pipeline.huggingface.whole_model import whole_base

    check_is_adapter(checkpoint)
    record, tensors = read_record(checkpoint), CheckpointTensors(checkpoint)
    wanted = recorded_base(record)
    assert wanted is not None
    source = find_base(wanted, base)
    wanted.check(whole_base(source))
    output.mkdir(parents=True, exist_ok=True)
    if not (source / "config.json").is_file():
        export(source, output / BASE, dtype=dtype)
        source = output / BASE
    mapping, finetune = mapping_for(record.model()), record.finetune()
    matrices = dict(_matrices(tensors, mapping))
    targets = sorted({name.split(".lora_")[0].removeprefix(PREFIX) for name in matrices})
    write_safetensors(
        output / "adapter_model.safetensors",
        {name: tuple(matrix.shape) for name, matrix in matrices.items()},
        matrices.values(),
        getattr(torch, DTYPES[dtype]),
    )
    tokenizer = copy_tokenizer(checkpoint, record, output)
    eod = record.eod if tokenizer is None else tokenizer.eod
    # peft generates by the base's settings: in one that is only here for the adapter they are its.
    for folder in (output, output / BASE) if source == output / BASE else (output,):
        write_chat(checkpoint, record, folder, eod=eod)
    card = model_card(record, mapping, dtype, library="peft", checkpoint=checkpoint)
    write_durably(output / "README.md", card.encode())
    write_json(
        output / "adapter_config.json",  # last: without it the folder is no adapter
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(source.absolute()),
            "r": finetune.lora_rank,
            "lora_alpha": finetune.lora_alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": targets,
            "fan_in_fan_out": mapping.is_transposed,
            "inference_mode": True,
        },
    )


def check_is_adapter(checkpoint: Path) -> None:
    """Raise unless low-rank matrices are all there is, by the record and the tensors' names.

    Raises:
        CheckpointError: the checkpoint is no adapter, or more was trained.
        ConfigError: it reads pictures.
    """
    record, reason = read_record(checkpoint), None
    if record.base is None or not record.finetune().lora_rank:
        reason = "it is no adapter"
    else:
        from pipeline.checkpoint.tensors import CheckpointTensors  # needs torch

        names = CheckpointTensors(checkpoint).parameters
        if more := [name for name in names if not is_lora(name)]:
            reason = f"{more[0]} was trained too"
    if reason is not None:
        raise CheckpointError(
            f"{checkpoint} cannot become a PEFT folder, which holds low-rank matrices only: "
            f"{reason}. Export it merged: adapter=false."
        )
    if record.model().vision.num_layers:
        raise ConfigError(
            f"{checkpoint} reads pictures: an adapter folder of such a model is not written. "
            "Export it merged, without adapter=true."
        )


def _matrices(tensors: CheckpointTensors, mapping: Mapping) -> Iterator[tuple[str, Tensor]]:
    """(their name, matrix) of every low-rank matrix; A of a fused linear once for each part."""
    own = set(tensors.parameters)
    for rule in mapping.rules:
        stem, _, kind = rule.name.rpartition(".")
        if kind != "weight" or f"{stem}.lora_a" not in own:
            continue
        a, b = (tensors.tensor(f"weights/{stem}.lora_{n}") for n in "ab")
        # B has the rows of W, and is cut where they are; Conv1D turns W, and not B.
        for theirs, rows in zip(rule.theirs, rule.split(b), strict=True):
            at = PREFIX + theirs.removesuffix(".weight")
            yield f"{at}.lora_A.weight", a
            yield f"{at}.lora_B.weight", rows.t() if mapping.is_transposed else rows


def adapter_difference(checkpoint: Path, output: Path, *, dtype: DType) -> tuple[float, float]:
    """Largest |difference| of fp32 logits: peft's and ours, and what the adapter itself changes.

    Ours are of W x + scale * B (A x), not of merged weights; the base's as the folder holds them.
    """
    import torch

    from pipeline.checkpoint.tensors import CheckpointTensors
    from pipeline.huggingface.reader import HuggingFaceWeights
    from pipeline.model.local_model import LocalModel

    peft: Any = importlib.import_module("peft")
    tensors, record = CheckpointTensors(checkpoint), read_record(checkpoint)
    config = json.loads((output / "adapter_config.json").read_text())
    source = Path(config["base_model_name_or_path"])
    model, finetune = record.model(), record.finetune()
    assert model.vocab_size is not None
    shapes = parameter_shapes(model, finetune, vocab_size=model.vocab_size)
    base, rounded = HuggingFaceWeights(source, model), getattr(torch, DTYPES[dtype])

    def weight(name: str) -> Tensor:
        if is_lora(name):
            return tensors.tensor(f"weights/{name}").to(rounded).float()
        return base.tensor(name, shapes[name])

    ours = LocalModel(model, weight, finetune=finetune)
    theirs = load_transformers(source, torch.float32, ours.device)
    tokens = fixed_tokens(model)
    with torch.no_grad():
        alone = theirs(input_ids=tokens.to(ours.device)).logits.float()
        adapted = peft.PeftModel.from_pretrained(theirs, str(output)).eval()
        logits = adapted(input_ids=tokens.to(ours.device)).logits.float()
    expected = ours.logits(tokens)
    logits, alone = (x[..., : model.vocab_size] for x in (logits, alone))
    return float((logits - expected).abs().max()), float((alone - expected).abs().max())
