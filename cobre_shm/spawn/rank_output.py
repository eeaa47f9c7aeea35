"""What becomes of the ranks' output: shown or not, labelled, copied to files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

from cobre_shm.spawn.errors import InvalidArguments
from cobre_shm.spawn.job import Job
from cobre_shm.spawn.loop import Loop
from cobre_shm.spawn.output import FileCopy, Output, Stream

__all__ = ["RankOutput"]


class RankOutput:
    """The output of all ranks.

    Args:
        job: Says what is shown, and how.
        loop: The launcher's.
        on_broken: Called with the error when somewhere no more output can be written.
        appends: Whether files keep what an earlier attempt wrote.
    """

    def __init__(
        self,
        job: Job,
        loop: Loop,
        on_broken: Callable[[OSError], None],
        appends: bool,
    ) -> None:
        self._job = job
        self._output = Output(loop.selector, on_broken)
        self._loop = loop
        self._on_broken = on_broken
        self._appends = appends
        self._stderr: dict[int, Stream] = {}

    @property
    def is_flushed(self) -> bool:
        """Whether everything was written, or never will be."""
        return self._output.is_flushed

    def add(self, rank: int, read_ends: tuple[int, int], *, is_typed_to: bool = False) -> None:
        """Pass on what a rank writes to its standard output and error; of one, prompts too.

        Only where they are shown on a terminal: elsewhere a line is worth more whole.
        """
        sinks = (self._output.stdout, self._output.stderr)
        shown = self._job.shows(rank)
        streams = [
            self._output.add(
                descriptor,
                sink if shown else None,
                label=self._label(rank, is_error),
                copy=self._copy(rank, is_error),
                keeps_tail=bool(is_error),
                call_after=self._loop.call_after if is_typed_to and sink.is_terminal else None,
            )
            for is_error, (descriptor, sink) in enumerate(zip(read_ends, sinks, strict=True))
        ]
        self._stderr[rank] = streams[1]

    def add_other(self, read_ends: Iterable[int]) -> None:
        """Pass on what a process that is no rank writes."""
        for descriptor in read_ends:
            self._output.add(descriptor, self._output.stderr)

    def say(self, data: bytes) -> None:
        """Write lines of the launcher itself to standard error."""
        self._output.stderr.put(None, data)

    def last_words(self, rank: int) -> tuple[list[bytes], bool]:
        """Return the last lines of a rank's standard error, and whether nothing came behind."""
        stream = self._stderr[rank]
        return list(stream.tail), stream.is_last

    def hold(self, rank: int) -> None:
        """Keep back what a rank writes to its standard error from now on."""
        self._stderr[rank].hold()

    def take_held(self, rank: int) -> bytes:
        """Return what was kept back, and keep back no more."""
        return self._stderr[rank].take_held()

    def finish(self) -> None:
        """Read what the pipes hold and close them: no rank is left that could write."""
        self._output.finish()

    def discard(self) -> None:
        """Close everything and forget what is not written yet."""
        self._output.discard()

    def _label(self, rank: int, is_error: int) -> Callable[[], bytes]:
        mark = f"[{rank}{':err' if is_error else ''}] " if self._job.labels else ""
        if not self._job.timestamps:
            fixed = mark.encode()
            return lambda: fixed
        return lambda: f"{datetime.now().isoformat(timespec='milliseconds')} {mark}".encode()

    def _copy(self, rank: int, is_error: int) -> FileCopy | None:
        if self._job.output_dir is None:
            return None
        path = self._job.output_dir / f"rank-{rank}.{'err' if is_error else 'out'}"
        try:
            return FileCopy(path, self._appends, self._on_broken)
        except OSError as error:
            raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> InvalidArguments:
    """The error of a file for output that cannot be had."""
    return InvalidArguments(
        f"Output cannot be written to {str(path)!r}: {error.strerror}",
        context={"path": str(path)},
    )
