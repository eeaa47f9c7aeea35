"""What a communicator has met: an entry per dtype and reduction, filled by the Python methods.

A reduction has two, as programs write it in two ways, ``ReduceOp.MAX`` and ``"max"``.

Byte offsets in an entry of 64-bit integers. The table is private to the process.
"""

from __future__ import annotations

DESCR = 0  # address of the dtype object
OP = 8  # address of the ReduceOp, or of its name; 0: for what only copies
WHAT = 16  # first call word
TAG = 24
ITEM_BYTES = 32
REDUCTION = 40  # address of the kernel
BYTES = 48

# Programs use few dtypes; where there are more, the latest are known.
ENTRIES = 128
