"""`python -m MODULE ...`, with faults planted in training: PYTHON="python tests/plant.py" sbatch launch/pretrain.slurm

    PLANT="step_s=0.2"            every step takes so much longer: something can happen in the meantime
    PLANT="nan=17 spike=41"       the batch that holds the global sample has NaN in its loss mask, or labels made up
    PLANT="crash=12"              rank 1 raises in step 12
    PLANT="halt=6"                step 6 of a start comes once the file of go_on() is there: what is to happen amid the run
                                  has all the time it needs

Samples, not steps, carry faults: after a rollback that jumps over them they do not come again.
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def go_on(job_id: str) -> Path:
    """In the folder that the run was started in: it then goes past where it halts."""
    return Path(f"go-on-{job_id}")


def install(faults: dict[str, float]) -> None:
    """Wrap the loader once the ranks are connected; nothing is imported before: handlers come first, torch later."""
    from pipeline.distributed import layout as layout_module

    connect = layout_module.connect

    def connect_and_plant(*args: Any, **kwargs: Any) -> Any:
        from pipeline.data import loader

        layout = connect(*args, **kwargs)
        next_step, steps = loader.Loader.next_step, iter(range(10**9))
        released = go_on(os.environ.get("SLURM_JOB_ID", "none"))

        def faulty_next_step(self: Any) -> list[Any]:
            time.sleep(faults.get("step_s", 0.0))
            step = next(steps)
            if step == faults.get("crash") and layout.ranks.global_rank == 1:
                raise RuntimeError("a planted crash")
            while step == faults.get("halt") and not released.exists():
                time.sleep(0.2)
            batches = next_step(self)
            return (
                [spoilt(batch, faults) for batch in batches]
                if {"nan", "spike"} & set(faults)
                else batches
            )

        loader.Loader.next_step = faulty_next_step
        return layout

    layout_module.connect = connect_and_plant


def spoilt(batch: Any, faults: dict[str, float]) -> Any:
    """The batch, with a fault if it holds a sample that carries one."""
    import torch

    batch.loss_mask = torch.ones_like(batch.labels, dtype=torch.float32)
    rows = {
        name: (torch.as_tensor(batch.sample_ids) == faults.get(name, -1))
        for name in ("nan", "spike")
    }
    batch.loss_mask[rows["nan"]] = float("nan")
    # An id that the data never holds is certain to be unlikely; else ids in a senseless order.
    senseless = torch.arange(batch.labels.shape[1]) * 7919 % 64
    batch.labels[rows["spike"]] = int(faults["label"]) if "label" in faults else senseless
    batch.loss_mask[rows["spike"]] = 50.0  # so that one sample shows in the mean
    return batch


if __name__ == "__main__":
    # In place of this folder, where a file has the name of a library: tokenizers.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    planted = {
        name: float(value)
        for name, _, value in (word.partition("=") for word in os.environ.get("PLANT", "").split())
    }
    if sys.argv[1] != "-m":  # a line of Python, which launch scripts have too
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    module, sys.argv = sys.argv[2], sys.argv[2:]
    if planted and module == "pipeline.train":
        install(planted)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
