"""What is written or said holds no secret, and loses nothing else."""

import contextlib
import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.sources.pieces import printable
from pipeline import redaction
from pipeline.redaction import redact
from tests.support.corpus import make_texts, make_tokenizer, write_jsonl
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]

ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalr/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "HF_TOKEN": "hf_short-planted",
    "DB_PASSWORD": "correct horse",
    "TOKENIZERS_PARALLELISM": "falsefalse",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key.json",
    "USE_KEY": "1",
}
HIDDEN = [
    ("https://me:pass@host/a.jsonl", "https://***@host/a.jsonl"),
    ("https://token@host:8080/a", "https://***@host:8080/a"),
    ("https://me:p@ss@host/a", "https://***@host/a"),
    ("https://host/a.zst?X-Amz-Credential=A&X-Amz-Signature=4f1", "https://host/a.zst?***"),
    ("https://host/a?4f1f4f", "https://host/a?***"),
    ("s3://bucket/a?versionId=abc", "s3://bucket/a?***"),
    ("web=https://u:p@h/x?sig=1,code=https://u:p@h/y?sig=2", "web=https://***@h/x?***,code=https://***@h/y?***"),
    ("cannot read 'https://host/a?sig=x' (403)", "cannot read 'https://host/a?***' (403)"),
    ("Authorization: Bearer abcdef0123456789", "Authorization: Bearer ***"),
    ("api_key=abcdef0123, step 5", "api_key=***, step 5"),
    ('{"password": "abcdef"}', '{"password": "***"}'),
    ("aws_access_key_id=AKIAIOSFODNN7EXAMPLE", "aws_access_key_id=***"),
    ("the key AKIAIOSFODNN7EXAMPLE is refused", "the key *** is refused"),
    ("key 0123456789abcdef0123456789abcdef01234567!", "key ***!"),
    ("wJalr/K7MDENG+bPxRfiCYEXAMPLEKEY", "***"),
    ("sign=wJalr%2FK7MDENG%2BbPxRfiCYEXAMPLEKEY", "sign=***"),
    ("hf_short-planted and correct horse", "*** and ***"),
]  # fmt: skip


@pytest.mark.parametrize("text, expected", HIDDEN)
def test_secrets_are_hidden_and_what_is_around_them_stays(text, expected):
    assert redact(text, ENVIRONMENT) == expected


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/part-?.jsonl.zst",
        "https://host/data/train",
        "data/tokens=5/a?b=c.jsonl",
        "tokenizer=gpt2.json eod=0",
        "falsefalse 1 /home/me/key.json",
        "step 5/10 | loss 2.3 | tokens/s 1,000 | tokens_seen 5",
        "commit da7c490da7c490da7c490da7c490da7c490da7c4 on cpu",
        "mail me@example.org",
        "KeyError: 'step'",
        "num_query_groups: 4, keys: 3",
    ],
)
def test_what_is_no_secret_is_not_touched(text):
    assert redact(text, ENVIRONMENT) == text


def test_values_inside_settings_are_hidden_at_any_depth():
    settings = {"data": {"train": [{"path": "https://u:p@h/d", "weight": 1.0}]}, "seed": None}
    assert redact(settings, ENVIRONMENT) == {
        "data": {"train": [{"path": "https://***@h/d", "weight": 1.0}]},
        "seed": None,
    }
    assert settings["data"]["train"][0]["path"] == "https://u:p@h/d", "the run still needs it"


def test_redacting_twice_changes_nothing():
    for text, expected in HIDDEN:
        assert redact(redact(text, ENVIRONMENT), ENVIRONMENT) == expected


# ---- planted secrets, real commands -------------------------------------------------------------------------------

PLANTED = {
    "WANDB_API_KEY": "feedfacefeedfacefeedfacefeedfacefeedface",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/0123456789abcdefghij",
    "HF_TOKEN": "hf_plantedplantedplantedplanted",
}
IN_ADDRESSES = ("planted-password", "planted-signature")


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """host:port of a web server over the folder; user and query are taken as they come."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def command(*words: str, folder: Path, code: int = 0) -> str:
    """What a command prints, the planted keys in its environment."""
    environment = {**os.environ, **PLANTED, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=HANG_S,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def leaks(folder: Path, printed: str) -> list[str]:
    """Where a planted secret stands."""
    secrets = [*PLANTED.values(), *IN_ADDRESSES]
    found = [f"printed: {secret}" for secret in secrets if secret in printed]
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        found += [f"{path}: {secret}" for secret in secrets if secret.encode() in content]
        found += [f"{path}: its name" for secret in secrets if secret in str(path)]
    return found


@pytest.mark.slow
def test_no_planted_secret_is_in_a_file_or_in_what_is_printed(tmp_path):
    """Tokenization and training over addresses with a password and a signature, with both trackers."""
    served, work = tmp_path / "served", tmp_path / "work"
    work.mkdir()
    write_jsonl(served / "corpus.jsonl", make_texts(400))
    with (served / "corpus.jsonl").open("a") as file:
        file.write("not json\n")  # goes to the rejects, with the address it is from
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", vocab_size=300)
    with web_server(served) as host:
        address = f"http://me:planted-password@{host}"
        printed = command(
            str(ROOT / "data_prep" / "tokenize.py"), "output=out", f"tokenizer={tokenizer}", "workers=1", "format=jsonl",
            f"input=web={address}/corpus.jsonl?X-Amz-Signature=planted-signature", "validation_fraction=0.1",
            "on_error=quarantine", folder=work,
        )  # fmt: skip
        assert (work / "out" / "rejects.jsonl").exists()
        (served / "data").symlink_to(work / "out")
        settings = [
            "model=tiny", "model.num_layers=1", "model.hidden_size=32", "model.max_seq_len=32", "schedule.warmup_steps=1",
            "training.total_steps=4", "training.global_batch_size=2", "training.micro_batch_size=2",
            "training.precision=fp32", "training.eval_every=2", "training.eval_sequences=4", "checkpoint.save_every=2",
            "tracking.log_every=1", "tracking.wandb=offline", "tracking.tensorboard=true", "name=a",
        ]  # fmt: skip
        printed += command(
            "-m", "pipeline.train", f"data.path={address}/data", *settings, folder=work
        )
        printed += command("-m", "pipeline.report", "runs/a", folder=work)
        printed += command("-m", "pipeline.checkpoint", "show", "runs/a", folder=work)
        missing = command(
            "-m", "pipeline.train", f"data.path={address}/none", "name=b", *settings[:-1], folder=work, code=2
        )  # fmt: skip
        wrong = command(
            str(ROOT / "data_prep" / "tokenize.py"), "output=other", f"tokenizer={tokenizer}",
            f"input={address}/none.jsonl?sig=planted-signature", "format=jsonl", folder=work, code=2,
        )  # fmt: skip
    assert "http://***@" in missing and "http://***@" in wrong
    assert list((work / "runs/a/wandb").glob("offline-run-*/*.wandb")), "W&B ran"
    assert list((work / "runs/a/tensorboard/by-step").glob("events.*")), "TensorBoard too"
    assert leaks(work, printed + missing + wrong) == []
    config = (work / "runs/a/config.yaml").read_text()
    assert f"path: http://***@{host}/data" in config, "what is no secret is still told"


def test_files_that_a_query_names_stay_apart():
    """Both were .../get?***, so a job on b.jsonl said that it was complete: a.jsonl's was."""
    names = [printable(f"https://h/get?file={name}.jsonl") for name in "ab"]
    assert len(set(names)) == 2 and not any("file=" in name for name in names)
    signed = [printable(f"https://h/a.jsonl?X-Amz-Signature={n}") for n in "12"]
    assert signed == ["https://h/a.jsonl?***"] * 2


def test_what_secrets_are_called_stands_in_one_table():
    """A word that only one of several lists knew was hidden in a log and written into an id."""
    for word in (*redaction.SURE, *redaction.UNSURE):
        value = f"planted-{word}"
        assert value not in redact(f"hello {value}", {f"MY_{word.upper()}": value})
        assert redaction.is_signed(f"{word}={value}")
    for word in redaction.SURE:
        assert redact(f"{word}=planted", {}) == f"{word}=***"
    for word, before in redaction.UNSURE.items():
        assert redact(f"{word}=planted", {}) == f"{word}=planted"
        for first in before.split():
            assert redact(f"{first}_{word}=planted", {}) == f"{first}_{word}=***"
