"""Under a real Slurm with two nodes that are made up: ``scripts/slurm``. As root, on Debian."""

import os
import subprocess

import pytest

from tests.mpi.conftest import PROGRAMS, ROOT, WATCHDOG_SECS, get_mpi
from tests.sddp.results import values

pytestmark = pytest.mark.slow
LEVELS = PROGRAMS / "levels.py"
NO_NAMESPACES, NO_PACKAGES = 77, 69
KEPT = ("PATH", "HOME", "LANG", "TMPDIR")
# Two ranks on each of the two nodes.
SRUN = ("srun", "--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1")


class Slurm:
    """Runs commands in it, with ``python`` that of an MPI."""

    def __init__(self, folder):
        self.folder = folder

    def run(self, name, *command, **variables):
        """Each in a Slurm of its own, which starts in a few seconds."""
        # No more than is needed: PMI-2 of Slurm 22.05 misreads some starts where there is much.
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        env = {**kept, "PYTHONPATH": str(ROOT), **variables}
        env["PATH"] = f"{get_mpi(name).folder / 'bin'}{os.pathsep}{env['PATH']}"
        if name == "mpich":
            # With all of UCX's transports the address of a rank is longer than what Slurm 22.05's
            # PMI-2 reads at once: some of the starts then end with "value not properly terminated".
            env |= {"UCX_TLS": "posix,tcp,self"}
        if name == "openmpi":
            # The only network in there is the loopback, which it leaves out.
            env |= {"OMPI_MCA_btl_tcp_if_include": "lo", "OMPI_MCA_osc": "^ucx"}
        return subprocess.run(
            [ROOT / "scripts/slurm", self.folder, *command],
            env=env,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WATCHDOG_SECS,
            check=False,
        )


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    found = Slurm(tmp_path_factory.mktemp("slurm"))
    done = found.run("mpich", "true")
    if done.returncode in (NO_NAMESPACES, NO_PACKAGES):
        pytest.skip(f"no Slurm: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize(
    ("name", "interface", "file"),
    [
        ("mpich", "pmi2", "slurm-hierarchical.sbatch"),
        ("impi", "pmi2", "slurm-hierarchical.sbatch"),
        ("mpich", "pmi2", "slurm-mpi.sbatch"),
        ("openmpi", "pmix", "slurm-mpi.sbatch"),
    ],
)
def test_launch_file_trains_with_the_bits_of_one_process(
    slurm, alone, tmp_path, name, interface, file
):
    said = tmp_path / "said"
    done = slurm.run(
        name,
        *("sbatch", "--wait", "--ntasks-per-node=2", f"--output={said}"),
        *(f"scripts/schedulers/{file}", "--iterations=2", f"--output-dir={tmp_path}"),
        SLURM_MPI_TYPE=interface,
    )
    assert done.returncode == 0, (done.stderr, said.read_text())
    assert "4 ranks, backend mpi" in said.read_text()
    assert values(tmp_path) == alone


@pytest.mark.parametrize(
    ("distribution", "levels"),
    [("block", "2 nodes"), ("cyclic", "flat: the ranks are not placed node by node")],
)
def test_levels_follow_the_nodes_and_the_order_of_ranks(slurm, distribution, levels):
    done = slurm.run(
        "mpich", *SRUN, "--mpi=pmi2", f"--distribution={distribution}", "python", LEVELS
    )
    assert done.returncode == 0, done.stderr
    expected = [f"rank {r} of 4, mpi, {levels}, 10000000000000000" for r in range(4)]
    assert sorted(done.stdout.splitlines()) == expected


def test_levels_that_the_order_forbids_are_an_error_when_demanded(slurm):
    done = slurm.run(
        "impi",
        *(*SRUN, "--mpi=pmi2", "--distribution=cyclic", "python", LEVELS),
        COBRE_MPI_HIERARCHICAL="1",
    )
    assert done.returncode != 0
    assert "the ranks are not placed node by node" in done.stderr
    assert "srun --distribution=block" in done.stderr


@pytest.mark.parametrize(("name", "right"), [("mpich", "pmi2"), ("openmpi", "pmix")])
def test_srun_without_the_interface_is_refused_and_names_it(slurm, name, right):
    done = slurm.run(name, "srun", "--mpi=none", "--ntasks=2", "python", LEVELS)
    assert done.returncode != 0
    assert "Slurm's srun started 2 processes" in done.stderr
    assert f"srun --mpi={right}" in done.stderr


def test_info_explains_the_choice_under_srun(slurm):
    command = ("srun", "--ntasks=1", "python", "-m", "cobre_shm.info")
    under_srun = slurm.run("mpich", *command, SLURM_MPI_TYPE="none")
    assert under_srun.returncode == 0, under_srun.stderr
    assert "auto would take mpi: detected, as SLURM_PROCID is set" in under_srun.stdout
    with_pmi = slurm.run("mpich", *command, SLURM_MPI_TYPE="pmi2")
    assert "auto would take mpi: detected, as PMI_RANK is set" in with_pmi.stdout


def test_uncaught_exception_ends_the_step(slurm):
    done = slurm.run(
        "mpich", *SRUN, "--mpi=pmi2", "python", PROGRAMS / "ending.py", "raise", "auto"
    )
    assert done.returncode != 0
    assert "LookupError: of rank 1" in done.stderr
