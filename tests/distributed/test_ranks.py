"""Who is who: ranks from torchrun, from srun, from nobody; tensor-parallel peers on one node."""

from __future__ import annotations

import os

import pytest

from pipeline.distributed.ranks import (
    Ranks,
    crowding_warning,
    export_to_environment,
    placement_warning,
    ranks_from_environment,
    withdraw_from_environment,
)
from pipeline.errors import ConfigError


def test_torchrun_and_srun_are_read_alike() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    srun = {
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURMD_NODENAME": "n2",
    }  # fmt: skip
    assert ranks_from_environment(srun) == Ranks(5, 8, 1, 4, "n2")
    assert ranks_from_environment({**torchrun, "SLURMD_NODENAME": "n2"}) == Ranks(5, 8, 1, 4, "n2")


def test_a_batch_script_without_srun_is_one_process() -> None:
    """Slurm sets PROCID and NTASKS in the batch script too; only a step has a step id."""
    ranks = ranks_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"})
    assert (ranks.global_rank, ranks.world_size) == (0, 1)


def test_a_half_set_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK=8 must be below WORLD_SIZE=8"):
        ranks_from_environment({"RANK": "8", "WORLD_SIZE": "8"})
    with pytest.raises(ConfigError, match="RANK=x"):
        ranks_from_environment({"RANK": "x", "WORLD_SIZE": "8"})


def test_libraries_are_told_the_number_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes LOCAL_RANK for it: rank 3 of a node that sees one device has number 0."""
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("RANK", "of the launcher")
    before = dict(os.environ)
    export_to_environment(Ranks(11, 16, 3, 8, "n2"), local_rank=0)
    told = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    withdraw_from_environment()
    assert told == ["11", "0", "8"]
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "world, local, tensor, warns",
    [(16, 8, 8, False), (16, 8, 2, False), (16, 8, 16, True), (12, 6, 4, True), (6, 6, 4, False)],
)
def test_tensor_parallel_across_nodes_warns(
    world: int, local: int, tensor: int, warns: bool
) -> None:
    warning = placement_warning(Ranks(0, world, 0, local, "n"), tensor_parallel_size=tensor)
    assert (warning is not None) == warns


def test_more_ranks_than_cores_are_named() -> None:
    """Two ranks on one core wait for each other in every layer; nothing said why it was slow."""
    assert crowding_warning(Ranks(0, 8, 0, 4, "n"), num_cores=4) is None
    warning = crowding_warning(Ranks(0, 4, 0, 4, "n"), num_cores=2)
    assert warning is not None and warning.startswith("4 ranks compute on 2 CPU cores")
    assert "launch/local.sh 2" in warning


@pytest.mark.parametrize(
    "tensor, context, warns",
    [(2, 4, False), (2, 8, False), (1, 3, True), (4, 3, True), (1, 16, False)],
)
def test_ranks_that_share_a_sequence_fill_nodes_or_a_part_of_one(
    tensor: int, context: int, warns: bool
) -> None:
    ranks = Ranks(0, 48, 0, 8, "n")
    warning = placement_warning(ranks, tensor_parallel_size=tensor, context_parallel_size=context)
    assert (warning is not None) == warns
