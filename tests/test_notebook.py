"""The notebook goes from a text to a folder that transformers loads, and shows what came of it."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "gpt_in_an_hour.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def shown(cells: list[dict[str, Any]], kind: str) -> str:
    """All that cells show of one kind of data."""
    outputs = [output for cell in cells for output in cell["outputs"]]
    found = [output.get("data", {}).get(kind, "") for output in outputs]
    found += [output["text"] for output in outputs if "text" in output and kind == "text/plain"]
    return "".join("".join(part) for part in found)


def test_every_cell_is_python_and_was_run_in_order_without_an_error() -> None:
    """Who opens it on a page of a repository sees all of it, pictures too, and nobody's folders."""
    cells = code_cells()
    for cell in cells:
        ast.parse("".join(cell["source"]))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds == {"stream", "execute_result", "display_data"}
    text = shown(cells, "text/plain")
    assert "done at step 300 of 300" in text and "logits of transformers and ours differ" in text
    assert shown(cells, "image/png").count("iVBOR") == 2 and "<th>train/loss</th>" in shown(cells, "text/html")  # fmt: skip
    assert not [word for word in ("/home/", "/root/", "/tmp/", "site-packages") if word in text]


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader runs it, with fewer steps; its pictures, sample and export come of its own run."""
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebook]'")
    pytest.importorskip("ipykernel", reason="pip install -e '.[notebook]'")
    text = NOTEBOOK.read_text()
    assert text.count("steps = 300") == 1 and text.count("save_every = 50") == 1
    text = text.replace("steps = 300", "steps = 20").replace("save_every = 50", "save_every = 10")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.reads(text, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=HANG_S, kernel_name="python3", resources=place).execute()  # fmt: skip
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    said = shown(cells, "text/plain")
    assert "done at step 20 of 20" in said and "logits of transformers and ours differ" in said
    assert shown(cells, "image/png").count("iVBOR") == 2
    assert (tmp_path / "gpt_in_an_hour" / "exported" / "model.safetensors").is_file()
