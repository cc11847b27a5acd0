"""Epsilon is the accountant's; the secret of the noise is one file of the run, and no checkpoint's."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import cli
from pipeline.config.choices import OnSpike, OptimizerName, Precision
from pipeline.config.finetune import FinetuneConfig, PrivacyConfig
from pipeline.config.privacy_rules import delta, privacy
from pipeline.config.run_shape import derive
from pipeline.errors import CheckpointError, ConfigError
from pipeline.huggingface.card_facts import privacy_facts
from pipeline.training import privacy as privacy_module
from pipeline.training.privacy import _own_key, check_same, composed, epsilon, noise_salt, spent
from tests.support.checkpoint_runs import record_of
from tests.support.layouts import VOCAB, config

PRIVATE = replace(config(clip_grad=0.0), finetune=FinetuneConfig(dp=PrivacyConfig(clip_norm=1.0)))


def exact(noise_multiplier: float, reads: int, delta: float) -> float:
    """Least epsilon of a Gaussian mechanism (Balle & Wang 2018, arXiv:1805.06530, theorem 8), by bisection."""
    mu = math.sqrt(reads) / noise_multiplier
    phi = lambda x: math.erfc(-x / math.sqrt(2)) / 2  # noqa: E731
    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        left = phi(mu / 2 - middle / mu) - math.exp(middle) * phi(-mu / 2 - middle / mu)
        low, high = (middle, high) if left > delta else (low, middle)
    return high


def test_the_installed_accountant_gives_the_value_of_its_own_example() -> None:
    """opacus/tests/accountants_test.py, test_rdp_accountant: another release must not change what a card says."""
    accountants = pytest.importorskip("opacus.accountants")
    accountant = accountants.RDPAccountant()
    for _ in range(int(90 / 0.04)):
        accountant.step(noise_multiplier=1.5, sample_rate=0.04)
    assert accountant.get_epsilon(delta=1e-5) == pytest.approx(7.32911117143, abs=1e-6)


@pytest.mark.parametrize("noise_multiplier, reads", [(1.0, 1), (2.0, 1), (1.0, 2), (4.0, 50)])
def test_epsilon_is_an_upper_bound_close_to_the_least_one(
    noise_multiplier: float, reads: int
) -> None:
    pytest.importorskip("opacus")
    found, least = epsilon(noise_multiplier, reads, 1e-5), exact(noise_multiplier, reads, 1e-5)
    assert least < found < 1.1 * least


def test_epsilon_is_that_of_the_accountant_asked_read_by_read() -> None:
    """It is told all reads at once, in a field of its own that another release may read otherwise."""
    accountant = pytest.importorskip("opacus.accountants").RDPAccountant()
    for reads in (1, 2, 3):
        accountant.step(noise_multiplier=1.5, sample_rate=1)
        assert epsilon(1.5, reads, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-12)


def test_a_run_that_has_read_nothing_has_spent_nothing() -> None:
    dp = PrivacyConfig(clip_norm=1.0)
    assert spent(dp, reads=0, seq_len=8, salt="s", earlier=[]) | {"unit": ""} == {
        "epsilon": 0.0, "delta": 1e-5, "clip_norm": 1.0, "noise_multiplier": 1.0, "reads": 0, "salt": "s", "unit": "",
    }  # fmt: skip


def test_the_key_is_made_once_for_its_owner_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run/dp_noise.key"
    key = _own_key(path)
    assert len(key) == 64 and _own_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert _own_key(tmp_path / "other/dp_noise.key") != key
    path.write_text("short")
    with pytest.raises(OSError, match="it is no key"):
        _own_key(path)


def test_a_private_run_goes_on_with_the_noise_it_began_with() -> None:
    before = {"finetune": {"dp": {"clip_norm": 1.0, "noise_multiplier": 2.0}}}
    record = replace(record_of(1), config=before)
    check_same(PrivacyConfig(clip_norm=1.0, noise_multiplier=2.0), record)
    for now in (PrivacyConfig(), PrivacyConfig(clip_norm=1.0)):
        with pytest.raises(CheckpointError, match="epsilon would be that of neither"):
            check_same(now, record)
    check_same(PrivacyConfig(), replace(record_of(1), config={}))  # of an older program


def test_other_steps_have_other_noise_and_the_same_ones_theirs(monkeypatch: Any) -> None:
    """With one noise on both, the difference of two models would have none, and be that of the gradients."""
    monkeypatch.setattr(privacy_module.dist, "broadcast_object_list", lambda found, **_: None)
    layout: Any = SimpleNamespace(host_group=None)
    now = json.loads(json.dumps(cli.to_dict(PRIVATE)))
    first, again = noise_salt(None, now, layout), noise_salt(None, now, layout)
    assert len(first) == len(again) == 32 and first != again
    record = replace(record_of(3), config=now, privacy={"salt": first})
    goes_on = replace(
        PRIVATE,
        parallel=replace(PRIVATE.parallel, tensor_parallel_size=2),
        training=replace(PRIVATE.training, micro_batch_size=1, eval_every=3),
    )
    assert noise_salt(record, cli.to_dict(goes_on), layout) == first
    for change in (
        {"seed": 7},
        {"optimizer": replace(PRIVATE.optimizer, lr=1.0)},
        {"training": replace(PRIVATE.training, global_batch_size=32)},
        {"data": replace(PRIVATE.data, mask_documents=True)},
    ):
        assert noise_salt(record, cli.to_dict(replace(PRIVATE, **change)), layout) != first
    assert noise_salt(replace(record, privacy={}), now, layout) not in (first, "", "None")


def test_a_delta_that_would_let_a_sequence_be_published_is_refused() -> None:
    dp = PrivacyConfig(clip_norm=1.0, delta=1e-3)
    assert not list(delta(dp, 999)) and not list(delta(PrivacyConfig(delta=1e-3), 1000))
    (found,) = delta(dp, 1000)
    assert "below one over the 1,000 sequences" in found and "finetune.dp.delta=1e-04" in found


@pytest.mark.parametrize(
    "section, change, message",
    [
        ("parallel", {"pipeline_parallel_size": 2}, "adds up over all stages"),
        ("parallel", {"context_parallel_size": 2}, "a part of each sequence only"),
        ("parallel", {"zero_stage": 3}, "weights are gathered"),
        ("parallel", {"offload_optimizer": True}, "they have left the device"),
        ("model", {"hidden_dropout": 0.1}, "under another mask"),
        ("training", {"precision": Precision.fp16}, "bf16 or fp32"),
        ("optimizer", {"name": OptimizerName.muon}, "optimizer=adamw"),
        ("optimizer", {"clip_grad": 1.0}, "from before the noise"),
        ("resilience", {"on_spike": OnSpike.skip}, "would tell of the data"),
        ("data", {"allow_dataset_change": True}, "from one order alone"),
        ("finetune", {"dp": PrivacyConfig(clip_norm=0.0)}, "must be above 0"),
        ("finetune", {"dp": PrivacyConfig(clip_norm=1.0, noise_multiplier=0.0)}, "without noise"),
        ("finetune", {"dp": PrivacyConfig(clip_norm=1.0, delta=1.0)}, "below 1"),
        ("finetune", {"dp": PrivacyConfig(noise_multiplier=2.0)}, "count only with"),
    ],
)
def test_what_privacy_would_not_hold_with_is_refused_with_the_reason(
    section: str, change: dict, message: str
) -> None:
    pytest.importorskip("opacus")
    assert not list(privacy(PRIVATE))
    cfg = replace(PRIVATE, **{section: replace(getattr(PRIVATE, section), **change)})
    (found,) = privacy(cfg)
    assert message in found


def test_experts_are_refused_and_the_rules_are_asked() -> None:
    pytest.importorskip("opacus")
    cfg = replace(config("moe", clip_grad=0.0), finetune=PRIVATE.finetune)
    with pytest.raises(ConfigError, match="couples the sequences of a batch"):
        derive(cfg, world_size=1, tokenizer_vocab_size=VOCAB)


def test_epsilons_of_one_run_after_another_compose_by_the_accountant() -> None:
    """Gaussian mechanisms of one noise are one that is used as often as both; and less than the plain sum."""
    accountant = pytest.importorskip("opacus.accountants").RDPAccountant()
    assert composed([(2.0, 1), (2.0, 3)], 1e-5) == pytest.approx(epsilon(2.0, 4, 1e-5), rel=1e-12)
    for noise in (1.0, 3.0, 3.0):
        accountant.step(noise_multiplier=noise, sample_rate=1)
    both = composed([(1.0, 1), (3.0, 2)], 1e-5)
    assert both == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-12)
    assert epsilon(1.0, 1, 1e-5) < both < epsilon(1.0, 1, 1e-5) + epsilon(3.0, 2, 1e-5)
    assert composed([(1.0, 1), (3.0, 0)], 1e-5) == epsilon(1.0, 1, 1e-5)
    earlier = [{"epsilon": 5.0, "delta": 1e-6, "noise_multiplier": 1.0, "reads": 1}]
    dp = PrivacyConfig(clip_norm=1.0, noise_multiplier=3.0)
    found = spent(dp, reads=2, seq_len=8, salt="s", earlier=earlier)
    assert found["epsilon"] == epsilon(3.0, 2, 1e-5)
    assert found["with_earlier"] == {
        "epsilon": both, "delta": 1e-5, "epsilons": 5.0 + found["epsilon"], "deltas": pytest.approx(1.1e-5),
    }  # fmt: skip


def test_epsilon_is_not_said_to_cover_the_runs_before() -> None:
    """A second private run begins with weights for which another epsilon was spent."""
    found = {"epsilon": 4.7, "delta": 1e-5, "clip_norm": 1.0, "noise_multiplier": 1.0, "reads": 1, "unit": "a row"}  # fmt: skip
    card = privacy_facts(replace(record_of(1), privacy=found), None)["Differential privacy"]
    assert "of this run alone" in card and "epsilons and deltas add up" in card
    assert privacy_facts(record_of(1), None) == {}
    before = [{"epsilon": 3.2, "delta": 1e-6, "noise_multiplier": 1.0, "reads": 1}]
    both = {"epsilon": 6.1, "delta": 1e-5, "epsilons": 7.9, "deltas": 1.1e-5}
    record = replace(record_of(1), privacy=found | {"with_earlier": both}, spent_before=before)
    card = privacy_facts(record, None)["Differential privacy"]
    for number in ("epsilon 4.70 at", "epsilon 3.20 at delta 1e-06", "epsilon 6.10 at delta 1e-05", "7.90 at 1.1e-05"):  # fmt: skip
        assert number in card
    card = privacy_facts(replace(record_of(1), spent_before=before), None)["Differential privacy"]
    assert "epsilon 3.20" in card and "itself without privacy" in card
