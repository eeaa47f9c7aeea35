"""The words of a plan: a collective whose arguments were checked when it was made."""

from __future__ import annotations

KERNEL = 0  # address
ARITY = 1  # of the kernel's own arguments
CONTEXT = 2  # address
RESULT = 3  # address of the object that a call returns
START = 4  # address of a Python function of the plan: the whole operation
FINISH = 5  # the same for the rest of one that has begun
NBYTES = 6  # of the payload
ARGUMENTS = 7  # eight of them
WORDS = 15
