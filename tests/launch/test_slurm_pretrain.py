"""Training under launch/pretrain.slurm on a real Slurm: whatever happens, the losses are those of an undisturbed run.

Every run is compared, step by step, with one process that nothing happened to: sample hashes equal, losses within fp32
rounding. Nodes are namespaces of this machine (tests/slurm_cluster.py), so they can be switched off and cut off.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.support import slurm_cluster
from tests.support.corpus import make_texts, make_tokenizer, write_jsonl
from tests.support.slurm_cluster import REPO, Job, SlurmCluster
from tests.support.slurm_lab import SETTINGS, STEPS, Lab
from tests.support.waiting import HANG_S

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "a cluster can start"
    ),
]


@pytest.fixture(scope="module")
def one_lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(folder / "box", num_nodes=3, kill_wait_s=20, grace_s=30) as cluster:
        yield Lab(cluster, folder)


@pytest.fixture
def lab(one_lab):
    one_lab.cluster.reset()
    return one_lab


def test_two_jobs_in_one_folder_one_trains_and_one_is_refused(lab: Lab) -> None:
    """sbatch of the same line twice, on two nodes that share the disk: the first must not notice the second."""
    first = lab.submit("twice", options=("--nodes=1",), plant="step_s=1")
    lab.wait_for_step(first, "twice", 3)
    second = lab.submit("twice", options=("--nodes=1",))
    assert second.wait_for_end(HANG_S) == "FAILED", second.log()
    assert "is in use by process" in second.log() and f"Slurm job {first.id}" in second.log()
    assert first.wait_for_end(HANG_S) == "COMPLETED", first.log()
    lab.expect_undisturbed("twice")


def test_tensor_and_pipeline_parallel_over_two_nodes_equals_one_machine(lab):
    job = lab.submit(
        "layout", "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "tracking.wandb=disabled",
        options=("--nodes=2", "--ntasks-per-node=2"), plant="",
    )  # fmt: skip
    assert job.wait_for_end(HANG_S) == "COMPLETED", job.log()
    lab.expect_undisturbed("layout")


def test_every_kind_of_notice_resumes_without_losing_a_step(lab):
    """scancel -s USR2, scontrol requeue and preemption, one after the other, in one job."""
    job = lab.submit("notice")
    lab.wait_for_step(job, "notice", 5)
    lab.cluster.run("scancel", "-s", "USR2", job.id)
    lab.cluster.run("scancel", "-s", "USR2", job.id)  # a second one does no harm
    lab.cluster.wait_for(lambda: "leaving on notice" in job.log(), "leaving", 60, job=job)
    lab.wait_for_step(job, "notice", lab.rows("notice")[-1]["step"] + 3)
    lab.cluster.run("scontrol", "requeue", job.id)
    lab.cluster.wait_for(lambda: job.log().count("leaving on notice") == 2, "leaving", 60, job=job)
    lab.wait_for_step(job, "notice", lab.rows("notice")[-1]["step"] + 3)
    (lab.folder / "urgent.sh").write_text("#!/bin/bash\nsleep 1\n")
    lab.cluster.run(
        "sbatch",
        "--partition=high",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        str(lab.folder / "urgent.sh"),
    )
    assert job.wait_for_end(HANG_S) == "COMPLETED", job.log()
    assert job.log().count("leaving on notice") == 3
    lab.expect_undisturbed("notice")
    lab.expect_one_wandb_run("notice", starts=4)


def test_time_limit_resumes_without_losing_a_step(lab):
    """Notice comes 75 s before the end of two minutes, or up to a minute earlier: before step 40 in any case."""
    job = lab.submit(
        "limit", options=("--nodes=1", "--time=2", "--signal=USR2@75"), plant="step_s=1.0"
    )
    lab.cluster.wait_for(
        lambda: "requeued (start 2 comes)" in job.log(), "notice of the limit", HANG_S, job=job
    )
    lab.cluster.run("scontrol", "update", f"jobid={job.id}", "TimeLimit=60")  # once is enough
    assert job.wait_for_end(HANG_S) == "COMPLETED", job.log()
    assert job.fact("Restarts") == "1"
    lab.expect_undisturbed("limit")
    lab.expect_one_wandb_run("limit", starts=2)


def test_killed_rank_dead_node_and_cut_link_continue_from_the_last_checkpoint(lab):
    """A killed rank: again on the same nodes. A dead node: on the spare. A cut link: on the one node that is left."""
    job = lab.submit("breaks", "resilience.collective_timeout_s=60", options=("--nodes=1-2",),
                     plant="step_s=0.5")  # fmt: skip
    lab.wait_for_step(job, "breaks", 12)
    node = job.nodes()[1]
    (rank,) = lab.cluster.tasks(job, node)
    lab.cluster.run("kill", "-9", rank, node=node)
    lab.cluster.wait_for(lambda: "requeued (start 2 comes)" in job.log(), "a requeue", 60, job=job)
    assert (
        len(job.log().split("requeued (start 2 comes)")[0].split("step 12/")[1].splitlines()) < 40
    )  # one screen
    lab.wait_for_step(job, "breaks", 22)
    dead = job.nodes()[1]
    lab.cluster.power_off(dead)
    lab.cluster.wait_for(
        lambda: int(job.fact("Restarts")) == 2, "a requeue after the node's end", 90, job=job
    )
    lab.wait_for_step(job, "breaks", 32)
    assert dead not in job.nodes() and len(job.nodes()) == 2
    cut = next(node for node in job.nodes() if node != job.fact("BatchHost"))
    lab.cluster.cut(cut)
    assert job.wait_for_end(HANG_S) == "COMPLETED", job.log()
    assert len(job.nodes()) == 1
    lab.expect_undisturbed("breaks", repeated=True)
    assert int(job.fact("Restarts")) == 3


def test_the_power_off_of_the_owners_node_does_not_keep_the_next_start_out(lab):
    """Its claim stays behind: the requeued job takes over at once, another job when the claim has been silent."""
    job = lab.submit("power", options=("--nodes=1",), plant="step_s=0.5")
    lab.wait_for_step(job, "power", 12)
    owner = lab.run_dir("power") / "owner"
    assert [path.name for path in owner.iterdir()] == ["00000001.json"]
    node = job.fact("BatchHost")
    lab.cluster.power_off(node)
    claim = json.loads((owner / "00000001.json").read_text())
    assert (claim["node"], claim["released"]) == (node, False), "nobody was left to release it"
    lab.wait_for_step(job, "power", lab.rows("power")[-1]["step"] + 4)  # requeued, elsewhere
    assert job.fact("BatchHost") != node and job.fact("Restarts") == "1"
    lab.cluster.power_off(job.fact("BatchHost"))
    lab.cluster.run("scancel", job.id)
    another = lab.submit("power", options=("--nodes=1",), plant="step_s=0.5")
    assert another.wait_for_end(HANG_S) == "COMPLETED", another.log()
    assert json.loads((owner / "00000003.json").read_text())["job_id"] == another.id
    lab.expect_undisturbed("power", repeated=True)


def test_stopped_rank_is_named_with_its_node(lab):
    job = lab.submit("hang", "resilience.hang_timeout_s=20", options=("--nodes=2",))
    lab.wait_for_step(job, "hang", 12)
    node = job.nodes()[1]
    (pid,) = lab.cluster.tasks(job, node)
    lab.cluster.run("kill", "-STOP", pid, node=node)
    logs = lab.run_dir("hang") / "logs"
    lab.cluster.wait_for(lambda: bool(list(logs.glob("hang-*.md"))), "a hang report", 60, job=job)
    assert job.wait_for_end(HANG_S) == "COMPLETED", job.log()  # requeued: step 10 was saved
    page = next(logs.glob("hang-*.md")).read_text()
    assert f"rank 1 on {node}**: silent" in page and "Sample hash of the step" in page
    assert re.search(r"\| 0 \| n\d \| \d+ \| train \| collective \(\w+\)", page), page
    assert "error: no progress for 20 s" in job.log()
    lab.expect_undisturbed("hang", repeated=True)


def test_planted_nan_and_spike_are_handled_the_same_way_twice(lab):
    def ledger(name: str) -> list:
        job = lab.submit(
            name, "resilience.on_spike=rollback", "resilience.spike_window=8", "resilience.spike_sigmas=5",
            "tracking.wandb=disabled",
            plant=f"nan={8 * 14 + 3} spike={8 * 26 + 5}",
        )  # fmt: skip
        assert job.wait_for_end(HANG_S) == "COMPLETED", job.log()
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


def test_crash_before_any_checkpoint_stops_the_job_with_a_short_log(lab):
    job = lab.submit("crash", plant="crash=3", options=("--nodes=2", "--ntasks-per-node=2"))
    assert job.wait_for_end(HANG_S) == "FAILED", job.log()
    assert job.fact("Restarts") == "0"
    failure = [line for line in job.log().splitlines() if "planted crash" in line]
    assert len(failure) == 1 and failure[0].startswith("error: rank 1 on n"), job.log()
    assert job.log().count("Traceback") == 0
    assert "no new checkpoint in this start: not requeued" in job.log()


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
def test_soak_twenty_random_kills_leave_no_trace(lab):
    """`make soak`: ranks killed, nodes switched off, notices, at random times (seeded). About 10 minutes."""
    dice, kills = random.Random(20), int(os.environ.get("SOAK_KILLS", "20"))

    def is_over(job: Job, restarts: str) -> bool:
        return job.fact("Restarts") != restarts or job.fact("JobState") in ("FAILED", "COMPLETED")

    def submit() -> Job:
        settings = (
            "checkpoint.save_every=2",
            "checkpoint.asynchronous=false",
            "resilience.collective_timeout_s=60",
        )
        return lab.submit("soak", *settings, plant="step_s=1.0")

    job = submit()
    for number in range(kills):
        before = max((row["step"] for row in lab.rows("soak")), default=0)
        lab.wait_for_step(job, "soak", min(before + 1, STEPS - 1))
        time.sleep(dice.uniform(0.0, 0.8))
        if job.fact("JobState") == "COMPLETED":
            break
        node = dice.choice(job.nodes())
        kind = dice.choice(["kill", "kill", "USR2", "requeue", "power off"])
        print(f"{number}: step {lab.rows('soak')[-1]['step']}, {kind} {node}", flush=True)
        restarts = job.fact("Restarts")
        if kind == "kill":
            lab.cluster.run(
                "sh", "-c", f"kill -9 {' '.join(lab.cluster.tasks(job, node))} || true", node=node
            )
        elif kind == "USR2":
            lab.cluster.run("scancel", "-s", "USR2", job.id)
        elif kind == "requeue":
            lab.cluster.run("scontrol", "requeue", job.id)
        else:
            lab.cluster.power_off(node)
        lab.cluster.wait_for(partial(is_over, job, restarts), "the end of this start", 120, job=job)
        if kind == "power off":
            lab.cluster.boot(node)
        if (
            job.fact("JobState") == "FAILED"
        ):  # killed before the first save of this start: a person submits it again
            job = submit()
    assert job.wait_for_end(HANG_S) == "COMPLETED", job.log()
    lab.expect_undisturbed("soak", repeated=True)


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
    assert pretrain.wait_for_end(HANG_S) == "COMPLETED", pretrain.log()
    tasks = [
        lab.cluster.run("scontrol", "-o", "show", "job", f"{first}_{task}") for task in range(3)
    ]
    assert {re.search(r" NodeList=(\S+)", task)[1] for task in tasks} == {"n1", "n2", "n3"}
    last = json.loads((lab.run_dir("story") / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6
    assert "val/validation/loss" in (lab.run_dir("story") / "metrics.jsonl").read_text()
