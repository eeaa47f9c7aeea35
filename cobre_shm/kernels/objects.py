"""What the fast road knows of the memory of Python's objects: offsets of fields, in bytes.

They are those of CPython 3.11 to 3.13 with the GIL, of numpy's array object and of the shm
communicator; before any is used, ``fastcall.py`` compares them with living objects.
"""

from __future__ import annotations

TYPE = 8
TUPLE_SIZE, TUPLE_ITEMS = 16, 24
LIST_SIZE, LIST_ITEMS = 16, 24
ARRAY_DATA, ARRAY_NDIM, ARRAY_DIMS, ARRAY_DESCR, ARRAY_FLAGS = 16, 24, 32, 56, 64

# Where ``_context`` lies in a communicator: right behind the head, see ``fastcall.py``.
STATE = 16
