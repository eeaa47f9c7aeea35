"""From the words of the command line to the exit code."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from cobre_shm.command_line import BAD_BACKEND, while_somebody_reads
from cobre_shm.cpus import count_cpus
from cobre_shm.errors import CobreError
from cobre_shm.spawn.errors import ProgramNotRunnable, exit_code_of
from cobre_shm.spawn.options import Options, parse, wants_json

__all__ = ["execute"]


def execute(words: Sequence[str]) -> int:
    """Do what the command line says, tell what was wrong, and return the exit code."""
    try:
        options = parse(words)
        if options.own.doctor:
            return while_somebody_reads(lambda: _examine(options))
        job = options.job()
        if options.own.dry_run:
            from cobre_shm.spawn.dry_run import show

            return while_somebody_reads(lambda: show(job))
        # Only now: --help and mistakes must not wait for what starting ranks needs.
        from cobre_shm.spawn.launcher import launch

        return launch(job)
    except (CobreError, OSError) as error:
        told = error if isinstance(error, CobreError) else _refused(error)
        _show(told, as_json=wants_json(words))
        return exit_code_of(told)


def _examine(options: Options) -> int:
    from cobre_shm.spawn.doctor import examine, has_passed, to_json, to_text

    size = options.own.size or count_cpus()
    as_json = options.own.output_format == "json" or options.own.json
    checks = []
    for check in examine(size, options.backend):
        checks.append(check)
        if not as_json:
            print(to_text(check), flush=True)
    if as_json:
        print(json.dumps(to_json(checks), indent=2), flush=True)
    return 0 if has_passed(checks) else BAD_BACKEND


def _refused(error: OSError) -> ProgramNotRunnable:
    """Any of the launcher's own calls may meet a limit; what was made has been given back."""
    return ProgramNotRunnable(
        f"The system refuses what the launcher needs: {error}",
        suggestion="Look at the limits of this process (ulimit -a) and of its container.",
    )


def _show(error: CobreError, *, as_json: bool) -> None:
    text = json.dumps(error.to_dict()) if as_json else f"cobre_shm.spawn: {error}"
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr)
