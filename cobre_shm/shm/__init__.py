"""The shm backend: ranks on one machine, over a shared memory segment.

Three rooms, each on the one before: ``membership`` is a rank's part in a group from joining to
leaving, ``collectives`` are its calls, ``communicator`` adds the memory that all ranks share.
"""

from cobre_shm.shm.communicator import ShmCommunicator

__all__ = ["ShmCommunicator"]
