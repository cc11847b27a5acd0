"""Activations on disk: those of the exported model, in order, whole after a kill, at any layout."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.choices import Precision
from pipeline.config.data import DataConfig, DatasetConfig
from pipeline.config.training import ParallelConfig
from pipeline.errors import ConfigError
from tests.support.exported import EXPORTED, save_models, tokenizer_file
from tests.support.layouts import SEQ_LEN, VOCAB, reset_parallel_state
from tests.support.ranks import run_on_ranks
from tests.support.token_dataset import write_dataset

PLACES = ("embedding", "layers.1", "layers.2.self_attention", "layers.3.mlp")
SHARD, LENGTHS = 3, (5 * SEQ_LEN + 9, 2 * SEQ_LEN + 1)
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [dict(tensor_parallel_size=2, sequence_parallel=True), dict(zero_stage=3)],
    4: [dict(pipeline_parallel_size=2)],
}


def unclosed(test: Any) -> Any:
    """Webdataset leaves its files to the collector."""
    for what in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{what}")(test)
    return test


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and two held-out datasets: one of two shards, whose last windows are short."""
    root = tmp_path_factory.mktemp("dumped")
    tokenizer = tokenizer_file(root)
    run_on_ranks(save_models, 1, {"gpt2": EXPORTED["gpt2"]}, root, tokenizer)
    for name, parts in (("a", LENGTHS), ("b", (4 * SEQ_LEN + 1,))):
        shards = [np.random.default_rng(size).integers(0, VOCAB, size) for size in parts]
        write_dataset(root / name, shards, vocab_size=VOCAB, tokenizer=tokenizer.read_bytes())
    return root


def settings(root: Path, place: str, output: Path, **more: Any) -> Any:
    from pipeline.activations import ActivationsConfig

    held_out = [DatasetConfig(path=str(root / name)) for name in ("a", "b")]
    return ActivationsConfig(
        checkpoint=str(root / "gpt2"), place=place, output=str(output), shard_sequences=SHARD,
        seq_len=SEQ_LEN, micro_batch_size=2, precision=Precision.fp32,
        data=DataConfig(validation=held_out), **more,
    )  # fmt: skip


def dumped(layouts: list[dict[str, Any]], root: Path, output: Path) -> list[int]:
    """Shards written by layout and place."""
    from pipeline.activations import write_activations
    from pipeline.distributed.ranks import ranks_from_environment

    counts = []
    for number, layout in enumerate(layouts):
        for place in PLACES:
            folder = output / f"{number}-{place}"
            cfg = settings(root, place, folder, parallel=ParallelConfig(**layout))
            counts.append(write_activations(cfg, ranks_from_environment()))
            reset_parallel_state()
    return counts


def expected(root: Path) -> dict[str, list[np.ndarray]]:
    """By place: the activations of every window, from the exported folder under transformers."""
    from pipeline.checkpoint import folder as folders
    from pipeline.huggingface.writer import DType, export
    from tests.support.probed import Theirs

    warnings.simplefilter("ignore")  # transformers warns about its own future
    export(folders.find(root / "gpt2"), root / "exported", dtype=DType.fp32)
    theirs = Theirs(root / "exported")
    found: dict[str, list[np.ndarray]] = {place: [] for place in PLACES}
    for tokens in windows():
        seen = theirs.run(torch.from_numpy(tokens)[None])
        values = seen["embedded"], seen["after"][1], seen["attended"][2], seen["mlp"][3]
        for place, value in zip(PLACES, values):
            found[place].append(value[0].numpy())
    return found


def windows() -> list[np.ndarray]:
    """Tokens that are read, window after window."""
    rows = []
    for size in (*LENGTHS, 4 * SEQ_LEN + 1):
        tokens = np.random.default_rng(size).integers(0, VOCAB, size)
        rows += [tokens[i : i + SEQ_LEN + 1][:-1] for i in range(0, size - 1, SEQ_LEN)]
    return rows


def read(folder: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """What webdataset gives of the tars, in their order."""
    import webdataset as wds

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    stream = wds.WebDataset(tars, shardshuffle=False).decode()
    return list(stream.to_tuple("__key__", "tokens.npy", "activations.npy"))


def documented_rows() -> Any:
    """The `rows` of docs/probing.md, which autoencoders are trained on."""
    page = (Path(__file__).resolve().parents[2] / "docs/probing.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def rows" in c)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    return names["rows"]


def compare(folder: Path, wanted: list[np.ndarray], case: str) -> None:
    found = read(folder)
    assert [key for key, _, _ in found] == [f"{number:09d}" for number in range(len(wanted))], case
    for (_, tokens, values), theirs, ids in zip(found, wanted, windows(), strict=True):
        assert np.array_equal(tokens, ids), case
        np.testing.assert_allclose(values, theirs, rtol=1e-5, atol=1e-5, err_msg=case)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tokens"] == sum(map(len, wanted))
    assert [s["sequences"] for s in manifest["shards"]] == [3, 3, 2, 3, 1]


@pytest.fixture(scope="module")
def wanted(root: Path) -> dict[str, list[np.ndarray]]:
    return run_on_ranks(expected, 1, root)[0]


@unclosed
@pytest.mark.slow
def test_activations_are_transformers_and_a_dump_goes_on_where_it_was_killed(
    root: Path, wanted: dict[str, list[np.ndarray]], tmp_path: Path
) -> None:
    """Short windows, two datasets; a shard that was being written is written again, byte by byte."""
    assert run_on_ranks(dumped, 1, [{}], root, tmp_path) == [[5] * len(PLACES)]
    folders = [tmp_path / f"0-{place}" for place in PLACES]
    for folder, place in zip(folders, PLACES):
        compare(folder, wanted[place], place)
    batches = list(documented_rows()(folders[1], batch=8, mixed=20))
    assert max(map(len, batches)) == 8
    theirs = np.concatenate(wanted[PLACES[1]])
    by_first = np.argsort(theirs[:, 0]), torch.cat(batches).numpy()
    mixed = by_first[1][np.argsort(by_first[1][:, 0])]
    np.testing.assert_allclose(mixed, theirs[by_first[0]], rtol=1e-5, atol=1e-5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for folder in folders:
        (folder / "done" / "00000001.json").unlink()
        (folder / "manifest.json").unlink()
        (folder / "activations-00000001.tar").write_bytes(b"half")
    assert run_on_ranks(dumped, 1, [{}], root, tmp_path) == [[1] * len(PLACES)]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run_on_ranks(refusals, 1, root, folders[1])


def refusals(root: Path, folder: Path) -> None:
    """A folder of another dump, a folder of something else, a place that is none."""
    from pipeline.activations import write_activations
    from pipeline.distributed.ranks import ranks_from_environment

    ranks, held_out = ranks_from_environment(), settings(root, "layers.1", folder).data
    bf16 = {"precision": Precision.bf16}
    masked = {"data": replace(held_out, mask_documents=True)}
    for place, output, more, said in (
        (
            "layers.2",
            folder,
            {},
            "holds a dump of something else .*place 'layers.1', now 'layers.2'",
        ),
        ("layers.1", folder, bf16, "something else .precision 'fp32', now 'bf16'"),
        ("layers.1", folder, masked, "something else .mask_documents False, now True"),
        ("layers.2", root, {}, "holds other files: choose another output"),
        ("layers.4", folder, {}, r"place=layers.4 is none of this model.*layers.0 to layers.3 "),
    ):
        with pytest.raises(ConfigError, match=said):
            write_activations(replace(settings(root, place, output), **more), ranks)
        reset_parallel_state()


@unclosed
@pytest.mark.slow
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_activations_are_the_same_at_every_layout(
    world_size: int, root: Path, wanted: dict[str, list[np.ndarray]], tmp_path: Path
) -> None:
    """Copies of the model write shards of their own, of unequal sizes; stages only what they hold."""
    layouts = LAYOUTS[world_size]
    counts = run_on_ranks(dumped, world_size, layouts, root, tmp_path)
    assert counts == [[5] * len(PLACES) * len(layouts)] * world_size
    for number, layout in enumerate(layouts):
        for place in PLACES:
            compare(tmp_path / f"{number}-{place}", wanted[place], f"{layout} {place}")
