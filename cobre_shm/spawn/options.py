"""The command line of the launcher, turned into a job."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence

from cobre_shm.cpus import count_cpus
from cobre_shm.spawn.binding import cpus_of_ranks
from cobre_shm.spawn.environment import check_variable, common_environment, parse_setting
from cobre_shm.spawn.errors import InvalidArguments
from cobre_shm.spawn.flags import Parser, make_parser
from cobre_shm.spawn.job import Job
from cobre_shm.spawn.network import Network
from cobre_shm.spawn.program import resolve_program

__all__ = ["Options", "parse", "wants_json"]


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
        self._check_output()
        environment = self._environment()
        return Job(
            program=resolve_program(
                self.words, is_python=not own.no_python, environment=environment
            ),
            size=own.size,
            environment=environment,
            backend=self.backend,
            network=self._network({**os.environ, **environment}),
            start_method=own.start_method,
            preload=own.preload,
            cpus=cpus_of_ranks(own.bind_to, own.size),
            labels=own.label,
            timestamps=own.timestamps,
            output_dir=own.output_dir,
            tee=own.tee,
            monitor=own.monitor,
            shown_ranks=own.show_ranks,
            grace=own.grace,
            timeout=own.timeout,
            max_restarts=own.max_restarts,
            json_errors=own.output_format == "json" or own.json,
            events=own.events,
            json_events=own.json,
        )

    @property
    def backend(self) -> str:
        """In which the ranks are to meet, ``shm`` or ``tcp``."""
        own = self.own
        if own.backend != "auto":
            return str(own.backend)
        return "tcp" if own.nnodes > 1 or own.coordinator is not None else "shm"

    def _check_output(self) -> None:
        own = self.own
        if own.tee and own.output_dir is None:
            raise InvalidArguments("--tee shows what --output-dir writes: give both")
        if own.monitor and (own.output_dir is None or own.tee):
            raise InvalidArguments(
                "--monitor needs the place where the output is shown: "
                "give --output-dir D, and not --tee",
                suggestion="To see both: python -m cobre_shm.top, in another terminal",
            )
        if own.monitor and self.backend != "shm":
            raise InvalidArguments("--monitor looks into shared memory, and tcp has none")
        absent = [rank for rank in own.show_ranks or () if rank >= own.nnodes * own.size]
        if absent:
            raise InvalidArguments(
                f"--show-ranks: there is no rank {min(absent)}",
                suggestion=f"Ranks are numbered 0..{own.nnodes * own.size - 1}",
            )

    def _network(self, env: Mapping[str, str]) -> Network:
        own = self.own
        network = Network(own.nnodes, own.node_rank, own.coordinator)
        if self.backend == "tcp":
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
            check_variable("-x", name, value)
            # A name alone passes on what we have, which happens anyway.
            if value is not None:
                settings[name] = value
            elif name not in os.environ:
                raise InvalidArguments(f"-x {name}: it is not set here; give {name}=VALUE")
        for name in own.unset:
            check_variable("--unset-env", name)
        if own.stall_warn is not None:
            settings[f"COBRE_{self.backend.upper()}_STALL_WARN_SECS"] = f"{own.stall_warn:g}"
        threads = {None: 1, "keep": None, "auto": max(1, count_cpus() // own.size)}
        return common_environment(
            os.environ,
            backend=self.backend,
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
    parser, valued = make_parser()
    own, program = split(words, valued)
    for word in own:
        # argparse drops such a value and leaves an empty list.
        if word.endswith("=--"):
            raise InvalidArguments(f"{word}: -- is no value, it ends the options")
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
        _, valued = make_parser()
    index = 0
    while index < len(words) and words[index].startswith("-") and words[index] != "-":
        word = words[index] = _with_dashes(words[index])
        if word == "--":
            return words[:index], words[index + 1 :]
        if word in ("-m", "-c"):
            break
        if word[:2] in ("-m", "-c"):
            return words[:index], [word[:2], word[2:], *words[index + 1 :]]
        index += 2 if word in valued else 1
    return words[:index], words[index:]


def _with_dashes(word: str) -> str:
    """Return an option as it is spelled here: with torchrun, ``--max_restarts`` is as good."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def wants_json(words: Sequence[str]) -> bool:
    """Whether errors are wanted as JSON: the options as a whole may be what is wrong."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output-format", default="text")
    parser.add_argument("--json", action="store_true")
    with contextlib.suppress(InvalidArguments):
        known, _ = parser.parse_known_args(split(words)[0])
        return bool(known.output_format == "json" or known.json)
    return False
