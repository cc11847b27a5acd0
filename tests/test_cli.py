"""The command line: every mistake is named with a way out, help is instant, nothing is silently ignored."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import yaml
from omegaconf import OmegaConf

from data_prep.tokens.tokenize_job import TokenizeConfig
from pipeline import cli
from pipeline import schema as schemas
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import ConfigError


def compose(*arguments: str) -> PretrainConfig:
    return cli.compose(PretrainConfig, arguments, config="pretrain")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("model.num_layer=3", ["'model.num_layer'", "Did you mean model.num_layers?"]),
        ("training.total_stepz=10", ["'training.total_stepz'", "training.total_steps"]),
        ("model.moe.num_expert=3", ["'model.moe.num_expert'", "model.moe.num_experts"]),
        ("micro_batch_size=4", ["'micro_batch_size'", "training.micro_batch_size"]),
        ("nosuch=3", ["'nosuch'", "--help"]),
        ("+model.num_layer=3", ["'model.num_layer'", "model.num_layers"]),
        ("++seeed=3", ["'seeed'", "seed"]),
        ("training.ramp=[{until_step:5,seqlen:4}]", ["training.ramp", "'seqlen'", "seq_len"]),
        ("optimizer.lr=abc", ["optimizer.lr=abc", "Float"]),
        ("training.total_steps=1.5", ["training.total_steps=1.5", "Integer"]),
        ("training.precision=bf15", ["training.precision=bf15", "fp32, bf16, fp16"]),
        ("model=gpt2-124", ["model=gpt2-124", "Did you mean gpt2-124m?", "gpt3-175b"]),
        ("experiment=nope", ["experiment=nope", "gpt2-124m"]),
        ("model=gpt2", ["Did you mean gpt2-124m, gpt2-1558m, gpt2-355m or gpt2-774m?"]),
        ("learning_rate=1e-3", ["Did you mean optimizer.lr?"]),
        ("--learning-rate=1e-3", ["Did you mean optimizer.lr=1e-3?"]),
        ("gpt2-124m", ["Did you mean experiment=gpt2-124m or model=gpt2-124m?"]),
        ("model=tiny,gpt2-124m", ["model=tiny,gpt2-124m", "one value", "pipeline.sweep"]),
        ("model.num_layers=[", ["model.num_layers=[", "not understood"]),
        ("--num-layers", ["'--num-layers'", "key=value"]),
        ("model.num_layers", ["'model.num_layers'", "key=value"]),
        ("model.num_layers=???", ["model.num_layers is not set"]),
        ("optimizer.lr_scale={embedding.*:fast}", ["optimizer.lr_scale", "Float"]),
        ("hydra.run.dir=out", ["'hydra.run.dir=out'", "no effect"]),
        ("hydra/launcher=basic", ["'hydra/launcher=basic'", "no effect", "pipeline.sweep"]),
        ("~hydra/output", ["'~hydra/output'", "no effect"]),
    ],
)
def test_mistake_is_named_with_the_way_out(argument, parts):
    """Hydra's own messages advise `+key`, which would make a misspelt setting disappear."""
    with pytest.raises(ConfigError) as caught:
        compose(argument)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "Traceback" not in message
    assert "+model" not in message


def test_table_takes_new_keys():
    """lr_scale is keyed by patterns that no schema can list."""
    assert compose("optimizer.lr_scale={embedding.*:0.5}").optimizer.lr_scale == {
        "embedding.*": 0.5
    }


def test_text_is_taken_literally():
    """A path or prompt may hold what hydra's grammar would take apart."""
    assert compose("runs_dir=a b,{c}=[d]").runs_dir == "a b,{c}=[d]"
    assert compose("checkpoint.init_from=[x], {y}").checkpoint.init_from == "[x], {y}"


@pytest.mark.parametrize(
    "text", ["a${", "${oc.env:HOME}", r"\${model.name}", r"a\b", r"\\${x}y${", "$x{y}"]
)
def test_nothing_in_a_text_is_looked_up(text):
    """A folder may be called so; and an environment variable must not get into a run's files."""
    cfg = compose(f"runs_dir={text}")
    assert cfg.runs_dir == cli.to_dict(cfg)["runs_dir"] == text
    assert yaml.safe_load(cli.to_yaml(cfg))["runs_dir"] == text


def test_what_a_preset_looks_up_is_the_literal_text():
    """conf/data/default.yaml makes its two datasets from data.path."""
    cfg = compose("data.path=/d/${oc.env:HOME},[x]")
    assert [dataset.path for dataset in cfg.data.train] == ["/d/${oc.env:HOME},[x]/train"]


@dataclass
class Job:
    """A job without a yaml file."""

    path: str = "???"
    """Where."""
    count: int = 1
    """How many,
    in pieces."""
    tags: list[str] = field(default_factory=list)


def test_positional_word_fills_its_field():
    """`python -m pipeline.report runs/x` reads as a command."""
    job = cli.compose(Job, ["runs/x, y", "count=3"], config="job_without_yaml", positional=["path"])
    assert dataclasses.astuple(job) == ("runs/x, y", 3, [])


def test_a_folder_with_an_equal_sign_is_a_positional_word(tmp_path, monkeypatch):
    """Runs are called lr=0.1; what is no folder is a misspelt setting."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "lr=0.1").mkdir(parents=True)
    (tmp_path / "count=3").mkdir()
    job = cli.compose(Job, ["runs/lr=0.1", "count=3"], config="job_2", positional=["path"])
    assert dataclasses.astuple(job) == ("runs/lr=0.1", 3, [])
    with pytest.raises(ConfigError, match="runs/lr"):
        cli.compose(Job, ["runs/lr=0.2"], config="job_2", positional=["path"])


@pytest.mark.parametrize(
    "argument, message",
    [
        ("checkpoint.init_from=", "checkpoint.init_from is empty. Is a variable"),
        ("checkpoint.fallback_dir=", "checkpoint.fallback_dir is empty"),
        ("runs_dir=~/runs", "Write runs_dir=/home/me/runs"),
        ("data.cache_dir=~", "Write data.cache_dir=/home/me"),
    ],
)
def test_what_a_shell_left_of_a_path_is_refused(argument, message, tmp_path, monkeypatch):
    """An unset variable took the fallback away, and `~` became a folder of that name."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        compose(argument)
    (tmp_path / "~").mkdir()  # a folder that is there is meant
    assert compose("runs_dir=~/runs").runs_dir == "~/runs"
    assert compose("runs_dir=~no such user").runs_dir == "~no such user"


def test_every_setting_that_is_a_path_is_known_as_one():
    """The list is kept by hand: one that lacks in it would take `~` and an unset variable."""
    root = cli.CONF_DIR.parent
    sources = [*root.glob("pipeline/**/*.py"), *root.glob("data_prep/**/*.py")]
    calls = {p: re.search(r"\n    cli\.run\(main, (\w+),", p.read_text()) for p in sources}
    found = set()
    for path, call in calls.items():
        if call is None:
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for _, field_, owner in schemas.keys(getattr(importlib.import_module(module), call[1])):
            is_text = field_.type in ("str", "str | None")
            docs = schemas.documentation(field_, owner)
            if is_text and re.search(r"\b(file|folder|path)\b", docs, re.IGNORECASE):
                found.add(field_.name)
    assert {"page", "device", "domains", "init_from", "cache_dir"} <= found <= schemas.PATHS


def test_a_bug_is_not_told_as_a_file_of_conf(monkeypatch):
    """People looked for a broken preset."""

    def bug(_):
        raise TypeError("a bug")

    monkeypatch.setattr(cli, "literal", bug)
    with pytest.raises(TypeError, match="a bug"):
        cli.compose(Job, ["path=x"], config="job_3")


def test_yaml_is_what_omegaconf_writes():
    """config.yaml and --cfg: texts that look like numbers are quoted, as its reader takes 1e-4 for one."""
    cfg = compose(
        "runs_dir=1e-4", "optimizer.lr=3e-5", "tracking.tags=[a,yes,'007']", "tracking.group=null"
    )
    assert cli.to_yaml(cfg) == OmegaConf.to_yaml(OmegaConf.create(cli.to_dict(cfg)))


def test_required_value_that_is_missing_is_named():
    """The job must not start with a hole."""
    with pytest.raises(ConfigError, match="path is not set"):
        cli.compose(Job, ["count=3"], config="job_without_yaml", positional=["path"])


def test_all_required_values_that_are_missing_are_named_at_once():
    """Of three that `tokenize` needs the second was named, then the first, then the third."""
    wanted = "input, output, tokenizer are not set and have no default; give input=... output=... tokenizer=..."
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        cli.compose(TokenizeConfig, [], config="tokenize", positional=["input", "output"])


def commands() -> dict[str, type]:
    """Module to the dataclass of its settings, of every command."""
    root, found = cli.CONF_DIR.parent, {}
    for path in [*root.glob("pipeline/**/*.py"), *root.glob("data_prep/**/*.py")]:
        if call := re.search(r"\n    cli\.run\(main, (\w+),", path.read_text()):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            found[module] = getattr(importlib.import_module(module), call[1])
    return found


def test_every_setting_of_every_command_says_what_it_means():
    """A third of train's had no line, and what tokenize inherits had none at all."""
    silent = [
        f"{module}: {key}"
        for module, schema in commands().items()
        for key, field_, owner in schemas.settings(schema)
        if len(schemas.documentation(field_, owner)) < 10
    ]
    assert silent == []


def test_what_an_entry_of_a_list_has_is_a_setting_too():
    found = {key for key, _, _ in schemas.settings(PretrainConfig)}
    assert {"data.train[].weight", "data.validation[].path", "training.ramp[].until_step"} <= found


def page_of(capsys, *words: str, main=PretrainConfig, config="pretrain") -> tuple[int, str, str]:
    """Exit code, page and messages of `--help` beside `words`."""
    code = cli._help(page_of, main, words, config=config, positional=["path"])
    return code, *capsys.readouterr()


def test_help_shows_each_field_with_its_documentation(capsys):
    """The schema is the manual: nothing to fall out of date."""
    code, text, _ = page_of(capsys, main=Job, config="job")
    assert "path = (required) (may be given without its name)" in text
    assert "count = 1\n      How many, in pieces." in text
    assert " ".join(text.split()).startswith(sys.modules[__name__].__doc__.strip())
    assert code == 0


def test_help_shows_the_values_that_a_run_would_have(capsys):
    """It showed the schema's: total_steps null, min_lr 6e-05, where a run has 1000 and the recipe's."""
    _, text, _ = page_of(capsys)
    assert "  training.total_steps = 1000\n" in text and "  model.num_layers = 4\n" in text
    assert "  name = tiny\n" in text
    _, text, _ = page_of(capsys, "experiment=quickstart", "seed=7")
    assert "  training.total_steps = 1800\n" in text and "  seed = 7\n" in text
    assert "  optimizer.lr = 0.004\n" in text
    assert "  schedule.decay = linear   (cosine | linear | wsd | constant)\n" in text


def test_help_beside_a_mistake_shows_the_page_and_the_mistake(capsys):
    """Whoever is refused adds --help to the same words."""
    code, text, messages = page_of(capsys, "learning_rate=1")
    assert code == 2 and "  training.total_steps = 1000\n" in text
    assert "Did you mean optimizer.lr?" in messages
    code, text, messages = page_of(capsys, "training.seq_len=${nowhere}")
    assert code == 2 and "  training.total_steps = 1000\n" in text
    assert messages == "error: training.seq_len: Interpolation key 'nowhere' not found\n"


def run(*arguments: str) -> tuple[subprocess.CompletedProcess, float]:
    """A command in a process of its own, and the processor time it took: other processes do not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cli.CONF_DIR.parent
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize(
    ("command", "limit_s"),
    [(["-m", "pipeline.train"], 2.0), (["data_prep/tokenize.py"], 1.0)],
    ids=["train", "tokenize"],
)
def test_help_is_lean(command, limit_s):
    """Help answers at once: no torch; the best of three, as this machine may be busy."""
    done, _ = run("-X", "importtime", *command, "--help")
    assert done.returncode == 0, done.stderr[-500:]
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "wandb", "deepspeed", "megatron"} & imported
    assert min(run(*command, "--help")[1] for _ in range(3)) < limit_s


@pytest.mark.parametrize(
    "command", [["-m", "pipeline.train"], ["data_prep/tokenize.py"]], ids=["train", "tokenize"]
)
def test_misspelt_key_ends_without_traceback_and_with_an_exit_code(command):
    """One line is what a user needs; a traceback hides it."""
    done, _ = run(*command, "nosuch_setting=1")
    assert done.returncode == 2
    assert "nosuch_setting" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_owns_the_folder_of_compiled_kernels(tmp_path):
    """On every node, whoever starts the ranks there: a launch script runs on the first node only."""
    show = "import os; from pipeline import cli; from pipeline.config.pretrain import PretrainConfig as C; "
    show += (
        'cli.run(lambda cfg: print(os.environ["TORCHINDUCTOR_CACHE_DIR"]), C, config="pretrain")'
    )
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.stdout == f"{tmp_path}/pretrain-{os.getuid()}/inductor\n", done.stderr


@pytest.mark.parametrize(
    "error, code, said",
    [
        (OSError(errno.ENOSPC, "No space left on device", "out.json"), 2, "out.json: No space left on device. Free some"),
        (OSError(errno.EROFS, "Read-only file system", "a", None, "b"), 2, "error: b: Read-only file system"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 141, ""),
    ],
)  # fmt: skip
def test_what_is_no_bug_ends_in_a_sentence(error, code, said, monkeypatch, capfd):
    """A full disk, a reader that left and Ctrl-C ended in tracebacks, in any command that wrote."""

    def main(_):
        raise error

    monkeypatch.setattr(sys, "argv", ["job", "path=x"])
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # pytest needs its standard output
    monkeypatch.setattr(cli, "own_compiled_code", lambda: None)
    with pytest.raises(SystemExit) as end:
        cli.run(main, Job, config="job_4")
    assert end.value.code == code and said in capfd.readouterr().err


def test_what_is_a_bug_keeps_its_traceback(monkeypatch):
    def main(_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    monkeypatch.setattr(sys, "argv", ["job", "path=x"])
    monkeypatch.setattr(cli, "own_compiled_code", lambda: None)
    with pytest.raises(FileNotFoundError):
        cli.run(main, Job, config="job_4")


@pytest.mark.parametrize(
    "command",
    [["pipeline.generate", "nowhere"], ["pipeline.export", "nowhere", "out"], ["pipeline.evaluate", "nowhere"]],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_wrong_checkpoint_is_named_before_anything_heavy_is_imported(command):
    """A misspelt name cost the seconds that torch takes."""
    done, _ = run("-X", "importtime", "-m", *command)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 2 and "nowhere is no folder" in done.stderr, done.stderr[-500:]
    assert not {"torch", "transformers", "deepspeed"} & imported
