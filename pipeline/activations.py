r"""Write down what stands at one place of a model for every token it reads: food for SAEs.

    python -m pipeline.activations runs/NAME place=layers.5 output=FOLDER            held-out data
    python -m pipeline.activations runs/NAME place=layers.5 output=FOLDER \
        'data.validation=[{path: OUT/train}]' sequences=100000

WebDataset tars in the order of the data, at any layout of the model; run it again and it goes on
where it ended. Sparse autoencoders are trained elsewhere: docs/probing.md shows how they read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import cli, log
from pipeline.errors import ConfigError
from pipeline.files import check_writable
from pipeline.inference.asked_model import (
    CACHE_DIR,
    AskedConfig,
    evaluation_of,
    open_asked_model,
)
from pipeline.probing.places import Place

if TYPE_CHECKING:
    from pipeline.distributed.ranks import Ranks

DType = Enum("DType", ["float32", "float16"])


@dataclass
class ActivationsConfig(AskedConfig):
    """Write activations of a checkpoint to WebDataset tars."""

    place: str = "???"
    """embedding (the stream before block 0), layers.N (after block N), layers.N.self_attention or
    layers.N.mlp (what they add to it).
    """
    output: str = "???"
    """Folder of the tars; what is whole in it is kept, the rest is written."""
    dtype: DType = DType.float32
    """float32 or float16 of the written activations; numpy has no bfloat16."""
    shard_sequences: int = 512
    """Sequences of a tar, which one rank writes: times seq_len x hidden_size numbers."""


def main(cfg: ActivationsConfig) -> int:
    """Write what is missing, and say where it is."""
    from pipeline.distributed.layout import disconnect
    from pipeline.distributed.ranks import ranks_from_environment

    ranks = ranks_from_environment()
    log.setup(global_rank=ranks.global_rank)
    written = write_activations(cfg, ranks)
    if ranks.is_main:
        print(f"{written} shards written\n{Path(cfg.output) / 'manifest.json'}")
    disconnect()
    return 0


def write_activations(cfg: ActivationsConfig, ranks: Ranks) -> int:
    """Build the model on this layout, dump; how many shards were missing. Collective.

    Raises:
        ConfigError: settings contradict each other, or the folder holds something else.
    """
    from pipeline.config.run_shape import derive_evaluation
    from pipeline.data.datasets import open_datasets

    _check(cfg)
    evaluation, path, data = evaluation_of(cfg)
    # A compiled block calls no hooks; and the mask is to tell which tokens there are.
    evaluation = replace(
        evaluation,
        model=replace(evaluation.model, compile=False),
        data=replace(evaluation.data, mask_eod_loss=False),
    )
    Place.of(cfg.place, num_layers=evaluation.model.num_layers)
    cache_dir = Path(evaluation.data.cache_dir or CACHE_DIR)
    datasets = open_datasets(
        evaluation.data.validation or [], cfg=evaluation.data, cache_dir=cache_dir
    )
    shape = derive_evaluation(
        evaluation, world_size=ranks.world_size, tokenizer_vocab_size=data.vocab_size,
        row_tokens=data.row_tokens,
    )  # fmt: skip

    from pipeline.distributed.layout import connect  # from here on torch is needed

    layout = connect(ranks, shape.sizes)
    from pipeline.probing.dump import Dump, plan_of, reading

    model, path = open_asked_model(evaluation, shape, layout, path=path)
    plan = plan_of(
        evaluation, datasets, checkpoint=str(path.resolve()), place=cfg.place,
        dtype=cfg.dtype.name, shard_sequences=cfg.shard_sequences, seq_len=shape.seq_len,
    )  # fmt: skip
    read = reading(model, datasets, evaluation, shape)
    rows = shape.micro_batch_size
    return Dump(model, plan, Path(cfg.output), read=read, micro_batch_size=rows).run()


def _check(cfg: ActivationsConfig) -> None:
    """Refuse sizes that mean nothing, before anything is read."""
    if cfg.shard_sequences < 1 or cfg.micro_batch_size < 1 or cfg.sequences < 0:
        raise ConfigError(
            f"shard_sequences ({cfg.shard_sequences}) and micro_batch_size "
            f"({cfg.micro_batch_size}) must be at least 1, sequences ({cfg.sequences}) at least 0 "
            "(all)."
        )
    output = Path(cfg.output)
    check_writable(output / "plan.json", "output=")
    if output.is_dir() and not (output / "plan.json").exists() and any(output.iterdir()):
        raise ConfigError(f"{output} holds other files: choose another output=FOLDER.")
    if (ranks := cfg.parallel.context_parallel_size) != 1:
        raise ConfigError(
            f"parallel.context_parallel_size ({ranks}) must be 1: what is written are whole "
            "sequences. Share the model by parallel.tensor_parallel_size instead."
        )


if __name__ == "__main__":
    cli.run(main, ActivationsConfig, config="activations", positional=("checkpoint",))
