"""What a collective is, in words that all ranks compare."""

from __future__ import annotations

from typing import NamedTuple

from cobre_net.tcp.wire import BODY_BYTES, HEAD, PREFIX_BYTES, Head
from cobre_shm.call_text import call_text

__all__ = ["Call"]

OPERATION_MASK = 0x0F


class Call(NamedTuple):
    """One collective, without its data. Ranks agree when these are equal.

    Attributes:
        operation: One of ``cobre_shm.layout.OPERATIONS``.
        reduction: Of an allreduce.
        extra: Root of a broadcast; hash of the counts of an allgatherv, of the shape of a region.
        dtype: Tag of the element type.
        elements: How many, of all ranks together for an allgatherv.
    """

    operation: int
    reduction: int = 0
    extra: int = 0
    dtype: int = 0
    elements: int = 0

    def head(self, kind: int, sequence: int, payload_bytes: int, block: int = 0) -> bytes:
        """Return the head of a data frame; ``kind`` is SEND or RESULT."""
        return HEAD.pack(
            BODY_BYTES + payload_bytes,
            kind | self.operation,
            sequence,
            self.reduction | self.extra << 32,
            self.dtype,
            self.elements,
            block,
        )

    def template(self, kind: int, payload_bytes: int) -> tuple[bytes, bytes]:
        """Return what stands before and behind the sequence number in a head for block 0."""
        head = self.head(kind, 0, payload_bytes)
        return head[:PREFIX_BYTES], head[PREFIX_BYTES + 8 :]

    @classmethod
    def of(cls, head: Head) -> Call:
        """Return the call that a head speaks of."""
        return cls(
            head.tag & OPERATION_MASK,
            head.what & 0xFFFFFFFF,
            head.what >> 32,
            head.dtype,
            head.elements,
        )

    def __str__(self) -> str:
        root = hashed = self.extra
        return call_text(self.operation, self.reduction, root, hashed, self.dtype, self.elements)
