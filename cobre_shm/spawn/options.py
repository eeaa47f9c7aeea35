"""The command line of the launcher, turned into a job."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import cobre_shm
from cobre_shm.cpus import count_cpus
from cobre_shm.layout import MAX_RANKS
from cobre_shm.spawn.binding import cpus_of_ranks, parse_numbers
from cobre_shm.spawn.environment import common_environment, parse_setting
from cobre_shm.spawn.errors import InvalidArguments
from cobre_shm.spawn.job import Job
from cobre_shm.spawn.network import Network
from cobre_shm.spawn.program import resolve_program

__all__ = ["Options", "parse", "wants_json"]

_DESCRIPTION = """\
Start N ranks of a program on this machine and look after them.

Every rank's create_communicator() joins the group over shared memory, or over tcp with
--backend tcp. Options of the launcher end at the first word that is none, or at --. With no
program, the ranks train the case shipped with the package (-m cobre_shm.sddp)."""

_EPILOG = """\
examples:
  %(prog)s -n 4 program.py --flag-of-the-program
  %(prog)s -n auto -m package.module CASE
  %(prog)s -n 8 --backend tcp program.py
  %(prog)s -n 4 --backend tcp --nnodes 2 --node-rank 1 --coordinator node-0:29500 program.py
  %(prog)s -n 2 -c 'import os; print(os.environ["COBRE_SHM_RANK"])'
  %(prog)s -n 8 -l --output-dir logs --tee --timeout 3600 program.py
  %(prog)s -n 2 --no-python ./command

exit codes:
  0        all ranks ended with 0
  1        the command line is not understood
  4        the backend cannot be set up
  124      the run took longer than --timeout
  126, 127 the program cannot be run, or does not exist
  128 + n  killed by signal n: 130 for ^C, 137 for KILL, 141 when nobody reads our output
  else     the exit code of the first rank that failed"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidArguments(
            message[:1].upper() + message[1:], suggestion=f"See: {self.prog} --help"
        )


class Options:
    """A command line: our own options, and the words of the program."""

    def __init__(self, own: argparse.Namespace, words: list[str]) -> None:
        self.own = own
        self.words = words

    def job(self) -> Job:
        """Return what is to be launched.

        Raises:
            InvalidArguments: Options contradict each other or the machine.
            ProgramNotFound: There is no such program.
            ProgramNotRunnable: It cannot be run.
        """
        own = self.own
        if own.size is None:
            raise InvalidArguments(
                "How many ranks? The option -n is missing",
                suggestion=f"Give -n N, or -n auto for the {count_cpus()} CPUs "
                "that may be used here",
            )
        if own.tee and own.output_dir is None:
            raise InvalidArguments("--tee shows what --output-dir writes: give both")
        environment = self._environment()
        return Job(
            program=resolve_program(self.words, is_python=not own.no_python),
            size=own.size,
            environment=environment,
            backend=own.backend,
            network=self._network({**os.environ, **environment}),
            start_method=own.start_method,
            preload=own.preload,
            cpus=cpus_of_ranks(own.bind_to, own.size),
            labels=own.label,
            timestamps=own.timestamps,
            output_dir=own.output_dir,
            tee=own.tee,
            shown_ranks=own.show_ranks,
            grace=own.grace,
            timeout=own.timeout,
            max_restarts=own.max_restarts,
            json_errors=own.output_format == "json" or own.json,
            events=own.events,
            json_events=own.json,
        )

    def _network(self, env: Mapping[str, str]) -> Network:
        own = self.own
        network = Network(own.nnodes, own.node_rank, own.coordinator)
        if own.backend == "tcp":
            network.check(env)
        elif network != Network():
            raise InvalidArguments(
                "--nnodes, --node-rank and --coordinator are for --backend tcp",
                suggestion="Shared memory does not reach beyond one machine",
            )
        return network

    def _environment(self) -> dict[str, str]:
        own = self.own
        settings = {}
        for name, value in map(parse_setting, own.settings):
            # A name alone passes on what we have, which happens anyway.
            if value is not None:
                settings[name] = value
            elif name not in os.environ:
                raise InvalidArguments(f"-x {name}: it is not set here; give {name}=VALUE")
        if own.stall_warn is not None:
            settings[f"COBRE_{own.backend.upper()}_STALL_WARN_SECS"] = f"{own.stall_warn:g}"
        threads = {None: 1, "keep": None, "auto": max(1, count_cpus() // own.size)}
        return common_environment(
            os.environ,
            backend=own.backend,
            settings=settings,
            unset=own.unset,
            threads=threads.get(own.threads, own.threads),
            overrides_threads=own.threads not in (None, "keep"),
        )


def parse(words: Sequence[str]) -> Options:
    """Read a command line.

    Raises:
        InvalidArguments: It is not understood.
    """
    parser, valued = _make_parser()
    own, program = split(words, valued)
    return Options(parser.parse_args(own), program)


def split(
    words: Sequence[str], valued: frozenset[str] | None = None
) -> tuple[list[str], list[str]]:
    """Divide a command line into our own options and the program with its arguments.

    Args:
        words: All of it.
        valued: Our options that take a value; looked up if it is not given.
    """
    words = list(words)
    if valued is None:
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


def wants_json(words: Sequence[str]) -> bool:
    """Whether errors are wanted as JSON: the options as a whole may be what is wrong."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output-format", default="text")
    parser.add_argument("--json", action="store_true")
    with contextlib.suppress(InvalidArguments):
        known, _ = parser.parse_known_args(split(words)[0])
        return bool(known.output_format == "json" or known.json)
    return False


def _make_parser() -> tuple[_Parser, frozenset[str]]:
    """Return the parser of our own options, and those of them that take a value."""
    is_script = Path(sys.argv[0]).name == "cobrerun"
    parser = _Parser(
        prog="cobrerun" if is_script else "python -m cobre_shm.spawn",
        usage="%(prog)s -n N [options] [-m MODULE | -c CODE | - | PROGRAM] [arguments]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_ranks(parser)
    _add_network(parser)
    _add_output(parser)
    _add_environment(parser)
    _add_endings(parser)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="show what would be started, and end")
    add("--version", action="version", version=f"cobre-shm {cobre_shm.__version__}")
    valued = (o.option_strings for o in parser._actions if o.nargs != 0)
    return parser, frozenset(name for names in valued for name in names)


def _add_ranks(parser: _Parser) -> None:
    add = parser.add_argument_group("what is started").add_argument
    add(
        "-n",
        dest="size",
        metavar="N",
        type=_count,
        help="number of ranks; auto: one for each CPU that may be used here "
        "(also -np, --np, --nproc-per-node)",
    )
    # Apart from -n, so that messages about it do not recite all of them.
    for alias in ("-np", "--np", "--nproc-per-node", "--nproc_per_node"):
        add(alias, dest="size", type=_count, help=argparse.SUPPRESS)
    add("-m", dest="module", metavar="MODULE", help="run a module, as python -m does")
    add("-c", dest="code", metavar="CODE", help="run this code, as python -c does")
    add(
        "--no-python",
        action="store_true",
        help="the program is a command, not something for Python",
    )
    add(
        "--start-method",
        choices=("zygote", "spawn"),
        default="zygote",
        help="zygote: one process imports what ranks need and is forked into them; spawn: every "
        "rank is a fresh interpreter (default: zygote)",
    )
    add(
        "--preload",
        metavar="auto|none|MODULE,...",
        type=_modules,
        default="auto",
        help="modules that the zygote imports beside numpy and the kernels, for all ranks to "
        "share; auto: numba, if the program's own file imports it (default: auto)",
    )
    add(
        "--bind-to",
        metavar="none|core|numa|LIST",
        default="none",
        help="CPUs of a rank: any, a core, a NUMA node, or the one at its place in a list such "
        "as 0,2,4-7 (default: none)",
    )


def _add_network(parser: _Parser) -> None:
    add = parser.add_argument_group("where the ranks meet").add_argument
    add(
        "--backend",
        choices=("shm", "tcp"),
        default="shm",
        help="shared memory, or tcp, also on several machines (default: shm)",
    )
    add(
        "--nnodes",
        metavar="NODES",
        type=_nodes,
        default=1,
        help="number of machines, on each of which this command starts N ranks (tcp)",
    )
    add(
        "--node-rank",
        metavar="NODE",
        type=int,
        default=0,
        help="which of them this is, from 0; it has the ranks from NODE * N on (tcp)",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="where the ranks meet: an address of node 0 (tcp)",
    )


def _add_output(parser: _Parser) -> None:
    add = parser.add_argument_group("output").add_argument
    add(
        "-l",
        "--label",
        "--tag-output",
        action="store_true",
        help="begin every line with its rank",
    )
    add("--timestamps", action="store_true", help="begin every line with the time it came")
    add(
        "--output-dir",
        metavar="D",
        type=Path,
        help="write each rank's output to D/rank-R.out and D/rank-R.err instead of showing it",
    )
    add("--tee", action="store_true", help="with --output-dir: show it nonetheless")
    add(
        "--show-ranks",
        metavar="LIST",
        type=_ranks,
        help="show the output of these ranks only, such as 0,3-5",
    )
    add(
        "--output-format",
        choices=("text", "json"),
        default="text",
        help="how errors are shown on standard error (default: text)",
    )
    add("--events", metavar="FILE", type=Path, help="write events there, one JSON object a line")
    add("--json", action="store_true", help="write events and errors as JSON to standard error")


def _add_environment(parser: _Parser) -> None:
    add = parser.add_argument_group("environment of the ranks").add_argument
    add(
        "-x",
        dest="settings",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set a variable; may be repeated",
    )
    add(
        "--unset-env",
        dest="unset",
        metavar="NAME",
        action="append",
        default=[],
        help="take a variable away; may be repeated",
    )
    add(
        "--threads-per-rank",
        dest="threads",
        metavar="K|auto|keep",
        type=_threads,
        help="OMP_, OPENBLAS_, MKL_ and NUMBA_NUM_THREADS; auto: CPUs divided by ranks; keep: as "
        "they are (default: 1 where you have not set them)",
    )
    add(
        "--stall-warn",
        metavar="S",
        type=_positive,
        help="seconds after which ranks name one that is late (COBRE_SHM_STALL_WARN_SECS, "
        "or COBRE_TCP_STALL_WARN_SECS)",
    )


def _add_endings(parser: _Parser) -> None:
    add = parser.add_argument_group("its end").add_argument
    add(
        "--timeout",
        metavar="S",
        type=_positive,
        help="seconds after which the run is ended with 124; first shows what all ranks do",
    )
    add(
        "--grace",
        metavar="S",
        type=_seconds,
        default=5.0,
        help="seconds between SIGTERM and SIGKILL when the run is stopped (default: 5)",
    )
    add(
        "--max-restarts",
        metavar="K",
        type=_restarts,
        default=0,
        help="start the whole group again, K times at most, when a rank has failed (default: 0)",
    )


def _count(text: str) -> int:
    if text == "auto":
        return count_cpus()
    return _whole(text, 1, MAX_RANKS, f"the number of ranks is 1 to {MAX_RANKS}, or auto,")


def _nodes(text: str) -> int:
    return _whole(text, 1, MAX_RANKS, f"the number of nodes is 1 to {MAX_RANKS},")


def _restarts(text: str) -> int:
    return _whole(text, 0, 1 << 31, "expected a whole number, 0 or more,")


def _threads(text: str) -> int | str:
    if text in ("auto", "keep"):
        return text
    return _whole(text, 1, 1 << 16, "expected a number of threads, auto or keep,")


def _modules(text: str) -> str:
    if text == "none":
        return ""
    if not all(name.isidentifier() for name in text.replace(",", ".").split(".")):
        raise argparse.ArgumentTypeError(
            f"expected modules with commas, auto or none, not {text!r}"
        )
    return text


def _whole(text: str, least: int, most: int, expected: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{expected} not {text!r}")
    return number


def _ranks(text: str) -> frozenset[int]:
    try:
        return frozenset(parse_numbers(text))
    except InvalidArguments as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, not {text!r}")
    return seconds


def _positive(text: str) -> float:
    seconds = _seconds(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, not {text!r}")
    return seconds
