"""How ranks come into being: forked from a zygote, or as fresh interpreters.

The group calls ``begin`` and turns its loop until ``is_done``; from then on all ranks are children
of ours and run. ``cancel`` ends what is left of a start that was given up.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from cobre_shm.spawn.errors import ProgramNotRunnable
from cobre_shm.spawn.forking import Order, Zygote
from cobre_shm.spawn.job import Job
from cobre_shm.spawn.output import encoded
from cobre_shm.spawn.parent import die_with
from cobre_shm.spawn.rank import Pipes, Rank
from cobre_shm.spawn.stacks import DUMP_SIGNAL
from cobre_shm.spawn.terminal import TerminalInput, is_controlled_by_terminal

if TYPE_CHECKING:
    from cobre_shm.spawn.group import Group

__all__ = ["FreshStart", "Start", "ZygoteStart"]


class Start(Protocol):
    """Brings the ranks of one group into being.

    Attributes:
        method: ``zygote`` or ``spawn``, as ``--start-method`` says it.
        is_done: Whether all of them run.
    """

    method: str
    is_done: bool

    def begin(self, group: Group) -> None:
        """Start the ranks, or begin to."""

    def cancel(self) -> None:
        """End what is left of a start that was given up; idempotent."""


class FreshStart:
    """Starts every rank as an interpreter, or a command, of its own."""

    method: str = "spawn"
    is_done: bool = False

    def begin(self, group: Group) -> None:
        """Start all ranks, one after the other."""
        for number in group.job.ranks:
            rank = self._start(group, number)
            group.add(rank)
            group.watch(rank)
        self.is_done = True

    def cancel(self) -> None:
        """There is nothing beside the ranks."""

    def _start(self, group: Group, number: int) -> Rank:
        job, meeting = group.job, group.meeting
        die_with_us = die_with(os.getpid())
        cpus = job.cpus_of(number)
        mask = group.inbox.block()

        def before_exec() -> None:
            die_with_us()
            if cpus:
                os.sched_setaffinity(0, cpus)
            resource.setrlimit(resource.RLIMIT_NOFILE, group.descriptor_limits)
            group.inbox.reset_in_child(mask)

        try:
            with _refusal_of(number, job), _standard_input(group, number) as stdin:
                pipes = Pipes.make()
                try:
                    process = subprocess.Popen(
                        job.program.command,
                        stdin=stdin,
                        stdout=pipes.write_ends[0],
                        stderr=pipes.write_ends[1],
                        env={**job.environment, **meeting.variables(number)},
                        pass_fds=meeting.descriptors(number),
                        process_group=0,
                        preexec_fn=before_exec,
                    )
                except BaseException:
                    pipes.close_read_ends()
                    raise
                finally:
                    pipes.close_write_ends()
        finally:
            group.inbox.unblock(mask)
        # We reap it ourselves; the object shall not say that nobody did.
        process.returncode = 0
        _take_output(group, number, pipes)
        rank = Rank(number, process.pid)
        if job.program.is_python and job.environment.get("PYTHONFAULTHANDLER"):
            rank.dump_signal = signal.SIGABRT
        return rank


# Orders that the zygote has not answered: while it forks one rank, the next is being ordered.
_MOST_ORDERS = 2
_LOOK_SECS = 1.0


class ZygoteStart:
    """Has ranks forked from a zygote; from fresh interpreters where it is not fit for that.

    Args:
        zygote: Started already, so that it imports while we do other things.
    """

    method: str = "zygote"

    def __init__(self, zygote: Zygote) -> None:
        self.is_done: bool = False
        self._zygote = zygote
        self._ordered = 0
        self._is_listening = False

    def begin(self, group: Group) -> None:
        """Listen to the zygote."""
        self._group = group
        group.output.add_other(self._zygote.take_pipes())
        group.loop.selector.register(self._zygote, selectors.EVENT_READ, self._on_message)
        self._is_listening = True
        self._look()

    def cancel(self) -> None:
        """Kill the zygote, and ranks that it has not handed over."""
        self._stop_listening()
        self._zygote.kill()

    def _stop_listening(self) -> None:
        if self._is_listening:
            self._group.loop.selector.unregister(self._zygote)
            self._is_listening = False

    def _look(self) -> None:
        """See its end even where a process that an import has started holds its socket open."""
        if not self._is_listening:
            return
        if self._zygote.has_ended():
            self._on_end()
        else:
            self._group.loop.call_after(_LOOK_SECS, self._look)

    def _on_message(self) -> None:
        group = self._group
        message = self._zygote.receive()
        if message is None:
            self._on_end()
        elif "compiling" in message:
            group.output.say(
                b"cobre_shm.spawn: Compiling the kernels; later runs load them from the cache\n"
            )
        elif "unfit" in message:
            self._start_fresh(message["unfit"])
        elif "error" in message:
            with _refusal_of(self._expected(), group.job):
                raise OSError(message["error"])
        else:
            if "pid" in message:
                rank = Rank(self._expected(), message["pid"])
                rank.dump_signal = DUMP_SIGNAL
                group.add(rank)
            if len(group.ranks) == group.job.size:
                self._finish()
            while self._ordered < min(group.job.size, len(group.ranks) + _MOST_ORDERS):
                self._order(group.job.ranks[self._ordered])
                self._ordered += 1

    def _expected(self) -> int:
        """The rank that the zygote tells of next: it answers in the order of its orders."""
        return self._group.job.ranks[len(self._group.ranks)]

    def _order(self, number: int) -> None:
        group, job = self._group, self._group.job
        meeting = group.meeting
        with _refusal_of(number, job), _standard_input(group, number) as stdin:
            pipes = Pipes.make()
            try:
                self._zygote.order(
                    Order(
                        environment=meeting.variables(number),
                        descriptors=(stdin, *pipes.write_ends),
                        cpus=job.cpus_of(number),
                        reads=number == 0 or job.program.source is not None,
                        dumps=DUMP_SIGNAL,
                        inherited=meeting.descriptors(number),
                    )
                )
            except BaseException:
                pipes.close_read_ends()
                raise
            finally:
                pipes.close_write_ends()
        _take_output(group, number, pipes)

    def _finish(self) -> None:
        group = self._group
        self._stop_listening()
        self._zygote.release(len(group.ranks))
        for rank in group.ranks:
            group.watch(rank)
        self.is_done = True

    def _on_end(self) -> None:
        """The zygote has ended by itself: a library that it imports has crashed, or memory."""
        group = self._group
        if group.ranks:
            with _refusal_of(group.ranks[-1].number, group.job):
                raise OSError("the zygote has died")
        self._start_fresh("the zygote has died")

    def _start_fresh(self, why: str) -> None:
        group = self._group
        self._stop_listening()
        self._zygote.kill()
        line = f"cobre_shm.spawn: Ranks are started one by one: {why}\n"
        group.output.say(encoded(line))
        FreshStart().begin(group)
        self.is_done = True


def _take_output(group: Group, number: int, pipes: Pipes) -> None:
    is_typed_to = number == 0 and group.terminal is not None
    group.output.add(number, pipes.read_ends, is_typed_to=is_typed_to)


@contextlib.contextmanager
def _refusal_of(number: int, job: Job) -> Iterator[None]:
    size = job.group_size
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        raise ProgramNotRunnable(
            f"Rank {number} of {size} cannot be started: {error}",
            context={"rank": number, "size": size},
        ) from error


@contextlib.contextmanager
def _standard_input(group: Group, number: int) -> Iterator[int]:
    """A descriptor for a rank's standard input, closed here at the end unless it is our own."""
    source = group.job.program.source
    if source is not None:
        descriptor = _file_of(source)
    elif number > 0:
        descriptor = os.open(os.devnull, os.O_RDONLY)
    elif is_controlled_by_terminal():
        descriptor, typed_end = os.pipe()
        group.terminal = TerminalInput(typed_end, group.loop.selector)
    else:
        yield 0
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _file_of(source: bytes) -> int:
    """Return a descriptor that reads ``source`` from its beginning, by itself."""
    descriptor = os.memfd_create("program")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(source)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
