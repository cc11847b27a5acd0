"""Heads are seen alike at every layout while they are trained, as in the checkpoint afterwards."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.choices import Precision
from pipeline.config.run_shape import derive
from pipeline.errors import ConfigError
from pipeline.model.names import canonical_name
from tests.support.checkpoint_runs import Run
from tests.support.exported import tokenizer_file
from tests.support.layouts import SEQ_LEN, VOCAB, config, rank_batches, reset_parallel_state
from tests.support.ranks import run_on_ranks
from tests.support.unwritten import with_nan_memory

Case = dict[str, Any]
LAYOUTS: dict[int, list[Case]] = {
    2: [
        dict(pp=2, documents=True),
        dict(pp=2, schedule="dualpipev"),
        dict(zero=3),
        dict(tp=2, zero=2, documents=True),
    ],
    4: [dict(tp=2, pp=2, sp=True, documents=True), dict(pp=4), dict(tp=2, sp=True, zero=3)],
}
FAST: dict[int, list[Case]] = {2: [dict(tp=2, sp=True, zero=3)]}


PROMPT = [3, 14, 15, 92, 65, 35, 3, 14, 15]


def text(documents: bool) -> Any:
    """Two rows of what the probe reads afterwards, behind which nothing counts."""
    from pipeline.data.batch import Batch

    ids, mask = torch.zeros(2, SEQ_LEN, dtype=torch.int64), torch.zeros(2, SEQ_LEN)
    ids[:, : len(PROMPT)], mask[:, : len(PROMPT) - 1] = torch.tensor(PROMPT), 1.0
    return Batch.of_whole_sequences(ids, loss_mask=mask, documents=documents, positions=False)


def seen(cases: list[Case], folder: Path) -> list[Any]:
    """After two steps: scores by head, what is logged, and the losses of the next two steps."""
    from pipeline.model.stage_io import StageSchema
    from pipeline.probing.while_training import HeadProbe, LensProbe

    found = []
    for number, case in enumerate(cases):
        cfg = config("modern", **case)
        run = Run(cfg, folder / str(number))
        if cfg.data.mask_documents:  # one a row: nothing is masked
            for step in run.steps:
                step["document_ids"] = torch.zeros_like(step["tokens"])
        run.train(0, 2)
        schema = StageSchema.of(cfg.data, cfg.parallel, cfg.model)
        probe = HeadProbe(run.engine, schema)
        lens = LensProbe(run.engine, schema, text(cfg.data.mask_documents)).run()
        tables = {name: table.tolist() for name, table in probe.scores().items()}
        found.append((tables, probe.run(), list(lens.values()), run.train(2, 4)))
        run.close()
    return found


def afterwards(folder: Path) -> Any:
    """The same scores from a checkpoint of the second step, and the next two steps unseen."""
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.probe import ProbeConfig, look_into

    tokenizer = tokenizer_file(folder).read_bytes()
    run = Run(config("modern"), folder / "run", attachments={"tokenizer.json": tokenizer})
    run.train(0, 2)
    run.save(2)
    losses = run.train(2, 4)
    run.close()
    prompt = " ".join(f"t{i}" for i in PROMPT)
    asked = ProbeConfig(checkpoint=str(folder / "run"), prompt=prompt, precision=Precision.fp32)
    findings = look_into(asked, ranks_from_environment())
    reset_parallel_state()
    return findings["kinds"], findings["averages"]["lens_loss"], losses


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        *FAST.items(),
        *(pytest.param(size, cases, marks=pytest.mark.slow) for size, cases in LAYOUTS.items()),
    ],
)
def test_heads_and_lens_in_training_are_those_of_the_checkpoint(
    world_size: int, layouts: list[Case], tmp_path: Path
) -> None:
    """Partitioned weights, stages and heads; and training goes on as if nobody had looked."""
    [(kinds, lens, losses)] = run_on_ranks(afterwards, 1, tmp_path)
    for ranks in run_on_ranks(seen, world_size, layouts, tmp_path):
        for case, (tables, logged, early, later) in zip(layouts, ranks, strict=True):
            np.testing.assert_allclose(early, lens, atol=1e-5, err_msg=str(case))
            for name, table in kinds.items():
                np.testing.assert_allclose(tables[name], table, atol=1e-5, err_msg=str(case))
                assert logged[f"probe/{name}"] == np.max(tables[name])
            assert np.shape(tables["entropy"]) == (4, 4)
            assert logged["probe/entropy"] == pytest.approx(np.mean(tables["entropy"]))
            np.testing.assert_allclose(later, losses, rtol=1e-5, err_msg=str(case))


def of_three_parts(**layout: Any) -> dict[str, Any]:
    """Scores of a fresh model whose sequences are a multiple of 3."""
    from pipeline.model.stage_io import StageSchema
    from pipeline.probing.while_training import HeadProbe
    from tests.engine.test_engine import engine_of

    cfg = config("odd", **layout)
    cfg.model.max_seq_len = cfg.training.seq_len = 48
    probe = HeadProbe(engine_of(cfg), StageSchema.of(cfg.data, cfg.parallel, cfg.model))
    return {name: table.tolist() for name, table in probe.scores().items()}


def alone_in_three_parts() -> dict[str, Any]:
    return of_three_parts()


def shared_by_three() -> dict[str, Any]:
    return of_three_parts(tp=3, sp=True)


@pytest.mark.slow
def test_three_ranks_may_share_sequences() -> None:
    """32 repeated tokens do not divide by 3: training ended at its first look."""
    [alone] = run_on_ranks(alone_in_three_parts, 1)
    for found in run_on_ranks(shared_by_three, 3):
        for name, table in alone.items():
            np.testing.assert_allclose(found[name], table, atol=1e-5, err_msg=name)


KINDS = ("moe", "pictures", "gpt1")


def lens_beside_cut_models(cases: list[Case]) -> list[Any]:
    """After a step: lens losses, those of the model without its later blocks, and what heads do."""
    from pipeline.data.batch import Batch
    from pipeline.model.stage_io import StageSchema
    from pipeline.probing.passage import hooked
    from pipeline.probing.while_training import HeadProbe, LensProbe
    from tests.engine.test_engine import engine_of
    from tests.engine.test_pictures import pictured

    found = []
    for case in cases:
        cfg = config(**case)
        engine = engine_of(cfg)
        step = pictured()[0]
        if case["model"] != "pictures":
            del step["images"], step["patch_ids"]
        engine.train_step(rank_batches(step, engine.shape, engine.layout), step=0)
        rows = {"loss_mask" if name == "mask" else name: t[:6] for name, t in step.items()}
        text = Batch(
            sample_ids=np.arange(6), num_documents=6, document_ids=None, positions=None, **rows
        )
        schema = StageSchema.of(cfg.data, cfg.parallel, cfg.model)
        lens = list(LensProbe(engine, schema, text).run().values())
        heads = HeadProbe(engine, schema).run()
        blocks = {
            int(match[1]): module
            for name, module in engine.runner.module.named_modules()
            if (match := re.fullmatch(r"layers\.(\d+)\.?", canonical_name(name, num_layers=4)))
        }
        cut = []
        for last in range(4):
            with ExitStack() as hooks:
                for number, block in blocks.items():
                    if number > last:
                        hooks.enter_context(hooked(block, lambda _module, inputs, _out: inputs[0]))
                scores = engine.evaluate([text])
            cut.append(float(scores.nats / scores.tokens))
        found.append((lens, cut, list(heads.values())))
        reset_parallel_state()
    return found


@pytest.mark.slow
def test_the_lens_of_experts_pictures_and_post_norm_is_the_model_without_its_later_blocks() -> None:
    """A lens loss is what is left when later blocks hand on what they are given; at every layout the same numbers."""
    alone = [dict(model=model) for model in KINDS]
    expected = dict(zip(KINDS, run_on_ranks(lens_beside_cut_models, 1, alone)[0], strict=True))
    cases = [{**case, **layout} for case in alone for layout in (dict(tp=2, sp=True), dict(pp=2))]
    cases.append(dict(model="moe", ep=2))
    for ranks in run_on_ranks(with_nan_memory, 2, lens_beside_cut_models, cases):
        for case, (lens, cut, heads) in zip(cases, ranks, strict=True):
            lens_alone, cut_alone, heads_alone = expected[case["model"]]
            assert min(abs(np.diff(lens))) > 1e-4, "blocks that say the same show nothing"
            np.testing.assert_allclose(lens, cut, atol=1e-5, err_msg=str(case))
            np.testing.assert_allclose(lens_alone, cut_alone, atol=1e-5, err_msg=str(case))
            np.testing.assert_allclose(lens, lens_alone, atol=2e-5, err_msg=str(case))
            np.testing.assert_allclose(heads, heads_alone, atol=2e-5, err_msg=str(case))


def test_compiled_blocks_are_not_looked_into() -> None:
    """Their hooks would not be called, and every score would be 0."""
    cfg = config("modern")
    cfg.training.probe_every, cfg.model.compile = 10, True
    with pytest.raises(ConfigError, match=r"training.probe_every \(10\) needs model.compile=false"):
        derive(cfg, world_size=1, tokenizer_vocab_size=VOCAB)
