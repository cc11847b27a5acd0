"""A model writes alike at every layout while it is trained, as its checkpoint does; training never knows of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.training import TrainingConfig
from tests.support.checkpoint_runs import Run
from tests.support.exported import tokenizer_file
from tests.support.layouts import config, reset_parallel_state
from tests.support.ranks import run_on_ranks

Case = dict[str, Any]
PROMPTS = ["t7 t8 t9", "", "t40 t42 t44 t46 t48"]
NEW_TOKENS = 12
LAYOUTS: dict[int, list[Case]] = {
    2: [dict(cp=2), dict(pp=2, schedule="dualpipev")],
    4: [dict(tp=2, pp=2, sp=True), dict(tp=2, sp=True, zero=3), dict(model="moe", ep=2, tp=2, sp=True)],
}  # fmt: skip
FAST: dict[int, list[Case]] = {2: [dict(tp=2, sp=True), dict(pp=2), dict(zero=3)]}


def loader(folder: Path) -> Any:
    """The data's tokenizer, of no dialogues; the test has written it: ranks would read half a file."""
    path = folder / "tokenizer.json"
    return SimpleNamespace(
        attachments=lambda: {"tokenizer.json": path.read_bytes()},
        special_ids=lambda: {"eod": 0, "end_of_turn": None},
        tokenizer_path=path,
    )


def written(run: Run, folder: Path, *, temperature: float) -> list[str]:
    from pipeline.model.stage_io import StageSchema
    from pipeline.training.text_samples import TextSamples

    cfg = TrainingConfig(
        sample_prompts=PROMPTS, sample_tokens=NEW_TOKENS, sample_temperature=temperature
    )
    schema = StageSchema.of(run.cfg.data, run.cfg.parallel, run.cfg.model)
    samples = TextSamples(cfg, engine=run.engine, schema=schema, loader=loader(folder), seed=3)
    return [sample.text for sample in samples.draw(2)]


def beside_training(cases: list[Case], folder: Path) -> list[Any]:
    """Texts after two steps, and losses with dropout of a run that wrote them and of one that did not."""
    found = []
    for number, case in enumerate(cases):
        case = {"model": "modern", **case}
        run = Run(config(**case), folder / f"{number}")
        run.train(0, 2)
        texts = [written(run, folder, temperature=temperature) for temperature in (0.0, 0.0, 1.0)]
        run.close()
        losses = []
        for writes in (False, True):
            run = Run(config(dropout=0.2, **case), folder / f"{number}-{writes}")
            losses.append(run.train(0, 1))
            if writes:
                state = torch.get_rng_state()
                written(run, folder, temperature=1.0)
                assert torch.equal(state, torch.get_rng_state())
            losses[-1] += run.train(1, 3)
            run.close()
        found.append((texts, losses))
    return found


def of_the_checkpoint(folder: Path) -> list[str]:
    """What `pipeline.generate` makes of the second step's checkpoint by our own forward pass."""
    from pipeline.inference.generation import GenerateConfig
    from pipeline.inference.samplers import LocalSampler

    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    run = Run(config("modern"), folder / "run", attachments=files, ends={"eod": 0})
    run.train(0, 2)
    run.save(2)
    run.close()
    asked = GenerateConfig(max_new_tokens=NEW_TOKENS, temperature=0.0)
    sampler = LocalSampler(folder / "run" / "step-00000002", asked)
    texts = sampler.sample(PROMPTS, on_text=None)
    reset_parallel_state()
    return texts


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        *FAST.items(),
        *(pytest.param(size, cases, marks=pytest.mark.slow) for size, cases in LAYOUTS.items()),
    ],
)
def test_samples_are_those_of_the_checkpoint_and_leave_training_alone(
    world_size: int, layouts: list[Case], tmp_path: Path
) -> None:
    """A vocabulary in parts, stages that see no logits, partitioned weights, ranks with a run of each sequence."""
    tokenizer_file(tmp_path)
    [expected] = run_on_ranks(of_the_checkpoint, 1, tmp_path)
    assert len(set(expected)) == len(PROMPTS)
    by_rank = run_on_ranks(beside_training, world_size, layouts, tmp_path)
    for case, of_ranks in zip(layouts, zip(*by_rank, strict=True), strict=True):
        for (greedy, again, drawn), (alone, beside) in of_ranks:
            assert greedy == again and drawn != greedy
            assert (greedy, again, drawn) == tuple(of_ranks[0][0]), "ranks write differently"
            assert beside == alone, case
        if "model" not in case:
            assert of_ranks[0][0][0] == expected, case
