"""Kernels compiled by numba: waiting, the collectives, and reductions. No I/O.

Numba is imported here and nowhere else; ``jit`` is the one module that talks to its decorators.
"""
