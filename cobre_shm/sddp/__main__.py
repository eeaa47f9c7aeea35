"""Command line: train a case, on one process or on every rank of a launched group.

Every rank runs the same line; rank 0 reads the case, prints and writes. Exit codes: 0 success,
1 wrong arguments, output directory or standard output, 2 wrong configuration (``config.json``),
3 wrong case data or a stage problem without solution, 4 backend or communication, 5 a checkpoint or
policy that cannot be gone on with, 130 interrupted (Ctrl-C), 141 nobody reads our output,
143 terminated (SIGTERM). Both signals end the training after its iteration, with its results and a
checkpoint in the output directory, or the simulation after it, which leaves nothing; the same
signal once more ends the program at once. The launcher waits for that as long as ``--grace``
says. Output that is lost ends no training, and costs none of its files.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cobre_shm import create_communicator
from cobre_shm.command_line import BAD_ARGUMENTS, BAD_BACKEND
from cobre_shm.errors import BackendError, CobreError, CommError
from cobre_shm.sddp import shipped_case_path
from cobre_shm.sddp.envelope import envelope
from cobre_shm.sddp.errors import CaseError, CheckpointError, SolverError
from cobre_shm.sddp.standard_streams import with_lenient_streams

if TYPE_CHECKING:
    from cobre_shm.communicator import Communicator
    from cobre_shm.sddp.simulation import SimulationResult
    from cobre_shm.sddp.training_files import TrainingFiles
    from cobre_shm.sddp.training_result import TrainingDetails

BAD_CONFIGURATION = 2
BAD_DATA = 3
BAD_CHECKPOINT = 5
_SIGNAL_BASE = 128

# Commands beside the training, and the modules with their ``add_arguments`` and ``run``. A case
# directory of such a name is given as ./NAME.
_COMMANDS = {"report": "cobre_shm.sddp.report", "validate": "cobre_shm.sddp.validate"}


class _UsageError(Exception):
    """The arguments are wrong; the text is argparse's own."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, so that only one rank of a group prints them."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{self.format_usage()}{self.prog}: error: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m cobre_shm.sddp",
        description="Train a hydrothermal operation policy. Under the launcher the same line "
        "runs on every rank. 'validate CASE' checks a case instead; 'report DIR' draws what is in "
        "an output directory.",
        epilog="Exit codes: 0 success, 1 wrong arguments, output directory or standard output, "
        "2 wrong config.json, 3 wrong case data or a stage problem without solution, 4 backend or "
        "communication, 5 a checkpoint or policy that cannot be gone on with, 130 interrupted, 141 "
        "nobody reads our output, 143 terminated.",
    )
    parser.add_argument(
        "case",
        nargs="?",
        type=Path,
        metavar="CASE",
        help="case directory; by default the case that comes with the package",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="write the result there; without it no files are written",
    )
    parser.add_argument(
        "--iterations", type=_positive, metavar="N", help="replaces the case's iteration limit"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=_positive,
        metavar="K",
        help="write a checkpoint to the output directory after every K iterations",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="go on from the checkpoint in the output directory; where there is none, begin",
    )
    parser.add_argument(
        "--warm-start",
        type=Path,
        metavar="DIR",
        help="begin with the cuts in the policy directory DIR of an earlier training",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument(
        "--output-format",
        choices=("text", "json"),
        default="text",
        help="json: a JSON object a line, one for each iteration and the last for the summary or "
        "the error, which stderr has as well (default: text)",
    )
    return parser


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.output_dir is None and (options.resume or options.checkpoint_every):
        parser.error("--resume and --checkpoint-every need --output-dir")
    return options


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return value


def _run_command(name: str, arguments: Sequence[str]) -> int:
    """Run a command that needs no communicator, and so runs on one process."""
    command = importlib.import_module(_COMMANDS[name])
    parser = _Parser(prog=f"python -m cobre_shm.sddp {name}", description=command.__doc__)
    command.add_arguments(parser)
    try:
        options = parser.parse_args(arguments)
    except _UsageError as error:
        print(error, file=sys.stderr)
        return BAD_ARGUMENTS
    try:
        return int(command.run(options))
    except CobreError as error:
        return _report_error(error, name, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return with_lenient_streams(lambda: _main(given))


def _main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in _COMMANDS:
        return _run_command(arguments[0], arguments[1:])
    try:
        options = _parse(arguments)
    except _UsageError as error:
        return _report_usage(str(error))
    rank = 0
    try:
        with create_communicator() as comm:
            rank = comm.rank
            return _run(options, comm)
    except CobreError as error:
        return _report_error(error, "train", options, rank)


def _report_usage(text: str) -> int:
    try:
        with create_communicator() as comm:
            first = comm.rank == 0
    except CobreError:
        first = True
    if first:
        print(text, file=sys.stderr)
    return BAD_ARGUMENTS


def _report_error(
    error: CobreError, command: str, options: argparse.Namespace, rank: int = 0
) -> int:
    """Print an error and return the exit code.

    As JSON, standard output ends with the answer of the command, of which the error is a part,
    just as it ends with the summary where there is none; standard error gets the error's record.
    """
    code, as_json = _exit_code(error), options.output_format == "json"
    if as_json and rank == 0:
        print(json.dumps(envelope(command, code, errors=[error]), default=str), flush=True)
    # Errors of the case are raised on every rank; only the others belong to one.
    if rank == 0 or isinstance(error, CommError | BackendError):
        record = json.dumps(error.to_dict(), default=str)
        text = record if as_json else f"cobre_shm.sddp: error: {error}"
        print(text, file=sys.stderr, flush=True)
    return code


def _exit_code(error: CobreError) -> int:
    if isinstance(error, BackendError | CommError):
        return BAD_BACKEND
    if isinstance(error, CheckpointError):
        return BAD_CHECKPOINT
    if isinstance(error, CaseError):
        return BAD_CONFIGURATION if error.is_configuration else BAD_DATA
    return BAD_DATA if isinstance(error, SolverError) else BAD_ARGUMENTS


def _run(options: argparse.Namespace, comm: Communicator) -> int:
    # Imported here so that a wrong backend is reported even where no solver is installed.
    from cobre_shm.sddp.case import share_case, with_iterations
    from cobre_shm.sddp.progress import ConvergenceTable, EventLines
    from cobre_shm.sddp.training import train
    from cobre_shm.sddp.training_files import training_files

    case = share_case(options.case or shipped_case_path(), comm)
    if options.iterations is not None:
        case = with_iterations(case, options.iterations)
    files = training_files(
        case.config,
        options.output_dir,
        options.checkpoint_every,
        options.resume,
        options.warm_start,
    )
    speaks = comm.rank == 0 and not options.quiet
    if speaks:
        for warning in case.warnings:
            print(f"cobre_shm.sddp: warning: {warning}", file=sys.stderr)
    with _stop_on_signal() as received:
        with ExitStack() as stack:
            shown: ConvergenceTable | EventLines | None = None
            if speaks and options.output_format == "text":
                print(_opening_line(case.name, comm, files), flush=True)
                shown = stack.enter_context(ConvergenceTable(case.config.iteration_limit))
            elif speaks:
                shown = EventLines(case.config.iteration_limit)
            result = train(
                case,
                comm,
                output_dir=options.output_dir,
                progress=shown,
                should_stop=lambda: bool(received),
                checkpoint_every=options.checkpoint_every,
                resume=options.resume,
                warm_start=options.warm_start,
            )
        simulation: SimulationResult | None = None
        ended_by = 0
        if result.stop_reason == "interrupted":
            # Another rank may have got the signal, and this one none.
            ended_by = received[0] if received else signal.SIGINT
        elif case.config.simulation_scenarios:
            simulation, ended_by = _simulate(result, comm, options.output_dir, received)
        code = _SIGNAL_BASE + ended_by if ended_by else 0
        if speaks:
            print(_summary(result, simulation, options, code), flush=True)
    return code


def _simulate(
    result: TrainingDetails, comm: Communicator, output_dir: Path | None, received: Sequence[int]
) -> tuple[SimulationResult | None, int]:
    """Simulate the policy until a signal comes to any rank, and write the outcome. Collective.

    Args:
        result: The training.
        comm: The communicator.
        output_dir: Where the outcome is written, unless it is None.
        received: The signals that this rank received; grows meanwhile.

    Returns:
        The simulation and 0, or nothing and the number of the signal that ended it.
    """
    from cobre_shm.sddp.sharing import on_rank_zero
    from cobre_shm.sddp.simulation import simulate
    from cobre_shm.sddp.simulation_results import write_simulation

    case, problems = result.case, itertools.count()
    written: list[Path] = []

    def write(directory: Path) -> None:
        write_simulation(simulation, directory)
        written.append(directory)

    def check() -> None:
        # Ranks build their problems together, and each is tried when it is built. From then on
        # an error is as that of a problem without solution: raised on all ranks.
        if next(problems) >= case.stages and received:
            raise SolverError("the simulation was interrupted", context={"signal": received[0]})

    try:
        simulation = simulate(case, result.cuts, comm, output_dir=output_dir, check=check)
        if output_dir is not None:
            on_rank_zero(lambda: write(output_dir), comm)
    except SolverError as error:
        if "signal" not in error.context:
            raise
        return None, int(error.context["signal"])
    except CommError:
        # Whoever sent the signal to all ranks may have waited for us no longer.
        if not received:
            raise
        return simulation if written else None, received[0]
    return simulation, 0


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """Collect the first SIGINT and SIGTERM instead of ending by them; a second one ends at once.

    Yields:
        The numbers of the signals received, to be looked at between iterations or problems.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def take(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, take)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _opening_line(name: str, comm: Communicator, files: TrainingFiles) -> str:
    ranks = "1 rank" if comm.size == 1 else f"{comm.size} ranks"
    line = f"case {name}, {ranks}, backend {comm.backend}"
    path = files.resume_from
    if path is not None:
        line += f", {'goes on from' if path.is_file() else 'begins: there is no'} {path}"
    return line


def _summary(
    result: TrainingDetails,
    simulation: SimulationResult | None,
    options: argparse.Namespace,
    code: int,
) -> str:
    from cobre_shm.sddp.simulation_results import summary

    last = result.history[-1]
    directory = options.output_dir
    values: dict[str, Any] = {
        "case": result.case.name,
        "iterations": result.iterations,
        "stop_reason": result.stop_reason,
        "lower_bound": last.lower_bound,
        "upper_bound_mean": last.upper_bound_mean,
        "upper_bound_std": last.upper_bound_std,
        "upper_bound_half_width": last.half_width,
        "gap_percent": last.gap_percent,
        "ranks": result.ranks,
        "backend": result.backend,
        "seconds": result.seconds,
        "lp_solves": result.lp_solves,
        "lp_solves_per_second": result.lp_solves / result.seconds,
        "output_dir": None if directory is None else str(directory),
    }
    if simulation is not None:
        values["simulation"] = summary(simulation)
    if options.output_format == "json":
        return json.dumps(envelope("train", code, warnings=result.case.warnings, summary=values))
    lines = [
        "",
        f"stopped after {result.iterations} iterations: {result.stop_reason}",
        f"lower bound   {last.lower_bound:,.2f} $",
        f"upper bound   {last.upper_bound_mean:,.2f} $ +- {last.half_width:,.2f} (95 %)",
        f"gap           {last.gap_percent:.2f} %",
        f"time          {result.seconds:.2f} s, {result.lp_solves} LPs, "
        f"{values['lp_solves_per_second']:.0f} LPs/s",
        f"ran on        {result.ranks} rank(s), backend {result.backend}",
    ]
    if simulation is not None:
        costs = values["simulation"]
        lines.append(
            f"simulation    {costs['mean']:,.2f} $ +- {costs['ci95_half_width']:,.2f} (95 %), "
            f"{costs['scenarios']} scenarios"
        )
    elif code and result.stop_reason != "interrupted":
        lines.append("simulation    interrupted")
    lines.append(
        "files         none; give --output-dir DIR to keep the result"
        if directory is None
        else f"files         {directory}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
