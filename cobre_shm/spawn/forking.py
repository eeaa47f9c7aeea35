"""The launcher's side of the zygote: start it, order ranks, become their parent.

The protocol is argued in ``zygote``, which is the other side.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cobre_shm.spawn import boot
from cobre_shm.spawn.errors import ProgramNotRunnable
from cobre_shm.spawn.job import Job
from cobre_shm.spawn.parent import die_with
from cobre_shm.spawn.program import Program, interpreter
from cobre_shm.spawn.rank import Pipes, wait_for_killed
from cobre_shm.spawn.zygote import ORDER_BYTES

__all__ = ["Order", "Zygote", "can_adopt", "start_zygote"]

_PR_SET_CHILD_SUBREAPER = 36
# Leaves no name in ``__main__``.
_BOOT = (
    "(lambda path: exec(compile(__import__('pathlib').Path(path).read_bytes(), path, 'exec'),"
    f" {{'__name__': {boot.MARK!r}}}))(__import__('sys').argv[1])"
)


@dataclass(frozen=True)
class Order:
    """One rank that the zygote is to fork.

    Attributes:
        environment: What this rank has beside the zygote's environment.
        descriptors: Its standard input, output and error.
        cpus: On which it may run; empty: no change.
        reads: Whether its standard input may be anything else than the null device.
        dumps: Signal on which it shows its Python stacks, or 0.
        inherited: Descriptors that it gets, maybe under other numbers: where its environment
            says ``fd:N`` for one of them, it finds the new number.
    """

    environment: Mapping[str, str]
    descriptors: tuple[int, int, int]
    cpus: Sequence[int]
    reads: bool
    dumps: int
    inherited: Sequence[int]


class Zygote:
    """A zygote that was started.

    Args:
        program: What its ranks will run.
        environment: Of the zygote, and of ranks.
        preload: What it imports beside numpy and the kernels: names of modules with commas, or
            ``auto``.

    Raises:
        ProgramNotRunnable: The system refuses.
    """

    def __init__(self, program: Program, environment: Mapping[str, str], preload: str) -> None:
        self._words = [preload, *program.words]
        self._is_over = False
        self._gate: tuple[int, int] | None = None
        with contextlib.ExitStack() as undo:
            try:
                self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                undo.callback(self._link.close)
                with theirs:
                    pipes = Pipes.make()
                    undo.callback(pipes.close_read_ends)
                    self._process = self._execute(environment, pipes, theirs.fileno())
            except (OSError, subprocess.SubprocessError) as error:
                raise ProgramNotRunnable(f"The zygote cannot be started: {error}") from error
            undo.pop_all()
        self._pipes: Pipes | None = pipes
        _be_subreaper(True)

    def _execute(
        self, environment: Mapping[str, str], pipes: Pipes, link: int
    ) -> subprocess.Popen[bytes]:
        words = ["-c", _BOOT, boot.__file__, str(link), *self._words]
        try:
            return subprocess.Popen(
                [*interpreter(), *words],
                stdin=subprocess.DEVNULL,
                stdout=pipes.write_ends[0],
                stderr=pipes.write_ends[1],
                env=environment,
                pass_fds=[link],
                process_group=0,
                preexec_fn=die_with(os.getpid()),
            )
        finally:
            pipes.close_write_ends()

    def take_pipes(self) -> tuple[int, int]:
        """Return its standard output and error; whoever takes them closes them."""
        if self._pipes is None:
            raise ValueError("taken before")
        pipes, self._pipes = self._pipes, None
        return pipes.read_ends

    def fileno(self) -> int:
        """Return the descriptor that is readable when the zygote has told something."""
        return self._link.fileno()

    def receive(self) -> dict[str, Any] | None:
        """Return what it has told, or None when it has ended."""
        try:
            packet = self._link.recv(ORDER_BYTES)
        except OSError:
            packet = b""
        return json.loads(packet) if packet else None

    def has_ended(self) -> bool:
        """Look whether it has ended by itself."""
        return not self._is_over and self._process.poll() is not None

    def order(self, order: Order) -> None:
        """Have a rank forked; the answer comes by ``receive``.

        Raises:
            OSError: The zygote has ended, or the order cannot be sent.
        """
        if self._gate is None:
            self._gate = os.pipe()
        message = {
            "environment": dict(order.environment),
            "cpus": list(order.cpus),
            "reads": order.reads,
            "dumps": order.dumps,
            "inherited": list(order.inherited),
            "launcher": os.getpid(),
            "interpreter": interpreter(),
        }
        descriptors = [self._gate[0], *order.descriptors, *order.inherited]
        socket.send_fds(self._link, [json.dumps(message).encode()], descriptors)

    def release(self, ranks: int) -> None:
        """End the zygote, take over its ranks, and let them run."""
        self._end()
        if self._gate is not None:
            # They are written before anybody can have closed the other end: it is ours as well.
            os.write(self._gate[1], b"\0" * ranks)
        self._close_gate()

    def kill(self) -> None:
        """End it, and its ranks unless they were released; idempotent."""
        if not self._is_over:
            self._end()
        if self._pipes is not None:
            self._pipes.close_read_ends()
            self._pipes = None
        self._close_gate()

    def _end(self) -> None:
        # Not asked to: it may be stopped, and the end of the socket, which the guard has as well,
        # may not reach it. It has nothing to tidy up.
        self._process.kill()
        self._link.close()
        wait_for_killed(self._process)
        self._is_over = True
        # From now on, who loses its parent is no longer our business.
        _be_subreaper(False)

    def _close_gate(self) -> None:
        if self._gate is not None:
            for descriptor in self._gate:
                os.close(descriptor)
            self._gate = None


def start_zygote(job: Job) -> Zygote | None:
    """Start the zygote of a job; None where its ranks are to be started one by one."""
    if job.start_method != "zygote" or not job.program.is_python or not can_adopt():
        return None
    return Zygote(job.program, job.environment, job.preload)


def can_adopt() -> bool:
    """Whether the kernel, or what filters its calls, lets us become the parent of ranks."""
    return _be_subreaper(True) and _be_subreaper(False)


def _be_subreaper(on: bool) -> bool:
    return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on)) == 0)
