"""Compiled kernels for Python: their addresses, found without numba.

What the compiler (``cobre_shm.compiler``) made of ``cobre_shm.kernels`` is stored as images of
machine code. Loading one is reading a file and mapping it; numba is imported where there is none.
"""
