"""What is offered to a run that does not fit: legal settings, best first, each with what it would need."""

from pipeline.planning.advice import advice, estimate_of_run
from tests.support.planned_run import run_of


def test_advice_names_legal_settings_best_first():
    cfg, shape = run_of("training.micro_batch_size=4")
    lines = advice(cfg, shape).splitlines()
    assert lines[0].startswith("estimated need of a device: ")
    totals = [float(line.split(": ")[1].split()[0]) for line in lines[2:]]
    assert totals == sorted(totals) and totals[-1] < estimate_of_run(cfg, shape).total
    names = " ".join(lines)
    assert "training.recompute=full" in names and "training.micro_batch_size=1" in names
    for line in lines[2:]:
        setting = line.strip().split(": ")[0]
        _, changed = run_of("training.micro_batch_size=4", setting)
        assert changed.world_size == 8


def test_a_pipeline_is_not_told_to_use_zero_2():
    cfg, shape = run_of("parallel.pipeline_parallel_size=2", "training.micro_batch_size=4")
    assert "zero_stage" not in advice(cfg, shape)


def test_one_fp32_rank_is_told_of_no_stage():
    """Stage 0 runs there whatever stage is set: no stage would change anything."""
    words = ["model=gpt2-124m", "training.precision=fp32", "training.micro_batch_size=1"]
    for stage in (1, 2, 3):
        cfg, shape = run_of(*words, f"parallel.zero_stage={stage}", world_size=1)
        assert "zero_stage" not in advice(cfg, shape)
