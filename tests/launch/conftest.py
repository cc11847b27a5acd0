"""The cluster that the tests of a file share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.preloaded import Preloaded
from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_lab import Lab


@pytest.fixture(scope="module")
def one_lab(tmp_path_factory: pytest.TempPathFactory, server: Preloaded) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(folder / "box", num_nodes=3, kill_wait_s=20, grace_s=30) as cluster:
        yield Lab(cluster, folder, server)


@pytest.fixture
def lab(one_lab: Lab) -> Lab:
    """A cluster on which nothing runs, all nodes up."""
    one_lab.cluster.reset()
    one_lab.python = one_lab.plain_python
    return one_lab


@pytest.fixture
def preloaded(lab: Lab) -> None:
    """The ranks of its jobs find the libraries loaded."""
    lab.preload()
