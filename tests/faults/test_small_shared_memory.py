"""Where /dev/shm is too small: the launcher does without it, and everybody else is told.

Programs run with a /dev/shm of 5 MB of their own, in a private mount namespace.
"""

import fcntl
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cobre_shm import layout
from cobre_shm.errors import AllocationFailed, InitializationFailed
from cobre_shm.segment.attach import segments_open_in
from cobre_shm.segment.posix import UntrustedObject
from cobre_shm.segment.segment import DEFAULT_SLOT_BYTES, Segment
from cobre_shm.segment.unnamed import Whereabouts, create_unnamed, open_unnamed
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator

ROOT = Path(__file__).parents[2]
SIZE = 4  # ranks, with slots of the usual size: more than fits
NEED = layout.segment_bytes(SIZE, DEFAULT_SLOT_BYTES)
FREE = 5 << 20
# Only ends tests that hang: no outcome depends on it.
WATCHDOG_SECS = 240

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
    process = small("-m", "cobre_shm.spawn", "-n", SIZE, "-c", program, *args)
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
    assert all(line.startswith("/cobre-") for line in out.splitlines())


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
import os, sys, time
import cobre_shm
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


# A descriptor in detail, in this process


@pytest.fixture
def handed():
    """A segment for one rank as a launcher makes it."""
    segment = Segment.create_unnamed(1, slot_bytes=4096, launched=True)
    yield segment
    segment.close()


def join(name):
    return ShmCommunicator(ShmConfig(name=name, rank=0, size=1, timeout_secs=10))


def test_inherited_descriptor_serves_and_is_not_passed_on(handed):
    os.set_inheritable(handed.descriptor, True)
    with join(handed.name) as comm:
        assert comm.allreduce(np.arange(5000.0)).tolist() == np.arange(5000.0).tolist()
        assert not os.get_inheritable(handed.descriptor)
    os.fstat(handed.descriptor)  # it is the caller's: not closed


def test_nobody_can_truncate_the_segment(handed):
    for nbytes in (0, handed.nbytes - 4096, handed.nbytes + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(handed.descriptor, nbytes)
    assert os.fstat(handed.descriptor).st_size == handed.nbytes
    assert os.fstat(handed.descriptor).st_blocks * 512 >= handed.nbytes


def memfd(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, mode=0o600, content=b""):
    fd = os.memfd_create("cobre-test", os.MFD_ALLOW_SEALING)
    os.fchmod(fd, mode)
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, 1 << 16)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def not_open():
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    return fd


def read_only():
    fd = memfd()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (not_open, "Bad file descriptor"),
        (lambda: os.open(os.devnull, os.O_RDWR), "not a regular file"),
        (lambda: os.open(__file__, os.O_RDONLY), "mode|no memfd"),
        (lambda: memfd(seals=fcntl.F_SEAL_GROW), "can be truncated"),
        (lambda: memfd(seals=fcntl.F_SEAL_SHRINK), "can be truncated"),
        (lambda: memfd(mode=0o777), "mode 777"),
        (read_only, "not open for reading and writing"),
        (memfd, "never made ready"),
        (lambda: memfd(content=b"precious"), "magic word"),
        (lambda: memfd(content=layout.MAGIC.to_bytes(8, "little")), "version"),
    ],
)
def test_bad_descriptor_is_one_error_that_quotes_it_and_stays_as_it_was(make, why):
    fd = make()
    is_open = make is not not_open
    try:
        before = os.pread(fd, 64, 0) if is_open else b""
        with pytest.raises(InitializationFailed, match=why) as caught:
            join(f"fd:{fd}")
        assert f"fd:{fd} " in caught.value.message
        assert caught.value.context["code"] == "IncompatibleSegment"
        assert f"rm /dev/shm/fd:{fd}" not in str(caught.value)
        if is_open:
            assert os.pread(fd, 64, 0) == before
    finally:
        if is_open:
            os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_descriptor_of_another_users_memory_is_refused(handed):
    os.fchown(handed.descriptor, 12345, 12345)
    with pytest.raises(InitializationFailed, match="belongs to uid 12345"):
        join(handed.name)


def test_descriptor_of_a_dead_run_is_refused(handed):
    handed.words.store(layout.HEADER_CREATOR_START, 1)
    with pytest.raises(InitializationFailed, match="dead run"):
        join(handed.name)


@pytest.mark.parametrize("text", ["fd:", "fd:x", "fd:-1", "fd:7 ", "fd:" + "9" * 12])
def test_name_that_is_no_descriptor_is_refused_and_quoted(text):
    with pytest.raises(InitializationFailed, match=re.escape(repr(text))) as caught:
        ShmConfig(name=text, rank=0, size=1)
    assert "fd:N" in caught.value.message


@pytest.mark.parametrize(
    ("text", "name"), [("fd:7", "fd:7"), ("fd:007", "fd:7"), ("/fd:7", "/fd:7")]
)
def test_name_with_a_slash_is_a_posix_name(text, name):
    config = ShmConfig(name=text, rank=0, size=1)
    assert config.name == name
    assert ShmConfig(name=config.name, rank=0, size=1) == config


def test_memory_beyond_that_of_the_machine_is_an_error_that_leaves_nothing():
    with pytest.raises(AllocationFailed) as caught:
        create_unnamed("cobre-test", 1 << 50)
    assert caught.value.requested_bytes == 1 << 50
    assert caught.value.context["free_bytes"] < 1 << 50


def test_memory_of_another_process_is_opened_if_it_is_what_was_announced():
    fd = create_unnamed("cobre-test", 8192)
    other = create_unnamed("cobre-test", 8192)
    try:
        where = Whereabouts.of(fd)
        opened = open_unnamed(where, 8192)
        os.pwrite(opened, b"shared", 100)
        os.close(opened)
        assert os.pread(fd, 6, 100) == b"shared"
        os.dup2(other, fd)
        with pytest.raises(UntrustedObject, match="other memory"):
            open_unnamed(where, 8192)
        with pytest.raises(FileNotFoundError):
            open_unnamed(where, 8193)
    finally:
        os.close(fd)
        os.close(other)


def test_attaching_from_outside_tells_segments_from_other_memory(handed):
    region = create_unnamed("cobre-test-region", 1 << 16)
    try:
        found = segments_open_in([os.getpid()])
        mine = [each for each in found if each.creator[0] == os.getpid()]
        assert [(each.size, each.nbytes) for each in mine] == [(1, handed.nbytes)]
        for each in found:
            each.close()
    finally:
        os.close(region)
