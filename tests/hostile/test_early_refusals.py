"""Wrong words on a command line are found before a library that takes seconds is imported, or a tensor is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.checkpoint import folder as folders
from pipeline.config.pretrain import PretrainConfig
from tests.support.checkpoint_runs import record_of
from tests.support.records import write_record
from tests.support.small_runs import overrides, write_data

ROOT = Path(__file__).resolve().parents[2]
# RUN's checkpoint is a record alone: who reads its tensors says that it is damaged.
WRONG = {
    "pipeline.generate nowhere": "nowhere is no folder",
    "pipeline.generate EMPTY": "is no checkpoint",
    "pipeline.generate RUN temperature=-1": "temperature (-1.0)",
    "pipeline.generate RUN top_p=2": "top_p (2.0)",
    "pipeline.generate RUN max_new_tokens=0": "max_new_tokens (0)",
    "pipeline.generate RUN file=nowhere.txt": "nowhere.txt cannot be read",
    "pipeline.generate RUN file=FILE interactive=true": "several ways to ask",
    "pipeline.generate RUN image=nowhere.png": "nowhere.png",
    "pipeline.generate RUN image=FILE": "is no PNG, JPEG or WebP",
    "pipeline.generate RUN chat=true num_samples=2": "no effect with chat",
    "pipeline.serve nowhere": "nowhere is no folder",
    "pipeline.serve RUN port=99999": "port (99999)",
    "pipeline.serve RUN temperature=3": "temperature (3.0)",
    "pipeline.export nowhere OUT": "nowhere is no folder",
    "pipeline.export RUN": "output",
    "pipeline.export RUN TAKEN": "is not empty",
    "pipeline.export RUN FILE/out": "FILE/out",
    "pipeline.export RUN OUT base=elsewhere": "base=elsewhere has no effect",
    "pipeline.export RUN OUT adapter=true": "it is no adapter",
    "pipeline.export RUN OUT dtype=int8": "dtype",
    "pipeline.evaluate nowhere": "nowhere is no folder",
    "pipeline.evaluate RUN data.path=nowhere": "nowhere",
    "pipeline.evaluate RUN seq_len=0": "seq_len",
    "pipeline.evaluate RUN seq_len=4096": "seq_len",
    "pipeline.evaluate RUN micro_batch_size=0": "micro_batch_size",
    "pipeline.evaluate RUN sequences=-1": "sequences",
    "pipeline.evaluate RUN parallel.tensor_parallel_size=3": "tensor_parallel_size",
    "pipeline.evaluate RUN output=FILE/x.json": "FILE/x.json cannot be written",
    "pipeline.probe nowhere": "nowhere is no folder",
    "pipeline.probe RUN answer=B": "patch_into and answer go with a prompt",
    "pipeline.probe RUN train_lens=-1": "train_lens (-1)",
    "pipeline.probe RUN prompt=LONG": "tokens",
    "pipeline.probe RUN output=FILE/x": "FILE/x/probe.json cannot be written",
    "pipeline.probe RUN tuned_lens=nowhere.safetensors": "nowhere.safetensors",
    "pipeline.answer nowhere TALKS": "nowhere is no folder",
    "pipeline.answer RUN nowhere.jsonl": "nowhere.jsonl",
    "pipeline.answer RUN TALKS": "no chat template",
    "pipeline.answer RUN TALKS limit=-1": "limit (-1)",
    "pipeline.answer RUN TALKS output=FILE/x": "FILE/x cannot be written",
}  # fmt: skip
HEAVY = ["torch", "transformers", "deepspeed", "megatron", "wandb", "matplotlib"]
PROGRAM = """
import contextlib, io, json, runpy, sys
HEAVY = sys.argv[1:]
found = []
for words in json.load(sys.stdin):
    sys.argv = words
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = runpy.run_module(words[0], run_name="__main__", alter_sys=True) and None
        except SystemExit as end:
            code = end.code
    found.append((code, said.getvalue(), [name for name in HEAVY if name in sys.modules]))
print(json.dumps(found))
"""


@pytest.fixture
def there(tmp_path: Path) -> dict[str, str]:
    """What the words stand for."""
    data = write_data(tmp_path / "data")
    cfg = cli.compose(PretrainConfig, overrides(data, tmp_path / "runs"), config="pretrain")
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / folders.name_of(1)
    for folder in (checkpoint, tmp_path / "empty", tmp_path / "taken" / "something"):
        folder.mkdir(parents=True)
    shutil.copy(data / "tokenizer.json", checkpoint)
    vocab_size = json.loads((data / "train" / "manifest.json").read_text())["tokenizer"][
        "vocab_size"
    ]
    record = replace(record_of(1), config=cli.to_dict(cfg), vocab_size=vocab_size, eod=0)
    write_record(checkpoint, record.to_json())
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk) + "\n")
    (tmp_path / "file").write_text("a file\n")
    places = {"RUN": "runs/run", "EMPTY": "empty", "TAKEN": "taken", "FILE": "file", "TALKS": "talks.jsonl", "OUT": "out"}  # fmt: skip
    return {name: str(tmp_path / place) for name, place in places.items()} | {"LONG": "the " * 3000}


def test_wrong_words_are_found_before_anything_is_loaded(
    there: dict[str, str], tmp_path: Path
) -> None:
    """Of torch alone the import takes seconds: a mistake is answered at once."""

    def filled(text: str) -> str:
        for name, value in there.items():
            text = text.replace(name, value)
        return text

    asked = [[filled(word) for word in command.split(" ")] for command in WRONG]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *HEAVY], input=json.dumps(asked), capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    wrong = {
        command: answer
        for (command, part), answer in zip(WRONG.items(), json.loads(done.stdout), strict=True)
        if answer[0] != 2 or filled(part) not in answer[1] or answer[2] or "Traceback" in answer[1]
    }
    assert wrong == {}
