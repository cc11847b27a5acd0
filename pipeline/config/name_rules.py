"""The rules of settings that name parameters: learning rates, what is trained, where LoRA goes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator

from pipeline.config.choices import Init, OptimizerName, PipelineSchedule
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.parameter_names import (
    is_linear_weight,
    is_lora,
    linear_shapes,
    lora_stems,
    matching,
    parameter_names,
    trained_names,
)
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.stages import pad_vocabulary, partition, pipeline_costs, places_of
from pipeline.config.step_shape import full_seq_len
from pipeline.config.training import OptimizerConfig
from pipeline.config.vision import RowPictures, images_per_row


def names(cfg: PretrainConfig) -> Iterator[str]:
    """Every setting that names parameters names some, and they can do what it says."""
    yield from lr_scale(cfg.optimizer, cfg.model, cfg.finetune)
    yield from trained(cfg.finetune, cfg.model)
    yield from lora(cfg.finetune, cfg.model)
    yield from muon(cfg)


def unknown_patterns(
    setting: str, patterns: Iterable[str], names: Collection[str], model: ModelConfig
) -> Iterator[str]:
    """Patterns of canonical names that name nothing, each with the nearest one that would."""
    for pattern in patterns:
        if any(matching(names, [pattern], model)):
            continue
        in_every_layer = {re.sub(r"\.\d+\.", ".*.", name) for name in names}
        modules = {f"{name.rpartition('.')[0]}.*" for name in in_every_layer}
        near = difflib.get_close_matches(pattern, sorted({*names, *in_every_layer, *modules}), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"They are {', '.join(sorted(modules))}."
        if ".lora_" in pattern and not any(map(is_lora, names)):
            hint = "Low-rank matrices come with finetune=lora, or finetune.lora_rank=8."
        yield f"{setting}: {pattern} names no parameter of this model. {hint}"


def lr_scale(cfg: OptimizerConfig, model: ModelConfig, finetune: FinetuneConfig) -> Iterator[str]:
    """Every pattern of optimizer.lr_scale names a parameter, and its factor is a number."""
    names = parameter_names(model, finetune) if cfg.lr_scale else []
    for pattern, factor in cfg.lr_scale.items():
        if not 0 <= factor < math.inf:
            yield f"optimizer.lr_scale: the factor of {pattern} ({factor}) must be at least 0."
    yield from unknown_patterns("optimizer.lr_scale", cfg.lr_scale, names, model)


def trained(finetune: FinetuneConfig, model: ModelConfig) -> Iterator[str]:
    """Every pattern names a parameter, and something is trained."""
    names = parameter_names(model, finetune)
    if not finetune.train:
        yield "finetune.train is empty: nothing would be trained. '[\"*\"]' trains everything."
    yield from unknown_patterns("finetune.train", finetune.train, names, model)


def lora(finetune: FinetuneConfig, model: ModelConfig) -> Iterator[str]:
    """Low-rank matrices have a linear to stand beside, and are trained."""
    if not finetune.lora_rank:
        return
    targets, linears = finetune.lora_targets, list(linear_shapes(model))
    attention = [name for name in linears if ".self_attention." in name]
    if model.moe.num_experts and (
        set(lora_stems(model, finetune)) - set(attention)
        or any(unknown_patterns("", targets, attention, model))
    ):
        yield (
            f"finetune.lora_targets ({', '.join(targets)}) of a mixture of experts may name its "
            "attention only: a token passes some of the experts, and which scale their low-rank "
            "matrices would need is not known here. "
            "Set finetune.lora_targets='[*.self_attention.linear_*]'."
        )
    else:
        yield from unknown_patterns("finetune.lora_targets", targets, linears, model)
    if not finetune.lora_alpha > 0:
        yield f"finetune.lora_alpha ({finetune.lora_alpha}) must be above 0."
    if model.init is Init.mup:
        yield (
            "finetune.lora_rank needs another model.init than mup: which learning rate muP gives "
            "to low-rank matrices is not known here."
        )
    names = parameter_names(model, finetune)
    if not any(is_lora(name) for name in trained_names(names, model, finetune)):
        yield (
            f"finetune.lora_rank ({finetune.lora_rank}) adds matrices that finetune.train "
            f"({', '.join(finetune.train)}) leaves frozen at a product of 0. "
            "Add '*.lora_?' to finetune.train, or set finetune.lora_rank=0."
        )


def muon(cfg: PretrainConfig) -> Iterator[str]:
    """Muon has a matrix to update, and a device to do it on."""
    if cfg.optimizer.name is not OptimizerName.muon:
        return
    names = parameter_names(cfg.model, cfg.finetune)
    if not any(map(is_linear_weight, trained_names(names, cfg.model, cfg.finetune))):
        yield (
            "optimizer.name=muon would update nothing: it is for the weights of the blocks' "
            f"linears, and finetune.train ({', '.join(cfg.finetune.train)}) trains none of them "
            "(low-rank matrices have AdamW). Set optimizer=adamw."
        )
    if cfg.parallel.offload_optimizer:
        yield (
            "optimizer.name=muon does not work with parallel.offload_optimizer=true: its products "
            "are the device's, where only gradients would be. Set parallel.offload_optimizer=false "
            "(Muon's state is 4 bytes a weight instead of 8), or optimizer=adamw."
        )
    if (expert := cfg.parallel.expert_parallel_size) > 1:
        yield (
            f"optimizer.name=muon does not work with parallel.expert_parallel_size ({expert}): its "
            "ranks take each matrix to be on all of them, or split over the tensor-parallel ones. "
            "Set parallel.expert_parallel_size=1, or optimizer=adamw."
        )


def stages_train(
    cfg: PretrainConfig, tokenizer_vocab_size: int | None, pictures: RowPictures | None
) -> Iterator[str]:
    """Every stage of a pipeline has something to train.

    One that has not breaks the others: torch's AdamW refuses an empty list on that stage, and the
    other stages wait for it in an all-reduce until someone ends them.
    """
    pipeline, model = cfg.parallel.pipeline_parallel_size, cfg.model
    vocab_size = model.vocab_size if model.vocab_size is not None else tokenizer_vocab_size
    if pipeline == 1 or vocab_size is None:
        return
    is_dual = cfg.parallel.pipeline_schedule is PipelineSchedule["dualpipev"]
    tensor, seq_len = cfg.parallel.tensor_parallel_size, full_seq_len(cfg)
    costs = pipeline_costs(
        model,
        padded_vocab_size=pad_vocabulary(vocab_size, tensor_parallel_size=tensor),
        seq_len=seq_len,
        images_per_row=images_per_row(model, seq_len, pictures),
    )
    bounds = partition(costs, pipeline * (2 if is_dual else 1))
    names = parameter_names(model, cfg.finetune)
    busy = {
        place
        for name in trained_names(names, model, cfg.finetune)
        for place in places_of(name, model)
    }
    idle = [
        number
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:]))
        if not busy & set(range(start, stop))
    ]
    if idle and busy:
        yield (
            f"finetune.train ({', '.join(cfg.finetune.train)}) names nothing on stage "
            f"{', '.join(map(str, idle))} of {len(bounds) - 1} pipeline stages, and each of them "
            "must train something. Set parallel.pipeline_parallel_size=1 and use "
            "parallel.tensor_parallel_size or parallel.zero_stage=3 instead, or train something "
            "in every block (finetune=lora)."
        )
