"""A model of dialogues: its checkpoint and its export know the template, and answer until the turn ends."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from data_prep.tokens.conversation_job import TEMPLATES
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import read_record
from pipeline.config.model import ModelConfig
from pipeline.data.chat import ChatTemplate
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError
from pipeline.generate import GenerateConfig, main
from pipeline.huggingface.writer import DType, export
from pipeline.inference.samplers import LocalSampler, TransformersSampler
from pipeline.inference.turns import fitting_turns
from tests.support.checkpoint_runs import Run
from tests.support.layouts import MODELS, VOCAB, config
from tests.support.ranks import run_on_ranks

CHATML = (TEMPLATES / "chatml.jinja").read_text()
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOD, END = 0, 2
TALK = [{"role": "user", "content": "t5 t6"}]


def chat_tokenizer(path: Path) -> Path:
    """Words t3 t4 ... behind the special tokens."""
    words = dict.fromkeys(NAMES, 0) | {f"t{i}": i for i in range(len(NAMES), VOCAB)}
    words |= {name: i for i, name in enumerate(NAMES)}
    backend = Backend(WordLevel(words, unk_token="t3"))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens(NAMES)
    backend.save(str(path))
    return path


def save_chat_models(root: Path, tokenizer: bytes) -> None:
    """GPT-2 with a template, and one without. Collective."""
    for name, chat in (("chat", True), ("text", False)):
        cfg = config()
        cfg.model = ModelConfig(**MODELS["gpt2"])
        files = {"tokenizer.json": tokenizer} | (
            {"chat_template.jinja": CHATML.encode()} if chat else {}
        )
        ends = {"eod": EOD} | ({"end_of_turn": END} if chat else {})
        run = Run(cfg, root / name, attachments=files, ends=ends)
        run.train(0, 1)
        run.save(1)
        run.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    run_on_ranks(save_chat_models, 1, root, chat_tokenizer(root / "tokenizer.json").read_bytes())
    for name in ("chat", "text"):
        export(folders.find(root / name), root / f"{name}-hf", dtype=DType.fp32)
    return root


def test_the_checkpoint_and_the_export_know_template_and_end_of_turn(root: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint = folders.find(root / "chat")
    assert read_record(checkpoint).end_of_turn == END
    assert (checkpoint / "chat_template.jinja").read_text() == CHATML
    assert folders.damage(checkpoint) == []
    generation = json.loads((root / "chat-hf/generation_config.json").read_text())
    assert generation["eos_token_id"] == [EOD, END]
    theirs = AutoTokenizer.from_pretrained(root / "chat-hf")
    template = ChatTemplate(CHATML, Tokenizer.from_file(root / "tokenizer.json"))
    assert template.end_of_turn == END
    asked = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)
    assert list(asked["input_ids"]) == template.prompt_ids(TALK)
    assert "fine-tuned on dialogues" in (root / "chat-hf/README.md").read_text()
    plain = json.loads((root / "text-hf/generation_config.json").read_text())
    assert plain["eos_token_id"] == EOD and not (root / "text-hf/chat_template.jinja").exists()


def answers(root: Path) -> dict[str, Any]:
    """Greedy answers of both samplers, then of both when the first token they say ends turns."""
    warnings.simplefilter("ignore")
    cfg = GenerateConfig(checkpoint="", max_new_tokens=6, temperature=0.0)
    ours = LocalSampler(folders.find(root / "chat"), cfg)
    theirs = TransformersSampler(root / "chat-hf", cfg)
    talks = [
        TALK,
        [*TALK, {"role": "assistant", "content": "t9"}, {"role": "user", "content": "t7"}],
    ]
    found: dict[str, Any] = {
        "ours": ours.answer(talks, on_text=None),
        "theirs": theirs.answer(talks, on_text=None),
    }
    # What the model says second: were that the end of a turn, an answer would be one word.
    second = ours.tokenizer.encode(found["ours"][0])[1]
    ours.ends, theirs.ends = {EOD, second}, [EOD, second]
    theirs.model.generation_config.eos_token_id = theirs.ends
    heard: list[str] = []
    found["stopped"] = [
        ours.answer([TALK], on_text=None)[0], theirs.answer([TALK], on_text=heard.append)[0]
    ]  # fmt: skip
    found["heard"] = "".join(heard)
    return found


def test_both_samplers_answer_alike_and_stop_at_the_end_of_the_turn(root: Path) -> None:
    found = run_on_ranks(answers, 1, root)[0]
    assert [text.split() for text in found["ours"]] == [text.split() for text in found["theirs"]]
    first = found["ours"][0].split()
    assert len(first) == 6
    kept = first[: 1 if first[0] != first[1] else 0]
    assert [text.split() for text in found["stopped"]] == [kept, kept]
    assert found["heard"].split() == kept


LONG = " ".join(["t5"] * 500)


def talked(root: Path) -> list[str]:
    """What a chat of two turns prints, by both samplers."""
    warnings.simplefilter("ignore")
    printed = []
    for name in ("chat", "chat-hf"):
        sys.stdin = io.StringIO(f"t5 t6\n{LONG}\nt7\n")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main(
                GenerateConfig(
                    checkpoint=str(root / name), chat=True, temperature=0.0, max_new_tokens=3
                )
            )
        printed.append(out.getvalue())
    return printed


def test_a_chat_in_the_terminal_keeps_the_dialogue(root: Path) -> None:
    """Also where a line has more tokens than the model has room for."""
    for chat in run_on_ranks(talked, 1, root)[0]:
        # Piped in, the questions are printed too.
        asked, first, _, again, second = chat.splitlines()[:5]
        assert (asked, again) == ("> t5 t6", "> t7") and first and second


def wrote(root: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """What a chat with a model of text prints; what it is given, and what it writes."""
    warnings.simplefilter("ignore")
    found = []
    for name, kind in (("text", LocalSampler), ("text-hf", TransformersSampler)):
        heard: list[tuple[str, str]] = []
        sample: Any = kind.sample

        def listen(self: Any, prompts: list[str], *, to: Any = (heard, sample), **options: Any) -> list[str]:  # fmt: skip
            texts = to[1](self, prompts, **options)
            to[0].append((prompts[0], texts[0]))
            return texts

        sys.stdin = io.StringIO(f"t5 t6\n\nt7\n{LONG}\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "sample", listen)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                main(
                    GenerateConfig(
                        checkpoint=str(root / name), chat=True, temperature=0.0, max_new_tokens=3
                    )
                )
        found.append((out.getvalue(), heard))
    return found


def test_a_model_of_text_goes_on_with_what_both_have_written(root: Path) -> None:
    """It was refused: a run on one's own text could not be talked to. An empty line adds nothing."""
    for printed, heard in run_on_ranks(wrote, 1, root)[0]:
        (first, one), (second, two), (third, three), (fourth, four) = heard
        assert one and two and three and four
        assert (first, second) == ("t5 t6", f"t5 t6{one}")
        assert (third, fourth) == (f"{second}{two}\nt7", f"{third}{three}\n{LONG}")
        assert printed.split("> ")[1:4] == [f"t5 t6\n{one}\n", f"\n{two}\n", f"t7\n{three}\n"]


def test_the_oldest_turns_give_way() -> None:
    messages = [{"role": "user", "content": str(n)} for n in range(5)]

    def ids(some: list[dict[str, Any]]) -> list[int]:
        return [int(message["content"]) for message in some for _ in range(4)]

    assert fitting_turns(messages, ids, 12)[1] == ids(messages[2:])
    system = {"role": "system", "content": "9"}
    assert fitting_turns([system, *messages], ids, 16)[1] == ids([system, *messages[2:]])
    with pytest.raises(ConfigError, match="the message has 4 tokens; the model has room for 3"):
        fitting_turns(messages, ids, 3)
