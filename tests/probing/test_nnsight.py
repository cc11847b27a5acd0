"""The bridge of docs/probing.md: nnsight on an exported folder sees what the probe sees."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.choices import Precision
from tests.support.exported import EXPORTED, save_models, tokenizer_file
from tests.support.layouts import reset_parallel_state
from tests.support.ranks import run_on_ranks
from tests.support.waiting import HANG_S

PAGE = Path(__file__).resolve().parents[2] / "docs" / "probing.md"
PROMPT = [3, 14, 15, 92, 65, 35, 3, 14, 15]


def probed(root: Path) -> dict[str, Any]:
    """The probe's findings on the prompt; and the exported folder, beside the checkpoint."""
    from pipeline.checkpoint import folder as folders
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.huggingface.writer import DType, export
    from pipeline.probe import ProbeConfig, look_into

    save_models({"gpt2": EXPORTED["gpt2"]}, root, tokenizer_file(root))
    export(folders.find(root / "gpt2"), root / "exported", dtype=DType.fp32)
    cfg = ProbeConfig(
        checkpoint=str(root / "gpt2"), prompt=" ".join(f"t{i}" for i in PROMPT), ablate=True,
        precision=Precision.fp32,
    )  # fmt: skip
    found = look_into(cfg, ranks_from_environment())
    reset_parallel_state()
    return found


def run_documented(root: Path) -> str:
    """What the page's lines print beside root/exported: the loss without the MLP of block 2."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    [lines] = [block for block in blocks if "nnsight" in block]
    shown = "torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor({ids})).item()"
    program = root / "documented.py"  # a file: nnsight reads the lines under `with`
    program.write_text(
        lines.replace("The cat sat on the", " ".join(f"t{i}" for i in PROMPT))
        + f"print({shown.format(ids=PROMPT[1:])})\n"
    )
    done = subprocess.run(
        [sys.executable, program], cwd=root, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_streams_and_interventions_of_nnsight_are_the_probes(tmp_path: Path) -> None:
    """Lens losses after every block; and the loss with an MLP silenced, by the page's own lines."""
    nnsight = pytest.importorskip("nnsight")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [found] = run_on_ranks(probed, 1, tmp_path)
    warnings.simplefilter("ignore")  # transformers warns about its own future
    folder = tmp_path / "exported"
    inner: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = nnsight.LanguageModel(inner, tokenizer=AutoTokenizer.from_pretrained(folder))
    tokens, streams = torch.tensor([PROMPT]), []

    def loss(logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]))

    with torch.no_grad():
        for block in range(len(inner.transformer.h)):
            with model.trace(tokens):
                stream = model.transformer.h[block].output.save()
            streams.append(stream[0] if isinstance(stream, tuple) else stream)
        lens = [loss(inner.lm_head(inner.transformer.ln_f(stream))) for stream in streams]
    assert lens == pytest.approx(found["averages"]["lens_loss"], abs=1e-5)
    printed = run_documented(tmp_path)
    assert float(printed) == pytest.approx(found["ablation"]["mlp"][2], abs=1e-5)
