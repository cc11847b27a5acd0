"""A checkpoint as a Hugging Face folder that loads without remote code, and the proof of it.

    checkpoint --one parameter at a time--> model-00001-of-00003.safetensors ..., config.json,
                                            tokenizer, README.md
    FOLDER --transformers--> logits on fixed tokens == our own forward pass, or the export fails

Memory: one parameter, and for the check the model twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.record import CHAT_TEMPLATE, CheckpointRecord, attachment, read_record
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import resolve
from pipeline.files import write_durably
from pipeline.huggingface.card_facts import privacy_facts
from pipeline.huggingface.json_files import write_json
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.processor import fixed_pictures, write_processor
from pipeline.huggingface.rules import Mapping, Rule

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.checkpoint.adapters import WholeTensors
    from pipeline.data.tokenizer import Tokenizer

DType = Enum("DType", ["fp32", "bf16", "fp16"])
# torch's names
DTYPES = {DType.fp32: "float32", DType.bf16: "bfloat16", DType.fp16: "float16"}
SHARD_BYTES = 5 * 10**9
# Largest |difference| of fp32 logits, given the same rounded weights.
TOLERANCE = 1e-4


def export(checkpoint: Path, output: Path, *, dtype: DType, base: Path | None = None) -> Mapping:
    """Write everything but the proof.

    Raises:
        ConfigError: no transformers class computes the model.
    """
    from pipeline.huggingface.whole_model import open_model

    record, tensors = read_record(checkpoint), open_model(checkpoint, base=base)
    model = record.model()
    mapping = mapping_for(model)
    output.mkdir(parents=True, exist_ok=True)
    write_weights(tensors, mapping, output, dtype=dtype)
    tokenizer = copy_tokenizer(checkpoint, record, output)
    eod = record.eod if tokenizer is None else tokenizer.eod
    ends = {"bos_token_id": eod, "eos_token_id": eod}
    config = {
        "architectures": [mapping.architecture],
        **mapping.config,
        **ends,
        "torch_dtype": DTYPES[dtype],
    }
    if model.vision.num_layers:
        config |= {"image_token_index": record.image_token_id}
        config["text_config"] = config["text_config"] | ends
        write_processor(model, output, tokenizer, record.image_token_id)
    write_chat(checkpoint, record, output, eod=eod)
    card = model_card(record, mapping, dtype, checkpoint=checkpoint)
    write_durably(output / "README.md", card.encode())
    write_json(output / "config.json", config)  # last: without it the folder is no model
    return mapping


def write_chat(
    checkpoint: Path, record: CheckpointRecord, output: Path, *, eod: int | None
) -> None:
    """Write what begins and ends a text: the chat template, if there is one, and the ends' ids."""
    generation: dict[str, Any] = {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod}
    template = attachment(checkpoint, CHAT_TEMPLATE)
    if template is not None:  # it stops where a turn ends, and where a document does
        write_durably(output / CHAT_TEMPLATE, template)
        generation["eos_token_id"] = list(dict.fromkeys([eod, record.end_of_turn]))
    write_json(output / "generation_config.json", generation)


def copy_tokenizer(checkpoint: Path, record: CheckpointRecord, output: Path) -> Tokenizer | None:
    """Write the checkpoint's tokenizer, if it has one, and give it."""
    from pipeline.data.tokenizer import Tokenizer

    raw = attachment(checkpoint, "tokenizer.json")
    if raw is None:
        return None
    tokenizer = Tokenizer(raw, path=str(checkpoint / "tokenizer.json"), eod=record.eod)
    write_tokenizer(tokenizer, output, max_seq_len=record.model().max_seq_len)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, output: Path, *, max_seq_len: int) -> None:
    """tokenizer.json and its settings: AutoTokenizer gives the ids that training saw.

    Training saw no `<s>` in front of a text, and whole documents: what would add tokens or cut is
    left out of the file.
    """
    content, backend = tokenizer.json, tokenizer.backend
    adds = backend.num_special_tokens_to_add(False) or backend.num_special_tokens_to_add(True)
    dropped = {
        "truncation": None,
        "padding": None,
        "post_processor": None if adds else content.get("post_processor"),
    }
    raw = tokenizer.raw
    if any(content.get(key) != value for key, value in dropped.items()):
        raw = json.dumps(content | dropped, ensure_ascii=False, indent=1).encode()
    write_durably(output / "tokenizer.json", raw)
    end = tokenizer.eod_token
    first = content.get("pre_tokenizer") or {}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": None,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        # Else transformers 4 switches the pretokenizer's own off.
        "add_prefix_space": bool(first.get("add_prefix_space", False)),
    }
    write_json(output / "tokenizer_config.json", settings)


def write_weights(tensors: WholeTensors, mapping: Mapping, output: Path, *, dtype: DType) -> None:
    """Write the safetensors files and their index, holding one parameter at a time."""
    import torch

    from pipeline.checkpoint.safetensors_file import write_safetensors

    shards = list(_shards(tensors, mapping, dtype))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    index: dict[str, str] = {}
    total = 0
    for name, rules in zip(names, shards, strict=True):
        shapes = {
            theirs: shape for rule in rules for theirs, shape in _shapes(tensors, rule).items()
        }
        values = _values(tensors, rules)
        total += write_safetensors(output / name, shapes, values, getattr(torch, DTYPES[dtype]))[0]
        index |= dict.fromkeys(shapes, name)
    if len(shards) > 1:
        document = {"metadata": {"total_size": total}, "weight_map": index}
        write_json(output / "model.safetensors.index.json", document)


def _shards(tensors: WholeTensors, mapping: Mapping, dtype: DType) -> Iterator[list[Rule]]:
    """The rules in files of at most SHARD_BYTES, or one parameter; absent biases in the last."""
    current: list[Rule] = []
    size = 0
    for rule in mapping.rules:
        more = _num_bytes(_shapes(tensors, rule), dtype)
        if current and size + more > SHARD_BYTES:
            yield current
            current, size = [], 0
        current.append(rule)
        size += more
    absent = {name: (shape, 0.0) for name, shape in mapping.zeros.items()} | mapping.idle
    constants = [
        Rule("", (name,), split=partial(_constant, shape, value))
        for name, (shape, value) in absent.items()
    ]
    yield current + constants


def _shapes(tensors: WholeTensors, rule: Rule) -> dict[str, tuple[int, ...]]:
    """Their names and shapes, found out on tensors without memory."""
    import torch

    whole = torch.empty(tensors.shape(f"weights/{rule.name}") if rule.name else (0,), device="meta")
    return {
        name: tuple(part.shape) for name, part in zip(rule.theirs, rule.split(whole), strict=True)
    }


def _values(tensors: WholeTensors, rules: list[Rule]) -> Iterator[Tensor]:
    for rule in rules:
        whole = tensors.tensor(f"weights/{rule.name}") if rule.name else None
        yield from rule.split(whole)  # type: ignore[arg-type]  # a constant looks at nothing


def _constant(shape: tuple[int, ...], value: float, _: Tensor) -> list[Tensor]:
    import torch

    return [torch.full(shape, value)]


def _num_bytes(shapes: dict[str, tuple[int, ...]], dtype: DType) -> int:
    return sum(map(math.prod, shapes.values())) * (4 if dtype is DType.fp32 else 2)


def logits_difference(
    checkpoint: Path, output: Path, *, dtype: DType, base: Path | None = None
) -> float:
    """Largest |difference| of fp32 logits, the folder's and ours, on equally rounded weights."""
    import torch

    from pipeline.huggingface.loading import load_transformers
    from pipeline.huggingface.whole_model import open_model
    from pipeline.model.local_model import LocalModel

    tensors, record = open_model(checkpoint, base=base), read_record(checkpoint)
    model = record.model()
    rounded = getattr(torch, DTYPES[dtype])
    ours = LocalModel(model, lambda name: tensors.tensor(f"weights/{name}").to(rounded).float())
    theirs = load_transformers(output, torch.float32, ours.device)
    tokens = fixed_tokens(model)
    seen: tuple[Tensor, ...] = ()
    shown: dict[str, Tensor] = {}
    if model.vision.num_layers:
        assert record.image_token_id is not None  # or the export would have said so
        tokens, images, patch_ids = fixed_pictures(model, tokens, record.image_token_id)
        seen = images, patch_ids
        shown = {"pixel_values": images.flatten(0, 1).to(ours.device).float() / 127.5 - 1}
    with torch.no_grad():
        logits = theirs(input_ids=tokens.to(ours.device), **shown).logits.float()
    return float((logits - ours.logits(tokens, *seen)).abs().max())


def fixed_tokens(model: ModelConfig) -> Tensor:
    """(2, at most 64 and a picture's) token ids on which logits are compared."""
    import torch

    vision = resolve(model).vision
    patches = 0 if vision is None else vision.num_patches
    shape = (2, min(model.max_seq_len, patches + 64))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.vocab_size or 1, shape, generator=generator)


def model_card(
    record: CheckpointRecord,
    mapping: Mapping,
    dtype: DType,
    *,
    library: str = "transformers",
    checkpoint: Path | None = None,
) -> str:
    """README.md of an exported folder: what was trained, on what, and how, and what it gives away.

    Args:
        library: that loads it; peft, where it is an adapter.
        checkpoint: of the record, beside which findings may lie; None: there are none.
    """
    config, model = record.config, record.model()
    facts = {
        "Class": mapping.architecture,
        "Layers, hidden size, heads": (
            f"{model.num_layers}, {model.hidden_size}, {model.num_attention_heads}"
        ),
        "Vocabulary, context": f"{model.vocab_size:,} tokens, {model.max_seq_len:,} tokens",
        "Trained on": f"{record.tokens_seen:,} tokens in {record.step:,} steps",
        "Data": ", ".join(dataset.path for dataset in record.data().train) or "unknown",
        "Dataset identities (SHA-256)": _identities(record),
        "Optimizer, peak learning rate": (
            f"{record.optimizer}, {config.get('optimizer', {}).get('lr', 'unknown')}"
        ),
        "Precision in training, of these weights": (
            f"{record.training().precision.name}, {dtype.name}"
        ),
        **_fine_tuning(record, is_merged=library == "transformers"),
        **privacy_facts(record, checkpoint),
        "Seed": config.get("seed", "unknown"),
        "Checkpoint": f"step {record.step}, saved {record.saved_at}",
        "Versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\n---\n\n"
        f"# {config.get('name', model.name)}\n\n{_what_it_does(record)}\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )


def _fine_tuning(record: CheckpointRecord, *, is_merged: bool) -> dict[str, str]:
    """What the card says of a run that trained a part of a model."""
    if record.base is None:
        return {}
    finetune = record.finetune()
    facts = {
        "Trained parameters": ", ".join(finetune.train),
        "Base (SHA-256)": f"{record.base['path']} ({record.base['sha256'][:16]}...)",
    }
    if finetune.lora_rank:
        facts["LoRA"] = f"rank {finetune.lora_rank}, alpha {finetune.lora_alpha:g}"
        if is_merged:
            facts["LoRA"] += (
                "; merged in fp32, then rounded: not bit for bit the base in this precision with "
                "the adapter beside it"
            )
    return facts


def _what_it_does(record: CheckpointRecord) -> str:
    """A sentence for the card."""
    if record.end_of_turn is None:
        return "A language model that continues text; it has had no instruction tuning."
    return (
        "A language model fine-tuned on dialogues: it answers in the form of its chat template "
        "(chat_template.jinja) and stops at the end of its turn."
    )


def _identities(record: CheckpointRecord) -> str:
    return (
        ", ".join(
            f"{facts['name']} {identity[:16]}..." for identity, facts in record.datasets.items()
        )
        or "unknown"
    )
