"""What is offered to a run that does not fit: legal settings, the fastest first, each with its need."""

from __future__ import annotations

import re

from pipeline.planning.advice import advice, fitting_changes, lower_changes
from pipeline.planning.devices import load_device
from pipeline.planning.job import Job
from pipeline.planning.plan import Plan
from tests.support.planned_run import run_of

H100 = load_device("h100")


def test_changes_that_fit_are_legal_and_the_fastest_comes_first():
    cfg, shape = run_of("training.micro_batch_size=8")
    found = fitting_changes(cfg, shape, Plan(Job.of(cfg, shape), H100))
    rates = [layout.plan.tokens_per_s for layout in found]
    assert rates == sorted(rates, reverse=True) and all(layout.plan.fits for layout in found)
    assert {"training.recompute=full", "training.micro_batch_size=2"} <= {f.settings for f in found}
    for layout in found:
        _, changed = run_of("training.micro_batch_size=8", layout.settings)
        assert changed == layout.plan.job.shape
    lines = advice(cfg, shape, H100).splitlines()
    assert lines[0].startswith("estimated need of a device (stage 0): ")
    assert lines[1] == "single settings with which it fits h100, fastest first:"
    assert lines[2].startswith(f"  {found[0].settings}: ")


def test_where_nothing_fits_the_search_is_named():
    cfg, shape = run_of("model=gpt3-175b", "training.micro_batch_size=1")
    assert fitting_changes(cfg, shape, Plan(Job.of(cfg, shape), H100)) == []
    assert "search=true world_size=8 device=h100" in advice(cfg, shape, H100)


def test_who_was_out_of_memory_though_it_fits_is_offered_only_what_needs_less():
    """A pipeline was offered, one rank of which needs more than each of two does here."""
    words = ["model=gpt2-124m", "model.num_layers=4", "training.micro_batch_size=1"]
    cfg, shape = run_of(*words, world_size=2)
    now = Plan(Job.of(cfg, shape), H100)
    assert now.fits
    found = fitting_changes(cfg, shape, now)
    assert found and all(f.plan.worst.tensors < now.worst.tensors for f in found)
    assert "pipeline" not in " ".join(f.settings for f in found)


def test_an_unknown_device_is_told_what_saves_memory_least_need_first():
    cfg, shape = run_of("training.micro_batch_size=4")
    lines = advice(cfg, shape, None).splitlines()
    assert lines[1] == "settings that lower it:"
    needs = [float(re.findall(r": ([\d.]+) GiB", line)[0]) for line in lines[2:]]
    assert needs == sorted(needs) and len(needs) == 5


def test_a_mixture_is_told_of_the_ranks_that_may_share_its_experts():
    """Of eight experts on eight devices; a copy of each on every device is what does not fit."""
    words = ["model=mixtral-8x7b", "parallel.zero_stage=1"]
    cfg, shape = run_of(*words)
    found = {f.settings for f in lower_changes(cfg, shape, Plan(Job.of(cfg, shape), H100))}
    sizes = {f"parallel.expert_parallel_size={n}" for n in (2, 4, 8)}
    assert sizes <= found
    for size in sizes:
        assert run_of(*words, size)[1].sizes.expert > 1
    shared, more = run_of(*words, "parallel.expert_parallel_size=4")
    again = {f.settings for f in lower_changes(shared, more, Plan(Job.of(shared, more), H100))}
    assert not again & {"parallel.expert_parallel_size=2", "parallel.expert_parallel_size=4"}
    said = [line.partition("=")[0] for line in advice(cfg, shape, None).splitlines()[2:]]
    assert len(said) == len(set(said)) > 2, "one line of each setting"
    dense, of_dense = run_of()
    assert "expert_parallel" not in advice(dense, of_dense, None)


def test_a_pipeline_is_not_told_to_use_zero_2():
    cfg, shape = run_of("parallel.pipeline_parallel_size=2", "training.micro_batch_size=4")
    assert "zero_stage" not in advice(cfg, shape, None)


def test_one_fp32_rank_is_told_of_no_stage():
    """Stage 0 runs there whatever stage is set: no stage would change anything."""
    words = ["model=gpt2-124m", "training.precision=fp32", "training.micro_batch_size=1"]
    for stage in (1, 2, 3):
        cfg, shape = run_of(*words, f"parallel.zero_stage={stage}", world_size=1)
        assert "zero_stage" not in advice(cfg, shape, None)
