"""A communicator that nobody closes, and one that is not made to the end."""

import gc
import os
import secrets
import threading
from pathlib import Path

import pytest

from cobre_shm import layout
from cobre_shm.errors import InvalidCommunicator, RankFailed
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from tests.support.ranks import results_of, run_ranks


def make_one():
    name = f"/cobre-test-{secrets.token_hex(8)}"
    return ShmCommunicator(ShmConfig(name=name, rank=0, size=1))


def held():
    maps = Path("/proc/self/maps").read_text().splitlines()
    segments = [line for line in maps if "/cobre-test-" in line]
    return len(list(Path("/proc/self/fd").iterdir())), segments


def drop_one():
    make_one()
    gc.collect()


def test_dropped_communicator_gives_back_what_it_holds():
    before = held()
    with pytest.warns(ResourceWarning, match="unclosed <ShmCommunicator rank 0 of 1>"):
        drop_one()
    assert held() == before


class Owner:
    """In a cycle, so that it and its communicator are collected in any order."""

    def __init__(self, comm, end):
        self.comm, self.end, self.me = comm, end, self

    def __del__(self):
        self.end(self.comm)


def barrier_in(comm):
    with comm:
        while True:
            yield comm.barrier()


@pytest.mark.filterwarnings("ignore:unclosed")
def test_communicator_that_is_used_while_it_is_collected_is_closed():
    """By a finalizer of what is dropped with it: a closed one says so, and unmapped memory ends."""
    errors = []

    def use(comm):
        try:
            comm.barrier()
        except InvalidCommunicator as error:
            errors.append(str(error))

    before = held()
    for end in (ShmCommunicator.close, use):
        # The older one is finalized first.
        Owner(make_one(), end)
        gc.collect()
    box = [barrier_in(make_one())]
    next(box[0])
    box.append(box)
    del box
    gc.collect()
    assert held() == before
    assert errors == ["The communicator is closed"]


@pytest.mark.filterwarnings("ignore:unclosed")
def test_child_drops_nothing_of_its_parent():
    comm = make_one()
    pid = os.fork()
    if pid == 0:
        del comm
        gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    state = comm._segment.control(0) + layout.STATE
    assert comm._segment.words.load(state) == layout.ATTACHED
    comm.close()


@pytest.mark.parametrize("step", ["let_sleep", "Membership._enlist"])
def test_rank_that_fails_behind_the_door_gives_its_place_back(monkeypatch, step):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"cobre_shm.shm.membership.{step}", interrupt)
    before = held()
    with pytest.raises(KeyboardInterrupt):
        make_one()
    gc.collect()
    assert held() == before


def drop_and_stay(comm, name, in_thread):
    """Rank 1 drops one, collected in this thread or another, and lives on."""
    config = ShmConfig(name=name, rank=comm.rank, size=2, timeout_secs=60.0)
    second = ShmCommunicator(config)
    if comm.rank == 0:
        with second, pytest.raises(RankFailed, match=r"Rank 1 .* closed its communicator"):
            second.barrier()
        comm.barrier()
        return
    del second
    with pytest.warns(ResourceWarning):
        collect(in_thread)
    comm.barrier()


def collect(in_thread):
    if in_thread:
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
    else:
        gc.collect()


@pytest.mark.parametrize("in_thread", [False, True])
def test_peers_of_a_dropped_communicator_learn_of_it(in_thread):
    name = f"/cobre-test-{secrets.token_hex(8)}"
    results_of(run_ranks(drop_and_stay, 2, "shm", name, in_thread))
