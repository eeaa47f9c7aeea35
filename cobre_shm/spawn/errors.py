"""What keeps ranks from being started.

CobreError
`-- LaunchError               exit_code
    |-- InvalidArguments      1
    |-- ProgramNotRunnable    126
    `-- ProgramNotFound       127
"""

from __future__ import annotations

from typing import ClassVar

from cobre_shm.command_line import BAD_BACKEND
from cobre_shm.errors import CobreError


class LaunchError(CobreError):
    """The launcher cannot start what was asked for.

    Attributes:
        exit_code: What the command line ends with.
    """

    kind = "LaunchError"
    exit_code: ClassVar[int] = 1


class InvalidArguments(LaunchError):
    """The command line is not understood, or a number of ranks or workers is out of range."""

    kind = "InvalidArguments"


class ProgramNotRunnable(LaunchError):
    """The program exists, but Python cannot run it, or the system refuses another process."""

    kind = "ProgramNotRunnable"
    exit_code = 126


class ProgramNotFound(LaunchError):
    """No such file or module."""

    kind = "ProgramNotFound"
    exit_code = 127


def exit_code_of(error: CobreError | OSError) -> int:
    """Return what the command line ends with for an error that is raised."""
    if isinstance(error, OSError):
        # Any of the launcher's own calls may meet a limit.
        return ProgramNotRunnable.exit_code
    return error.exit_code if isinstance(error, LaunchError) else BAD_BACKEND
