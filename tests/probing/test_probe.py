"""What is found inside a model: equal at every layout, and to transformers on the exported folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.choices import Init, Precision
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.config.training import ParallelConfig
from pipeline.probing.findings import print_summary, write_findings
from tests.support.exported import EXPORTED, save_models, tokenizer_file
from tests.support.layouts import MODELS as KINDS_OF_MODELS
from tests.support.layouts import SEQ_LEN, VOCAB, reset_parallel_state
from tests.support.probed import Theirs, ablation, head_kinds, means, patching
from tests.support.ranks import run_on_ranks
from tests.support.token_dataset import write_dataset
from tests.support.unwritten import with_nan_memory

MODELS = ("gpt2", "qwen3")
PROMPT, OTHER, ANSWER = [3, 14, 15, 92, 65, 35, 3, 14, 15], [3, 14, 15, 92, 65, 35, 8, 97, 93], 92
SEQUENCES = 6
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        dict(tensor_parallel_size=2),
        dict(pipeline_parallel_size=2),
        dict(zero_stage=3),
    ],
    4: [
        dict(tensor_parallel_size=2, pipeline_parallel_size=2, sequence_parallel=True),
        dict(pipeline_parallel_size=4),
        dict(tensor_parallel_size=2, zero_stage=3),
    ],
}
FAST: list[dict[str, Any]] = [dict(tensor_parallel_size=2, sequence_parallel=True)]


def text(ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each model, and held-out data of two shards with short last windows."""
    root = tmp_path_factory.mktemp("probed")
    tokenizer = tokenizer_file(root)
    run_on_ranks(save_models, 1, {name: EXPORTED[name] for name in MODELS}, root, tokenizer)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 170)
    write_dataset(
        root / "data", np.split(tokens, [75]), vocab_size=VOCAB, tokenizer=tokenizer.read_bytes()
    )
    return root


def found(layouts: list[dict[str, Any]], root: Path) -> list[Any]:
    """By layout and model: findings on a prompt, with everything asked for, and on held-out data."""
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.probe import ProbeConfig, look_into

    answers = []
    for layout in layouts:
        for name in MODELS:
            common: dict[str, Any] = dict(
                checkpoint=str(root / name), precision=Precision.fp32, micro_batch_size=2,
                parallel=ParallelConfig(**layout),
            )  # fmt: skip
            prompts = dict(prompt=text(PROMPT), patch_into=text(OTHER), answer=text([ANSWER]))
            held_out = DataConfig(validation=[DatasetConfig(path=str(root / "data"))])
            pair = []
            for more in (
                dict(**prompts, ablate=True),
                dict(data=held_out, sequences=SEQUENCES, seq_len=SEQ_LEN, curve=True),
            ):
                cfg = ProbeConfig(**common, **more)  # type: ignore[arg-type]
                pair.append(look_into(cfg, ranks_from_environment()))
                reset_parallel_state()
            answers.append(pair)
    return answers


def windows(root: Path) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels and mask of the held-out windows, from the tokens themselves."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, 170)
    rows = []
    for shard in np.split(tokens, [75]):
        for start in range(0, len(shard) - 1, SEQ_LEN):
            part = torch.from_numpy(shard[start : start + SEQ_LEN + 1])
            row = torch.zeros(SEQ_LEN + 1, dtype=torch.int64)
            row[: len(part)] = part
            rows.append((row[:-1], row[1:], (torch.arange(SEQ_LEN) < len(part) - 1).float()))
    chosen = [torch.stack(field) for field in zip(*rows[:SEQUENCES], strict=True)]
    return chosen[0], chosen[1], chosen[2]


def expected(root: Path) -> list[Any]:
    """By model: the findings, from the exported folder."""
    from pipeline.checkpoint import folder as folders
    from pipeline.huggingface.writer import DType, export

    warnings.simplefilter("ignore")  # transformers warns about its own future
    answers = []
    for name in MODELS:
        export(folders.find(root / name), root / "exported" / name, dtype=DType.fp32)
        theirs = Theirs(root / "exported" / name)
        tokens, other = torch.tensor([PROMPT]), torch.tensor([OTHER])
        labels, mask = tokens.roll(-1, 1), torch.ones(1, len(PROMPT))
        mask[0, -1] = 0
        seen = theirs.run(tokens)
        lens = torch.stack([theirs.logits(h)[0] for h in seen["after"]]).detach()
        prompt = {
            "averages": means(theirs, tokens, labels, mask),
            "kinds": head_kinds(theirs),
            "attention": torch.cat(seen["attentions"]).tolist(),
            "lens": lens.softmax(-1).topk(5).values.tolist(),
            "ids": lens.topk(5).indices.tolist(),
            "ablation": ablation(theirs, tokens),
            "patching": patching(theirs, tokens, other, ANSWER),
        }
        answers.append([prompt, {"averages": means(theirs, *windows(root))}])
    return answers


def compare(pair: list[Any], wanted: list[Any], case: Any) -> None:
    """Findings on the prompt and on the data beside transformers'."""
    prompt, held_out = pair
    text_of = prompt["text"]
    got = {
        **prompt,
        "attention": text_of["attention"],
        "lens": text_of["lens"]["probabilities"],
        "ids": text_of["lens"]["ids"],
    }
    for name, value in wanted[0].items():
        theirs = value if name != "patching" else {**value}
        ours = {k: got[name][k] for k in theirs} if isinstance(theirs, dict) else got[name]
        close(ours, theirs, f"{case} {name}")
    close(
        {name: held_out["averages"][name] for name in wanted[1]["averages"]},
        wanted[1]["averages"],
        f"{case} on data",
    )
    curve = held_out["curve"]
    newest = {name: curve[name][-1] for name in curve if name != "steps"}
    close(
        newest,
        {n: {**wanted[0]["kinds"], **wanted[1]["averages"]}[n] for n in newest},
        f"{case} curve",
    )
    assert curve["steps"] == [1] and {"induction", "lens_loss"} < newest.keys()
    parts, logit = held_out["averages"]["attribution"], held_out["averages"]["logit"]
    assert sum(np.sum(value) for value in parts.values()) == pytest.approx(logit, abs=1e-5)


def close(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for name, value in theirs.items():
            close(ours[name], value, f"{where}.{name}")
        return
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=where)


@pytest.fixture(scope="module")
def wanted(runs: Path) -> list[Any]:
    return run_on_ranks(expected, 1, runs)[0]


def test_findings_equal_transformers_on_the_exported_folder(
    runs: Path, wanted: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Heads and vocabulary in parts, sequences in parts that the prompt does not fill."""
    for ranks in run_on_ranks(with_nan_memory, 2, found, FAST, runs):
        for pair, theirs, name in zip(ranks, wanted, MODELS, strict=True):
            compare(pair, theirs, name)
    for findings, name in zip(pair, ("prompt", "held_out"), strict=True):
        written = write_findings(findings | {"checkpoint": name}, tmp_path / name)
        assert json.loads(written["numbers"].read_text()) == findings | {"checkpoint": name}
        assert f"Inside {name}" in written["page"].read_text()
        print_summary(findings)
        printed = capsys.readouterr().out
        averages = findings["averages"]
        for block, loss in enumerate(averages["lens_loss"]):
            assert f"\n{block:<8}{loss:>12.4f}{averages['residual'][block]:>12.2f}" in printed
        best = max(
            (v, f"{i}.{k}") for i, row in enumerate(averages["sink"]) for k, v in enumerate(row)
        )
        assert f"\nsink        {best[1]} {best[0]:.3f}  " in printed
        assert ("(loss added)" in printed, "after patch_into" in printed) == (name == "prompt",) * 2
        assert (f"\n1           {averages['lens_loss'][-1]:>8.4f}" in printed) == (name != "prompt")


OTHERS = {
    **{name: KINDS_OF_MODELS[name] for name in ("moe", "capped", "parallel", "mqa", "gpt1")},
    "mup": {**KINDS_OF_MODELS["modern"], "init": Init.mup, "mup_base_hidden_size": 32},
}


def others(root: Path) -> dict[str, dict[str, Any]]:
    """Findings on the prompt of models that transformers does not compute."""
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.model.attention import CoreAttention
    from pipeline.model.block import Block
    from pipeline.model.tensor_parallel import VocabEmbedding
    from pipeline.probe import ProbeConfig, look_into

    answers, seen, streams, words = {}, [], [], []

    def keep(module: Any, inputs: Any, out: Any) -> None:
        if isinstance(module, CoreAttention):
            seen.append((inputs[2], out))
        if isinstance(module, Block):
            streams.append(out)
        if isinstance(module, VocabEmbedding):
            words[:] = [module.weight[:VOCAB]]

    save_models(OTHERS, root, tokenizer_file(root))
    for name in OTHERS:
        cfg = ProbeConfig(checkpoint=str(root / name), prompt=text(PROMPT), ablate=True)
        cfg.precision = Precision.fp32
        seen.clear(), streams.clear()
        hook = torch.nn.modules.module.register_module_forward_hook(keep)
        answers[name] = look_into(cfg, ranks_from_environment())
        hook.remove()
        for maps, (values, out) in zip(answers[name]["text"]["attention"], seen):
            values = values.repeat_interleave(out.shape[1] // values.shape[1], 1)
            np.testing.assert_allclose(
                torch.tensor(maps) @ values[0], out[0], atol=1e-5, err_msg=name
            )
        if name == "gpt1":  # nothing stands between a block and the head
            labels = torch.tensor(PROMPT[1:])
            cut = [(stream[0, : len(labels)] @ words[0].t(), labels) for stream in streams[:4]]
            answers[name]["cut"] = [float(F.cross_entropy(*pair)) for pair in cut]
        reset_parallel_state()
    return answers


def test_parts_add_up_to_the_logit_and_the_last_lens_is_the_loss(tmp_path: Path) -> None:
    """Experts, parallel residuals, soft-capped and scaled logits: none of them is left out; and the
    maps are those that heads attend with, also muP's, which divides by D where others by its root."""
    [found_of] = run_on_ranks(with_nan_memory, 1, others, tmp_path)
    for name, findings in found_of.items():
        averages = findings["averages"]
        if name == "gpt1":
            assert averages["lens_loss"] == pytest.approx(findings["cut"], abs=1e-5)
            assert "attribution" not in averages and "logit" not in averages
        else:
            added = sum(np.sum(value) for value in averages["attribution"].values())
            assert added == pytest.approx(averages["logit"], rel=1e-4, abs=1e-4), name
        loss = findings["ablation"]["none"][0]
        assert averages["lens_loss"][-1] == pytest.approx(loss, rel=1e-5), name
        changed = [findings["ablation"][part] for part in ("attention", "mlp", "heads")]
        assert all(np.all(np.asarray(part) != loss) for part in changed), name


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, *LAYOUTS])
def test_findings_are_the_same_at_every_layout(
    world_size: int, runs: Path, wanted: list[Any]
) -> None:
    """Also where a stage has no block, and where copies of the model share the sequences."""
    layouts = LAYOUTS.get(world_size, [{}])
    for ranks in run_on_ranks(with_nan_memory, world_size, found, layouts, runs):
        cases = [(layout, i) for layout in layouts for i in range(len(MODELS))]
        for pair, (layout, i) in zip(ranks, cases, strict=True):
            compare(pair, wanted[i], f"{MODELS[i]} {layout}")


POST_NORM = [dict(tensor_parallel_size=2, sequence_parallel=True), dict(pipeline_parallel_size=2)]


def of_post_norm(layouts: list[dict[str, Any]], root: Path) -> list[Any]:
    """Findings on the prompt of a model whose norms stand behind what is added."""
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.probe import ProbeConfig, look_into

    if layouts == [{}]:
        save_models({"gpt1": KINDS_OF_MODELS["gpt1"]}, root, tokenizer_file(root))
    answers = []
    for layout in layouts:
        cfg = ProbeConfig(
            checkpoint=str(root / "gpt1"), prompt=text(PROMPT), patch_into=text(OTHER), answer=text([ANSWER]),
            ablate=True, precision=Precision.fp32, parallel=ParallelConfig(**layout),
        )  # fmt: skip
        answers.append(look_into(cfg, ranks_from_environment()))
        reset_parallel_state()
    return answers


@pytest.mark.slow
def test_post_norm_models_are_seen_alike_at_several_ranks(tmp_path: Path) -> None:
    """One process's findings are those of `test_parts_add_up...`; transformers has no class for these models."""
    [[alone]] = run_on_ranks(of_post_norm, 1, [{}], tmp_path)
    assert "attribution" not in alone["averages"]
    for ranks in run_on_ranks(with_nan_memory, 2, of_post_norm, POST_NORM, tmp_path):
        for layout, findings in zip(POST_NORM, ranks, strict=True):
            for name in ("averages", "kinds", "ablation"):
                close(findings[name], alone[name], f"{layout} {name}")
            for name in ("of_prompt", "of_other", "streams", "heads"):
                close(findings["patching"][name], alone["patching"][name], f"{layout} {name}")
            lens = [found["text"]["lens"]["probabilities"] for found in (findings, alone)]
            close(*lens, f"{layout} lens")
