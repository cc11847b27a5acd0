"""What training.probe_every costs: CPU time of a look at heads and lens beside that of the steps between two.

    python -m benchmarks.looks [--rounds 15]

The model, batch and sequences are the quickstart's, whose steps of 1,024 tokens are the smallest of all recipes: a look costs the
same beside steps of a million. One process of one thread; the seconds are those of the process, so that other jobs of the machine
count little. Rounds alternate between steps and looks; medians. The share is of a run that does nothing but steps and looks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

EVERY = (100, 200, 500)
STEPS_A_ROUND = 3
VOCAB = 2048  # of the quickstart's tokenizer


def cpu_ms(work: Callable[[], Any]) -> float:
    """CPU time of one call."""
    before = time.process_time()
    work()
    return 1000 * (time.process_time() - before)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="looks that are timed")
    rounds = parser.parse_args().rounds
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch

    import torch

    from pipeline import cli
    from pipeline.config.pretrain import PretrainConfig
    from pipeline.config.run_shape import derive
    from pipeline.data.batch import Batch
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.model.stage_io import StageSchema
    from pipeline.probing.while_training import HeadProbe, LensProbe
    from pipeline.training.build import build_engine

    torch.set_num_threads(1)
    cfg = cli.compose(PretrainConfig, ["experiment=quickstart"], config="pretrain")
    shape = derive(cfg, world_size=1, tokenizer_vocab_size=VOCAB)
    engine = build_engine(cfg, shape, connect(ranks_from_environment({}), shape.sizes))

    def random(rows: int, size: int) -> Batch:
        ids = torch.randint(0, VOCAB, (rows, size))
        mask = torch.ones(rows, size)
        return Batch.of_whole_sequences(ids, loss_mask=mask, documents=False, positions=False)

    batch = random(shape.micro_batch_size, shape.seq_len)
    schema = StageSchema.of(cfg.data, cfg.parallel, cfg.model)
    heads, lens = HeadProbe(engine, schema), LensProbe(engine, schema, random(8, 128))
    times: dict[str, list[float]] = {"step": [], "heads": [], "lens": []}
    for number in range(rounds + 1):
        for _ in range(STEPS_A_ROUND):
            step = cpu_ms(lambda: engine.train_step([batch], step=1))
            if number:  # memory is allocated in the first round
                times["step"].append(step)
        seen = {"heads": cpu_ms(heads.run), "lens": cpu_ms(lens.run)}
        for name, value in seen.items() if number else ():
            times[name].append(value)
    of = {name: statistics.median(values) for name, values in times.items()}
    look = of["heads"] + of["lens"]
    print(
        f"{batch.tokens.numel():,} tokens a step, {rounds} rounds, one thread, {torch.__version__}\n"
    )
    shares = [f"probe_every={every}" for every in EVERY]
    print(f"| step, CPU ms | heads | lens | a look in steps | {' | '.join(shares)} |")
    print(f"|---{'|---' * (3 + len(EVERY))}|")
    cells = [
        f"{of['step']:.0f}",
        f"{of['heads']:.0f}",
        f"{of['lens']:.0f}",
        f"{look / of['step']:.2f}",
    ]
    cells += [f"{100 * look / (every * of['step'] + look):.2f} %" for every in EVERY]
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
