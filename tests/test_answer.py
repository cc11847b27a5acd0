"""The answer command: asks in batches, keeps the order, prints scores beside base rates."""

import contextlib
import json

import pytest

from pipeline import answer
from pipeline.errors import ConfigError


class Parrot:
    """Knows the answers that are in its questions."""

    def __init__(self):
        self.sizes = []

    def answer(self, dialogues, *, on_text):
        self.sizes.append(len(dialogues))
        return [messages[-1]["content"].removeprefix("say ") for messages in dialogues]


@pytest.fixture
def parrot(monkeypatch):
    found = Parrot()
    monkeypatch.setattr(answer, "open_sampler", lambda cfg: contextlib.nullcontext(found))
    return found


def write(folder, count):
    path = folder / "held.jsonl"
    rows = [
        {"prompt": f"say {'x' * (count - n)}{n}", "completion": f"{'x' * (count - n)}{n}", "group": "ab"[n % 2]}
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_are_scored_and_written_in_the_order_of_the_questions(tmp_path, parrot, capsys):
    cfg = answer.AnswerConfig(checkpoint=str(tmp_path), data=str(write(tmp_path, 7)), batch_size=3)
    assert answer.main(cfg) == 0
    assert parrot.sizes == [3, 3, 1]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == [line["reference"] for line in lines]
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ["7", "questions", "exact", "f1"]
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in out[1:13]}
    assert rows["all", "model"][:2] == ["100.0", "100.0"]
    assert rows["a", "shuffled"][0] == "0.0" and ("b", "copy") in rows


def test_a_limit_asks_fewer_and_settings_are_checked(tmp_path, parrot):
    data = str(write(tmp_path, 7))
    answer.main(answer.AnswerConfig(checkpoint=str(tmp_path), data=data, limit=2))
    assert parrot.sizes == [2]
    with pytest.raises(ConfigError, match="batch_size .0."):
        answer.main(answer.AnswerConfig(checkpoint=str(tmp_path), data=data, batch_size=0))
