"""A program: one rank of the conformance suite on the backend that the environment chooses."""

import itertools
import os
from pathlib import Path

from cobre_shm import create_communicator
from cobre_shm.testing.conformance import run_all

groups = itertools.count()
base = Path(os.environ["COBRE_SPOOL_DIR"])


def make_communicator():
    # Every group of ranks meets in a directory of its own.
    os.environ["COBRE_SPOOL_DIR"] = str(base / f"group-{next(groups)}")
    return create_communicator()


print(*run_all(make_communicator), sep="\n")
