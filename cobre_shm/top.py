"""A running group at a glance: ``python -m cobre_shm.top [PID|NAME]``.

A line per rank: what its process does, what it called last, how much of its time it waits, and
whether the others wait for it. Reads the group's memory and the process table; cannot write.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from cobre_shm.command_line import Parser, while_somebody_reads
from cobre_shm.errors import CobreError
from cobre_shm.segment.attach import ObservedSegment, own_processes, segments_open_in
from cobre_shm.segment.observe import (
    GroupFacts,
    RankFacts,
    command_line,
    has_ended,
    observe,
)
from cobre_shm.units import bytes_text

__all__ = ["GroupNotFound", "main"]

_NOT_FOUND = 1
# How soon the end of a group is noticed while a table stands.
_LOOK_SECS = 0.2

_EPILOG = """\
columns:
  STATE       of the process; or absent: not joined yet, closed: after close()
  LATE        the others have waited for this rank for 20 ms at least, and still do
  NUMBER      of the rank's current or last collective, from 1
  COLLECTIVE  what it is in, or (in parentheses) what it returned from
  SINCE       when it entered that one, or returned from it
  WAITING     part of its time spent waiting for others, over its last 256 collectives
  BYTES/S     payload of these collectives

exit codes:
  0    the group has ended, or ^C
  1    there is no such group, or several; or the command line is not understood
  141  nobody reads our output"""


class GroupNotFound(CobreError):
    """No group that can be shown, or more than one."""

    kind = "GroupNotFound"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _make_parser().parse_args(argv)
    return while_somebody_reads(lambda: _show(options))


def _show(options: argparse.Namespace) -> int:
    as_json = options.output_format == "json"
    try:
        with _attached(options.group) as segment:
            _watch(segment, once=options.once, as_json=as_json, interval=options.interval)
    except CobreError as error:
        text = json.dumps(error.to_dict()) if as_json else f"cobre_shm.top: {error}"
        print(text, file=sys.stderr)
        return _NOT_FOUND
    except KeyboardInterrupt:
        # The way to leave it, as with top.
        return 0
    return 0


def _make_parser() -> Parser:
    parser = Parser(
        prog="python -m cobre_shm.top",
        description="Show what the ranks of a running group do. The ranks do not notice.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "group",
        nargs="?",
        metavar="PID|NAME",
        help="the launcher or any rank, or the name of the shared memory segment "
        "(default: your only group)",
    )
    add("--once", action="store_true", help="show one table and end")
    add(
        "--interval",
        metavar="S",
        type=_seconds,
        default=1.0,
        help="seconds between two tables (default: 1)",
    )
    add(
        "--output-format",
        choices=("text", "json"),
        default="text",
        help="json: one object per line and table (default: text)",
    )
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, not {text!r}")
    return seconds


# Which group


@contextlib.contextmanager
def _attached(wanted: str | None) -> Iterator[ObservedSegment]:
    """Map the group that is meant, for reading."""
    with contextlib.ExitStack() as stack:
        running = []
        for segment in _candidates(wanted):
            stack.callback(segment.close)
            if not has_ended(segment):
                running.append(segment)
        if len(running) != 1:
            raise _several(running) if running else _none(wanted)
        yield running[0]


def _candidates(wanted: str | None) -> list[ObservedSegment]:
    if wanted is None:
        return segments_open_in(own_processes())
    if wanted.isdecimal():
        pid = int(wanted)
        _check_process(pid)
        return segments_open_in([pid])
    return segments_open_in(own_processes(), f"/{wanted.removeprefix('/')}")


def _check_process(pid: int) -> None:
    try:
        uid = Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        raise GroupNotFound(f"There is no process {pid}", context={"pid": pid}) from None
    if uid != os.geteuid():
        raise GroupNotFound(
            f"Process {pid} belongs to uid {uid}, not to {os.geteuid()}: "
            "only groups of the same user can be shown",
            context={"pid": pid, "uid": uid},
        )


def _none(wanted: str | None) -> GroupNotFound:
    if wanted is None:
        return GroupNotFound("No group of this user runs on this machine")
    is_pid = wanted.isdecimal()
    return GroupNotFound(
        f"Process {wanted} is in no running group"
        if is_pid
        else f"No group {wanted} of this user runs on this machine",
        context={"group": wanted},
        suggestion="Give the pid of the launcher or of a rank that has joined.",
    )


def _several(running: list[ObservedSegment]) -> GroupNotFound:
    lines, listed = "", []
    for segment in running:
        # The launcher, or rank 0.
        pid, program = segment.creator[0], command_line(segment)
        lines += f"\n  {segment.name}, pid {pid}, {_ranks(segment.size)}: {_shell_text(program)}"
        listed.append({"name": segment.name, "pid": pid, "ranks": segment.size, "program": program})
    return GroupNotFound(
        f"{len(running)} groups run here; name one of them:{lines}", context={"groups": listed}
    )


# Showing it


def _watch(segment: ObservedSegment, *, once: bool, as_json: bool, interval: float) -> None:
    screen = _Screen(sys.stdout)
    while True:
        facts = observe(segment)
        if as_json:
            print(json.dumps(asdict(facts)), flush=True)
        else:
            screen.show(facts)
        if once or facts.has_ended:
            return
        deadline = time.monotonic() + interval
        while time.monotonic() < deadline and not has_ended(segment):
            time.sleep(min(_LOOK_SECS, max(0.0, deadline - time.monotonic())))


class _Screen:
    """Where tables appear: over each other on a terminal, one after the other elsewhere.

    Nothing of the terminal is changed, so there is nothing to give back, however we end.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            # Paths of programs may be of any bytes.
            stream.reconfigure(errors="backslashreplace")
        self._redraws = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._shown = 0

    def show(self, facts: GroupFacts) -> None:
        if not self._redraws:
            text = "".join(f"{line}\n" for line in _lines(facts))
            self._stream.write(text if not self._shown else f"\n{text}")
            self._shown = 1
        else:
            width, height = shutil.get_terminal_size()
            lines = [line[: width - 1] for line in _lines(facts, height - 1)]
            # Up to where the last table began; each line is overwritten, then its rest cleared.
            up = f"\x1b[{self._shown}A" if self._shown else ""
            text = "".join(f"{line}\x1b[K\n" for line in lines)
            self._stream.write(f"\r{up}{text}\x1b[J")
            self._shown = len(lines)
        self._stream.flush()


_HEAD = ("RANK", "PID", "STATE", "LATE", "NUMBER", "SINCE", "WAITING", "BYTES/S", "COLLECTIVE")
_LEFT = ("STATE", "LATE", "COLLECTIVE")


def _lines(facts: GroupFacts, height: int | None = None) -> list[str]:
    """The table as lines; ranks that the others wait for stay when not all have room."""
    above = [_title(facts)]
    if facts.failure:
        above.append(f"The group has failed: {facts.failure}")
    late = [rank for rank in facts.ranks if rank.is_late]
    if late:
        named = ", ".join(f"{r.rank} (pid {r.pid}, {r.state})" for r in late[:4])
        more = f" and {len(late) - 4} more" if len(late) > 4 else ""
        above.append(f"The others wait for rank {named}{more}")
    if facts.has_ended:
        above.append("The group has ended")
    shown, below = facts.ranks, []
    room = len(shown) if height is None else max(1, height - len(above) - 1)
    if len(shown) > room:
        first = sorted(shown, key=lambda rank: not rank.is_late)[: max(1, room - 1)]
        shown = sorted(first, key=lambda rank: rank.rank)
        below = [f"and {len(facts.ranks) - len(shown)} more ranks"]
    rows = [_HEAD, *(_cells(rank) for rank in shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    table = [
        "  ".join(
            cell.ljust(width) if head in _LEFT else cell.rjust(width)
            for head, cell, width in zip(_HEAD, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return [*above, *table, *below]


def _title(facts: GroupFacts) -> str:
    launcher = f", launcher {facts.launcher}" if facts.launcher else ""
    joining = "" if facts.has_joined else ", joining"
    program = f": {_shell_text(facts.program)}" if facts.program else ""
    return f"{facts.name}, {_ranks(facts.size)}{launcher}{joining}{program}"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"


def _cells(rank: RankFacts) -> tuple[str, ...]:
    call = rank.call or ""
    return (
        str(rank.rank),
        str(rank.pid or "-"),
        rank.state,
        "late" if rank.is_late else "",
        str(rank.sequence),
        "-" if rank.since_secs is None else _duration(rank.since_secs),
        "-" if rank.waiting_share is None else f"{rank.waiting_share:.1%}",
        "-" if rank.bytes_per_sec is None else bytes_text(rank.bytes_per_sec),
        call if rank.is_inside or not call else f"({call})",
    )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.4g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _shell_text(words: Sequence[str]) -> str:
    # A command line may hold anything, and a terminal shall not obey it.
    return "".join(c if c.isprintable() else "?" for c in shlex.join(words))


if __name__ == "__main__":
    sys.exit(main())
