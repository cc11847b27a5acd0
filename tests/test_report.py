"""The report of finished, killed and restarted runs."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, DataError, MachineError
from pipeline.report import ReportConfig, main
from pipeline.tracking.history import HEADS, History
from tests.support.browser import browser


def step_row(step: int, loss: float | None) -> dict:
    return {
        "step": step,
        "tokens": step * 64,
        "time": 1e9 + 60 * step,
        "train/loss": loss,
        "train/lr": 1e-3,
        "train/grad_norm": 1.0,
        "throughput/tokens_per_sec": 100.0 + step,
        "resilience/restarts": 1,
        "resilience/skipped_steps": 0,
        "goodput/goodput": 0.87,
        "goodput/lost_steps": 3.0,
    }


def write(run_dir: Path, rows: list[dict], tail: str = "") -> Path:
    run_dir.mkdir(exist_ok=True)
    facts = {"num_parameters": 1234, "device": "<cpu>", "versions": {"torch": "2.13", "<x>": "1"}}
    lines = [{"event": "start", "world_size": 2, "facts": facts}, *rows]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + tail)
    (run_dir / "config.yaml").write_text("name: <x>\n")
    return run_dir


def test_report_is_a_picture_and_a_page_that_stands_alone(tmp_path, capsys):
    """The page is mailed and archived: it must carry its picture and load nothing."""
    rows = [step_row(s, 5 - s / 50) for s in range(10, 210, 10)]
    held_out = {"val/wiki/loss": 1.5, "val/wiki/ppl": 4.48, "val/wiki/bits_per_byte": 0.9}
    rows.append({"step": 200, "tokens": 12800, **held_out})
    talks = {key.replace("wiki", "talks"): value for key, value in held_out.items()}
    rows.append({"step": 200, "tokens": 12800, **talks, "val/talks/exact": 62.5})
    main(ReportConfig(run=str(write(tmp_path, rows))))
    png = (tmp_path / "report" / "curves.png").read_bytes()
    page = (tmp_path / "report" / "index.html").read_text()
    assert png.startswith(b"\x89PNG")
    pictures = [base64.b64decode(found) for found in re.findall(r'base64,([^"]*)"', page)]
    assert len(pictures) == 7 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "1.5000" in page
    assert "0.9000" in page
    assert "exact answers, %" in page and "62.5000" in page
    assert "62.5 % of answers exact  (talks, step 200)" in capsys.readouterr().out
    assert "1,234 parameters" in page
    assert "Goodput 87 %, 3 steps done twice." in page
    assert "&lt;cpu&gt;" in page and ">torch 2.13, &lt;x&gt; 1<" in page
    assert "name: &lt;x&gt;" in page


def several(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of 60 logged steps whose settings differ in one, with samples and evaluations."""
    folders = []
    for name, lr, last in (("slow", 1e-4, 2.0), ("fast", 1e-3, 1.5)):
        rows = [step_row(s, last + 3 / s) | {"memory/peak_gib": 1.5} for s in range(1, 61)]
        for step, tokens in ((30, 640), (60, 1280)):
            scores = {"loss": last + 0.5, "ppl": 9.0, "bits_per_byte": 1.25, "tokens": tokens}
            rows.append(
                {"step": step, "tokens": 64 * step, "time": 1e9 + 60 * step}
                | {f"val/a-dataset-with-a-long-name/{key}": value for key, value in scores.items()}
            )
        run = write(tmp_path / name, rows)
        (run / "config.yaml").write_text(f"name: {name}\noptimizer:\n  lr: {lr}\n  eps: 0.1\n")
        samples = [{"step": step, "tokens": 64 * step, "number": 0, "prompt": "def ", "text": f"<{name}>\n" + "x" * 200}
                   for step in (30, 60)]  # fmt: skip
        (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        folders.append(run)
    return folders[0], folders[1]


def test_runs_beside_each_other_show_what_differs(tmp_path: Path, capsys) -> None:
    """Names, and what is the same, would only hide it."""
    slow, fast = several(tmp_path)
    main(ReportConfig(run=str(slow), beside=[str(fast)]))
    page = (slow / "report" / "index.html").read_text()
    differing = page.partition("Settings that differ")[2].partition("</table>")[0]
    assert re.findall(r"<td[^>]*>([^<]*)<", differing) == ["optimizer.lr", "0.0001", "0.001"]
    assert "Rows of other numbers of tokens are of other parts of the data" in page
    assert ">1,280<" in page and "&lt;slow&gt;" in page and "&lt;fast&gt;" not in page
    assert "Begun 2001-09-09 01:47 UTC, last heard of 59m 00s later." in page
    with pytest.raises(ConfigError, match="named twice"):
        main(ReportConfig(run=str(slow), beside=[str(slow)]))
    other = tmp_path / "other"
    other.mkdir()
    fast.rename(other / "slow")
    main(ReportConfig(run=str(slow), beside=[str(other / "slow")]))
    assert "<th>other/slow</th>" in (slow / "report" / "index.html").read_text()


def test_a_strangers_settings_take_no_memory(tmp_path: Path) -> None:
    """Each line is nine of the one before: the text of the last is of gigabytes."""
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    first, second = several(tmp_path)
    (second / "config.yaml").write_text(bomb)
    main(ReportConfig(run=str(first), beside=[str(second)]))
    page = (first / "report/index.html").read_text()
    assert "Settings that differ" in page and len(page) < 10_000_000


def test_a_page_is_read_on_a_telephone_and_on_paper(tmp_path: Path) -> None:
    """In a browser: nothing is wider than the window, every picture is there, the newest samples are open."""
    slow, fast = several(tmp_path)
    main(ReportConfig(run=str(slow), beside=[str(fast)]))
    with browser(tmp_path / "profile") as page:
        for width, columns in ((400, 1), (1300, 3)):
            page.open((slow / "report" / "index.html").as_uri(), width=width, height=900)
            assert page.value("document.documentElement.scrollWidth") <= width
            assert (
                page.value(
                    "[...document.images].filter(i => i.complete && i.naturalWidth > 700).length"
                )
                == 8
            )
            lefts = page.value("[...document.images].map(i => i.getBoundingClientRect().left)")
            assert len(set(lefts)) == columns
            assert (
                page.value(
                    "[...document.querySelectorAll('.text')].filter(e => e.checkVisibility()).length"
                )
                == 1
            )
            page.screenshot(tmp_path / f"{width}.png")
        assert page.command("Page.printToPDF")["data"] and page.said == []


def test_heads_are_shown_where_somebody_looked(tmp_path: Path, capsys) -> None:
    """A restart repeats a step: its later scores count."""
    seen = [(10, 0.25), (20, 0.75), (20, 0.875)]
    rows = [step_row(step, 4.0) for step in (10, 20)]
    main(ReportConfig(run=str(write(tmp_path, rows))))
    assert "Attention heads" not in (tmp_path / "report" / "index.html").read_text()
    rows += [
        {
            "step": step, "tokens": 64, **{f"probe/{name}": score for name in HEADS},
            "lens/loss_0": 8 + score, "lens/loss_1": 4 + score,
        }
        for step, score in seen
    ]  # fmt: skip
    main(ReportConfig(run=str(write(tmp_path, rows))))
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count(">8.8750<") == page.count(">4.8750<") == 1 and ">8.7500<" not in page
    assert 'alt="Attention heads: ' in page and 'alt="Logit lens: ' in page and ">block 1<" in page
    assert page.count(">0.2500<") == page.count(">0.8750<") == len(HEADS) and ">0.7500<" not in page


def test_traces_are_linked_and_stay_where_they_are(tmp_path, capsys):
    """They are larger than the page, and each opens in a viewer of its own."""
    run = write(tmp_path / "my run", [step_row(1, 3.0)])
    folder = run / "profiles" / "steps-10-12"
    folder.mkdir(parents=True)
    for rank in range(40):
        (folder / f"rank-{rank:05d}.trace.json.gz").touch()
    (folder / ".rank-00040.trace.json.gz").touch()  # still written
    main(ReportConfig(run=str(run)))
    page = (run / "report" / "index.html").read_text()
    links = re.findall(r'href="([^"]*)"', page)
    assert len(links) == 32 and "8 more in profiles/" in page
    assert (run / "report" / links[0]).exists()
    assert f"{run / 'profiles'}" in capsys.readouterr().out


def test_steps_repeated_after_a_restart_count_once(tmp_path):
    """A requeued job repeats the steps since its checkpoint; the later values are the run's."""
    rows = [step_row(10, 3.0), step_row(20, 2.0), step_row(10, 2.9), step_row(20, 1.9)]
    history = History.load(write(tmp_path, rows))
    assert [(row["step"], row["train/loss"]) for row in history.steps] == [(10, 2.9), (20, 1.9)]


def test_report_of_a_killed_run_skips_the_torn_line(tmp_path):
    """A run that dies is the one whose curves are wanted."""
    main(
        ReportConfig(
            run=str(write(tmp_path, [step_row(1, 3.0), step_row(2, None)], tail='{"step": 3, "tr'))
        )
    )
    assert (tmp_path / "report" / "index.html").exists()
    assert [row["step"] for row in History.load(tmp_path).steps] == [1, 2]


def test_evaluation_of_the_whole_held_out_set_is_shown(tmp_path, capsys):
    """The training scores a sample; the number to quote is pipeline.evaluate's."""
    run = write(tmp_path, [step_row(1, 3.0)])
    scores = {"wiki": {"loss": 1.25, "ppl": 3.49, "bits_per_byte": 0.75, "tokens": 1000}}
    (run / "evaluation.json").write_text(json.dumps({"checkpoint": "x", "results": scores}))
    main(ReportConfig(run=str(run)))
    assert "loss 1.2500, 0.7500 bits per byte  (wiki, 1,000 tokens)" in capsys.readouterr().out
    assert "1.2500" in (run / "report" / "index.html").read_text()


def test_throughput_is_the_median_without_the_warm_up(tmp_path):
    """The first logged step compiles and allocates."""
    assert (
        History.load(write(tmp_path, [step_row(s, 1.0) for s in (1, 2, 3, 4)])).tokens_per_sec
        == 103.0
    )


def test_a_report_goes_into_the_run_and_nowhere_else(tmp_path):
    """Checkpoints may be on another disk; what is written must not follow a link, nor be read by one."""
    run = write(tmp_path / "run", [step_row(1, 3.0)])
    for name in ("checkpoints", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("s3cr3t")
    (run / "checkpoints").symlink_to(tmp_path / "checkpoints")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(tmp_path / "elsewhere" / "secret")
    main(ReportConfig(run=str(run)))
    assert "s3cr3t" not in (run / "report" / "index.html").read_text()
    for name in ("report/index.html", "report/curves.png", "report"):
        path = run / name
        path.unlink() if path.is_file() else path.rmdir()
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(MachineError, match=f"{re.escape(str(path))} is a link"):
            main(ReportConfig(run=str(run)))
        path.unlink()
        if name != "report":
            path.parent.mkdir(exist_ok=True)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["secret"]


def test_a_prediction_is_drawn_under_the_run_and_leaving_it_is_a_warning(tmp_path, capsys):
    """A run that goes another way than its ladder said is worth a look before it has ended."""
    rows = [step_row(s, 5 - s / 100) for s in range(10, 110, 10)]
    prediction = {
        "ladder": "small", "target": "run", "num_parameters": 1234, "parameters": 1000, "tokens": 12800,
        "flops": 1e9, "times_largest": 9.0, "loss": 3.0, "low": 2.9, "high": 3.1, "level": 0.9,
        "course": [{"part": 0.25, "low": 4.0, "high": 5.0}, {"part": 0.5, "low": 3.0, "high": 3.9}], "datasets": [],
    }  # fmt: skip
    run = write(tmp_path / "run", rows)
    main(ReportConfig(run=str(run)))
    without, said = (run / "report" / "curves.png").read_bytes(), capsys.readouterr()
    assert "Predicted" not in said.err
    (run / "prediction.json").write_text(json.dumps(prediction))
    main(ReportConfig(run=str(run)))
    said, page = capsys.readouterr().err, (run / "report" / "index.html").read_text()
    assert "Predicted by small: held-out loss 3.0000 (2.9000 to 3.1000, 90%)" in said
    assert (
        "warning: at 50% of its tokens the training loss, 4.0000, is above the predicted 3.0000"
        in said
    )
    assert "at 25%" not in said and "at 25%" not in page
    assert (run / "report" / "curves.png").read_bytes() != without
    (run / "prediction.json").write_text(json.dumps(prediction | {"loss": 3.2}))  # outside
    main(ReportConfig(run=str(run)))
    capsys.readouterr()
    held_out = {"val/wiki/loss": 3.4, "val/wiki/ppl": 30.0, "val/wiki/bits_per_byte": 1.0}
    rows += [step_row(200, 3.0), {"step": 200, "tokens": 12800, **held_out}]
    write(run, rows)
    main(ReportConfig(run=str(run)))
    said, page = capsys.readouterr().err, (run / "report" / "index.html").read_text()
    wanted = "warning: the last held-out loss (wiki), 3.4000, is not within the predicted 2.9000 to 3.1000"
    assert wanted in said and wanted in page


def test_facts_of_no_run_are_refused(tmp_path):
    """A stranger's metrics.jsonl: what was predicted is held against its datasets."""
    run = write(tmp_path, [step_row(1, 3.0)])
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"device"', '"datasets": 5, "device"'))
    with pytest.raises(DataError, match=r"of no run: facts.datasets is 5"):
        main(ReportConfig(run=str(run)))


@pytest.mark.parametrize("rows", [None, []])
def test_folder_without_steps_is_named(tmp_path, rows):
    """A typed wrong name is the likely cause."""
    if rows is not None:
        write(tmp_path, rows)
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        main(ReportConfig(run=str(tmp_path)))
