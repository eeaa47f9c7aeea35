"""Where /dev/shm is too small: the launcher does without it, and everybody else is told.

Programs run with a /dev/shm of 5 MB of their own, in a private mount namespace.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cobre_shm import layout

ROOT = Path(__file__).parents[2]
SIZE = 4  # ranks, with slots of the usual size: more than fits
NEED = layout.segment_bytes(SIZE, layout.DEFAULT_SLOT_BYTES)
FREE = 5 << 20
# Only ends tests that hang: no outcome depends on it.
WATCHDOG_SECS = 720

MOUNT = 'mount -t tmpfs -o size=5m tmpfs /dev/shm && exec "$@"'


@functools.cache
def with_small_memory():
    """What to put before a command, or None where the system does not permit it."""
    if shutil.which("unshare") is None:
        return None
    for options in (["-m"], ["-rm"]):
        prefix = ["unshare", *options, "sh", "-c", MOUNT, "sh"]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return None


@pytest.fixture
def small():
    """Start Python with a /dev/shm of 5 MB; what is left at the end is killed."""
    prefix = with_small_memory()
    if prefix is None:
        pytest.skip("the system does not permit a mount namespace of our own")
    started = []

    def start(*arguments, env=None):
        process = subprocess.Popen(
            [*prefix, sys.executable, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def launched(small, program, *args):
    process = small("-m", "cobre_shm.spawn", "-n", SIZE, "--grace", 60, "-c", program, *args)
    out, err = process.communicate(timeout=WATCHDOG_SECS)
    return process.returncode, out, err


NO_MEMFD = """
import os, sys
from cobre_shm.spawn.__main__ import main
def refuse(*_):
    raise PermissionError(1, "Operation not permitted")
os.memfd_create = refuse
sys.exit(main(["-n", "4", "-c", "print('never')"]))
"""


def test_launcher_that_may_not_do_without_the_mount_says_how_to_enlarge_it(small):
    process = small("-c", NO_MEMFD)
    out, err = process.communicate(timeout=WATCHDOG_SECS)
    assert (process.returncode, out) == (4, "")
    assert f"{NEED} bytes" in err
    assert f"/dev/shm has {FREE} bytes free" in err
    assert "--shm-size=16m" in err
    assert "instead" not in err


REDUCE = """
import os, sys
import numpy as np
import cobre_shm
elements = int(sys.argv[1])
with cobre_shm.create_communicator() as comm:
    values = np.full(elements, float(comm.rank + 1))
    values[-1] = 2.0**comm.rank
    comm.allreduce(values, values)
    assert (values[:-1] == comm.size * (comm.size + 1) / 2).all(), values
    assert values[-1] == 2.0**comm.size - 1, values[-1]
    print(os.environ["COBRE_SHM_NAME"].split(":")[0], os.listdir("/dev/shm"), flush=True)
"""


@pytest.mark.parametrize(
    "nbytes", [64 << 20, pytest.param(1 << 30, marks=pytest.mark.slow)], ids=["64MiB", "1GiB"]
)
def test_launched_group_reduces_far_more_than_the_mount_holds(small, nbytes):
    code, out, err = launched(small, REDUCE, nbytes // 8)
    assert code == 0, err
    assert out == "fd []\n" * SIZE
    notice = f"cobre_shm.spawn: /dev/shm has {FREE} bytes free, {NEED} are needed: "
    assert err == f"{notice}using memory without a name (memfd) instead\n"


def test_group_that_fits_says_nothing_and_uses_the_mount(small):
    process = small("-m", "cobre_shm.spawn", "-n", 2, "-c", REDUCE, 1000)
    out, err = process.communicate(timeout=WATCHDOG_SECS)
    assert (process.returncode, err) == (0, "")
    assert [line.startswith("/cobre-") for line in out.splitlines()] == [True] * 2


SHARE = """
import cobre_shm
from cobre_shm.errors import AllocationFailed
with cobre_shm.create_communicator() as comm:
    region = comm.create_shared_region(1_000_000)
    region.array[comm.rank] = comm.rank
    region.fence()
    assert region.array[: comm.size].tolist() == list(range(comm.size))
    region.freeze()
    assert region.array.flags.writeable == (comm.rank == 0)
    try:
        comm.create_shared_region(1 << 45)
    except AllocationFailed as error:
        print(error, flush=True)
    comm.barrier()
    region.close()
"""


@pytest.mark.parametrize("size", [2, SIZE])  # the segment has room, or has none
def test_regions_do_without_the_mount_and_fail_on_all_ranks_or_none(small, size):
    process = small("-m", "cobre_shm.spawn", "-n", size, "-c", SHARE)
    out, err = process.communicate(timeout=WATCHDOG_SECS)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert len(lines) == size
    assert all(f"Allocation of {8 << 45} bytes" in line for line in lines), lines
    # Who tried it knows how much there is; the others, that somebody was refused.
    assert sum("bytes of memory are available" in line for line in lines) == 1
    assert sum("refused on another rank" in line for line in lines) == size - 1


POPULATE = """
import errno, os
from cobre_shm.segment.libc import map_shared
from cobre_shm.segment.pages import populate
fd = os.open("/dev/shm/cobre-test-sparse", os.O_RDWR | os.O_CREAT, 0o600)
os.unlink("/dev/shm/cobre-test-sparse")
os.ftruncate(fd, 8 << 20)
address = map_shared(fd, 8 << 20)
populate(fd, 0, address, 1 << 20)
try:
    populate(fd, 0, address, 8 << 20)
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def test_memory_that_the_mount_has_not_is_an_error_and_no_signal(small):
    process = small("-c", POPULATE)
    out, err = process.communicate(timeout=WATCHDOG_SECS)
    assert (process.returncode, out) == (0, "ENOSPC\n"), err


ARRAYS = """
import cobre_shm
from cobre_shm.errors import AllocationFailed
with cobre_shm.create_communicator() as comm:
    array = comm.full(1_000_000, comm.rank + 1.0)
    try:
        comm.empty(1 << 35)
    except AllocationFailed as error:
        print(error, flush=True)
    total = comm.allreduce(array)
    assert set(total) == {comm.size * (comm.size + 1) / 2}, total
assert set(array) == {comm.rank + 1.0}
"""


@pytest.mark.parametrize("size", [2, SIZE])
def test_shared_arrays_do_without_the_mount_and_fail_on_all_ranks_or_none(small, size):
    process = small("-m", "cobre_shm.spawn", "-n", size, "-c", ARRAYS)
    out, err = process.communicate(timeout=WATCHDOG_SECS)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert len(lines) == size
    assert all(f"Allocation of {8 << 35} bytes" in line for line in lines), lines


SPLIT = """
import os
import numpy as np
import cobre_shm
def memfds():
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum("memfd:" in os.readlink(link) for link in links if os.path.lexists(link))
with cobre_shm.create_communicator() as comm:
    before = memfds()
    with comm.split_local() as group, group.split_local() as again:
        assert (again.rank, again.size) == (comm.rank, comm.size)
        region = again.create_shared_region(500_000)
        region.array[comm.rank] = 1
        region.fence()
        print(again.allreduce(np.ones(1))[0], region.array.sum(), end=" ")
        region.close()
    print(comm.allreduce(np.ones(1))[0], memfds() - before, flush=True)
"""


def test_groups_made_from_a_group_do_without_the_mount(small):
    code, out, err = launched(small, SPLIT)
    assert code == 0, err
    assert out == f"{SIZE}.0 {SIZE}.0 {SIZE}.0 0\n" * SIZE


CHILDREN = """
import subprocess, sys
import cobre_shm
look = "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') \
if os.path.lexists(f'/proc/self/fd/{n}')])"
with cobre_shm.create_communicator() as comm:
    comm.barrier()
    seen = subprocess.run([sys.executable, "-c", look], close_fds=False, capture_output=True)
    print("memfd" in seen.stdout.decode(), seen.returncode, flush=True)
"""


def test_programs_that_a_rank_starts_do_not_inherit_the_segment(small):
    code, out, err = launched(small, CHILDREN)
    assert code == 0, err
    assert out == "False 0\n" * SIZE


TWICE = """
import cobre_shm
from cobre_shm.errors import InitializationFailed
with cobre_shm.create_communicator() as comm:
    comm.barrier()
    try:
        cobre_shm.create_communicator()
    except InitializationFailed as error:
        print(error.context["code"], flush=True)
    comm.barrier()
"""


def test_second_communicator_of_a_rank_is_refused_and_the_first_stays_usable(small):
    code, out, err = launched(small, TWICE)
    assert (code, out) == (0, "NameInUse\n" * SIZE), err


DIE = """
import os, signal
import cobre_shm
# A survivor may need longer to speak than the launcher waits before it asks.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with cobre_shm.create_communicator() as comm:
    print(f"rank {comm.rank} is {os.getpid()}", flush=True)
    comm.barrier()
    if comm.rank == 2:
        os.kill(os.getpid(), 9)
    comm.barrier()
"""


def test_death_is_reported_as_in_any_group(small):
    code, out, err = launched(small, DIE)
    assert code == 128 + signal.SIGKILL
    pid = re.search(r"rank 2 is (\d+)", out)[1]
    assert err.count(f"RankFailed: Rank 2 (pid {pid}) was killed by SIGKILL") == SIZE - 1, err


WAIT = """
import sys, time
from pathlib import Path
import cobre_shm
with cobre_shm.create_communicator() as comm:
    region = comm.create_shared_region(1_000_000)
    print("there", flush=True)
    while not Path(sys.argv[1]).exists():
        time.sleep(0.01)
    comm.barrier()
"""


def test_monitor_finds_the_group_by_launcher_and_by_name(small, tmp_path):
    process = small("-m", "cobre_shm.spawn", "-n", SIZE, "-c", WAIT, tmp_path / "go")
    for _ in range(SIZE):
        assert process.stdout.readline() == "there\n", process.communicate()

    def facts(group):
        command = [sys.executable, "-m", "cobre_shm.top", group, "--once"]
        done = subprocess.run(
            [*command, "--output-format", "json"],
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    seen = facts(str(process.pid))
    assert (seen["size"], seen["launcher"], seen["has_joined"]) == (SIZE, process.pid, True)
    assert re.fullmatch(r"/cobre-[0-9a-f]{24}", seen["name"])
    assert [rank["rank"] for rank in seen["ranks"] if rank["pid"]] == list(range(SIZE))
    by_name = facts(seen["name"])
    assert [rank["pid"] for rank in by_name["ranks"]] == [rank["pid"] for rank in seen["ranks"]]
    (tmp_path / "go").touch()
    process.communicate(timeout=WATCHDOG_SECS)
    assert process.returncode == 0


ALONE = """
import json
import cobre_shm
from cobre_shm.errors import AllocationFailed
try:
    cobre_shm.create_communicator()
except AllocationFailed as error:
    print(json.dumps(error.to_dict()))
"""


def test_without_the_launcher_the_error_gives_need_free_mount_and_flag(small):
    variables = {"NAME": "/cobre-small", "RANK": "0", "SIZE": str(SIZE)}
    env = {f"COBRE_SHM_{name}": value for name, value in variables.items()}
    process = small("-c", ALONE, env={**env, "COBRE_COMM_BACKEND": "shm"})
    out, err = process.communicate(timeout=WATCHDOG_SECS)
    assert process.returncode == 0, err
    error = json.loads(out)
    context = error["context"]
    assert context["requested_bytes"] == NEED
    assert (context["free_bytes"], context["mount"]) == (FREE, "/dev/shm")
    text = json.dumps(error)
    assert f"/dev/shm has {FREE} bytes free" in text
    assert "--shm-size=16m" in text
    assert "mount -o remount,size=16m /dev/shm" in text


SPLIT_WITHOUT_ROOM = """
import os
from pathlib import Path
from cobre_shm.errors import AllocationFailed
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator

rank = 0 if os.fork() else 1
filler = Path("/dev/shm/filler")
config = ShmConfig(name="/small", rank=rank, size=2, timeout_secs=60, slot_bytes=1 << 16)
with ShmCommunicator(config) as comm:
    if rank == 0:
        usage = os.statvfs("/dev/shm")
        filler.write_bytes(bytes(usage.f_bavail * usage.f_frsize - 4096))
    try:
        comm.split_local()
    except AllocationFailed as error:
        said = f"{rank} {error.requested_bytes} {error.context.get('mount')}\\n"
    comm.barrier()
    if rank == 0:
        filler.unlink()
    comm.barrier()
    with comm.split_local() as group:
        group.barrier()
    comm.barrier()
# One write each: two processes share the pipe.
os.write(1, f"{said}{rank} {os.listdir('/dev/shm')}\\n".encode())
if rank == 0:
    os.wait()
"""


def test_group_that_cannot_be_split_by_name_for_want_of_room_says_so_on_all_ranks(small):
    process = small("-c", SPLIT_WITHOUT_ROOM)
    out, err = process.communicate(timeout=WATCHDOG_SECS)
    assert (process.returncode, err) == (0, "")
    need = layout.segment_bytes(2, 1 << 16)
    told = [f"0 {need} /dev/shm", "0 []", f"1 {need} None", "1 []"]
    assert sorted(out.splitlines()) == told
