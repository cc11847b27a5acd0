"""Ranks of large jobs, each alone in a process: requests on standard input, their reports out.

    a Request a line, as JSON -> our own groups, engine and steps on fake tensors -> JSON, a line

Imports take longer than most ranks: they are made once, and each rank runs in a copy of this
process. torch's `fake` process group answers every collective at once; nothing is computed or sent.
The program is started by rehearse() and is of no other use.
"""

from __future__ import annotations

from pipeline.rehearsal import fake_cuda

# isort: split
import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.distributed.ranks import Ranks
from pipeline.rehearsal.dry_run import Collective, Report
from pipeline.rehearsal.fused_kernels import stand_in_for_fused_kernels

DEVICES_OF_A_NODE = 8


@dataclass(frozen=True)
class Request:
    """What the process of a rank is told."""

    cfg: PretrainConfig
    shape: RunShape
    rank: int
    num_micro_batches: int
    steps: int

    @classmethod
    def read(cls, text: str) -> Request:
        """From the JSON of rehearse()."""
        from omegaconf import OmegaConf

        told = json.loads(text)
        schema = OmegaConf.structured(PretrainConfig)
        cfg: Any = OmegaConf.to_object(OmegaConf.merge(schema, cli.literal(told["settings"])))
        vocabulary = told["tokenizer_vocab_size"]
        shape = derive(cfg, world_size=told["world_size"], tokenizer_vocab_size=vocabulary)
        return cls(cfg, shape, told["rank"], told["num_micro_batches"], told["steps"])


def main() -> None:
    """Rehearse each request in a process of its own; print its report, or how it failed."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no report
    fake_cuda.load_guard()
    _import_all()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(_answer(line), file=out, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps({"failed": f"its process ended with code {code}"}), file=out)
        out.flush()


def _answer(line: str) -> str:
    """A line of JSON: the report, or {"failed": traceback}."""
    try:
        return json.dumps(asdict(_rehearse(Request.read(line))))
    except Exception:
        return json.dumps({"failed": traceback.format_exc()[-8000:]})


kernels: Counter[str] = Counter()
"""Attention kernel -> how often it was taken."""


def _import_all() -> None:
    """What every rank needs, on a device that is stood in for. No thread: a copy has none."""
    os.environ.update(DS_ACCELERATOR="cuda", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # megatron-core decorates what nothing here calls
    import torch
    import torch.distributed._tools.fake_collectives  # noqa: F401  (torch.cuda as it is)

    fake_cuda.stand_in()
    torch.set_num_threads(1)
    fake_cuda.stand_in_for_attention(lambda name: kernels.update([name]))
    stand_in_for_fused_kernels()
    import deepspeed.compile.backend
    import deepspeed.module_inject.auto_ep_layer  # noqa: F401  (both: an engine loads them)

    import pipeline.rehearsal.watch
    import pipeline.training.build  # noqa: F401

    gc.collect()
    gc.freeze()  # each full collection of a rank would go over all of that, 0.3 s


def _rehearse(request: Request) -> Report:
    """Groups, engine and steps of one rank, watched from the engine on."""
    began = time.monotonic()
    cfg, shape = request.cfg, request.shape
    layout = _connect(request)
    from pipeline.rehearsal.watch import Watch
    from pipeline.training.build import build_engine

    moe = cfg.model.moe
    watch = Watch(num_experts=max(1, moe.num_experts), top_k=moe.top_k)
    watch.group_names = _group_names(layout, shape)
    with fake_cuda.fake_tensors(), watch, _without_numbers(cfg, shape):
        engine = build_engine(cfg, shape, layout)
        built, build_peak = watch.live, watch.peak
        parameters = list(engine.runner.module.parameters())
        step_peaks = []
        for step in range(request.steps):
            watch.enter()
            kernels.clear()
            fake_cuda.host_waits.clear()
            batches = [_batch(cfg, shape, layout) for _ in range(request.num_micro_batches)]
            result = engine.train_step(batches, step=step)
            del batches
            step_peaks.append(watch.peak)
        held = [*parameters, result.loss, result.grad_norm, result.skipped]
        for state in engine.runner.optimizer.state.values():
            held += [value for value in state.values() if value.dim() > 0]
        return Report(
            rank=request.rank,
            tensor_rank=layout.tensor.rank,
            pipeline_rank=layout.pipeline.rank,
            data_rank=layout.data.rank,
            device=str(layout.device),
            num_parameters=sum(parameter.numel() for parameter in parameters),
            num_micro_batches=request.num_micro_batches,
            built_bytes=built,
            build_peak_bytes=build_peak,
            step_peak_bytes=step_peaks,
            live_bytes=watch.live,
            collectives=[
                Collective(*key, count, watch.collective_bytes[key])
                for key, count in sorted(watch.collectives.items())
            ],
            host_reads=dict(watch.host_reads),
            host_waits=dict(fake_cuda.host_waits),
            host_tensors={name: n for name, n in watch.host_tensors.items() if n},
            attention_kernels=dict(kernels),
            devices=sorted({str(tensor.device) for tensor in held}),
            seconds=round(time.monotonic() - began, 1),
        )


def _connect(request: Request) -> Any:
    """The run's own groups, all of them torch's fake ones."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pipeline.distributed.layout import connect

    world_size, rank = request.shape.world_size, request.rank
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    new_group = dist.new_group
    fake_cuda.set_all(dist, new_group=lambda ranks=None, *_, **__: new_group(ranks, backend="fake"))
    local = min(world_size, DEVICES_OF_A_NODE)
    return connect(Ranks(rank, world_size, rank % local, local, "rehearsal"), request.shape.sizes)


def _group_names(layout: Any, shape: RunShape) -> dict[tuple[int, ...], str]:
    """Ranks of the groups that a reader knows -> their names; one rank's own is none of them."""
    import torch.distributed as dist

    names = {tuple(range(shape.world_size)): "world"}
    for name in ("replica", "data", "context", "pipeline", "tensor"):
        axis = getattr(layout, name)
        if axis.size > 1:
            names[tuple(sorted(dist.get_process_group_ranks(axis.group)))] = name
    return names


@contextlib.contextmanager
def _without_numbers(cfg: Any, shape: RunShape) -> Iterator[None]:
    """What would draw, send or compare numbers, which nobody has here."""
    import torch
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from pipeline.engine.forward_only import DTYPES
    from pipeline.model.stage_io import StageSchema

    whole = shape.at(shape.total_steps).seq_len
    rows = whole // shape.sizes.context
    hidden = [shape.micro_batch_size, rows, cfg.model.hidden_size]
    if cfg.parallel.sequence_parallel:
        hidden = [rows // shape.sizes.tensor, shape.micro_batch_size, cfg.model.hidden_size]
    dtype = DTYPES[cfg.training.precision]
    names = StageSchema.of(cfg.data, cfg.parallel, cfg.model).between.names

    def receive(self: Any, _: int) -> Any:
        """Buffers for what the stage before sends, whose shapes would arrive as numbers."""
        found = [
            self._allocate_or_extend_buffers(i, hidden, dtype)
            if name == "hidden"
            else self._allocate_or_extend_buffers(i, [shape.micro_batch_size, whole], torch.int64)
            for i, name in enumerate(names)
        ]
        return found[0] if len(found) == 1 else tuple(found)

    def sort_experts(rows: Any, *_: Any, probs: Any = None, **__: Any) -> tuple[Any, Any]:
        """Chunks in another order, which would be read: as large, and as new."""
        return rows.clone(), None if probs is None else probs.clone()

    dispatcher = "megatron.core.transformer.moe.token_dispatcher"
    with (
        mock.patch(f"{dispatcher}.sort_chunks_by_idxs", sort_experts),
        # Nobody else is there to say what it holds: as much as this rank.
        mock.patch("pipeline.engine.home_ranks.gather", lambda runs, peers: [runs] * peers.size),
        mock.patch("pipeline.engine.engine.initialize", lambda *_, **__: None),
        mock.patch.object(PipelineEngine, "_recv_tensor_meta", receive),
    ):
        yield


def _batch(cfg: Any, shape: RunShape, layout: Any) -> Any:
    """A micro-batch with the fields that the run's data bring."""
    import numpy as np
    import torch

    from pipeline.data.batch import Batch, Masks
    from pipeline.engine.own_runs import no_pictures

    masks = Masks.of(cfg.data, packed=False)
    size = (shape.micro_batch_size, shape.at(shape.total_steps).seq_len)

    def ids(is_there: bool = True) -> Any:
        return torch.zeros(size, dtype=torch.long, device=layout.device) if is_there else None

    pictures: dict[str, Any] = {}
    if shape.images_per_row:
        pictures = no_pictures(cfg.model, ids(), per_row=shape.images_per_row)
    return Batch(
        tokens=ids(),
        labels=ids(),
        loss_mask=torch.ones(size, device=layout.device) if masks.loss else None,
        document_ids=ids(masks.documents),
        positions=ids(masks.positions),
        sample_ids=np.zeros(size[0], dtype=np.int64),
        num_documents=size[0] if masks.documents else 0,
        **pictures,
    )


if __name__ == "__main__":
    main()
