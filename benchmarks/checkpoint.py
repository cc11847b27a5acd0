"""Saving and loading a training state: ours against torch.save, DeepSpeed's own checkpoint, and torch DCP as it comes.

    python benchmarks/checkpoint.py                          125M parameters (1.5 GB of fp32 weights and moments)
    python benchmarks/checkpoint.py --layers 38 --rounds 3   500M parameters (6 GB); needs 20 GiB of memory

All save the same tensors: fp32 weights and both AdamW moments of one process's engine. Each contender has a process of
its own, one after the other because of the memory; medians over rounds, the first one (allocations, imports) left out.
The page cache is warm for every load.

    stall      time that training stands still; for the synchronous three, the whole save
    first      our first save, which also faults the host copy's pages in
    save       until everything is written; ours includes fsync and SHA-256, the others neither
    load       into the engine's tensors; ours includes checking every SHA-256
    extra GiB  peak memory above that of the engine itself
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]
CONTENDERS = ("ours", "torch.save", "deepspeed", "dcp")
WIDTH, VOCAB = 1024, 32000


def build(layers: int) -> Any:
    """An engine on one process whose optimizer has moments."""
    from pipeline.cli import compose
    from pipeline.config.pretrain import PretrainConfig
    from pipeline.config.run_shape import derive
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.engine import state
    from pipeline.training.build import build_engine

    cfg = compose(
        PretrainConfig,
        [
            "name=bench", "model=tiny", f"model.num_layers={layers}", f"model.hidden_size={WIDTH}",
            "model.num_attention_heads=16", "model.max_seq_len=64", "training.precision=fp32",
            "training.global_batch_size=1", "training.micro_batch_size=1",
        ],
        config="pretrain",
    )  # fmt: skip
    shape = derive(cfg, world_size=1, tokenizer_vocab_size=VOCAB)
    engine = build_engine(cfg, shape, connect(ranks_from_environment({}), shape.sizes))
    state.create_state(engine, ["exp_avg", "exp_avg_sq"], optimizer_step=1)
    for fragment in state.fragments(engine):
        fragment.views["exp_avg"].copy_(fragment.views["weight"])
        fragment.views["exp_avg_sq"].copy_(fragment.views["weight"]).square_()
    return engine


def state_of(engine: Any) -> dict[str, Any]:
    """The tensors, as views."""
    from pipeline.engine import state

    fragments = state.fragments(engine)
    return {f"{key}/{f.name}": view for f in fragments for key, view in f.views.items()}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def contender(name: str, layers: int, folder: Path) -> None:
    """Answer each line on standard input with one round of measurements."""
    engine = build(layers)
    base = peak_bytes()
    checkpointer: Any = None
    for number, line in enumerate(sys.stdin):
        path = folder / name / line.strip()
        path.mkdir(parents=True)
        if name == "ours" and checkpointer is None:
            from pipeline.checkpoint.checkpointer import Checkpointer
            from pipeline.config.operation import CheckpointConfig

            checkpointer = Checkpointer(
                CheckpointConfig(keep_last=1), folder=folder / name / "run", layout=engine.layout
            )
        found = _round(name, engine, checkpointer, path, number + 1)
        found |= {"extra": peak_bytes() - base, "bytes": _size(folder / name)}
        if name != "ours":
            shutil.rmtree(path)
        print("RESULT", json.dumps(found), flush=True)


def _round(name: str, engine: Any, checkpointer: Any, path: Path, step: int) -> dict[str, float]:
    """Save, then load: seconds of the stall, the whole save and the load."""
    import torch
    import torch.distributed.checkpoint as dcp

    from pipeline.checkpoint.record import RunRecord

    start = time.perf_counter()
    if name == "ours":
        checkpointer.save(engine, step=step, run=RunRecord(state={}, config={}))
        stall = time.perf_counter() - start
        assert checkpointer.wait()
    elif name == "torch.save":
        torch.save(state_of(engine), path / "state.pt")
    elif name == "deepspeed":
        engine.runner.deepspeed.save_checkpoint(str(path), tag="step")
    else:
        dcp.save(state_of(engine), checkpoint_id=path)
    save = time.perf_counter() - start
    if name != "ours":
        stall = save
    start = time.perf_counter()
    if name == "ours":
        assert checkpointer.restore(engine).step == step
    elif name == "torch.save":
        loaded = torch.load(path / "state.pt", weights_only=True)
        for key, view in state_of(engine).items():
            view.copy_(loaded[key])
    elif name == "deepspeed":
        engine.runner.deepspeed.load_checkpoint(str(path), tag="step")
    else:
        dcp.load(state_of(engine), checkpoint_id=path)
    return {"stall": stall, "save": save, "load": time.perf_counter() - start}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=8, help="12.6M parameters each, and 32.8M in the embedding"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; default: a temporary folder"
    )
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contender(arguments.contender, arguments.layers, arguments.folder)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = {name: run(name, arguments, Path(folder)) for name in arguments.contenders}
    _print(results, arguments.layers)


def run(name: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """One contender's rounds, alone on the machine's memory."""
    command = [
        sys.executable,
        __file__,
        "--contender",
        name,
        "--layers",
        str(arguments.layers),
        "--folder",
        str(folder),
    ]
    lines = "".join(f"{number}\n" for number in range(arguments.rounds + 1))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        command, input=lines, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    shutil.rmtree(folder / name, ignore_errors=True)
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


def _print(results: dict[str, list[dict[str, float]]], layers: int) -> None:
    """The table, medians without each contender's first round."""
    count = (layers * 12 * WIDTH**2 + VOCAB * WIDTH) / 1e6
    rounds = len(next(iter(results.values()))) - 1
    print(
        f"about {count:.0f}M parameters, {count * 12 / 1e3:.2f} GB of state; medians of {rounds} rounds"
    )
    print(
        f"{'':12}{'stall s':>9}{'first s':>9}{'save s':>9}{'load s':>9}{'GB':>8}{'extra GiB':>11}"
    )
    for name, found in results.items():
        median = {
            key: statistics.median(r[key] for r in found[1:]) for key in ("stall", "save", "load")
        }
        first, last = found[0], found[-1]
        print(
            f"{name:12}{median['stall']:9.2f}{first['stall']:9.2f}{median['save']:9.2f}{median['load']:9.2f}"
            f"{last['bytes'] / 1e9:8.2f}{last['extra'] / 2**30:11.2f}"
        )
    if {"ours", "torch.save"} <= results.keys():
        stall, whole = (
            statistics.median(r["stall"] for r in results[n][1:]) for n in ("ours", "torch.save")
        )
        print(f"our stall is {stall / whole:.1%} of torch.save")


if __name__ == "__main__":
    main()
