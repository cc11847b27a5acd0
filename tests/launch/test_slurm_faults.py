"""What breaks under launch/pretrain.slurm on a real Slurm: ranks, nodes, links; the losses are those of an undisturbed run.

Beside test_slurm_pretrain.py, on a cluster of its own: both mostly wait, and two workers wait at the same time.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from functools import partial

import pytest

from pipeline.resilience.ownership import BEAT_S, SILENCE_S
from tests.support.slurm_cluster import Job
from tests.support.slurm_lab import NEEDS_SLURM, STEPS

pytestmark = NEEDS_SLURM


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded")
def test_killed_rank_dead_node_and_cut_link_continue_from_the_last_checkpoint(lab):
    """A killed rank: again on the same nodes. A dead node: on the spare. A cut link: on the one node that is left."""
    job = lab.submit("breaks", "resilience.collective_timeout_s=60", options=("--nodes=1-2",),
                     until=12)  # fmt: skip
    lab.wait_for_step(job, "breaks", 12)
    node = job.nodes()[1]
    (rank,) = lab.cluster.tasks(job, node)
    lab.cluster.run("kill", "-9", rank, node=node)
    lab.lead("breaks", to=22)
    lab.cluster.wait_for(lambda: "requeued (start 2 comes)" in job.log(), "a requeue", job=job)
    assert (
        len(job.log().split("requeued (start 2 comes)")[0].split("step 12/")[1].splitlines()) < 40
    )  # one screen
    lab.wait_for_step(job, "breaks", 22)
    dead = job.nodes()[1]
    lab.cluster.power_off(dead)
    lab.lead("breaks", to=32)
    lab.cluster.wait_for(
        lambda: int(job.fact("Restarts")) == 2, "a requeue after the node's end", job=job
    )
    lab.wait_for_step(job, "breaks", 32)
    assert dead not in job.nodes() and len(job.nodes()) == 2
    cut = next(node for node in job.nodes() if node != job.fact("BatchHost"))
    lab.cluster.cut(cut)
    lab.lead("breaks")
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert len(job.nodes()) == 1
    lab.expect_undisturbed("breaks", repeated=True)
    assert int(job.fact("Restarts")) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded")
def test_the_power_off_of_the_owners_node_does_not_keep_the_next_start_out(lab):
    """Its claim stays behind: the requeued job takes over at once, another job when the claim has been silent.

    Two minutes of silence; the file is made as old as it would be near their end.
    """
    job = lab.submit("power", options=("--nodes=1",), until=12)
    lab.wait_for_step(job, "power", 12)
    owner = lab.run_dir("power") / "owner"
    assert [path.name for path in owner.iterdir()] == ["00000001.json"]
    node = job.fact("BatchHost")
    lab.cluster.power_off(node)
    claim = json.loads((owner / "00000001.json").read_text())
    assert (claim["node"], claim["released"]) == (node, False), "nobody was left to release it"
    lab.lead("power", to=16)
    lab.wait_for_step(job, "power", 16)  # requeued, elsewhere
    assert job.fact("BatchHost") != node and job.fact("Restarts") == "1"
    lab.cluster.power_off(job.fact("BatchHost"))
    lab.cluster.run("scancel", job.id)
    last_beat = time.time() - SILENCE_S + 2 * BEAT_S
    os.utime(owner / "00000002.json", (last_beat, last_beat))
    another = lab.submit("power", options=("--nodes=1",))
    assert another.wait_for_end() == "COMPLETED", another.log()
    assert json.loads((owner / "00000003.json").read_text())["job_id"] == another.id
    lab.expect_undisturbed("power", repeated=True)


@pytest.mark.slow
def test_kill_9_of_the_owner_keeps_no_start_out(lab):
    """Nobody releases its claim: the requeued job takes over at once, and another job on its node, where the kernel knows."""
    options = ("--nodes=1",)
    job = lab.submit("killed", options=options, until=12)
    owner, node = lab.run_dir("killed") / "owner", ""

    def kill_owner(number: int, *rest: str) -> None:
        """Kill -9 the process that claim `number` names, and what `rest` says on its node."""
        claim = json.loads((owner / f"{number:08d}.json").read_text())
        assert [str(claim["pid"])] == lab.cluster.tasks(job, node)
        lab.cluster.run("sh", "-c", "; ".join([f"kill -9 {claim['pid']}", *rest]), node=node)

    lab.wait_for_step(job, "killed", 12)
    node = job.fact("BatchHost")
    kill_owner(1)
    lab.lead("killed", to=22)
    lab.cluster.wait_for(lambda: "requeued (start 2 comes)" in job.log(), "a requeue", job=job)
    assert json.loads((owner / "00000001.json").read_text())["released"] is False
    lab.wait_for_step(job, "killed", 22)
    node = job.fact("BatchHost")
    kill_owner(2, "pkill -9 -f [s]lurm_script")  # and nobody is left to have it requeued
    assert job.wait_for_end() == "FAILED", job.log()
    assert json.loads((owner / "00000002.json").read_text())["released"] is False
    before = time.monotonic()
    another = lab.submit("killed", options=(*options, f"--nodelist={node}"))
    lab.cluster.wait_for((owner / "00000003.json").exists, "the third claim", job=another)
    assert time.monotonic() - before < SILENCE_S, (
        "it waited for a silence, with the owner's node at hand"
    )
    assert another.wait_for_end() == "COMPLETED", another.log()
    lab.expect_undisturbed("killed", repeated=True)


@pytest.mark.usefixtures("preloaded")
def test_stopped_rank_is_named_with_its_node(lab):
    job = lab.submit("hang", "resilience.hang_timeout_s=20", plant="stop=12")
    logs = lab.run_dir("hang") / "logs"
    lab.cluster.wait_for(lambda: bool(list(logs.glob("hang-*.md"))), "a hang report", job=job)
    assert job.wait_for_end() == "COMPLETED", job.log()  # requeued: step 10 was saved
    (node,) = re.findall(r"stops on (\w+)", job.log())
    page = next(logs.glob("hang-*.md")).read_text()
    assert f"rank 1 on {node}**: silent" in page and "Sample hash of the step" in page
    assert re.search(r"\| 0 \| n\d \| \d+ \| train \| collective \(\w+\)", page), page
    assert "error: no progress for 20 s" in job.log()
    lab.expect_undisturbed("hang", repeated=True)


@pytest.mark.usefixtures("preloaded")
def test_crash_before_any_checkpoint_stops_the_job_with_a_short_log(lab):
    job = lab.submit("crash", plant="crash=3", options=("--nodes=2", "--ntasks-per-node=2"))
    assert job.wait_for_end() == "FAILED", job.log()
    assert job.fact("Restarts") == "0"
    failure = [line for line in job.log().splitlines() if "planted crash" in line]
    assert len(failure) == 1 and failure[0].startswith("error: rank 1 on n"), job.log()
    assert job.log().count("Traceback") == 0
    assert "no new checkpoint in this start: not requeued" in job.log()


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded")
def test_soak_of_random_kills_leaves_no_trace(lab):
    """Ranks killed, nodes switched off, notices, at random times (seeded): each kind, and of all of them 20 in `make soak`."""
    dice, kills = random.Random(20), int(os.environ.get("SOAK_KILLS", "8"))

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
        lab.cluster.wait_for(partial(is_over, job, restarts), "the end of this start", job=job)
        if kind == "power off":
            lab.cluster.boot(node)
        if (
            job.fact("JobState") == "FAILED"
        ):  # killed before the first save of this start: a person submits it again
            job = submit()
    assert job.wait_for_end() == "COMPLETED", job.log()
    lab.expect_undisturbed("soak", repeated=True)
