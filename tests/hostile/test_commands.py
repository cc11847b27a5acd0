"""Hostile presets and names, through the commands: every use ends well or in a PipelineError; no traceback, hang, code or file elsewhere."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.errors import ConfigError
from tests.support.hostile import TIME_LIMIT_S, fault_of, time_limit

pytest.importorskip(
    "torch"
)  # here: to import it takes longer than a command may, on a busy machine
ROOT = Path(__file__).resolve().parents[2]

YAML = {
    "torn": b"num_layers: [1, 2", "tab": b"a:\n\t- b", "bytes": b"\xff\xfe\x00", "list": b"- 1", "alias": b"a: *b",
    "tag": b"a: !!python/object/apply:os.mkdir [%s]", "key": b"[1, 2]: 3", "twice": b"name: a\nname: b",
    "unknown": b"no_such_setting: 1", "interpolated": b"name: ${oc.env:HOME}", "deep": b"[" * 1000,
}  # fmt: skip


@pytest.mark.parametrize("name", [*YAML, "pipe", "folder"])
def test_presets(tmp_path, outside, monkeypatch, name):
    from pipeline.config.pretrain import PretrainConfig

    conf = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.setattr(cli, "CONF_DIR", conf)
    file = conf / "model" / "bad.yaml"
    if name == "pipe":
        os.mkfifo(file)
    elif name == "folder":
        file.mkdir()
    else:
        code = str(outside.with_name("code-was-run")).encode()
        file.write_bytes(YAML[name].replace(b"%s", code))
    fault = fault_of(lambda _: cli.compose(PretrainConfig, ["model=bad"], config="pretrain"), conf)
    assert fault is None
    if name == "torn":
        with pytest.raises(ConfigError, match="bad.yaml"):
            cli.compose(PretrainConfig, ["model=bad"], config="pretrain")


# Every command that reads a folder or a file of somebody's; F is the folder, O a new one.
COMMANDS = [
    "data_prep.show F",
    "data_prep.verify F",
    "data_prep.finalize F",
    "data_prep.tokenize F O tokenizer=F/tokenizer.json",
    "data_prep.clean F O clean=dedup",
    "data_prep.import_tokens F O tokenizer=F/tokenizer.json",
    "data_prep.conversations F O tokenizer=F/tokenizer.json row_tokens=64",
    "data_prep.train_tokenizer F O",
    *(
        f"pipeline.checkpoint {tool}"
        for tool in ("list F", "verify F", "show F", "diff F F", "merge F O")
    ),
    "pipeline.hf_import F",
    "pipeline.report F",
    "pipeline.evaluate F",
    "pipeline.export checkpoint=F output=O",
    "pipeline.generate checkpoint=F",
    "pipeline.answer checkpoint=F data=F/a.jsonl",
    "pipeline.order_audit data.path=F",
    "pipeline.preflight data.path=F",
]
NAMES = """manifest.json index.npy tokenizer.json checkpoint.json tensors.json SHA256SUMS config.json
    model.safetensors metrics.jsonl job.json a.jsonl b.txt c.parquet d.bin latest .metadata""".split()
KINDS = {"pipes": os.mkfifo, "devices": lambda path: path.symlink_to("/dev/zero"), "folders": Path.mkdir}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_end_with_a_message(tmp_path, outside, monkeypatch, capsys, command, kind):
    """It is for people: no traceback, and nothing in it commands the terminal. None waits for a pipe."""
    folder = tmp_path / "d\x1b[2J\udcff"
    folder.mkdir()
    for name in NAMES:
        KINDS[kind](folder / name)
    words = command.replace("F", str(folder)).replace(" O", f" {tmp_path / 'out'}").split(" ")
    words = [word.replace("=O", f"={tmp_path / 'out'}") for word in words]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), time_limit(TIME_LIMIT_S), pytest.raises(SystemExit) as ended:
        warnings.simplefilter("ignore")
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    said = capsys.readouterr()
    assert ended.value.code in (
        (1, 2) if "verify" in command or "preflight" in command else (2,)
    ), said
    assert "error: " in said.err or "verify" in command or "preflight" in command
    assert "Traceback" not in said.err and "\x1b" not in said.err + said.out
