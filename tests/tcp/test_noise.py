"""Random and damaged frames into every parser of data frames: an error that is known, no memory."""

import random

import pytest

from cobre_net.tcp import wire
from cobre_net.tcp.call import Call
from cobre_net.tcp.coordinator import Coordinator
from cobre_net.tcp.failure import Failure, Lost
from cobre_net.tcp.flows import Block, Different, Inflow, Ring, Spoke
from cobre_net.tcp.handshake import Identity
from cobre_net.tcp.link import Ended, Ending, FrameBuffer
from cobre_net.tcp.wire import END, RESULT, SEND, BadFrame, frame
from cobre_net.tcp.worker import Worker
from cobre_shm.layout import ALLREDUCE, BARRIER
from tests.tcp.fuzzing import check_memory, new_seed

TOTAL = 400
CALL = Call(ALLREDUCE, 0, 0, 7, TOTAL // 8)
PAYLOAD = bytes(range(200)) * 2
KNOWN = (Ended, BadFrame, Different, Spoke, Lost)


class Feed:
    """What a link looks like whose peer has sent some bytes and ended."""

    def __init__(self):
        self.rank, self.peer, self.sock = 1, Identity(4242, "node-7"), None
        self.buffer = FrameBuffer()

    def fill(self, data):
        self.rest = memoryview(data)
        self.buffer.received = self.unread = 0

    def receive(self, view, total):
        count = min(total, len(self.rest))
        view[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count

    def take(self, view, flags=0):
        count = self.receive(view, len(view))
        if not count:
            raise Ended("its connection ended")
        return count

    def send(self, data, flags=0):
        return len(data)

    def ending(self):
        return Ending()


def streams(kind):
    """Valid conversations for one round."""
    last = [CALL.head(kind, 1, 0, END)] if kind == RESULT else []
    whole = CALL.head(kind, 1, TOTAL) + PAYLOAD
    parts = b"".join(
        CALL.head(kind, 1, 100) + PAYLOAD[place : place + 100] for place in range(0, TOTAL, 100)
    )
    beat, probe = frame(wire.HEARTBEAT), frame(wire.PROBE)
    return [
        b"".join([whole, *last]),
        b"".join([beat, parts, beat, probe, *last]),
        Call(BARRIER).head(kind, 1, 0),
        Failure("raised", 1, text="x" * 50).to_frame(),
        frame(wire.SHUTDOWN),
    ]


def damaged(dice, valid):
    """Random bytes, or a valid conversation that was cut, stretched, or lost some bits."""
    if dice.random() < 0.2:
        return dice.randbytes(dice.randrange(64))
    data = bytearray(dice.choice(valid))
    for _ in range(dice.randrange(4)):
        # Mostly in the first head: damage of a payload is not looked for.
        data[dice.randrange(min(len(data), dice.choice((5, 41, 1000))))] ^= 1 << dice.randrange(8)
    if dice.random() < 0.3:
        del data[dice.randrange(len(data)) :]
    return bytes(data)


def stream_in(feed, kind, target):
    inflow = Inflow(feed, CALL, kind, 1, {0: target})
    while not inflow.is_done:
        inflow.pull()
        if isinstance(target, Ring):
            target.folded = target.ready


def feed_noise(rounds, seed):
    dice = random.Random(seed)
    feed, memory = Feed(), bytearray(TOTAL)
    # Made once: their buffers are all the memory that a round may need.
    centre, worker = Coordinator([feed], 1.0, 1.0), Worker(1, feed, 1.0, 1.0)
    sent, results = streams(SEND), streams(RESULT)
    done = 0
    for turn in range(rounds):
        is_centre = turn % 2 == 0
        feed.fill(damaged(dice, sent if is_centre else results))
        centre.sequence = worker.sequence = 0
        # As it came, as a part of a reduction, and on the short road.
        road = turn // 2 % 3
        try:
            if road == 0:
                stream_in(feed, SEND if is_centre else RESULT, Block(0, memoryview(memory)))
            elif road == 1:
                stream_in(feed, SEND, Ring(memoryview(memory)[:128], 0, TOTAL))
            elif is_centre:
                centre.exchange_equal(CALL, TOTAL, TOTAL, bool)
            else:
                worker.exchange(CALL, TOTAL, TOTAL)
            done += 1
        except KNOWN:
            continue
    return done


def test_noise_in_data_frames_is_a_known_error():
    assert 0 < feed_noise(6000, new_seed()) < 3000, "most are damaged, and some are not"


@pytest.mark.slow
def test_a_million_noises_in_data_frames_cost_no_memory():
    check_memory(feed_noise, 1_000_000, 50_000)
