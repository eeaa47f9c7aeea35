"""Random numbers that are equal, bit for bit, on every machine and for every rank.

Nothing here keeps a global state: each noise vector has a generator of its own, seeded with a
hash of what the vector is for. So a rank draws exactly the numbers that any other rank would
draw for the same iteration, scenario and stage.

Sources:
    SipHash-1-3: J.-P. Aumasson, D. J. Bernstein, "SipHash: a fast short-input PRF" (2012).
    PCG64 XSL-RR 128/64: M. E. O'Neill, "PCG: A Family of Simple Fast Space-Efficient
        Statistically Good Algorithms for Random Number Generation", HMC-CS-2014-0905 (2014).
    Normal deviates: J. A. Doornik, "An Improved Ziggurat Method to Generate Normal Random
        Samples" (2005), with 256 boxes.
    Seeds, draw order and rounding of the tables are those of the Cobre project,
        https://github.com/cobre-rs/cobre.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import numpy.typing as npt

_U32 = 0xFFFF_FFFF
_U64 = 0xFFFF_FFFF_FFFF_FFFF
_U128 = (1 << 128) - 1

# The words of pi-free "nothing up my sleeve" text in the SipHash paper:
# "somepseudorandomlygeneratedbytes"; with a zero key they are the initial state.
_SIP_STATE = (
    0x736F6D6570736575,
    0x646F72616E646F6D,
    0x6C7967656E657261,
    0x7465646279746573,
)

_PCG_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
_SEED_MULTIPLIER = 6364136223846793005
_SEED_INCREMENT = 11634580027462260723

_TAIL_START = 3.6541528853610088
_BOX_AREA = 0.00492867323399
_BOXES = 256

_SEED_FORMAT = struct.Struct("<QII")
SIMULATION_SCENARIO_OFFSET = 2_147_483_647


def siphash13(data: bytes) -> int:
    """Return the 64-bit SipHash-1-3 of ``data`` under the zero key."""
    v0, v1, v2, v3 = _SIP_STATE
    tail = len(data) % 8
    body = len(data) - tail
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, body, 8)]
    words.append(int.from_bytes(data[body:], "little") | (len(data) & 0xFF) << 56)
    for word in words:
        v3 ^= word
        v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
        v0 ^= word
    v2 ^= 0xFF
    for _ in range(3):
        v0, v1, v2, v3 = _sip_round(v0, v1, v2, v3)
    return v0 ^ v1 ^ v2 ^ v3


def _sip_round(v0: int, v1: int, v2: int, v3: int) -> tuple[int, int, int, int]:
    v0 = (v0 + v1) & _U64
    v1 = ((v1 << 13 | v1 >> 51) & _U64) ^ v0
    v0 = (v0 << 32 | v0 >> 32) & _U64
    v2 = (v2 + v3) & _U64
    v3 = ((v3 << 16 | v3 >> 48) & _U64) ^ v2
    v0 = (v0 + v3) & _U64
    v3 = ((v3 << 21 | v3 >> 43) & _U64) ^ v0
    v2 = (v2 + v1) & _U64
    v1 = ((v1 << 17 | v1 >> 47) & _U64) ^ v2
    v2 = (v2 << 32 | v2 >> 32) & _U64
    return v0, v1, v2, v3


def opening_seed(tree_seed: int, opening: int, stage_id: int) -> int:
    """Return the seed of one opening of the tree; the stage counts by its id."""
    return siphash13(_SEED_FORMAT.pack(tree_seed & _U64, opening, stage_id & _U32))


def forward_seed(tree_seed: int, iteration: int, scenario: int, stage_index: int) -> int:
    """Return the seed of one forward draw; the stage counts by its position."""
    packed = struct.pack("<QIII", tree_seed & _U64, iteration, scenario, stage_index)
    return siphash13(packed)


def _ziggurat_tables() -> tuple[list[float], list[float]]:
    edges = [0.0] * (_BOXES + 1)
    edges[0] = _BOX_AREA / math.exp(-_TAIL_START * _TAIL_START / 2)
    edges[1] = _TAIL_START
    for i in range(2, _BOXES):
        previous = edges[i - 1]
        height = _BOX_AREA / previous + math.exp(-previous * previous / 2)
        edges[i] = math.sqrt(-2 * math.log(height))
    # The reference tables are decimal text with 18 places; rounding the same way makes
    # every acceptance test agree.
    edges = [float(f"{x:.18f}") for x in edges]
    heights = [float(f"{math.exp(-x * x / 2):.18f}") for x in edges]
    return edges, heights


_EDGES, _HEIGHTS = _ziggurat_tables()


class Pcg64:
    """The PCG64 XSL-RR 128/64 generator, seeded from one 64-bit integer."""

    __slots__ = ("_increment", "_state")

    def __init__(self, seed: int) -> None:
        """Expand ``seed`` into state and stream by a small linear generator."""
        words = []
        for _ in range(8):
            seed = (seed * _SEED_MULTIPLIER + _SEED_INCREMENT) & _U64
            shifted = ((seed >> 18 ^ seed) >> 27) & _U32
            turn = seed >> 59
            words.append((shifted >> turn | shifted << (-turn & 31)) & _U32)
        low, high, stream_low, stream_high = (words[i] | words[i + 1] << 32 for i in range(0, 8, 2))
        self._increment = (stream_low | stream_high << 64) | 1
        self._state = ((low | high << 64) + self._increment) & _U128
        self._step()

    @property
    def words(self) -> tuple[int, int]:
        """The 128-bit state and the 128-bit odd increment."""
        return self._state, self._increment

    def _step(self) -> None:
        self._state = (self._state * _PCG_MULTIPLIER + self._increment) & _U128

    def next_u64(self) -> int:
        """Return the next 64 random bits."""
        self._step()
        state = self._state
        folded = state >> 64 ^ state & _U64
        turn = state >> 122
        return (folded >> turn | folded << (-turn & 63)) & _U64

    def next_u32(self) -> int:
        """Return the low half of the next 64 random bits."""
        return self.next_u64() & _U32

    def below(self, bound: int) -> int:
        """Return an integer in ``[0, bound)``; the bias is below ``bound / 2**64``."""
        product = self.next_u32() * bound
        result, low = product >> 32, product & _U32
        if low > (1 << 32) - bound:
            extra = self.next_u32() * bound
            result += (low + (extra >> 32)) >> 32
        return result

    def standard_normal(self) -> float:
        """Return a normal deviate of mean 0 and variance 1."""
        while True:
            bits = self.next_u64()
            box = bits & 0xFF
            signed = _unit_float(bits >> 12, 1024) - 3.0
            x = signed * _EDGES[box]
            if abs(x) < _EDGES[box + 1]:
                return x
            if box == 0:
                return self._tail(negative=signed < 0)
            uniform = (self.next_u64() >> 11) * 2.0**-53
            lower, upper = _HEIGHTS[box], _HEIGHTS[box + 1]
            if upper + (lower - upper) * uniform < math.exp(-x * x / 2):
                return x

    def _tail(self, *, negative: bool) -> float:
        while True:
            x = math.log(self._open_unit()) / _TAIL_START
            y = math.log(self._open_unit())
            if -2 * y >= x * x:
                return x - _TAIL_START if negative else _TAIL_START - x

    def _open_unit(self) -> float:
        return _unit_float(self.next_u64() >> 12, 1023) - (1 - 2.0**-53)


def _unit_float(mantissa: int, exponent: int) -> float:
    value: float = struct.unpack("<d", struct.pack("<Q", exponent << 52 | mantissa))[0]
    return value


def normal_vector(seed: int, size: int) -> npt.NDArray[np.float64]:
    """Return ``size`` independent standard normal deviates drawn from ``seed``."""
    generator = Pcg64(seed)
    return np.array([generator.standard_normal() for _ in range(size)], dtype=np.float64)
