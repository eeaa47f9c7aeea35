"""The launch files of PBS, with its variables set as it sets them; PBS itself is not there."""

import os

import pytest

from tests.mpi.conftest import ROOT, get_mpi, run
from tests.sddp.results import values

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("file", ["pbs-mpi.sh", "pbs-hierarchical.sh"])
def test_launch_file_trains_with_the_bits_of_one_process(alone, tmp_path, file):
    """MPICH's mpiexec reads PBS's list of hosts, which has one line for each rank."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost\n" * 3)
    done = run(
        ["bash", ROOT / "scripts/schedulers" / file, "--iterations=2", f"--output-dir={tmp_path}"],
        PATH=f"{get_mpi('mpich').folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        PBS_ENVIRONMENT="PBS_BATCH",
        PBS_NODEFILE=str(hosts),
        PBS_O_WORKDIR=str(ROOT),
    )
    assert done.code == 0, done.stderr
    assert "3 ranks, backend mpi" in done.stdout
    assert values(tmp_path) == alone
