"""Tasks of an array that come while another ends the job."""

from pathlib import Path

import pytest

from data_prep import jobs
from data_prep.tokens import dataset_job, dataset_writer
from data_prep.tokens.tokenize_job import TokenizeConfig, main
from pipeline import cli
from tests.support.corpus import checksums, make_texts, make_tokenizer, write_jsonl


@pytest.mark.parametrize(
    "module, name", [(dataset_writer, "copy_tokenizer"), (dataset_job, "run_units")]
)
def test_a_task_that_comes_while_another_ends_the_job_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module, name: str
) -> None:
    """Three tasks for one unit: the work folder goes under the feet of one that has nothing to do.

    It failed, and with it the array, on whose success a training job waited.
    """
    write_jsonl(tmp_path / "in" / "0.jsonl", make_texts(60))
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", vocab_size=300)
    output = tmp_path / "out"

    def tokenize(task: int) -> None:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
        words = [f"input={tmp_path}/in", f"output={output}", f"tokenizer={tokenizer}", "workers=1"]
        main(cli.compose(TokenizeConfig, words, config="tokenize"))

    original, expected = getattr(module, name), {}

    def comes_late(*args, **kwargs):
        monkeypatch.setattr(module, name, original)
        tokenize(0)
        expected.update(checksums(output))
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, comes_late)
    tokenize(2)
    assert expected and checksums(output) == expected
    assert not (output / ".work").exists()
    monkeypatch.setattr(jobs, "create_durably", None)  # by way of the work folder, which may go
    tokenize(1)
    assert checksums(output) == expected and not (output / ".work").exists()
