"""Memory without a name: what a descriptor must be to serve as a segment or a region."""

import fcntl
import os
import re

import numpy as np
import pytest

from cobre_shm import layout
from cobre_shm.errors import AllocationFailed, InitializationFailed
from cobre_shm.segment.attach import segments_open_in
from cobre_shm.segment.posix import UntrustedObject
from cobre_shm.segment.segment import Segment
from cobre_shm.segment.unnamed import Whereabouts, create_unnamed, open_unnamed
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator


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
