"""A failed job's log ends in ten lines, whatever the number of ranks."""

import os
import re
import tempfile

from pipeline.distributed.ranks import Ranks
from pipeline.errors import ConfigError, ShardError
from pipeline.resilience import failure
from pipeline.resilience.clock import Clock


def ranks(global_rank: int) -> Ranks:
    return Ranks(global_rank, 64, global_rank % 8, 8, f"n{1 + global_rank // 8}")


def bug() -> AssertionError:
    try:
        Clock().enter("no such phase", 0)
    except AssertionError as error:
        return error
    raise RuntimeError


def test_first_failing_rank_speaks_and_the_others_write_files(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert [
        failure.report(bug(), ranks=ranks(r), run_dir=tmp_path, step=120) for r in (9, 0, 63)
    ] == [1, 1, 1]
    printed = capfd.readouterr().err
    assert len(printed.splitlines()) <= 10
    assert printed.startswith("error: rank 9 on n2 after step 120: AssertionError: no such phase")
    assert re.search(r"pipeline/resilience/clock\.py:\d+ enter: assert phase in PHASES", printed)
    files = sorted(path.name for path in (tmp_path / "logs" / "failures" / "17-0").iterdir())
    assert files == ["00000.txt", "00009.txt", "00063.txt", "first"]
    assert "Traceback" in (tmp_path / "logs" / "failures" / "17-0" / "00063.txt").read_text()


def test_next_start_of_the_job_speaks_again(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for restart in ("0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        failure.report(bug(), ranks=ranks(0), run_dir=tmp_path, step=None)
    assert capfd.readouterr().err.count("error: rank 0 on n1") == 2


def test_user_errors_are_one_message_with_their_exit_code(tmp_path, capfd):
    code = failure.report(
        ConfigError("x must be even."), ranks=ranks(3), run_dir=tmp_path, step=None
    )
    assert (code, capfd.readouterr().err) == (2, "error: x must be even. (rank 3 on n1)\n")


def test_a_file_in_the_place_of_the_reports_does_not_hide_the_failure(tmp_path, capfd):
    """It was taken for another rank's claim, so that nobody spoke."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "failures").write_text("mine")
    for rank, error in ((0, bug()), (9, ShardError("shard 7 is gone.")), (10, bug())):
        failure.report(error, ranks=ranks(rank), run_dir=tmp_path, step=3)
    printed = capfd.readouterr().err
    assert "error: rank 0 on n1 after step 3" in printed
    assert "shard 7 is gone. (rank 9 on n2 after step 3)" in printed and "rank 10" not in printed


def test_a_report_holds_no_secret_and_a_closed_standard_error_no_rank(tmp_path, monkeypatch, capfd):
    """The exit code must reach the launcher: a rank that cannot speak would wait in its teardown."""
    error = RuntimeError("GET https://me:planted@host/x?sig=planted failed")
    failure.report(error, ranks=ranks(0), run_dir=tmp_path, step=1)
    (report,) = (tmp_path / "logs" / "failures").glob("*/00000.txt")
    printed = capfd.readouterr().err
    assert "https://***@host/x?***" in report.read_text() and "https://***@host/x?***" in printed
    assert "planted" not in report.read_text() + printed
    with open(os.devnull) as not_writable:
        monkeypatch.setattr("sys.stderr", not_writable)
        assert failure.report(error, ranks=ranks(0), run_dir=tmp_path / "b", step=1) == 1


def test_a_folder_that_cannot_be_written_does_not_hide_the_failure(tmp_path, capfd):
    (tmp_path / "logs").write_text("a file where a folder should be")
    failure.report(bug(), ranks=ranks(0), run_dir=tmp_path, step=3)
    printed = capfd.readouterr().err
    assert "no report in" in printed and "error: rank 0 on n1 after step 3" in printed


def test_a_refused_start_writes_into_a_folder_of_its_user_only(tmp_path, monkeypatch, capfd):
    """The name can be foreseen: reports went wherever a link that somebody put there leads."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    folder, elsewhere = tmp_path / f"pretrain-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    assert failure.report(ConfigError("wrong"), ranks=ranks(0), run_dir=None, step=None) == 2
    assert list(elsewhere.iterdir()) == []
    said = capfd.readouterr().err
    assert "not a folder of this user" in said and "error: wrong" in said
    folder.unlink()
    assert failure.report(ConfigError("wrong"), ranks=ranks(0), run_dir=None, step=None) == 2
    assert (folder / "17-0/00000.txt").exists()
    assert folder.stat().st_mode & 0o777 == 0o700
