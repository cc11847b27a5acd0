"""`python -m MODULE ...`, with faults planted in training: PYTHON="python tests/plant.py" sbatch launch/pretrain.slurm

    PLANT="until=FILE"            no step comes after the one whose number is in the file: a test leads the run there, and
                                  has all the time it needs for what is to happen amid it (Lead writes the file)
    PLANT="step_s=1"              every step takes so many seconds longer: what comes at a random time may come in any of it
    PLANT="nan=17 spike=41"       the batch that holds the global sample has NaN in its loss mask, or labels made up
    PLANT="crash=12 stop=12"      rank 1 raises, or says where it is and stops (SIGSTOP), after step 12; not in a start
                                  after the first

Samples, not steps, carry faults: after a rollback that jumps over them they do not come again.
"""

import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any


class Lead:
    """How far a run may go that is started with PLANT=lead.plant."""

    def __init__(self, file: Path, *, to: int) -> None:
        self.file, self.plant = file, f"until={file}"
        self.to(to)

    def to(self, step: int) -> None:
        """On to that step, and no further until told again."""
        new = self.file.with_name(f"{self.file.name}.new")
        new.write_text(str(step))
        new.rename(self.file)  # whoever reads meanwhile finds one number or the other


def install(faults: dict[str, str]) -> None:
    """Wrap the loader once the ranks are connected; nothing is imported before: handlers come first, torch later."""
    from pipeline.distributed import layout as layout_module

    connect = layout_module.connect

    def connect_and_plant(*args: Any, **kwargs: Any) -> Any:
        from pipeline.data import loader

        layout = connect(*args, **kwargs)
        next_step = loader.Loader.next_step
        fails = layout.ranks.global_rank == 1 and "SLURM_RESTART_COUNT" not in os.environ

        def faulty_next_step(self: Any) -> list[Any]:
            time.sleep(float(faults.get("step_s", 0)))
            done = self._position.step
            while "until" in faults and done >= int(Path(faults["until"]).read_text()):
                time.sleep(0.05)
            if fails and str(done) == faults.get("crash"):
                raise RuntimeError("a planted crash")
            if fails and str(done) == faults.get("stop"):
                os.write(2, f"stops on {socket.gethostname()}\n".encode())
                os.kill(os.getpid(), signal.SIGSTOP)
            batches = next_step(self)
            return (
                [spoilt(batch, faults) for batch in batches]
                if {"nan", "spike"} & set(faults)
                else batches
            )

        loader.Loader.next_step = faulty_next_step
        return layout

    layout_module.connect = connect_and_plant


def spoilt(batch: Any, faults: dict[str, str]) -> Any:
    """The batch, with a fault if it holds a sample that carries one."""
    import torch

    batch.loss_mask = torch.ones_like(batch.labels, dtype=torch.float32)
    rows = {
        name: (torch.as_tensor(batch.sample_ids) == int(faults.get(name, -1)))
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
        name: value
        for name, _, value in (word.partition("=") for word in os.environ.get("PLANT", "").split())
    }
    if sys.argv[1] != "-m":  # a line of Python, which launch scripts have too
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    module, sys.argv = sys.argv[2], sys.argv[2:]
    if planted and module == "pipeline.train":
        install(planted)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
