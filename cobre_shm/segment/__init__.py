"""The POSIX segment of a group: creating, attaching, liveness, poison, recorder, regions.

Nothing here needs numba, so that the launcher can watch a group without it.
"""
