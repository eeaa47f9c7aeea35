"""Facts about processes."""

import errno
import os
import signal
from pathlib import Path

from cobre_shm.segment.process import is_alive, is_dying, start_time
from tests.support.processes import started


def test_process_is_dying_from_when_its_memory_goes_until_it_is_reaped():
    assert not is_dying(os.getpid())
    with started(["sleep", "600"]) as process:
        start = start_time(process.pid)
        assert is_alive(process.pid, start)
        assert not is_dying(process.pid)
        process.send_signal(signal.SIGKILL)
        # Not reaped, it is as one whose memory has gone and that has not ended.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_dying(process.pid)
        assert not is_alive(process.pid, start)
    assert not is_dying(process.pid)


def test_process_that_cannot_be_looked_at_counts_as_alive_while_there_is_one(monkeypatch):
    """To call a living peer dead, for want of a descriptor, would fail the group."""

    def refuse(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with started(["sleep", "600"]) as process:
        start = start_time(process.pid)
        monkeypatch.setattr(Path, "read_text", refuse)
        assert is_alive(process.pid, start)
    assert not is_alive(process.pid, start)
