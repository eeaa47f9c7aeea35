"""Small collectives that are prepared once and done again and again."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from cobre_net.tcp.call import Call
from cobre_net.tcp.coordinator import Coordinator
from cobre_net.tcp.link import PAYLOAD, FrameBuffer
from cobre_net.tcp.reducing import fold_function
from cobre_net.tcp.star import Prepared
from cobre_net.tcp.worker import Worker
from cobre_shm.communicator import Array
from cobre_shm.datatypes import ReduceOp, dtype_tag
from cobre_shm.layout import ALLREDUCE

__all__ = ["SmallReduce", "payload"]


def payload(buffer: FrameBuffer, dtype: np.dtype[Any], count: int) -> Array:
    """Return the payload of a small frame as an array."""
    return np.frombuffer(buffer.memory, dtype, count, PAYLOAD)


class SmallReduce:
    """A small allreduce of one dtype, operation and number of elements, ready to be done again."""

    def __init__(self, star: Coordinator | Worker, send: Array, op: ReduceOp) -> None:
        call = Call(ALLREDUCE, int(op), 0, dtype_tag(send.dtype), send.size)
        self.part = payload(star.out, send.dtype, send.size)
        prepared = Prepared(star, call, send.nbytes, send.nbytes)
        if isinstance(star, Coordinator):
            self.result = self.part
            fold, address, count = fold_function(send.dtype, op), star.out.address, send.size
            self.run = partial(
                star.exchange_prepared,
                prepared,
                lambda link: fold(address, address, link.buffer.address, count, 1),
            )
        else:
            self.result = payload(star.links[0].buffer, send.dtype, send.size)
            self.run = partial(star.exchange_prepared, prepared)
