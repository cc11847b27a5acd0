"""Launch scripts and their documentation: what is written there works."""

import re
import shlex
import subprocess

import pytest
import yaml

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.preflight import PreflightConfig
from tests.support.slurm_cluster import REPO

LAUNCH = REPO / "launch"
SCRIPTS = sorted(p for p in LAUNCH.iterdir() if p.suffix in (".sh", ".slurm"))
PROGRAMS = (
    r"(launch/pretrain\.slurm|launch/local\.sh \d+|-m pipeline\.train|-m pipeline\.preflight)"
)


def documented_settings() -> list[tuple[str, list[str]]]:
    """(program, its settings) of every command in the launch scripts and pages."""
    found = []
    for path in [LAUNCH / "README.md", *SCRIPTS, LAUNCH / "kubernetes" / "pytorchjob.yaml"]:
        for match in re.finditer(PROGRAMS + r"((?: [a-z_.]+=[^\s`|\"$]+)+)", path.read_text()):
            found.append((match[1], shlex.split(match[2])))
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


def test_every_documented_command_composes():
    commands = documented_settings()
    assert len(commands) >= 6
    for program, settings in commands:
        cli.compose(
            PreflightConfig if "preflight" in program else PretrainConfig,
            settings,
            config="pretrain",
        )


def test_env_keeps_what_the_user_has_set_and_explains_each_variable():
    text = (LAUNCH / "env.sh").read_text()
    names = re.findall(r"^export (\w+)=", text, re.MULTILINE)
    ours = {"PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER"}
    values = {name: "mine" for name in names if name not in ours} | {
        "REPO": str(REPO),
        "PYTHON": "mine",
    }
    show = (
        'source "$REPO/launch/env.sh"; for name in '
        + " ".join(values)
        + '; do echo "$name=${!name}"; done'
    )
    printed = subprocess.run(
        ["bash", "-c", show],
        env=values | {"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert dict(line.split("=", 1) for line in printed.stdout.splitlines()) == values
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("export "):
            block = next(
                lines[i] for i in range(number - 1, -1, -1) if not lines[i].startswith("export ")
            )
            assert block.startswith("#") or block == "fi", f"{line} has no reason above it"


def test_kubernetes_job_starts_one_torchrun_per_node_until_the_run_is_done():
    job = yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text())
    master, worker = (job["spec"]["pytorchReplicaSpecs"][role] for role in ("Master", "Worker"))
    assert master["template"] == worker["template"] and master["replicas"] == 1
    (container,) = master["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert container["args"][0].endswith("&& [ -e /runs/$NAME/DONE ]\n")
    assert job["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    mounted, volumes = (
        {m["name"] for m in container["volumeMounts"]},
        {v["name"] for v in master["template"]["spec"]["volumes"]},
    )
    assert mounted == volumes


def test_kubernetes_notice_reaches_torchrun_and_an_unfinished_run_is_started_again(tmp_path):
    """The kubelet tells the container's first process alone: the shell that waits for torchrun."""
    job = yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    (tmp_path / "torchrun").write_text(
        '#!/bin/bash\ntrap "touch $HERE/heard; exit 0" TERM\n'
        "echo started\nwhile kill -0 $PPID 2> /dev/null; do sleep 0.05; done\n"
    )
    (tmp_path / "torchrun").chmod(0o755)
    command = [*container["command"], container["args"][0].replace("/runs", str(tmp_path))]
    environment = {"HERE": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", "NAME": "big"}
    with subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True
    ) as pod:
        assert pod.stdout.readline() == "started\n"
        pod.terminate()
        assert pod.wait(timeout=60) == 1  # no DONE: "failed", so the pod is started again
    assert (tmp_path / "heard").exists()
