"""Payloads in frames: they arrive whole, and what does not belong here is named."""

import contextlib
import random
import select
import signal
import socket
import struct
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobre_net.tcp import link as link_module
from cobre_net.tcp import wire
from cobre_net.tcp.call import Call
from cobre_net.tcp.coordinator import Coordinator
from cobre_net.tcp.failure import Failure, Lost
from cobre_net.tcp.flows import Block, Different, Inflow, Outflow, Spoke, look_for_word
from cobre_net.tcp.handshake import Identity
from cobre_net.tcp.link import PAYLOAD, Ended, Link, last_word, say_last
from cobre_net.tcp.wire import END, RESULT, SEND, BadFrame, check_prefix, frame
from cobre_net.tcp.worker import Worker
from cobre_shm.datatypes import dtype_tag
from cobre_shm.layout import ALLREDUCE

ME = Identity(4242, "node-7")
CALL = Call(ALLREDUCE, 0, 0, 7, 1000)


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
    for _ in range(10_000):
        if outflow.is_done:
            break
        outflow.push()
    assert outflow.is_done
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


def test_heartbeats_and_probes_are_taken_out_wherever_they_come(pair):
    link, raw = pair
    raw.sendall((frame(wire.HEARTBEAT) + frame(wire.PROBE)) * 3 + HEAD)
    probes = 0
    while link.buffer.received < wire.HEAD_BYTES:
        room = link.buffer.frame[link.buffer.received : wire.HEAD_BYTES]
        link.buffer.received += link.take(room)
        probes += look_for_word(link)
    assert bytes(link.buffer.frame[: wire.HEAD_BYTES]) == HEAD
    assert probes == 3 * len(frame(wire.PROBE))


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


# Last words


def test_last_word_reaches_a_peer_that_reads_late_though_the_process_ends_at_once(
    pair, monkeypatch
):
    # On a busy machine it may take a second to read so much.
    monkeypatch.setattr(link_module, "_LAST_WORDS_SECS", 30.0)
    link, raw = pair
    failure = Failure("interrupted", 1, 4242, "node-7")
    # A frame is half sent, the peer has sent what will never be read, and it reads only later.
    link.frame, link.sent = [memoryview(bytes((8 << 20) + 100))], [100]
    raw.sendall(bytes(1000))
    got = bytearray()

    def read_late():
        time.sleep(0.2)
        with contextlib.suppress(ConnectionResetError):
            while data := raw.recv(1 << 16):
                got.extend(data)

    reader = threading.Thread(target=read_late)
    reader.start()
    say_last([link], failure.to_frame())
    # As the kernel does for a process that has ended.
    link.sock.close()
    reader.join(30)
    assert last_word(bytes(got), 8 << 20).failure == failure


class Interrupted(Exception):
    """What a signal handler raised."""


@pytest.fixture
def narrow():
    """Two sockets between which there is room for little."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.connect(listener.getsockname())
        sock, _ = listener.accept()
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
            yield sock, raw


def sender_of(kind, link, raw, timeout):
    """Return a function that sends a frame, and the frame."""
    payload = random.Random(3).randbytes(800_000 if kind == "stream" else wire.SMALL_BYTES)
    count = len(payload)
    call = CALL._replace(elements=count // 8)
    if kind in ("stream", "part"):
        star, tag = Worker(1, link, timeout, 60.0), SEND
    else:
        star, tag = Coordinator([link], timeout, 60.0), RESULT
        raw.sendall(call.head(SEND, 1, 0))
    if kind != "stream":
        star.out.memory[PAYLOAD : PAYLOAD + count] = payload
    send = {
        "stream": lambda: star.stream(call, memoryview(payload), {}),
        "part": lambda: star.exchange(call, count, count),
        "sum": lambda: star.exchange_equal(call, 0, count, bool),
        "blocks": lambda: star.exchange_parts(call, [0, 0], count, bool),
    }
    return send[kind], call.head(tag, 1, count) + payload


def heard_after_say_last(link, raw, word):
    """Read on one side while the other says its last word."""
    got = bytearray()

    def read():
        while data := raw.recv(1 << 16):
            got.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    say_last([link], word)
    reader.join(30)
    return bytes(got)


WORD = Failure("interrupted", 1, 4242, "node-7").to_frame()
SENDERS = ["stream", "part", "sum", "blocks"]


@pytest.mark.parametrize("kind", SENDERS)
def test_frame_that_was_begun_goes_as_it_is_before_the_last_word(narrow, kind, monkeypatch):
    """It may be all that a peer lacks: filled up with anything else, it would be taken for data."""
    monkeypatch.setattr(link_module, "_LAST_WORDS_SECS", 30.0)
    sock, raw = narrow
    link = Link(sock, 1, ME, 0.05)
    send, whole = sender_of(kind, link, raw, 0.5)
    with pytest.raises(Lost):
        send()
    assert 0 < link.unsent < len(whole)
    assert heard_after_say_last(link, raw, WORD) == whole + WORD
    assert not link.frame, "it keeps the user's memory"


@pytest.mark.parametrize("kind", SENDERS)
@pytest.mark.parametrize("when", ["in the first call", "in a later one"])
def test_interrupt_while_the_kernel_takes_a_frame_does_not_hide_how_much(
    narrow, kind, when, monkeypatch
):
    """The call then returns how much, and the handler raises before that can be looked at."""
    monkeypatch.setattr(link_module, "_LAST_WORDS_SECS", 30.0)
    sock, raw = narrow
    is_first = when == "in the first call"
    if is_first:
        monkeypatch.setattr(link_module, "FIRST_SECS", 30.0)
    link = Link(sock, 1, ME, 30.0 if is_first else 0.05)
    send, whole = sender_of(kind, link, raw, 20.0)
    main = threading.main_thread().ident

    def interrupt_when_begun():
        # There is no room for all, so the call sleeps or is about to.
        select.select([raw], [], [], 30)
        while not is_first and not link.sent:
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGALRM)

    def handle(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handle)
    thread = threading.Thread(target=interrupt_when_begun)
    try:
        thread.start()
        with pytest.raises(Interrupted):
            send()
    finally:
        signal.signal(signal.SIGALRM, before)
        thread.join()
    assert 0 < link.unsent < len(whole)
    assert heard_after_say_last(link, raw, WORD) == whole + WORD


def test_frame_of_which_nothing_was_sent_is_not_begun(narrow):
    sock, raw = narrow
    link = Link(sock, 1, ME, 0.05)
    filled = 0
    with contextlib.suppress(Ended):
        while count := link.put([bytes(1000)]):
            filled += count
    outflow = Outflow(link, CALL, SEND, 5, [Block(0, memoryview(bytes(8000)), 8000)])
    assert outflow.push() == 0
    assert link.unsent == 0
    assert heard_after_say_last(link, raw, WORD) == bytes(filled) + WORD


def test_peer_that_has_said_its_last_word_is_not_told_another(narrow, monkeypatch):
    """It reads no more, so this rank would try in vain for as long as it may."""
    monkeypatch.setattr(link_module, "_LAST_WORDS_SECS", 600.0)
    sock, raw = narrow
    link = Link(sock, 1, ME, 0.05)
    send, whole = sender_of("stream", link, raw, 30.0)

    def speak():
        select.select([raw], [], [], 30)
        raw.sendall(WORD)

    speaking = threading.Thread(target=speak)
    speaking.start()
    with pytest.raises(Lost) as caught:
        send()
    speaking.join()
    assert caught.value.failure.kind == "interrupted"
    assert 0 < link.unsent < len(whole)
    telling = threading.Thread(target=say_last, args=([link], WORD), daemon=True)
    telling.start()
    telling.join(60)
    assert not telling.is_alive()
    assert not link.frame, "it keeps the user's memory"
