"""The handshake without sockets: who is let in, and what any bytes do to it."""

import random
import struct

import pytest

from cobre_net.tcp import handshake, wire
from cobre_net.tcp.handshake import Applicant, Greeter, Identity, Refused
from cobre_net.tcp.wire import SEND, frame
from cobre_shm.layout import ALLREDUCE
from tests.tcp.fuzzing import check_memory, new_seed

KEY = b"the secret of this group"
ME = Identity(4242, "node-7")


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
    with pytest.raises(Refused, match=f"version 0 is not {wire.VERSION}") as caught:
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
    feed_noise(10_000, new_seed())


@pytest.mark.slow
def test_a_million_random_inputs_are_refused_and_cost_no_memory():
    check_memory(feed_noise, 1_000_000, 50_000)
