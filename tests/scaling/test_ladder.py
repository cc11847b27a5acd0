"""A ladder, laid out: which runs it has, and which ladders say nothing."""

from __future__ import annotations

import pytest

from pipeline import cli
from pipeline.config.pretrain import PretrainConfig
from pipeline.errors import ConfigError
from pipeline.scaling.ladder import (
    LadderConfig,
    LrRule,
    TargetConfig,
    lay_out,
    lay_out_targets,
    num_active,
    settings_of,
)
from tests.support.ladders import VOCAB, ladder, size


def runs_of(config: LadderConfig):
    return lay_out(config, world_size=1, vocab_size=VOCAB)


def test_every_size_is_run_with_every_number_of_tokens_the_cheapest_first():
    rungs = runs_of(ladder())
    assert {rung.name for rung in rungs} == {
        f"w{hidden}-{tokens}" for hidden in (8, 16, 32) for tokens in (1280, 2560, 5120)
    }
    assert [rung.flops for rung in rungs] == sorted(rung.flops for rung in rungs)
    rung = next(rung for rung in rungs if rung.name == "w16-2560")
    assert rung.tokens == 2560 and rung.shape.total_steps == 20
    assert rung.cfg.schedule.warmup_tokens == 51 and rung.cfg.runs_dir == "runs/ladder"
    # 2 blocks of 12 h^2 + 13 h, a final norm of 2 h, and the table that is the head too.
    assert rung.parameters == 2 * (12 * 16**2 + 13 * 16) + 2 * 16 + VOCAB * 16


def test_tables_that_are_only_looked_up_are_not_counted():
    """6 N D is the work of a run; a table of positions, or an input table of its own, is none."""

    def model(*words):
        return cli.compose(PretrainConfig, ["model=tiny", *words], config="pretrain").model

    tied, untied = model(), model("model.tied_embeddings=false")
    assert num_active(tied, VOCAB) == num_active(untied, VOCAB)
    assert num_active(model("model.position=rope"), VOCAB) == num_active(tied, VOCAB)


def test_a_rule_gives_each_run_its_learning_rate():
    """As in arXiv:2503.04715: smaller for larger models, larger for longer runs."""
    config = ladder(lr=LrRule(1.79, -0.713, 0.307))
    rungs = runs_of(config)
    target = lay_out_targets(config, rungs, world_size=1, vocab_size=VOCAB)[0]
    for rung in [*rungs, target]:
        asked = 1.79 * rung.parameters**-0.713 * rung.tokens**0.307
        assert rung.cfg.optimizer.lr == pytest.approx(asked, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": {"a": size(8, 1280), "b": size(16, 2560), "c": size(32, 5120)}},
         "3 runs do not tell five coefficients"),
        ({"sizes": {"a": size(8, *(1280.0 * k for k in range(1, 8)))}}, "the runs have 1 different sizes"),
        ({"sizes": {f"w{h}": size(h, 1280) for h in range(8, 40, 4)}}, "1 different numbers of tokens"),
        ({"sizes": ladder().sizes | {"short": size(24, 1280, settings=("training.seq_len=16",))}},
         "different training.seq_len: 32 and 16"),
        ({"sizes": ladder().sizes | {"other": size(24, 1280, settings=("data.path=elsewhere",))}},
         "w8-1280 and other-1280 have different data"),
        ({"sizes": ladder().sizes | {"v": size(24, 1280, settings=("model.vocab_size=600",))}},
         "different vocabularies: 512 and 600"),
        ({"sizes": {f"w{h}": size(h, 1280, 2560, 5120, settings=("model.moe.num_experts=4", "model.bias=false"))
                    for h in (8, 16, 32)}}, "mixtures of experts follow another law"),
        ({"sizes": ladder().sizes | {"w8": size(8, 1280, 1280, 2560)}},
         "two runs of the ladder are called w8-1280"),
        ({"sizes": ladder().sizes | {"odd": size(9, 1280)}}, "run odd-1280 of the ladder ladder: model.hidden_size"),
    ],
)  # fmt: skip
def test_runs_that_lie_on_no_curve_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        runs_of(ladder(**changes))


def test_a_command_without_a_ladder_says_how_to_choose_one():
    with pytest.raises(ConfigError, match="there is no ladder.*ladder=quickstart is an example"):
        settings_of(LadderConfig())


def test_a_target_differs_from_the_ladder_in_size_and_length_alone():
    rungs = runs_of(ladder())
    long = TargetConfig(["model.hidden_size=64", "training.seq_len=16"], 40960.0)
    with pytest.raises(ConfigError, match="w8-1280 and long have different training.seq_len"):
        lay_out_targets(ladder(targets={"long": long}), rungs, world_size=1, vocab_size=VOCAB)


def test_the_quickstarts_ladder_is_legal_and_its_target_has_eight_times_the_compute():
    from pipeline.scaling.__main__ import ScalingConfig

    config = cli.compose(ScalingConfig, ["ladder=quickstart"], config="scaling").ladder
    rungs = lay_out(config, world_size=1, vocab_size=2048)
    target = lay_out_targets(config, rungs, world_size=1, vocab_size=2048)[0]
    assert target.flops >= 8 * rungs[-1].flops
