"""Kernels for numba: waiting, the collectives, and reductions. No I/O.

Nobody imports them to call them: ``cobre_shm.compiler`` makes machine code of them, which
``cobre_shm.native`` loads. Only modules of constants (``context``, ``known``, ``mpi_words``,
``objects``, ``plans``), which do without numba, are for everybody.
"""
