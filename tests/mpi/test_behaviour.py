"""What is this backend's alone, and the trainer over it."""

import os

import pytest

from tests.mpi.conftest import run
from tests.sddp.results import values


@pytest.mark.parametrize("program", ["behaviour", "road", "given_back", "inside"])
def test_checks_that_ranks_run(mpi, program):
    # What the program wants of errors in its own communicators is not for ours.
    done = mpi.program(4, program, MPI4PY_RC_ERRORS="fatal")
    assert (done.code, done.stdout.strip()) == (0, "done"), done.stderr


@pytest.mark.parametrize("levels", ["0", "1"])
def test_trainer_has_the_bits_of_one_process(mpi, alone, tmp_path, levels):
    done = mpi.run(
        3,
        *("-m", "cobre_shm.sddp", "--iterations", "2", "--output-dir", tmp_path),
        COBRE_MPI_HIERARCHICAL=levels,
    )
    assert done.code == 0, done.stderr
    assert "3 ranks, backend mpi" in done.stdout
    assert values(tmp_path) == alone
    assert len(alone) > 10


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_number_of_threads_is_not_taken_for_that_of_cores(mpi):
    """Ranks with cores of their own need not yield, which takes MPICH fifty times as long."""
    # In one piece: MPICH's launcher mixes what two ranks write in several.
    found = "str([name for name in os.environ if 'YIELD' in name])"
    code = f"import os; os.write(1, ({found} + chr(10)).encode())"
    done = mpi.run(2, "-c", code, OMP_NUM_THREADS="1")
    assert done.stdout.strip("\0\n ").splitlines() == ["[]", "[]"], done.stderr


def test_launcher_of_another_mpi_is_refused(all_of_them):
    """Otherwise each of n processes would be rank 0 of 1, and train the whole case."""
    mpich, openmpi = all_of_them("mpich"), all_of_them("openmpi")
    program = "import cobre_shm; cobre_shm.create_communicator()"
    done = run(
        [mpich.folder / "bin/mpiexec", "-n", "2", openmpi.folder / "bin/python", "-c", program]
    )
    assert done.code != 0
    assert "the mpiexec of MPICH or Intel MPI started 2 processes" in done.stderr
    assert "every process is rank 0 of 1 (Open MPI v5" in done.stderr
    assert f"Use the launcher of that library: {openmpi.folder}/bin/mpiexec -n 2" in done.stderr


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("mpi4py.rc.thread_level = 'single'", ""),
        ("mpi4py.rc.initialize = False", ""),
        (
            "mpi4py.rc.thread_level = 'single'; "
            "threading.Thread(target=threading.Event().wait, daemon=True).start()",
            "MPI was initialised for the thread level single, but this process has several threads",
        ),
        ("from mpi4py import MPI; MPI.Finalize()", "MPI was finalised in this process"),
    ],
)
def test_state_of_mpi_is_looked_at(all_of_them, before, said):
    code = (
        f"import mpi4py, threading; {before}\n"
        "import cobre_shm\n"
        "try: comm = cobre_shm.create_communicator('mpi'); comm.barrier(); print('works')\n"
        "except cobre_shm.InitializationFailed as error: print(error.message)"
    )
    done = run([all_of_them("mpich").folder / "bin/python", "-c", code])
    assert (said or "works") in done.stdout, done.stderr
