"""What a worker process runs: one task, given by the process that started it.

The interpreter is a fresh one. It does not import the starting program's main module; that
program's ``sys.path`` was set by the command line, before this module could be found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from cobre_shm.spawn.frames import Channel, Frame
from cobre_shm.spawn.parent import die_with
from cobre_shm.spawn.remote import encode_exception

__all__ = ["Entry", "main"]

# What a task names: it gets the channel and the task's payload, and returns the result.
Entry = Callable[[Channel, bytes], bytes]

_FAILED = 1


def main(descriptor: int, parent: int, entry: str) -> None:
    """Carry out the task and end the process.

    Args:
        descriptor: Of the inherited end of the channel.
        parent: Pid of the starting process; this one does not outlive it.
        entry: ``module:function`` that carries it out.
    """
    die_with(parent)()
    channel = Channel(descriptor)
    try:
        task = channel.receive_task()
        module, _, name = entry.partition(":")
        function: Entry = getattr(import_module(module), name)
        result = function(channel, task)
    except BaseException as error:
        # What a communicator that is left open tells its peers when the interpreter ends.
        sys.last_value = error
        _report(channel, error)
        code = error.code if isinstance(error, SystemExit) else _FAILED
        sys.exit(code if isinstance(code, int) and code else _FAILED)
    channel.send(Frame.RESULT, result)
    channel.close()


def _report(channel: Channel, error: BaseException) -> None:
    try:
        channel.send(Frame.ERROR, encode_exception(error))
        channel.close()
    except OSError:
        # Nobody listens any more; the exit code remains.
        return
