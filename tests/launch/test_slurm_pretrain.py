"""Training under launch/pretrain.slurm on a real Slurm: whatever happens, the losses are those of an undisturbed run.

Every run is compared, step by step, with one process that nothing happened to: sample hashes equal, losses within fp32
rounding. Nodes are namespaces of this machine (tests/support/slurm_cluster.py); what happens to them: test_slurm_faults.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.corpus import make_texts, make_tokenizer, write_jsonl
from tests.support.plant import Lead
from tests.support.slurm_cluster import REPO, Job
from tests.support.slurm_lab import NEEDS_SLURM, SETTINGS, STEPS, Lab
from tests.support.waiting import HANG_S

pytestmark = [*NEEDS_SLURM, pytest.mark.usefixtures("preloaded")]


def test_two_jobs_in_one_folder_one_trains_and_one_is_refused(lab: Lab) -> None:
    """sbatch of the same line twice, on two nodes that share the disk: the first must not notice the second."""
    first = lab.submit("twice", options=("--nodes=1",), until=3)
    lab.wait_for_step(first, "twice", 3)
    second = lab.submit("twice", options=("--nodes=1",), until=3)
    assert second.wait_for_end() == "FAILED", second.log()
    assert "is in use by process" in second.log() and f"Slurm job {first.id}" in second.log()
    lab.lead("twice")
    assert first.wait_for_end() == "COMPLETED", first.log()
    lab.expect_undisturbed("twice")


def test_tensor_and_pipeline_parallel_over_two_nodes_equals_one_machine(lab):
    job = lab.submit(
        "layout", "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "tracking.wandb=disabled",
        options=("--nodes=2", "--ntasks-per-node=2"),
    )  # fmt: skip
    assert job.wait_for_end() == "COMPLETED", job.log()
    lab.expect_undisturbed("layout")


def test_every_kind_of_notice_resumes_without_losing_a_step(lab):
    """scancel -s USR2, scontrol requeue and preemption, one after the other, in one job."""

    def lead_after(heard: str, *commands: list[str], to: int) -> None:
        """Two signals of a kind are heard once or twice."""
        before = job.log().count(f"{heard} heard")
        for command in commands:
            lab.cluster.run(*command)
        lab.cluster.wait_for(lambda: job.log().count(f"{heard} heard") > before, heard, job=job)
        lab.lead("notice", to=to)

    job = lab.submit("notice", until=5)
    lab.wait_for_step(job, "notice", 5)
    usr2 = ["scancel", "-s", "USR2", job.id]
    lead_after("USR2", usr2, usr2, to=9)  # a second one does no harm
    lab.wait_for_step(job, "notice", 9)
    lead_after("TERM", ["scontrol", "requeue", job.id], to=13)
    lab.wait_for_step(job, "notice", 13)
    (urgent := lab.folder / "urgent.sh").write_text("#!/bin/bash\nsleep 1\n")
    options = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null"]
    lead_after("TERM", ["sbatch", *options, str(urgent)], to=STEPS)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.log().count("leaving on notice") == 3
    lab.expect_undisturbed("notice")
    lab.expect_one_wandb_run("notice", starts=4)


def test_time_limit_resumes_without_losing_a_step(lab):
    """Notice comes 75 s before the end of two minutes, or up to a minute earlier; the run halts until then."""
    options = ("--nodes=1", "--time=2", "--signal=USR2@75")
    job = lab.submit("limit", options=options, until=30)
    lab.cluster.wait_for(lambda: "USR2 heard" in job.log(), "notice of the limit", job=job)
    lab.lead("limit")
    lab.cluster.wait_for(
        lambda: "requeued (start 2 comes)" in job.log(), "the second start", job=job
    )
    lab.cluster.run("scontrol", "update", f"jobid={job.id}", "TimeLimit=60")  # once is enough
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.fact("Restarts") == "1"
    lab.expect_undisturbed("limit")
    lab.expect_one_wandb_run("limit", starts=2)


@pytest.mark.slow
def test_planted_nan_and_spike_are_handled_the_same_way_twice(lab):
    def ledger(name: str) -> list:
        job = lab.submit(
            name, "resilience.on_spike=rollback", "resilience.spike_window=8", "resilience.spike_sigmas=5",
            "tracking.wandb=disabled",
            plant=f"nan={8 * 14 + 3} spike={8 * 26 + 5}",
        )  # fmt: skip
        assert job.wait_for_end() == "COMPLETED", job.log()
        newest = (lab.run_dir(name) / "checkpoints" / "latest").read_text().strip()
        record = json.loads(
            (lab.run_dir(name) / "checkpoints" / newest / "checkpoint.json").read_text()
        )
        return [
            record["guard"]["ledger"],
            [(row["step"], row["train/loss"], row["data/sample_hash"]) for row in lab.rows(name)],
        ]

    first, second = ledger("spike-a"), ledger("spike-b")
    assert first == second
    assert [(e["step"], e["kind"], e["action"]) for e in first[0]] == [
        (14, "bad_numbers", "skip"),
        (26, "spike", "rollback"),
    ]
    steps = [row[0] for row in first[1]]
    assert steps == [*range(1, 28), *range(21, STEPS + 1)]  # back to the checkpoint of step 20


def test_torchrun_on_two_hosts_equals_one_machine(lab):
    """The command of launch/README.md, typed on two machines that share no memory and no address."""

    def host(node_rank: int) -> str:
        train = ["-m", "pipeline.train", "name=torchrun", *lab.settings, "tracking.wandb=disabled"]
        place = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={node_rank}", "--master-addr=n1"]
        environment = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", *place, *train]
        return lab.cluster.run(
            *command, node=f"n{1 + node_rank}", env=environment, cwd=lab.folder, timeout_s=HANG_S
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(host, range(2)))
    lab.expect_undisturbed("torchrun")


@pytest.mark.slow
def test_a_killed_point_of_a_sweep_does_not_end_the_others(lab: Lab) -> None:
    """launch/sweep.slurm: an array of 2 x 2, two at a time; the login node's table says which one was killed."""
    swept = ["optimizer.lr=0.003,0.001", "seed=1,2"]
    settings = [word for word in lab.settings if not word.startswith("optimizer.lr")]
    own = ["tracking.wandb=disabled", "training.total_steps=20", "checkpoint.save_every=0", "tracking.log_every=5"]  # fmt: skip
    words = ["name=sweep", *settings, *own, *swept]
    options = ("--array=0-3%2", "--exclusive=user", "--cpus-per-task=1", "--mem=1G", "--gres=none")
    lead = Lead(lab.folder / "sweep.until", to=5)
    environment = {"PYTHON": lab.plain_python, "PLANT": lead.plant, "OMP_NUM_THREADS": "1"}
    job = lab.cluster.submit("launch/sweep.slurm", *words, options=options, env=environment, cwd=lab.folder)  # fmt: skip
    point = "001-lr=0.003,seed=2"
    lab.cluster.wait_for(lambda: bool(lab.rows(f"sweep/{point}")), "a step of the second point")
    node = re.search(r" NodeList=(\S+)", facts := tasks(lab, job)[1])
    assert node is not None, facts
    training = f"pipeline.train .*name={point}"
    (pid,) = lab.cluster.run("pgrep", "-f", training, node=node[1]).split()
    lab.cluster.run("kill", "-9", pid, node=node[1])
    lead.to(20)
    over = {"COMPLETED", "FAILED"}
    lab.cluster.wait_for(lambda: set(states(lab, job)) <= over, "the array's end", HANG_S)
    assert states(lab, job) == ["COMPLETED", "FAILED", "COMPLETED", "COMPLETED"]
    told = subprocess.run(
        [sys.executable, "-m", "pipeline.sweep", *words, "run=false"], cwd=lab.folder,
        env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert told.returncode == 1, told.stderr
    said = [
        row.split("|")[4].strip() for row in told.stdout.splitlines() if re.match(r"\| \d", row)
    ]
    assert said == ["done", "FAILED, exit code 137", "done", "done"], told.stdout
    assert "not done: 1." in told.stdout
    assert [lab.rows(f"sweep/{name}")[-1]["step"] for name in ("000-lr=0.003,seed=1", "003-lr=0.001,seed=2")] == [20, 20]  # fmt: skip


def tasks(lab: Lab, job: Job) -> list[str]:
    """What Slurm knows of each task of an array, in order."""
    return [lab.cluster.run("scontrol", "-o", "show", "job", f"{job.id}_{n}") for n in range(4)]


def states(lab: Lab, job: Job) -> list[str]:
    return [text.split("JobState=")[1].split()[0] for text in tasks(lab, job)]


def test_from_text_to_model_in_one_command(lab):
    """launch/text_to_model.sh: tokenization as an array over three nodes, then the training job that waited for it."""
    folder = lab.folder / "story"
    tokenizer = make_tokenizer(folder / "tokenizer.json", vocab_size=300)
    for number in range(6):
        write_jsonl(folder / "text" / f"{number}.jsonl", make_texts(60 + number))
    one_node_each = ["--array=0-2", "--cpus-per-task=8", "--mem=1G"]
    data = [
        f"input={folder}/text/*.jsonl",
        f"output={folder}/out",
        f"tokenizer={tokenizer}",
        "workers=1",
    ]
    two_nodes = ["--nodes=2", "--exclusive=user", "--cpus-per-task=1", "--mem=1G", "--gres=none"]
    small = [word for word in SETTINGS if not word.startswith(("data.", "training.total_steps"))]
    train = [
        "name=story",
        *small,
        "training.total_steps=6",
        "training.eval_sequences=8",
        "tracking.wandb=disabled",
    ]
    command = [
        str(REPO / "launch" / "text_to_model.sh"),
        *one_node_each,
        *data,
        "--",
        *two_nodes,
        *train,
    ]
    environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    printed = lab.cluster.run(*command, env=environment, cwd=lab.folder)
    first, second = re.fullmatch(r"tokenize (\d+), pretrain (\d+)\n", printed).groups()
    pretrain = Job(lab.cluster, second, lab.folder / f"slurm-{second}.out")
    assert pretrain.fact("Reason") == "Dependency"
    assert pretrain.wait_for_end() == "COMPLETED", pretrain.log()
    tasks = [
        lab.cluster.run("scontrol", "-o", "show", "job", f"{first}_{task}") for task in range(3)
    ]
    assert {re.search(r" NodeList=(\S+)", task)[1] for task in tasks} == {"n1", "n2", "n3"}
    last = json.loads((lab.run_dir("story") / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6
    assert "val/validation/loss" in (lab.run_dir("story") / "metrics.jsonl").read_text()
