"""What somebody meant: names of other programs, beginnings, slips; and nothing where nothing is near."""

from __future__ import annotations

import pytest

from data_prep.tokens.tokenize_job import TokenizeConfig
from pipeline import schema, suggestions
from pipeline.config.pretrain import PretrainConfig
from pipeline.inference.generation import GenerateConfig


@pytest.mark.parametrize(
    "word, meant",
    [
        ("learning_rate", "optimizer.lr"), ("lr", "optimizer.lr"), ("model.lr", "optimizer.lr"),
        ("optimizer.learning_rate", "optimizer.lr"), ("--learning-rate", "optimizer.lr"),
        ("batch_size", "training.global_batch_size"), ("tp", "parallel.tensor_parallel_size"),
        ("max_steps", "training.total_steps"), ("n_layer", "model.num_layers"),
        ("block_size", "training.seq_len"), ("dataset", "data.path"), ("grad_clip", "optimizer.clip_grad"),
        ("bf16", "training.precision"), ("training.total_s", "training.total_steps"),
        ("model.num_layer", "model.num_layers"), ("resilience.hang", "resilience.hang_timeout_s"),
        ("trainin.total_steps", "training.total_steps"), ("log_interval", "tracking.log_every"),
        ("experts", "model.moe.num_experts"), ("save_evry", "checkpoint.save_every"),
    ],
)  # fmt: skip
def test_a_setting_is_found_by_the_names_that_people_know(word, meant):
    """A newcomer types what the last program was told."""
    assert meant in suggestions.for_setting(word, PretrainConfig)


@pytest.mark.parametrize(
    "word, part",
    [("epochs", "training.total_steps"), ("dp", "launch/local.sh N"), ("grad_accum", "micro_batch_size")],
)  # fmt: skip
def test_what_is_no_setting_has_an_answer(word, part):
    """Epochs, data-parallel ranks and accumulation follow from others."""
    assert part in suggestions.for_setting(word, PretrainConfig)


def test_suggestions_are_settings_of_the_command_that_was_called():
    """A name means another thing there, or nothing."""
    assert suggestions.for_setting("model", GenerateConfig) == " Did you mean checkpoint?"
    assert suggestions.for_setting("max_tokens", GenerateConfig) == " Did you mean max_new_tokens?"
    assert suggestions.for_setting("temp", GenerateConfig) == " Did you mean temperature?"
    assert suggestions.for_setting("num_proc", TokenizeConfig) == " Did you mean workers?"
    assert suggestions.for_setting("epochs", GenerateConfig) == ""
    assert suggestions.for_setting("qqqq", PretrainConfig) == ""


def test_every_name_leads_to_a_setting_that_exists():
    """A setting that was renamed must take its other names along."""
    kinds = (PretrainConfig, GenerateConfig, TokenizeConfig)
    known = {key for kind in kinds for key, _, _ in schema.settings(kind)}
    known |= {
        "run",
        "seq_len",
        "precision",
        "micro_batch_size",
        "dtype",
        "output",
    }  # of other commands
    meant = {key for found in suggestions.KNOWN_AS.values() for key in found}
    assert meant - known == set()


@pytest.mark.parametrize(
    "word, meant",
    [
        ("gpt2", ["gpt2-124m", "gpt2-355m"]), ("gpt2-small", ["gpt2-124m"]), ("GPT2_XL", ["gpt2-1558m"]),
        ("gtp2-124m", ["gpt2-124m"]), ("nanogpt", ["tiny"]), ("gpt-3", ["gpt3-125m"]),
    ],
)  # fmt: skip
def test_a_preset_is_found_by_its_beginning_and_its_other_names(word, meant):
    options = ["gpt2-124m", "gpt2-355m", "gpt2-1558m", "gpt3-125m", "tiny"]
    assert all(name in suggestions.for_option(word, options) for name in meant)


def test_at_most_four_are_named():
    assert suggestions.did_you_mean("abcdef") == " Did you mean a, b, c or d?"
    assert suggestions.did_you_mean([]) == ""
