"""Creating and opening segments: nothing foreign is trusted, followed, or removed."""

import contextlib
import errno
import os
import re
import resource
import struct
import sys

import numpy as np
import posix_ipc
import pytest

from cobre_shm import layout
from cobre_shm.errors import AllocationFailed, InitializationFailed
from cobre_shm.segment import posix
from cobre_shm.segment.failure import failure
from cobre_shm.segment.join import join
from cobre_shm.segment.notes import say
from cobre_shm.segment.poison import read_poison
from cobre_shm.segment.posix import (
    DIRECTORY,
    create_object,
    how_to_enlarge,
    open_object,
    unlink_object,
)
from cobre_shm.segment.segment import Segment
from cobre_shm.segment.watch import WatchedSegment

SLOT = 4096


@pytest.fixture
def name():
    text = Segment.random_name()
    yield text
    (DIRECTORY / text[1:]).unlink(missing_ok=True)


@pytest.fixture
def segment(name):
    made = Segment.create(name, 3, slot_bytes=SLOT)
    yield made
    made.unlink()
    made.close()


def path_of(name):
    return DIRECTORY / name[1:]


def test_create_then_open_sees_the_same_group(segment, name):
    other = Segment.open(name)
    assert (other.size, other.slot_bytes, other.nbytes) == (3, SLOT, segment.nbytes)
    assert other.creator == segment.creator
    assert other.creator[0] == os.getpid()
    other.words.store(segment.control(2) + layout.ARRIVAL, 7)
    assert segment.words.load(segment.control(2) + layout.ARRIVAL) == 7
    other.close()


def test_create_makes_a_private_file_with_real_memory(segment, name):
    status = path_of(name).stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == segment.nbytes == layout.segment_bytes(3, SLOT)
    assert status.st_blocks * 512 >= segment.nbytes


def test_create_refuses_a_taken_name(segment, name):
    with pytest.raises(FileExistsError):
        Segment.create(name, 3, slot_bytes=SLOT)
    assert path_of(name).exists()


def test_open_returns_none_until_the_magic_word_is_there(segment, name):
    segment.words.store(0, 0)
    assert Segment.open(name) is None
    segment.words.store(0, layout.MAGIC)
    Segment.open(name).close()


def test_open_returns_none_when_absent():
    assert Segment.open("/cobre-test-no-such-segment") is None


@pytest.mark.parametrize("pages", [-1, 1])
def test_open_refuses_a_segment_that_was_cut_off_or_made_longer(segment, name, pages):
    os.truncate(path_of(name), segment.nbytes + pages * layout.PAGE_BYTES)
    with pytest.raises(InitializationFailed, match="segment bytes"):
        Segment.open(name)


def test_open_refuses_a_mode_that_lets_others_in(segment, name):
    path_of(name).chmod(0o666)
    with pytest.raises(InitializationFailed, match="mode 666"):
        Segment.open(name)


def test_open_refuses_a_symbolic_link_and_leaves_the_target(name, tmp_path):
    target = tmp_path / "precious"
    target.write_bytes(struct.pack("<Q", layout.MAGIC) + bytes(100_000))
    path_of(name).symlink_to(target)
    with pytest.raises(InitializationFailed):
        Segment.open(name)
    assert target.read_bytes() == struct.pack("<Q", layout.MAGIC) + bytes(100_000)


@pytest.mark.timeout(20)
def test_open_refuses_a_fifo_without_blocking(name):
    os.mkfifo(path_of(name), 0o600)
    with pytest.raises(InitializationFailed):
        Segment.open(name)


def test_open_refuses_a_second_hard_link(segment, name):
    link = path_of(name + "-link")
    os.link(path_of(name), link)
    try:
        with pytest.raises(InitializationFailed, match="2 hard links"):
            Segment.open(name)
    finally:
        link.unlink()


def test_open_refuses_a_directory_and_leaves_it(name):
    path_of(name).mkdir(0o700)
    try:
        with pytest.raises(InitializationFailed, match="cannot be opened"):
            Segment.open(name)
        with pytest.raises(FileExistsError):
            Segment.create(name, 1, slot_bytes=SLOT)
        assert path_of(name).is_dir()
    finally:
        path_of(name).rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_open_refuses_another_users_segment_and_leaves_it(segment, name):
    before = path_of(name).read_bytes()
    os.chown(path_of(name), 12345, 12345)
    with pytest.raises(InitializationFailed, match="belongs to uid 12345"):
        Segment.open(name)
    with pytest.raises(FileExistsError):
        Segment.create(name, 3, slot_bytes=SLOT)
    assert path_of(name).read_bytes() == before


def test_unlink_removes_only_the_segment_it_made(name):
    old = Segment.create(name, 1, slot_bytes=SLOT)
    path_of(name).unlink()
    new = Segment.create(name, 1, slot_bytes=SLOT)
    old.unlink()
    assert path_of(name).exists()
    new.unlink()
    assert not path_of(name).exists()
    new.unlink()
    old.close()
    new.close()


def test_create_object_beyond_memory_is_an_error_that_leaves_nothing(name):
    usage = os.statvfs(DIRECTORY)
    too_much = usage.f_blocks * usage.f_frsize + 1
    with pytest.raises(AllocationFailed) as caught:
        create_object(name, too_much)
    assert caught.value.requested_bytes == too_much
    assert caught.value.context["free_bytes"] < too_much
    assert re.search(r"--shm-size=[0-9]+[mg]$", caught.value.suggestion)
    assert not path_of(name).exists()


@pytest.mark.parametrize(
    ("nbytes", "size"),
    [
        (1, "1m"),
        (64 << 20, "64m"),
        ((64 << 20) + 1, "128m"),
        (1 << 30, "1g"),
        ((1 << 30) + 1, "2g"),
    ],
)
def test_how_to_enlarge_names_a_size_that_is_enough(nbytes, size):
    mount, container = how_to_enlarge(nbytes).split(", or for a container ")
    assert mount == f"mount -o remount,size={size} /dev/shm"
    assert container == f"--shm-size={size}"


def test_open_object_shares_memory_with_its_creator(name):
    fd = create_object(name, 8192)
    other, nbytes = open_object(name, 8192)
    assert nbytes == 8192
    os.pwrite(fd, b"shared", 100)
    assert os.pread(other, 6, 100) == b"shared"
    unlink_object(name, fd)
    os.close(fd)
    os.close(other)


def test_words_are_signed_64_bit_and_independent(segment):
    words = segment.words
    values = np.array([-1, 2**63 - 1, -(2**63), 0], dtype=np.int64)
    for i, value in enumerate(values):
        words.store(segment.control(i % 3) + layout.EXIT_CODE, int(value))
        assert words.load(segment.control(i % 3) + layout.EXIT_CODE) == value


@contextlib.contextmanager
def without_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("is_named", [True, False])
def test_process_without_descriptors_is_not_told_that_the_segment_is_at_fault(segment, is_named):
    """Nor to remove it: it is that of a group that lives."""
    made = segment if is_named else Segment.create_unnamed(3, slot_bytes=SLOT)
    with without_descriptors(), pytest.raises(InitializationFailed) as caught:
        join(made.name, 1, 3, SLOT, 1.0)
    assert caught.value.context["code"] == "SystemError"
    assert "the operating system refused" in caught.value.message
    assert "rm " not in str(caught.value)
    if not is_named:
        made.close()


@pytest.mark.parametrize(("code", "number"), [(None, None), (0, None), (3, None), (None, 9)])
def test_end_of_a_rank_is_told_as_it_was_seen(name, code, number):
    """An end that nobody saw is not one with code 0."""
    segment = WatchedSegment.create(name, 2, slot_bytes=SLOT, launched=True)
    try:
        segment.report_exit(1, exit_code=code, signal=number)
        error = failure(segment, read_poison(segment), 1.0)
        assert (error.rank, error.exit_code, error.signal) == (1, code, number)
    finally:
        segment.unlink()
        segment.close()


def test_name_is_not_taken_where_there_is_no_place_for_names(name, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise posix_ipc.ExistentialError

    monkeypatch.setattr(posix_ipc, "SharedMemory", refuse)
    with pytest.raises(FileExistsError):
        create_object(name, SLOT)
    monkeypatch.setattr(posix, "DIRECTORY", tmp_path / "absent")
    with pytest.raises(AllocationFailed, match="absent is mounted") as caught:
        create_object(name, SLOT)
    assert caught.value.context["mount"] == str(tmp_path / "absent")


class Full:
    """A stream whose disk is full."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        pass


@pytest.mark.parametrize("stream", [Full(), None])
def test_line_that_cannot_be_written_is_no_failure(monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    say("anything")
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")
