"""A hang is reported in time, names the right rank, and ends the process."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from pipeline.distributed.ranks import RankHost
from pipeline.distributed.waits import wait_for
from pipeline.errors import EXIT_HANG
from pipeline.resilience import clock as clock_module
from pipeline.resilience import watchdog as watchdog_module
from pipeline.resilience.clock import Clock
from pipeline.resilience.hang_page import PLACES, doing
from pipeline.resilience.watchdog import Watchdog
from tests.support.ranks import run_on_ranks
from tests.support.slurm_cluster import REPO
from tests.support.waiting import HANG_S

RANKS = [RankHost(rank, f"n{1 + rank // 2}", 100 + rank, 0.0) for rank in range(4)]

# On a busy machine the thread that reports comes late.
EXIT_AFTER_THE_REPORT = """
import os, threading
def exit_after_the_report(code, exit=os._exit):
    for thread in threading.enumerate():
        if thread.name == "watchdog-report": thread.join()
    exit(code)
os._exit = exit_after_the_report
"""
HANGING = f"""{EXIT_AFTER_THE_REPORT}
import sys, time
from pathlib import Path
from pipeline.resilience.clock import Clock
from pipeline.distributed.ranks import RankHost
from pipeline.resilience.watchdog import Watchdog
import os
clock = Clock()
rank, world_size = int(sys.argv[2]), int(sys.argv[3])
hosts = [RankHost(r, f"n{{r + 1}}", os.getpid(), 1.0) for r in range(world_size)]
with Watchdog(clock, run_dir=Path(sys.argv[1]), hosts=hosts, global_rank=rank, timeout_s=1.0, describe_step=lambda: "samples beef"):
    clock.enter("data", 7)
    def wait_for_a_disk_that_never_answers(): time.sleep(60)
    wait_for_a_disk_that_never_answers()
"""


def hang(run_dir, *, rank=0, world_size=1, program=HANGING) -> subprocess.CompletedProcess:
    """What becomes of one rank of a run that hangs."""
    command = [sys.executable, "-c", program, str(run_dir), str(rank), str(world_size)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=HANG_S)


def test_hang_ends_the_process_with_its_code_and_its_stacks(tmp_path):
    done = hang(tmp_path)
    assert done.returncode == EXIT_HANG
    assert "no progress for 1 s at step 7: rank 0 on n1" in done.stderr
    page = (tmp_path / "logs" / "hang-7.md").read_text()
    assert "wait_for_a_disk_that_never_answers" in page and "samples beef" in page
    kept = json.loads((tmp_path / "logs" / "hang-7" / "00000.json").read_text())
    assert kept["phase"] == "data"


SECRET, ADDRESS = (
    "planted0value0of0a0key",
    "https://someone:planted0password@store.example/part-7.jsonl",
)
READING = f"""
import os, threading, time
from pipeline.resilience import watchdog
key, address = os.environ["STORE_API_KEY"], "{ADDRESS}"
def refuse(): raise OSError(f"403 of {{address}} with {{key}}")
guard.describe_step = refuse
watchdog.waiting_collectives = lambda: [f"all_reduce of {{address}} {{key}}"]
threading.Thread(target=time.sleep, args=[60], name=f"reads {{address}} with {{key}}", daemon=True).start()
time.sleep(60)  # waits for {ADDRESS} with {SECRET}
"""


def test_what_a_rank_was_doing_is_told_without_its_secrets(tmp_path, monkeypatch):
    """Pages are mailed and pasted: names of threads, lines of code, errors and notes quote what they work with."""
    monkeypatch.setenv("STORE_API_KEY", SECRET)
    reader = tmp_path / "reader.py"  # from a file: the stack quotes its lines
    reader.write_text(READING)
    program = HANGING.replace(
        "    wait_for_a_disk_that_never_answers()",
        f"    import runpy; runpy.run_path({str(reader)!r}, dict(guard=guard))",
    )
    program = program.replace('"samples beef"):', '"samples beef") as guard:')
    done = hang(tmp_path, program=program)
    assert done.returncode == EXIT_HANG, done.stderr
    page = (tmp_path / "logs" / "hang-7.md").read_text()
    kept = (tmp_path / "logs" / "hang-7" / "00000.json").read_text()
    for text in (page, kept):
        assert SECRET not in text and "planted0password" not in text
        for place in ("reads", "waits for", "403 of", "all_reduce of"):  # each was quoted, without
            assert f"{place} https://***@store.example/part-7.jsonl" in text
    assert SECRET not in done.stderr and "planted0password" not in done.stderr


def alone(run_dir) -> Watchdog:
    """Of a run of one rank, not started."""
    return Watchdog(
        Clock(), run_dir=run_dir, hosts=RANKS[:1], global_rank=0, timeout_s=600.0, describe_step=str
    )


class Ended(Exception):
    """In place of the end of the process."""


class Hours:
    """Time that passes only where the watchdog waits; what is due happens as soon as it has come."""

    def __init__(self) -> None:
        self.now, self.due = 0.0, {}

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        for moment in [moment for moment in self.due if moment <= self.now]:
            self.due.pop(moment)()
        return False


@pytest.mark.parametrize(
    "what, moment, limit",
    [("nothing", 1, 600), ("suspended for an hour", 300, 4200), ("progress", 599, 1199)],
)
def test_the_end_comes_at_the_limit_of_time_in_which_the_process_ran(
    tmp_path, monkeypatch, what, moment, limit
):
    """By a clock of the test: real seconds would fail what is right on a busy machine."""
    hours, reports = Hours(), []
    for module in (watchdog_module, clock_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: hours.now, time=time.time))  # fmt: skip

    def end(code):
        assert code == EXIT_HANG
        raise Ended

    def away():
        hours.now += 3600

    monkeypatch.setattr(os, "_exit", end)
    watchdog = alone(tmp_path)
    watchdog._closed = SimpleNamespace(wait=hours.wait, is_set=lambda: False)
    watchdog._report = lambda _: reports.append(hours.now)
    at_once = SimpleNamespace(Thread=lambda target, args, **_: SimpleNamespace(start=lambda: target(*args)))  # fmt: skip
    monkeypatch.setattr(watchdog_module, "threading", at_once)
    happens = {"suspended for an hour": away, "progress": lambda: watchdog.clock.enter("train", 1)}
    hours.due[moment] = happens.get(what, lambda: None)
    with pytest.raises(Ended):
        watchdog._watch()
    tick_s = watchdog.grace_s / 20
    assert limit <= hours.now <= limit + 2 * tick_s
    assert limit - watchdog.grace_s <= reports[-1] <= limit - watchdog.grace_s + 2 * tick_s
    assert len(reports) == 1 + (what == "progress")


def test_progress_in_the_last_moment_withdraws_the_report(tmp_path):
    watchdog, seen = alone(tmp_path), []

    def wait(_):
        seen.extend(tmp_path.glob("logs/.hang-*/00000.json"))
        watchdog.clock.enter("train", 1)

    watchdog._closed = SimpleNamespace(wait=wait, is_set=lambda: False)
    watchdog._tell(watchdog.clock.now)
    assert len(seen) == 1 and not seen[0].exists()
    assert not list(tmp_path.glob("logs/hang-*.md"))


def test_a_disk_that_hangs_does_not_keep_the_job(tmp_path):
    """The report cannot be written when the file system is what hangs; the end must come all the same."""
    program = HANGING.removeprefix(EXIT_AFTER_THE_REPORT).replace(
        "clock = Clock()", "Watchdog._write_sighting = lambda _: time.sleep(60)\nclock = Clock()"
    )
    assert hang(tmp_path, program=program).returncode == EXIT_HANG


def test_a_rank_that_wakes_after_the_others_left_does_not_replace_their_page(tmp_path):
    """Slurm sends CONT to what it ends: a rank that was stopped would find everybody else silent."""
    assert hang(tmp_path, rank=0, world_size=2).returncode == EXIT_HANG
    woken = hang(tmp_path, rank=1, world_size=2)
    assert woken.returncode == EXIT_HANG
    assert "no progress" not in woken.stderr
    assert "**rank 1 on n2**: silent" in (tmp_path / "logs" / "hang-7.md").read_text()
    assert (tmp_path / "logs" / "hang-7" / "00000.json").exists()
    assert not (tmp_path / "logs" / ".hang-1").exists()


STOP_S = 5.0
SUSPENDED = f"""{EXIT_AFTER_THE_REPORT}
import os, sys, time
from pathlib import Path
from pipeline.resilience.clock import Clock
from pipeline.distributed.ranks import RankHost
from pipeline.resilience.watchdog import Watchdog
print("is there", flush=True)
sys.stdin.readline()
clock, rank = Clock(), int(sys.argv[2])
hosts = [RankHost(r, "n1", os.getpid(), 1.0) for r in range(2)]
with Watchdog(clock, run_dir=Path(sys.argv[1]), hosts=hosts, global_rank=rank, timeout_s={STOP_S - 1}, describe_step=str) as guard:
    clock.enter("train", 0)
    print("runs", flush=True)
    for step, _ in enumerate(sys.stdin, 1):  # each step when it is told to, then no more
        for _ in range(10):  # but not before the watchdog has looked
            before = guard._next_tick
            while guard._next_tick == before: time.sleep(0.001)
        clock.enter("train", step)
        print("went on", flush=True)
"""


def test_a_job_that_was_suspended_goes_on_when_it_is_resumed(tmp_path):
    """`scontrol suspend`, a paused machine, Ctrl-Z: nobody was late, for nobody ran; then a hang is one again.

    The one time that it waits for is the stop, which must be longer than the limit, and may be as long as it likes.
    """
    command = [sys.executable, "-c", SUSPENDED, str(tmp_path)]
    common = {"cwd": REPO, "text": True, **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)}  # fmt: skip
    first = subprocess.Popen([*command, "0"], process_group=0, **common)
    second = subprocess.Popen([*command, "1"], process_group=first.pid, **common)
    ranks = [first, second]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["is there\n"] * 2
        assert tell(ranks) == ["runs\n"] * 2
        os.killpg(first.pid, signal.SIGSTOP)
        time.sleep(STOP_S)
        os.killpg(first.pid, signal.SIGCONT)
        assert tell(ranks) == ["went on\n"] * 2
        said = [rank.stderr.read() for rank in ranks]
        ends = [rank.wait(HANG_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            for pipe in (rank.stdin, rank.stdout, rank.stderr):
                pipe.close()
    assert ends == [EXIT_HANG] * 2, said
    assert [path.name for path in (tmp_path / "logs").glob("hang-*.md")] == ["hang-1.md"]


def tell(ranks) -> list[str]:
    """What each answers to a line."""
    for rank in ranks:
        rank.stdin.write("\n")
        rank.stdin.flush()
    return [rank.stdout.readline() for rank in ranks]


class Seen(Exception):
    """Ends the function under test where it would wait."""


def stop_in_a_save(probe):
    from pipeline.checkpoint.checkpointer import Checkpointer

    Checkpointer.wait(SimpleNamespace(_thread=SimpleNamespace(join=probe)))  # type: ignore[arg-type]


def stop_in_the_loader(probe):
    from pipeline.data.loader import Loader

    ahead = SimpleNamespace(next=probe)
    Loader.next_step(SimpleNamespace(_thread=ahead, cfg=None, close=lambda: None))  # type: ignore[arg-type]


def stop_in_an_evaluation(probe):
    from pipeline.evaluation.perplexity import Evaluator

    dataset = SimpleNamespace(name="validation")
    Evaluator.run(SimpleNamespace(datasets=[dataset], _label_bytes=[None], _score=probe))  # type: ignore[arg-type]


def stop_in_the_forward_pass(probe):
    from pipeline.model.recompute import recompute

    recompute(probe, torch.ones(1, requires_grad=True))


def stop_in_the_backward_pass(probe):
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(probe)
    y.sum().backward()


def stop_in_the_optimizer(probe):
    torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1).step(probe)


def stop_in_a_collective(probe):
    class Message:
        def __reduce__(self):
            probe()

    torch.distributed.all_gather_object([None], Message())


def stop_in_a_collective_of_deepspeed(probe):
    from deepspeed.comm import comm

    comm.cdb, before = SimpleNamespace(is_initialized=lambda: True, barrier=probe), comm.cdb
    try:
        comm.barrier()
    finally:
        comm.cdb = before


STOPS = {
    "torch/distributed/": stop_in_a_collective,
    "deepspeed/comm/": stop_in_a_collective_of_deepspeed,
    "pipeline/distributed/waits.py": lambda probe: wait_for([SimpleNamespace(wait=probe)]),
    "autograd/": stop_in_the_backward_pass,
    "pipeline/checkpoint/": stop_in_a_save,
    "pipeline/data/": stop_in_the_loader,
    "pipeline/evaluation/": stop_in_an_evaluation,
    "torch/optim/": stop_in_the_optimizer,
    "pipeline/model/": stop_in_the_forward_pass,
}


def places_that_are_seen() -> dict[str, str]:
    """Part of a path -> where a rank is said to be whose stack ends there."""
    said = {}
    for part, stop in STOPS.items():

        def probe(*_, part=part, **__):
            said[part] = doing(sys._getframe()).split(" ")[0]
            raise Seen

        with pytest.raises(Seen):
            stop(probe)
    return said


def test_a_rank_that_waits_in_a_place_is_said_to_be_there():
    """A place is told by the paths of files: one that is moved, here or in a library, blinds the page.

    So each place's own function runs until it would wait, and its real stack is looked at there.
    """
    (said,) = run_on_ranks(places_that_are_seen, 1)
    assert said == dict(PLACES)
