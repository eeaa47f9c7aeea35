"""Command line of the launcher: ``python -m cobre_shm.spawn``, or ``cobrerun``."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import cobre_shm
from cobre_shm.cpus import count_cpus
from cobre_shm.errors import CobreError
from cobre_shm.layout import MAX_RANKS
from cobre_shm.spawn.errors import InvalidArguments, LaunchError
from cobre_shm.spawn.program import resolve_program

if TYPE_CHECKING:
    from cobre_shm.spawn.launcher import Job
    from cobre_shm.spawn.tcp import Network

__all__ = ["main"]

_BACKEND_ERROR = 4

_DESCRIPTION = """\
Start N ranks of a Python program on this machine and look after them.

Every rank is a fresh interpreter whose create_communicator() joins the group over shared
memory, or over tcp with --backend tcp. Options of the launcher end at the first word that is
none, or at --. With no program, the ranks train the case shipped with the package
(-m cobre_shm.sddp)."""

_EPILOG = """\
examples:
  %(prog)s -n 4 program.py --flag-of-the-program
  %(prog)s -n auto -m package.module CASE
  %(prog)s -n 8 --backend tcp program.py
  %(prog)s -n 4 --backend tcp --nnodes 2 --node-rank 1 --coordinator node-0:29500 program.py
  %(prog)s -n 2 -c 'import os; print(os.environ["COBRE_SHM_RANK"])'

exit codes:
  0        all ranks ended with 0
  1        the command line is not understood
  4        the backend cannot be set up
  126, 127 the program cannot be run, or does not exist
  128 + n  killed by signal n: 130 for ^C, 137 for KILL, 141 when nobody reads our output
  else     the exit code of the first rank that failed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, program = _split(words)
    try:
        job = _read_job(own, program)
        # Only now: --help and mistakes must not wait for what starting ranks needs.
        from cobre_shm.spawn.launcher import launch

        return launch(job)
    except CobreError as error:
        _show(error, as_json=_wants_json(own))
        return error.exit_code if isinstance(error, LaunchError) else _BACKEND_ERROR
    except KeyboardInterrupt:
        # Before the launcher watches signals, or after: there is no rank.
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidArguments(
            message[:1].upper() + message[1:], suggestion=f"See: {self.prog} --help"
        )


def _count(text: str) -> int:
    if text == "auto":
        return count_cpus()
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= MAX_RANKS:
        raise argparse.ArgumentTypeError(
            f"the number of ranks is a whole number from 1 to {MAX_RANKS}, or auto, not {text!r}"
        )
    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, not {text!r}")
    return seconds


def _make_parser() -> tuple[_Parser, frozenset[str]]:
    """Return the parser of our own options, and those of them that take a value."""
    is_script = Path(sys.argv[0]).name == "cobrerun"
    parser = _Parser(
        prog="cobrerun" if is_script else "python -m cobre_shm.spawn",
        usage="%(prog)s -n N [options] [-m MODULE | -c CODE | PROGRAM] [arguments]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    options = [
        add(
            "-n",
            dest="size",
            metavar="N",
            type=_count,
            help="number of ranks; auto: one for each CPU that may be used here "
            "(also -np, --np, --nproc-per-node)",
        ),
        # Apart from -n, so that messages about it do not recite all of them.
        *(
            add(alias, dest="size", type=_count, help=argparse.SUPPRESS)
            for alias in ("-np", "--np", "--nproc-per-node", "--nproc_per_node")
        ),
        add("-m", dest="module", metavar="MODULE", help="run a module, as python -m does"),
        add("-c", dest="code", metavar="CODE", help="run this code, as python -c does"),
        add(
            "--backend",
            choices=("shm", "tcp"),
            default="shm",
            help="what the ranks meet in: shared memory, or tcp, also on several machines "
            "(default: shm)",
        ),
        add(
            "--nnodes",
            metavar="NODES",
            type=_count,
            default=1,
            help="number of machines, on each of which this command starts N ranks (tcp)",
        ),
        add(
            "--node-rank",
            metavar="NODE",
            type=int,
            default=0,
            help="which of them this is, from 0; it has the ranks from NODE * N on (tcp)",
        ),
        add(
            "--coordinator",
            metavar="HOST:PORT",
            help="where the ranks meet: an address of node 0 (tcp)",
        ),
        add("-l", "--label", action="store_true", help="begin every line with its rank"),
        add(
            "--grace",
            metavar="S",
            type=_seconds,
            default=5.0,
            help="seconds between SIGTERM and SIGKILL when the run is stopped (default: 5)",
        ),
        add(
            "--output-format",
            choices=("text", "json"),
            default="text",
            help="how errors are shown on standard error (default: text)",
        ),
        add("--version", action="version", version=f"cobre-shm {cobre_shm.__version__}"),
    ]
    valued = (o.option_strings for o in options if o.nargs != 0)
    return parser, frozenset(name for names in valued for name in names)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Divide the command line into our own options and the program with its arguments."""
    _, valued = _make_parser()
    index = 0
    while index < len(words) and words[index].startswith("-") and words[index] != "-":
        word = words[index]
        if word == "--":
            return words[:index], words[index + 1 :]
        if word in ("-m", "-c"):
            break
        if word[:2] in ("-m", "-c"):
            return words[:index], [word[:2], word[2:], *words[index + 1 :]]
        index += 2 if word in valued else 1
    return words[:index], words[index:]


def _read_job(own: list[str], program: list[str]) -> Job:
    parser, _ = _make_parser()
    options = parser.parse_args(own)
    if options.size is None:
        raise InvalidArguments(
            "How many ranks? The option -n is missing",
            suggestion=f"Give -n N, or -n auto for the {count_cpus()} CPUs that may be used here",
        )
    arguments = resolve_program(program)
    network = _read_network(options)
    from cobre_shm.spawn.launcher import Job

    return Job(
        arguments=arguments,
        size=options.size,
        network=network,
        labels=options.label,
        grace=options.grace,
        json_errors=options.output_format == "json",
    )


def _read_network(options: argparse.Namespace) -> Network | None:
    from cobre_shm.spawn.tcp import Network

    network = Network(options.nnodes, options.node_rank, options.coordinator)
    if options.backend == "tcp":
        network.check(os.environ)
        return network
    if network != Network():
        raise InvalidArguments(
            "--nnodes, --node-rank and --coordinator are for --backend tcp",
            suggestion="Shared memory does not reach beyond one machine",
        )
    return None


def _wants_json(own: list[str]) -> bool:
    # The options as a whole may be what is wrong, so this one is looked for by itself.
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output-format", default="text")
    with contextlib.suppress(InvalidArguments):
        return bool(parser.parse_known_args(own)[0].output_format == "json")
    return False


def _show(error: CobreError, *, as_json: bool) -> None:
    text = json.dumps(error.to_dict()) if as_json else f"cobre_shm.spawn: {error}"
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
