"""launch/pretrain.slurm on a real Slurm, around a stand-in for the trainer that takes no time to start."""

import sys

import pytest

from tests.support.slurm_cluster import Job, SlurmCluster
from tests.support.slurm_lab import NEEDS_SLURM

pytestmark = NEEDS_SLURM

# Called as `PYTHON -m pipeline.preflight ...` and `PYTHON -m pipeline.train ...`.
STAND_IN = """#!/bin/bash
if [[ $2 == pipeline.preflight ]]; then
  [[ "$*" == *shards_only=true* ]] && { echo "error: shard 7 is truncated" >&2; exit 2; }
  [[ "$*" == *bad=1* ]] && { echo "error: bad must be 0" >&2; exit 2; }
  echo "preflight: $*" >&2; echo "$PWD/run"; exit 0
fi
mkdir -p run/checkpoints
arguments=$(printf ' [%s]' "${@:3}")
# One line, one write: four ranks append to the same file.
printf 'rank %s of %s on %s, meet at %s:%s, OMP %s, arguments:%s\\n' "$SLURM_PROCID" "$SLURM_NTASKS" "$(hostname)" \\
  "$MASTER_ADDR" "$MASTER_PORT" "$OMP_NUM_THREADS" "$arguments" >>ranks
if [[ $MODE != stuck && $SLURM_PROCID == 0 ]]; then echo "step-$SLURM_RESTART_COUNT" >run/checkpoints/latest; fi
[[ $MODE == bus && $SLURM_PROCID == 1 ]] && kill -BUS $$
[[ $MODE == bus ]] && sleep 60
[[ $MODE == done ]] && { touch run/DONE; exit 0; }
# Ranks start with the signals blocked: they wait to be asked for.
[[ $MODE == wait && -z $SLURM_RESTART_COUNT ]] && exec SYS_EXECUTABLE -c \
  'import signal; signal.sigwait([signal.SIGUSR2, signal.SIGTERM])'
[[ $MODE == wait ]] && { touch run/DONE; exit 0; }
exit 9
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm") / "box"
    # A node whose link is cut stays up for Slurm, as it does in production for minutes.
    with SlurmCluster(folder, num_nodes=2, slurmd_timeout_s=300) as cluster:
        yield cluster


def submit(cluster: SlurmCluster, folder, mode: str, *arguments: str) -> Job:
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN.replace("SYS_EXECUTABLE", sys.executable))
    stand_in.chmod(0o755)
    options = ["--nodes=2", "--ntasks-per-node=2", "--gres=none"]
    environment = {"PYTHON": str(stand_in), "MODE": mode, "OMP_NUM_THREADS": ""}
    return cluster.submit(
        "launch/pretrain.slurm", *arguments, options=options, env=environment, cwd=folder
    )


def test_one_task_per_rank_gets_every_argument_as_it_was_written(cluster, tmp_path):
    job = submit(cluster, tmp_path, "done", "name=a b", 'data.train=[{path: "x, y"}]', "model=tiny")
    assert job.wait_for_end() == "COMPLETED", job.log()
    port = 20000 + int(job.id) % 10000
    tail = f'meet at n1:{port}, OMP 4, arguments: [name=a b] [data.train=[{{path: "x, y"}}]] [model=tiny]'
    lines = sorted((tmp_path / "ranks").read_text().splitlines())
    assert lines == [f"rank {r} of 4 on n{1 + r // 2}, {tail}" for r in range(4)]
    assert "preflight: -m pipeline.preflight world_size=4 name=a b" in job.log()


def test_a_job_without_progress_stops_after_one_try(cluster, tmp_path):
    job = submit(cluster, tmp_path, "stuck")
    assert job.wait_for_end() == "FAILED"
    assert job.fact("ExitCode") == "9:0"
    assert job.fact("Restarts") == "0"
    assert "no new checkpoint in this start: not requeued" in job.log()


def test_a_rank_that_is_killed_makes_the_job_look_at_its_shards(cluster, tmp_path):
    """A shard that shrinks under its reader kills it without a word (SIGBUS)."""
    job = submit(cluster, tmp_path, "bus")
    cluster.wait_for(lambda: "requeued (start 2" in job.log(), "the end of a start", job=job)
    cluster.run("scancel", job.id)
    assert "error: shard 7 is truncated" in job.log()


def test_a_job_that_fails_after_progress_goes_on_until_progress_ends(cluster, tmp_path):
    """The stand-in saves something in each start before it fails."""
    job = submit(cluster, tmp_path, "crash")
    cluster.wait_for(lambda: job.log().count("requeued (start") == 2, "two requeues", job=job)
    (tmp_path / "run" / "DONE").touch()
    assert job.wait_for_end() == "COMPLETED"
    assert job.fact("Restarts") == "2"


def test_notice_is_requeued_and_the_log_has_both_starts(cluster, tmp_path):
    job = submit(cluster, tmp_path, "wait")
    cluster.wait_for(
        lambda: (tmp_path / "run" / "checkpoints" / "latest").exists(), "a step", job=job
    )
    cluster.run("scancel", "-s", "USR2", job.id)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.log().count("preflight: ") == 2
    assert len((tmp_path / "ranks").read_text().splitlines()) == 8


def test_a_bad_setting_ends_the_job_before_any_rank_starts(cluster, tmp_path):
    job = submit(cluster, tmp_path, "done", "bad=1")
    assert job.wait_for_end() == "FAILED"
    assert job.log().count("error: bad must be 0") == 1
    assert not (tmp_path / "ranks").exists()


@pytest.mark.slow
def test_a_node_that_does_not_answer_at_the_start_is_waited_for(cluster, tmp_path):
    """The launch would fail, and a job without progress is not started again: its link is cut until it was asked."""
    cluster.cut("n2")
    try:
        job = submit(cluster, tmp_path, "done")
        asked = "pretrain.slurm: not every node of n[1-2] answers"
        ranks = tmp_path / "ranks"
        cluster.wait_for(lambda: asked in job.log() or ranks.exists(), "a question", job=job)
        assert not ranks.exists(), job.log()
    finally:
        cluster.heal("n2")
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.fact("Restarts") == "0"
    assert len(ranks.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "script, module, words",
    [
        ("ladder", "scaling", ["ladder=quickstart", "processes=2"]),
        ("sweep", "sweep", ["name=lr", "optimizer.lr=1e-3,3e-4"]),
    ],
)
def test_each_task_of_an_array_makes_its_own_run(cluster, tmp_path, script, module, words):
    """launch/ladder.slurm, sweep.slurm: the task's number is the run's; the cores are shared out by the run's launcher."""
    number_of = {"ladder": "rung", "sweep": "point"}[script]
    stand_in = tmp_path / "python"
    stand_in.write_text(
        '#!/bin/bash\necho "$* OMP ${OMP_NUM_THREADS:-none}" >task-$SLURM_ARRAY_TASK_ID\n'
    )
    stand_in.chmod(0o755)
    options = ["--array=0-1", "--gres=none"]
    environment = {"PYTHON": str(stand_in), "OMP_NUM_THREADS": ""}
    job = cluster.submit(
        f"launch/{script}.slurm", *words, options=options, env=environment, cwd=tmp_path
    )
    files = [tmp_path / f"task-{number}" for number in (0, 1)]
    cluster.wait_for(lambda: all(f.exists() and f.read_text() for f in files), "tasks", job=job)
    assert [file.read_text() for file in files] == [
        f"-m pipeline.{module} {' '.join(words)} {number_of}={number} OMP none\n"
        for number in (0, 1)
    ]
