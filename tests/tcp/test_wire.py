"""The frames and the handshake, without sockets: what is taken, and what any bytes do to them."""

import json
import os
import random
import socket
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobre_net.tcp import handshake, wire
from cobre_net.tcp.call import ALLREDUCE, Call
from cobre_net.tcp.failure import Failure
from cobre_net.tcp.flows import Block, Different, Inflow, Outflow, Spoke, look_for_word
from cobre_net.tcp.handshake import Applicant, Greeter, Identity, Refused
from cobre_net.tcp.link import Ended, Link, last_word
from cobre_net.tcp.wire import END, RESULT, SEND, BadFrame, check_prefix, frame
from cobre_shm.datatypes import dtype_tag
from cobre_shm.errors import CollectiveMismatch, CollectiveTimeout, RankFailed

KEY = b"the secret of this group"
ME = Identity(4242, "node-7")
CALL = Call(ALLREDUCE, 0, 0, 7, 1000)


def greeter(size=4, key=KEY, claim=lambda rank: None):
    return Greeter(key, size, claim)


def applicant(rank=2, size=4, key=KEY):
    return Applicant(key, rank, size, ME)


def converse(server, client):
    """Carry frames to and fro until both fall silent; return every frame that was said."""
    said = [client.hello()]
    to_server = said[0]
    while to_server:
        answer = b""
        for place in range(len(to_server)):
            # One byte at a time is how a slow network may deliver it.
            answer += server.feed(to_server[place : place + 1])
        said.append(answer)
        to_server = b""
        while answer:
            part, answer = answer[: client.limit], answer[client.limit :]
            to_server += client.feed(part)
        said.append(to_server)
    return said


# The handshake


def test_handshake_tells_each_side_who_the_other_is():
    server, client = greeter(), applicant()
    converse(server, client)
    assert server.rank == 2
    assert server.peer == ME
    assert client.is_known
    assert client.feed(handshake.go(Identity(1, "node-0"))[: client.limit]) == b""
    rest = handshake.go(Identity(1, "node-0"))[wire.PREFIX_BYTES :]
    client.feed(rest)
    assert client.coordinator == Identity(1, "node-0")


@pytest.mark.parametrize(("ours", "theirs"), [(KEY, b"other"), (KEY, b""), (b"", KEY)])
def test_other_secret_is_refused_and_nothing_is_learned(ours, theirs):
    server, client = greeter(key=ours), applicant(key=theirs)
    with pytest.raises(Refused, match="secret") as caught:
        converse(server, client)
    assert server.rank is None
    # The refusal says neither sizes nor ranks.
    assert b"4" not in caught.value.reply[6:]


def test_coordinator_that_does_not_know_the_secret_is_refused():
    challenge = frame(wire.CHALLENGE, struct.pack(">H16s", wire.VERSION, bytes(16)))
    client = applicant()
    client.feed(challenge[:5])
    client.feed(challenge[5:])
    forged = frame(wire.ACK, bytes(48))
    client.feed(forged[:5])
    with pytest.raises(Refused, match="coordinator's proof"):
        client.feed(forged[5:])
    assert not client.is_known


@pytest.mark.parametrize(
    ("rank", "size", "reason"),
    [
        (2, 5, "size 5"),
        (2, 3, "size 3"),
        (0, 4, "rank 0"),
        (4, 4, "rank 4"),
        (2**32 - 1, 4, "rank"),
    ],
)
def test_peer_that_does_not_fit_is_refused_by_name(rank, size, reason):
    with pytest.raises(Refused, match=reason) as caught:
        converse(greeter(), applicant(rank, size))
    assert caught.value.reply[4] == wire.REFUSE


def test_second_claim_to_a_rank_is_refused_and_told_who_has_it():
    server = greeter(claim=lambda rank: f"rank {rank} is taken by pid 17 on node-1")
    with pytest.raises(Refused, match="pid 17 on node-1"):
        converse(server, applicant())
    assert server.rank is None


def test_old_version_is_refused_by_name():
    hello = frame(wire.HELLO, struct.pack(">8sH16s", b"COBRENET", 0, bytes(16)))
    with pytest.raises(Refused, match="version 0 is not 1") as caught:
        greeter().feed(hello)
    client = applicant()
    client.feed(caught.value.reply[: client.limit])
    with pytest.raises(Refused, match="another version"):
        client.feed(caught.value.reply[5:])


def test_recorded_handshake_is_refused_every_time():
    said = converse(greeter(), applicant())
    hello, _, proof = said[:3]
    for _ in range(1000):
        server = greeter()
        server.feed(hello)
        with pytest.raises(Refused, match="secret"):
            server.feed(proof)
        assert server.rank is None


def test_what_the_coordinator_said_cannot_be_sent_back_to_it():
    """Reflection: answer its challenge with a proof that it made itself for the same nonces."""
    server, client = greeter(), applicant()
    said = converse(server, client)
    nonce = said[1][-16:]
    other = greeter()
    mirrored = frame(wire.HELLO, struct.pack(">8sH16s", b"COBRENET", wire.VERSION, nonce))
    other.feed(mirrored)
    coordinators_mac = said[3][-32:]
    proof = frame(wire.PROOF, struct.pack(">II32s", 2, 4, coordinators_mac))
    with pytest.raises(Refused, match="secret"):
        other.feed(proof)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x00" * 64,
        b"\xff" * 64,
        struct.pack(">IB", 0, wire.HELLO),
        struct.pack(">IB", 2**32 - 1, wire.HELLO),
        struct.pack(">IB", 27, wire.PROOF),
        struct.pack(">IB", 27, SEND | ALLREDUCE),
    ],
    ids=["http", "tls", "ssh", "zeros", "ones", "length 0", "4 GiB", "out of turn", "data"],
)
def test_stranger_is_refused_at_its_first_bytes_without_an_answer(data):
    with pytest.raises(Refused) as caught:
        greeter().feed(data[: wire.STRANGER_BYTES])
    assert caught.value.reply == b""


def test_stranger_never_has_more_than_64_bytes_of_room():
    server, client = greeter(), applicant()
    assert server.limit == wire.STRANGER_BYTES == 64
    hello = client.hello()
    server.feed(hello[:7])
    assert server.limit == 57
    challenge = server.feed(hello[7:])
    assert server.limit == 64
    client.feed(challenge[:5])
    proof = client.feed(challenge[5:])
    assert len(proof) <= 64


def feed_noise(rounds, seed):
    """Random bytes, and valid conversations with random damage, at every step of both sides."""
    dice = random.Random(seed)
    valid = [each for each in converse(greeter(), applicant()) if each]
    known = longest = 0
    for turn in range(rounds):
        if turn % 3 == 0:
            data = dice.randbytes(dice.randrange(1, 64))
        else:
            data = bytearray(dice.choice(valid))
            for _ in range(dice.randrange(1, 4)):
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            data = bytes(data[: dice.randrange(1, len(data) + 1)])
        side = greeter() if turn % 2 else applicant()
        if dice.random() < 0.5:
            if turn % 2:
                side.feed(applicant().hello())
            else:
                challenge = greeter().feed(side.hello())
                side.feed(challenge[:5])
                side.feed(challenge[5:])
        try:
            while data:
                part, data = data[: side.limit], data[side.limit :]
                side.feed(part)
        except Refused as error:
            longest = max(longest, len(error.reply))
        known += getattr(side, "rank", None) is not None or getattr(side, "is_known", False)
    assert known == 0, "noise was taken for a rank"
    assert longest <= 64


def test_noise_at_any_step_of_the_handshake_is_refused():
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    feed_noise(10_000, seed)


@pytest.mark.slow
def test_a_million_random_inputs_are_refused_and_cost_no_memory():
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    feed_noise(1000, seed)
    tracemalloc.start()
    try:
        feed_noise(1_000_000, seed)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


# Failures on the wire


@st.composite
def failures(draw):
    rank = st.integers(-1, 2**31)
    return Failure(
        kind=draw(st.sampled_from(["died", "left", "aborted", "raised", "interrupted", "damaged"])),
        rank=draw(rank),
        pid=draw(st.integers(0, 2**22)),
        host=draw(st.text(max_size=50)),
        value=draw(st.integers(-(2**31), 2**31)),
        text=draw(st.text(max_size=300)),
        did=draw(st.text(max_size=100)),
        missing=tuple(draw(st.lists(rank, max_size=5))),
        seconds=draw(st.floats(0, 1e6)),
        calls=tuple(draw(st.lists(st.text(max_size=50), max_size=5))),
    )


@settings(max_examples=30)
@given(failures())
def test_failure_survives_the_wire(failure):
    data = failure.to_frame()
    assert len(data) <= wire.MAX_CONTROL_BYTES + wire.PREFIX_BYTES
    assert Failure.from_body(data[wire.PREFIX_BYTES :]) == failure
    assert last_word(b"junk" + data, 4).failure == failure


def test_failure_of_very_many_ranks_still_fits_a_frame():
    failure = Failure("mismatch", calls=("allreduce(3 x float64, SUM)",) * 20_000)
    data = failure.to_frame()
    assert len(data) <= wire.MAX_CONTROL_BYTES + wire.PREFIX_BYTES
    assert Failure.from_body(data[wire.PREFIX_BYTES :]).calls[0] == failure.calls[0]


def test_each_kind_of_failure_becomes_its_exception():
    assert type(Failure("mismatch", calls=("a", "b")).to_error()) is CollectiveMismatch
    late = Failure("timeout", 0, missing=(3,), seconds=2.0, text="rank 3").to_error()
    assert type(late) is CollectiveTimeout
    assert (late.missing_ranks, late.seconds) == ([3], 2.0)
    died = Failure("died", 3, 99, "node-3", text="{0} % {text}").to_error()
    assert type(died) is RankFailed
    assert (died.rank, died.pid, died.context["host"]) == (3, 99, "node-3")
    assert "{0} % {text}" in str(died)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 20_000,
        b"1" * 20_000,
        json.dumps({"kind": "died", "rank": "3"}).encode(),
        Failure("died", 3).to_frame()[5:].replace(b'"died"', b'"__class__"'),
        Failure("died", 3).to_frame()[5:].replace(b'"rank": 3', b'"rank": 1e400'),
        Failure("died", 3).to_frame()[5:].replace(b'"rank": 3', b'"rank": 999999999999999999999'),
        Failure("died", 3).to_frame()[5:].replace(b'"missing": []', b'"missing": "abc"'),
        Failure("died", 3).to_frame()[5:].replace(b'"calls": []', b'"calls": [[]]'),
    ],
)
def test_what_tells_of_no_failure_is_a_bad_frame(body):
    with pytest.raises(BadFrame):
        Failure.from_body(body)


@given(st.binary(max_size=200), st.integers(0, 50))
def test_last_word_takes_any_bytes(data, skip):
    last_word(data, skip)


# Data frames


@pytest.fixture
def pair():
    """A link, and a raw socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        raw = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    link = Link(sock, 1, ME, 0.05)
    with raw:
        yield link, raw
    link.close()


def receive(link, raw, data, total=8000, kind=SEND):
    """Let ``data`` arrive and then the stream end; return what came and how that was taken."""
    raw.sendall(data)
    raw.shutdown(socket.SHUT_WR)
    target = bytearray(total)
    inflow = Inflow(link, CALL, kind, 5, {0: Block(0, memoryview(target))})
    try:
        while not inflow.is_done:
            inflow.pull(0)
    except (Ended, BadFrame, Different, Spoke) as error:
        return target, type(error)
    return target, None


def test_payload_in_frames_of_any_size_arrives_whole(pair):
    link, raw = pair
    payload = random.Random(1).randbytes(8000)
    data, place = b"", 0
    for count in (1, 0, 4000, 3999):
        part = payload[place : place + count]
        data += CALL.head(SEND, 5, count) + part + frame(wire.HEARTBEAT)
        place += count
    target, error = receive(link, raw, data)
    assert error is None
    assert bytes(target) == payload


HEAD = CALL.head(SEND, 5, 8000)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (CALL.head(SEND, 5, 8001), BadFrame),
        (CALL.head(SEND, 5, 2**32 - 38), BadFrame),
        (struct.pack(">I", 0) + HEAD[4:], BadFrame),
        (struct.pack(">I", 36) + HEAD[4:], BadFrame),
        (CALL.head(SEND, 5, 8, block=1), BadFrame),
        (CALL.head(SEND, 5, 0, block=END), BadFrame),
        (CALL.head(SEND, 6, 8000), Different),
        (CALL.head(SEND, 4, 8000), Different),
        (CALL.head(RESULT, 5, 8000), Different),
        (CALL._replace(reduction=2).head(SEND, 5, 8000), Different),
        (CALL._replace(dtype=8).head(SEND, 5, 8000), Different),
        (CALL._replace(elements=999).head(SEND, 5, 8000), Different),
        (CALL._replace(operation=9).head(SEND, 5, 8000), Different),
        (frame(wire.SHUTDOWN), Spoke),
        (Failure("raised", 1).to_frame(), Spoke),
        (frame(wire.HELLO, bytes(26)), BadFrame),
        (frame(0), BadFrame),
        (struct.pack(">IB", 2**31, wire.ABORT), BadFrame),
        (struct.pack(">IB", 0, wire.SHUTDOWN), BadFrame),
        (frame(wire.ABORT, b"x" * 100), BadFrame),
        (HEAD + bytes(100), Ended),
        (HEAD[:20], Ended),
        (b"", Ended),
    ],
)
def test_frame_that_does_not_belong_here_is_named_before_memory_is_taken(pair, data, expected):
    link, raw = pair
    tracemalloc.start()
    try:
        _, error = receive(link, raw, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error is expected
    assert peak < 2 * 8000 + 100_000


@settings(max_examples=50)
@given(st.data())
def test_no_damage_of_a_head_goes_unnoticed(data):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        raw = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    link = Link(sock, 1, ME, 0.05)
    payload = bytes(range(200)) * 2
    stream = bytearray()
    for place in range(0, 400, 100):
        stream += CALL.head(SEND, 5, 100) + payload[place : place + 100]
    heads = [place for place in range(len(stream)) if place % 141 < 41]
    place = data.draw(st.sampled_from(heads))
    stream[place] ^= data.draw(st.integers(1, 255))
    with raw:
        target, error = receive(link, raw, bytes(stream), total=400)
    link.close()
    assert error is not None, bytes(target)


def test_outflow_fills_frames_and_ends_only_when_it_may(pair):
    link, raw = pair
    whole = random.Random(2).randbytes(wire.FRAME_BYTES + 300_000)
    block = Block(3, memoryview(whole))
    outflow = Outflow(link, CALL, RESULT, 5, [block])
    came = bytearray()

    def drain():
        raw.setblocking(False)
        try:
            while True:
                came.extend(raw.recv(1 << 20))
        except BlockingIOError:
            pass

    assert not outflow.has_work()
    block.ready = 1000
    assert not outflow.has_work(), "a frame for so little"
    block.ready = len(whole)
    for _ in range(10_000):
        if not outflow.has_work():
            break
        outflow.push()
        drain()
    assert not outflow.is_done
    outflow.may_end = True
    while not outflow.is_done:
        outflow.push()
    for _ in range(1000):
        drain()
    place, payload, heads = 0, b"", []
    while place < len(came):
        head = wire.Head._make(wire.HEAD.unpack_from(came, place))
        heads.append((head.payload_bytes, head.block))
        payload += came[place + wire.HEAD_BYTES : place + 4 + head.length]
        place += 4 + head.length
    assert payload == whole
    assert heads == [(wire.FRAME_BYTES, 3), (300_000, 3), (0, END)]


def test_heartbeats_are_taken_out_wherever_they_come(pair):
    link, raw = pair
    raw.sendall(frame(wire.HEARTBEAT) * 3 + HEAD)
    while link.buffer.received < wire.HEAD_BYTES:
        room = link.buffer.frame[link.buffer.received : wire.HEAD_BYTES]
        link.buffer.received += link.take(room)
        look_for_word(link)
    assert bytes(link.buffer.frame[: wire.HEAD_BYTES]) == HEAD


def test_prefix_is_checked_against_what_may_come():
    limits = {3: (2, 10)}
    assert check_prefix(struct.pack(">IB", 3, 3), limits) == 2
    for length, tag in ((2, 3), (12, 3), (5, 4), (0, 3)):
        with pytest.raises(BadFrame):
            check_prefix(struct.pack(">IB", length, tag), limits)


def test_call_is_readable():
    call = Call(ALLREDUCE, 3, 0, dtype_tag(np.dtype("f8")), 12)
    assert str(call) == "allreduce(12 x float64, MAX)"
    assert Call.of(wire.Head._make(wire.HEAD.unpack(call.head(SEND, 1, 96)))) == call
