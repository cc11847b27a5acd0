"""A run in words: what a person reads first fits the terminal, and its numbers are the run's."""

from __future__ import annotations

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.training.in_words import sentences


def lines_of(*words: str, world_size: int = 1) -> list[str]:
    cfg = cli.compose(PretrainConfig, words, config="pretrain")
    shape = derive(cfg, world_size=world_size, tokenizer_vocab_size=4096)
    return list(sentences(cfg, shape))


def test_first_run_is_told_in_words() -> None:
    """The log had a repr of a dataclass, and 0.0 GiB of everything."""
    lines = lines_of("training.total_steps=20", "schedule.min_lr=0")
    assert lines[:5] == [
        "model tiny: 1,350,400 parameters",
        "1 rank = 1 data x 1 pipeline x 1 tensor parallel; ZeRO-1, bf16",
        "20 steps, 327,680 tokens",
        "a step: 64 sequences of 256 tokens, 16 x 4 a data-parallel rank",
        "warm-up: 2 steps, a tenth of a short run (schedule.warmup_steps=N)",
    ]
    assert " 0.0 " not in " ".join(lines) and "MiB: weights 2.6 MiB" in " ".join(lines)


def test_a_warm_up_that_was_set_is_not_explained() -> None:
    assert not [line for line in lines_of("schedule.warmup_steps=7") if "warm-up" in line]


def test_what_stays_frozen_is_said() -> None:
    first = lines_of("finetune=lora", "checkpoint.init_from=x")[0]
    assert first.startswith("model tiny: 1,") and first.endswith(" of them trained")


def test_the_largest_size_that_shares_a_sequence_is_named() -> None:
    """Who has long sequences asks how far they can be cut: by heads of a tensor-parallel rank, and by every length."""
    long = ("model=tiny", "model.max_seq_len=16384", "training.seq_len=16384")
    here = "sequences of 16,384 tokens, {} on a rank: parallel.context_parallel_size={}, at most {}"
    two = (*long, "parallel.context_parallel_size=2")
    assert here.format("16,384", 1, 4) in lines_of(*long)
    assert here.format("8,192", 2, 4) in lines_of(*two, world_size=2)
    assert here.format("8,192", 2, 2) in lines_of(
        *two, "parallel.tensor_parallel_size=2", world_size=4
    )
    # 16,388 is 4 x 4,097; the shorter sequences of the ramp are cut by 2 and no more.
    odd = [word.replace("16384", "16388") for word in two]
    here = here.replace("16,384", "16,388")
    assert here.format("8,194", 2, 4) in lines_of(*odd, world_size=2)
    ramp = "training.ramp=[{until_step: 5, seq_len: 8194}]"
    assert here.format("8,194", 2, 2) in lines_of(*odd, ramp, world_size=2)
    assert not [line for line in lines_of() if "context_parallel_size" in line]
