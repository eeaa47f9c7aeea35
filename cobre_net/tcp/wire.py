"""The wire protocol, version 2. No sockets here.

Everything is a frame; integers are big-endian.

    0        4     5                       4 + length
    +--------+-----+-----------------------+
    | length | tag | body                  |        length: u32, of tag and body
    +--------+-----+-----------------------+

Joining (W: a rank from 1 on, C: the coordinator, which is rank 0). A stranger costs C at most
``STRANGER_BYTES`` of buffer, one descriptor and ``STRANGER_SECS``.

    W -> C   HELLO      magic 8 B, version u16, nonce 16 B
    C -> W   CHALLENGE  version u16, nonce 16 B
    W -> C   PROOF      rank u32, size u32, HMAC-SHA256 32 B
    C -> W   ACK        session 16 B, HMAC-SHA256 32 B
    W -> C   READY      session 16 B, pid u64, host name (UTF-8, at most 255 B)
    C -> W   GO         pid u64, host name; when all ranks are ready
    C -> W   REFUSE     reason u8, text; instead of any of C's frames, and the last one

A collective is one round. Each W sends its part, in one SEND frame or more; C compares what all
have called, and sends each W what it lacks, in one RESULT frame or more.

    SEND | operation, RESULT | operation (``cobre_shm.layout.OPERATIONS``)
    +--------+-----+----------+------+-------+--------+-------+---------+
    | length | tag | sequence | what | dtype | elem.  | block | payload |
    |  u32   | u8  |   u64    | u64  |  i64  |  i64   |  u32  |         |
    +--------+-----+----------+------+-------+--------+-------+---------+
    0        4     5          13     21      29       37      41

    sequence   of the collective, from 1: a frame of another one is damage
    what       reduction u32 (low), root or hash of counts or of shape u32 (high)
    dtype      ``cobre_shm.datatypes.dtype_tag``
    elem.      elements, of all ranks together for allgatherv
    block      RESULT: the rank whose data this is, 0 for a reduction; END: nothing more comes

A payload of at most ``SMALL_BYTES``, all blocks together, travels in one frame, and its result too
(block 0, blocks in rank order). A larger one travels in frames of up to ``FRAME_BYTES``; the
result's last frame is an empty one with block END, which C sends when all ranks have called and
the receiver's own part is there.

At any time between two frames:

    C -> W   HEARTBEAT  empty; only to a rank whose SEND has begun to arrive
    C -> W   PROBE      the same while C is outside; no sign that it will come, so no clock begins
                        anew: if W's process has ended, its kernel answers with a reset
    both     ABORT      the first failure, as JSON (``failure.py``); nothing follows
    both     SHUTDOWN   empty; the sender has closed its communicator; nothing follows
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = [
    "ABORT",
    "ACK",
    "BODY_BYTES",
    "CHALLENGE",
    "END",
    "FRAME_BYTES",
    "GO",
    "HEAD",
    "HEAD_BYTES",
    "HEARTBEAT",
    "HELLO",
    "MAX_CONTROL_BYTES",
    "PREFIX",
    "PREFIX_BYTES",
    "PROBE",
    "PROOF",
    "READY",
    "REFUSE",
    "RESULT",
    "SEND",
    "SHUTDOWN",
    "SMALL_BYTES",
    "STRANGER_BYTES",
    "STRANGER_SECS",
    "VERSION",
    "BadFrame",
    "Head",
    "check_prefix",
    "frame",
]

VERSION = 2

HELLO, CHALLENGE, PROOF, ACK, REFUSE, READY, GO = 1, 2, 3, 4, 5, 6, 7
HEARTBEAT, ABORT, SHUTDOWN, PROBE = 8, 9, 10, 11
# With the operation in the low bits.
SEND, RESULT = 0x20, 0x40

PREFIX = struct.Struct(">IB")
PREFIX_BYTES = PREFIX.size
HEAD = struct.Struct(">IBQQqqI")
HEAD_BYTES = HEAD.size
# What the length of a data frame counts beside the payload.
BODY_BYTES = HEAD_BYTES - 4

END = 0xFFFFFFFF
SMALL_BYTES = 1 << 15
FRAME_BYTES = 1 << 20
# So that it fits where a small frame does.
MAX_CONTROL_BYTES = SMALL_BYTES

STRANGER_BYTES = 64
STRANGER_SECS = 5.0


class BadFrame(Exception):
    """Bytes that are no frame of this protocol, or not one that may come here."""


class Head(NamedTuple):
    """The fields of a data frame's head."""

    length: int
    tag: int
    sequence: int
    what: int
    dtype: int
    elements: int
    block: int

    @property
    def payload_bytes(self) -> int:
        """Bytes that follow the head; negative in a frame that is too short to be one."""
        return self.length - BODY_BYTES


def frame(tag: int, body: bytes = b"") -> bytes:
    """Return a frame of the joining or control kind."""
    return PREFIX.pack(1 + len(body), tag) + body


def check_prefix(data: bytes | bytearray | memoryview, limits: dict[int, tuple[int, int]]) -> int:
    """Return the length of the body of the frame that begins with ``data``.

    Args:
        data: At least ``PREFIX_BYTES`` bytes.
        limits: Tags that may come here, with the smallest and largest length of their bodies.

    Raises:
        BadFrame: Another tag, or a length out of its range. Nothing needs to be read further, nor
            memory to be taken.
    """
    length, tag = PREFIX.unpack_from(data)
    if tag not in limits:
        raise BadFrame(f"tag {tag} where {sorted(limits)} may come")
    low, high = limits[tag]
    if not low <= length - 1 <= high:
        raise BadFrame(f"{length} bytes of tag {tag}: expected {low + 1} to {high + 1}")
    return int(length) - 1
