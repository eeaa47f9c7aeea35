"""The flags of the launcher, in groups as ``--help`` shows them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import cobre_shm
from cobre_shm.spawn import values
from cobre_shm.spawn.errors import InvalidArguments

__all__ = ["Parser", "make_parser"]

_DESCRIPTION = """\
Start N ranks of a program on this machine and look after them.

Every rank's create_communicator() joins the group over shared memory, or over tcp with
--backend tcp, or on several machines. Options of the launcher end at the first word that is
none, or at --. With no program, the ranks train the case shipped with the package
(-m cobre_shm.sddp)."""

_EPILOG = """\
examples:
  %(prog)s -n 4 program.py --flag-of-the-program
  %(prog)s -n auto -m package.module CASE
  %(prog)s -n 8 --backend tcp program.py
  %(prog)s -n 4 --nnodes 2 --node-rank 1 --coordinator node-0:29500 program.py
  %(prog)s -n 2 -c 'import os; print(os.environ["COBRE_SHM_RANK"])'
  %(prog)s -n 8 -l --output-dir logs --tee --timeout 3600 program.py
  %(prog)s -n 2 --no-python ./command
  %(prog)s -n 8 --doctor

exit codes:
  0        all ranks ended with 0
  1        the command line is not understood
  4        the backend cannot be set up
  124      the run took longer than --timeout
  126, 127 the program cannot be run, or does not exist
  128 + n  killed by signal n: 130 for ^C, 137 for KILL, 141 when nobody reads our output
  else     the exit code of the first rank that failed"""


class Parser(argparse.ArgumentParser):
    """Raises what it does not understand."""

    def error(self, message: str) -> NoReturn:
        """Raise it, instead of printing the usage."""
        raise InvalidArguments(
            message[:1].upper() + message[1:], suggestion=f"See: {self.prog} --help"
        )


def make_parser() -> tuple[Parser, frozenset[str]]:
    """Return the parser of our own options, and those of them that take a value."""
    is_script = Path(sys.argv[0]).name == "cobrerun"
    parser = Parser(
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
    add(
        "--doctor",
        action="store_true",
        help="look whether N ranks can be run here, say what to change, and end",
    )
    add("--version", action="version", version=f"cobre-shm {cobre_shm.__version__}")
    valued = (o.option_strings for o in parser._actions if o.nargs != 0)
    return parser, frozenset(name for names in valued for name in names)


def _add_ranks(parser: Parser) -> None:
    add = parser.add_argument_group("what is started").add_argument
    add(
        "-n",
        dest="size",
        metavar="N",
        type=values.rank_count,
        help="number of ranks; auto: one for each CPU that may be used here "
        "(also -np, --np, --nproc-per-node)",
    )
    # Apart from -n, so that messages about it do not recite all of them.
    for alias in ("-np", "--np", "--nproc-per-node"):
        add(alias, dest="size", type=values.rank_count, help=argparse.SUPPRESS)
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
        type=values.modules,
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


def _add_network(parser: Parser) -> None:
    add = parser.add_argument_group("where the ranks meet").add_argument
    add(
        "--backend",
        type=values.backend,
        metavar="auto|shm|tcp",
        default="auto",
        help="shared memory, or tcp, also on several machines; auto: tcp where --nnodes is above 1 "
        "or --coordinator is given, whatever COBRE_COMM_BACKEND says (default: auto)",
    )
    add(
        "--nnodes",
        metavar="NODES",
        type=values.nodes,
        default=1,
        help="number of machines, on each of which this command starts N ranks (tcp; default: 1)",
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


def _add_output(parser: Parser) -> None:
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
        type=values.ranks,
        help="show the output of these ranks only, such as 0,3-5",
    )
    add(
        "--output-format",
        choices=("text", "json"),
        default="text",
        help="how errors are shown on standard error (default: text)",
    )
    add(
        "--monitor",
        action="store_true",
        help="with --output-dir: show what the ranks do, as python -m cobre_shm.top does",
    )
    add("--events", metavar="FILE", type=Path, help="write events there, one JSON object a line")
    add("--json", action="store_true", help="write events and errors as JSON to standard error")


def _add_environment(parser: Parser) -> None:
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
        type=values.threads,
        help="OMP_, OPENBLAS_, MKL_ and NUMBA_NUM_THREADS; auto: CPUs divided by ranks; keep: as "
        "they are (default: 1 where you have not set them)",
    )
    add(
        "--stall-warn",
        metavar="S",
        type=values.positive_seconds,
        help="seconds after which ranks name one that is late (COBRE_SHM_STALL_WARN_SECS, "
        "or COBRE_TCP_STALL_WARN_SECS)",
    )


def _add_endings(parser: Parser) -> None:
    add = parser.add_argument_group("its end").add_argument
    add(
        "--timeout",
        metavar="S",
        type=values.positive_seconds,
        help="seconds after which the run, restarts included, is ended with 124; first shows what "
        "all ranks do",
    )
    add(
        "--grace",
        metavar="S",
        type=values.seconds,
        default=5.0,
        help="seconds between SIGTERM and SIGKILL when the run is stopped, and between ^C and "
        "SIGTERM (default: 5)",
    )
    add(
        "--max-restarts",
        metavar="K",
        type=values.restarts,
        default=0,
        help="start the whole group again, K times at most, when a rank has failed (default: 0)",
    )
