"""Launch scripts: valid bash, every variable explained, the Kubernetes job as it is written."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from tests.support.recipe import copy_repository
from tests.support.slurm_cluster import REPO
from tests.support.waiting import HANG_S

LAUNCH = REPO / "launch"
SCRIPTS = sorted(p for p in LAUNCH.iterdir() if p.suffix in (".sh", ".slurm"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


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


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, ["{repo}/.venv/bin/python"]),
        ("python3.12", ["python3.12"]),
        ("apptainer exec --nv x.sif python", ["apptainer", "exec", "--nv", "x.sif", "python"]),
    ],
)
def test_python_of_a_clone_is_one_word_and_yours_is_split(tmp_path, given, words):
    """A clone below `My Projects` started `/home/me/My`."""
    repo = tmp_path / "my clone"
    (repo / ".venv/bin").mkdir(parents=True)
    (repo / ".venv/bin/python").symlink_to("/bin/true")
    (repo / ".venv/pyvenv.cfg").touch()
    environment = {"REPO": str(repo), "PATH": "/usr/bin:/bin"} | (
        {"PYTHON": given} if given else {}
    )
    show = f'source "{LAUNCH}/env.sh"; printf "%s\\n" "${{python[@]}}"'
    printed = subprocess.run(["bash", "-c", show], env=environment, capture_output=True, text=True)
    assert printed.stdout.splitlines() == [word.format(repo=repo) for word in words]


def test_a_link_into_another_environment_is_called_by_the_path_it_points_to(tmp_path):
    """Python looks for its packages beside that path: through the link it finds none."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/bin/true")
    show = f'source "{LAUNCH}/env.sh"; printf "%s\\n" "${{python[@]}}"'
    environment = {"REPO": str(tmp_path), "PATH": "/usr/bin:/bin"}
    printed = subprocess.run(["bash", "-c", show], env=environment, capture_output=True, text=True)
    assert printed.stdout == "/bin/true\n"


def test_no_script_splits_what_it_was_given():
    """Every use of the program and of the arguments is quoted."""
    for script in SCRIPTS:
        code = "\n".join(line.partition(" #")[0] for line in script.read_text().splitlines())
        assert not re.search(r"\$PYTHON\b", code.replace('<<< "$PYTHON"', "")), script
        assert not re.search(r'(?<!")\$[@*]|(?<!")\$\{\w+\[@\]\}', code), script


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository, whose path has blanks."""
    folder = tmp_path_factory.mktemp("home") / "my clone"
    copy_repository(folder)
    return folder


@pytest.mark.parametrize("output", ["out", "my data/[1], größe=2", "a'b\"c{d}"])
@pytest.mark.parametrize("is_named", [True, False], ids=["output=", "by place"])
def test_text_to_model_hands_on_what_the_tokenization_writes_to(tmp_path, clone, output, is_named):
    """The training job would wait for the tokens, and then not find them."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f"#!{sys.executable}\nimport sys, json\n"
        f'open({str(tmp_path / "calls")!r}, "a").write(json.dumps(sys.argv[1:]) + "\\n")\nprint(7)\n'
    )
    sbatch.chmod(0o755)
    source = tmp_path / "a, b.jsonl"
    words = [f"input={source}", f"output={output}"] if is_named else [str(source), output]
    subprocess.run(
        [clone / "launch/text_to_model.sh", "--array=0-3", *words, "tokenizer=t.json", "--", "--nodes=2", "name=big"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable},
        check=True,
    )  # fmt: skip
    tokenize, pretrain = map(json.loads, (tmp_path / "calls").read_text().splitlines())
    assert tokenize[2:] == [f"{clone}/launch/tokenize.slurm", *words, "tokenizer=t.json"]
    assert pretrain[-3:] == [f"{clone}/launch/pretrain.slurm", f"data.path={output}", "name=big"]
    config = cli.compose(PretrainConfig, pretrain[-2:], config="pretrain")
    assert config.data.path == output


@pytest.mark.parametrize("recipe", ["quickstart", "talk", "caption", "translate"])
def test_settings_of_a_recipe_that_is_done_are_refused(tmp_path, recipe):
    """They would change nothing, and the tables printed after them would be taken for theirs."""
    for folder in ("launch", f"runs/{recipe}"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("recipe.sh", f"{recipe}.sh"):
        (tmp_path / "launch" / name).write_bytes((LAUNCH / name).read_bytes())
    (tmp_path / "runs" / recipe / "DONE").touch()
    command = ["bash", f"launch/{recipe}.sh", "optimizer.lr=1", "seed=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 2 and done.stdout == ""
    told = f"error: runs/{recipe} is done, and optimizer.lr=1 seed=2 would change nothing."
    assert done.stderr.startswith(told) and "name=mine" in done.stderr


@pytest.mark.parametrize(
    "is_done, words, code", [(True, "", 0), (False, "seed=2", 0), (True, "seed=2", 2)]
)
def test_a_recipe_goes_on_without_settings_or_before_its_end(tmp_path, is_done, words, code):
    """The same line resumes what was interrupted, and reuses what is done."""
    if is_done:
        (tmp_path / "DONE").touch()
    show = f'source "{LAUNCH}/recipe.sh"; refuse_settings_of_done "{tmp_path}" {words}'
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, timeout=HANG_S)
    assert (done.returncode, bool(done.stderr)) == (code, code != 0)


def test_text_to_model_says_a_wrong_setting_before_anything_is_submitted(tmp_path):
    """Sixty-four tasks would each say it in an hour."""
    result = subprocess.run(
        [LAUNCH / "text_to_model.sh", "input=a", "output=b", "tokenizr=c", "--", "name=big"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "Did you mean tokenizer" in result.stderr


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


def command_of_the_pod(folder, torchrun):
    """What the container runs, with a stand-in for torchrun that lasts as long as its shell."""
    job = yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    wait = "while kill -0 $PPID 2> /dev/null; do sleep 0.01; done\n"
    (folder / "torchrun").write_text(f"#!/bin/bash\n{torchrun}\n{wait}")
    (folder / "torchrun").chmod(0o755)
    return [*container["command"], container["args"][0].replace("/runs", str(folder))]


def test_kubernetes_notice_reaches_torchrun_and_an_unfinished_run_is_started_again(tmp_path):
    """The kubelet tells the container's first process alone: the shell that waits for torchrun."""
    command = command_of_the_pod(tmp_path, 'trap "touch $HERE/heard; exit 0" TERM\necho started')
    environment = {"HERE": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", "NAME": "big"}
    with subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True
    ) as pod:
        assert pod.stdout.readline() == "started\n"
        pod.terminate()
        assert pod.wait(timeout=HANG_S) == 1  # no DONE: "failed", so the pod is started again
    assert (tmp_path / "heard").exists()


def test_kubernetes_notice_may_come_as_soon_as_torchrun_is_there(tmp_path):
    """Where the shell set its trap after starting torchrun, 12 of 30 such notices were lost."""
    command = command_of_the_pod(tmp_path, 'trap "echo heard; exit 0" TERM\nkill -TERM $PPID')
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NAME": "big"}
    for _ in range(20):
        pod = subprocess.run(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)
        assert (pod.stdout, pod.returncode) == ("heard\n", 1)
