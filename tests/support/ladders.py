"""A ladder of tiny runs on counting sequences, and runs that are written instead of made."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import cli
from pipeline.planning.flops import num_parameters
from pipeline.scaling.ladder import LadderConfig, Rung, SizeConfig, TargetConfig
from pipeline.scaling.law import Law
from pipeline.scaling.runs import run_dir

VOCAB = 512
LAW = Law(E=1.2, log_A=math.log(40), log_B=math.log(60), alpha=0.35, beta=0.4)
DATASETS = {"a" * 64: {"name": "train", "path": "train", "tokens": 1}}


def size(hidden: int, *tokens: float, settings: tuple[str, ...] = ()) -> SizeConfig:
    return SizeConfig([f"model.hidden_size={hidden}", *settings], list(tokens))


def ladder(
    runs_dir: Path | str = "runs", data: Path | str = "none", **changes: Any
) -> LadderConfig:
    """Three sizes of three lengths, and a target of sixteen times the compute."""
    values = {
        "name": "ladder",
        "runs_dir": str(runs_dir),
        "settings": [
            f"data.path={data}", "model=tiny", "model.num_layers=2", "model.num_attention_heads=2",
            "model.max_seq_len=32", "schedule=linear", "training.precision=fp32",
            "training.global_batch_size=4", "training.micro_batch_size=4", "tracking=local",
        ],
        "sizes": {f"w{hidden}": size(hidden, 1280, 2560, 5120) for hidden in (8, 16, 32)},
        "targets": {"large": TargetConfig(["model.hidden_size=64"], 40960.0)},
        **changes,
    }  # fmt: skip
    return LadderConfig(**values)


def write_run(
    rung: Rung, loss: float, *, datasets: dict[str, Any] | None = None, until: float = 1.0
) -> Path:
    """The folder that a run leaves: losses above the law until its end, where it is evaluated.

    Args:
        loss: held out, after the last step.
        datasets: identities it read.
        until: part of the run that is there; an unfinished one is not evaluated.
    """
    folder = run_dir(rung)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(cli.to_yaml(rung.cfg))
    facts = {
        "num_parameters": num_parameters(rung.cfg.model, rung.shape.vocab_size),
        "datasets": DATASETS if datasets is None else datasets,
    }
    rows: list[dict[str, Any]] = [{"event": "start", "world_size": 1, "facts": facts}]
    steps = rung.shape.total_steps
    for step in range(1, round(until * steps) + 1):
        tokens = step * rung.tokens // steps
        ended = loss * LAW.loss(rung.parameters, tokens) / LAW.loss(rung.parameters, rung.tokens)
        values = {"train/loss": ended * (1.3 - 0.3 * step / steps), "train/lr": 1e-3}
        values |= {"train/grad_norm": 1.0, "throughput/tokens_per_sec": 1e3}
        rows.append({"step": step, "tokens": tokens, **values})
    if until == 1:
        held_out = {"loss": loss, "ppl": float(np.exp(loss)), "bits_per_byte": loss}
        scores = {f"val/validation/{key}": value for key, value in held_out.items()}
        rows.append({"step": steps, "tokens": rung.tokens, **scores})
        (folder / "DONE").write_text(f"{steps}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_ladder(rungs: list[Rung], *, noise: float = 0.002) -> None:
    """Every run of a ladder, its loss that of LAW."""
    rng = np.random.default_rng(0)
    for rung in rungs:
        loss = LAW.loss(rung.parameters, rung.tokens) * np.exp(noise * rng.standard_normal())
        write_run(rung, float(loss))
