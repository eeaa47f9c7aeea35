"""What would be started, for ``--dry-run``."""

from __future__ import annotations

import os
import shlex
import sys

from cobre_shm.spawn.binding import format_numbers
from cobre_shm.spawn.environment import rank_variables
from cobre_shm.spawn.job import Job

__all__ = ["show"]


def show(job: Job) -> None:
    """Print commands that would start the same ranks by hand, and how we would start them."""
    text = _commands_of(job)
    # Names and values may be of any bytes. A notebook's output, for one, takes text only.
    binary = getattr(sys.stdout, "buffer", None)
    if binary is None:
        print(text)
    else:
        binary.write(os.fsencode(text + "\n"))


def _commands_of(job: Job) -> str:
    method = job.start_method if job.program.is_python else "spawn"
    lines = [f"# {job.size} rank{'s' * (job.size != 1)}, start method {method}"]
    lines += [f"unset {name}" for name in sorted(os.environ) if name not in job.environment]
    lines += [
        f"export {name}={shlex.quote(value)}"
        for name, value in sorted(job.environment.items())
        if os.environ.get(name) != value
    ]
    # What is made at the start is another one each time.
    own = {"COBRE_SHM_NAME": "/cobre-..."}
    if job.backend == "tcp":
        own = {"COBRE_TCP_COORDINATOR": job.network.coordinator or "127.0.0.1:..."}
    for local, rank in enumerate(job.ranks):
        names = rank_variables(
            job.backend, rank, job.group_size, local_rank=local, local_size=job.size
        )
        words = [f"{name}={value}" for name, value in {**own, **names}.items()]
        if cpus := job.cpus_of(rank):
            words += ["taskset", "-c", format_numbers(cpus)]
        lines.append(" ".join([*words, shlex.join(job.program.command)]))
    return "\n".join(lines)
