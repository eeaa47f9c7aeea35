"""A wire between two network namespaces that loses, delays, doubles and swaps packets.

    python bad_wire.py FIRST SECOND DEVICE LOSS DELAY_MS JITTER_MS SWAP DOUBLE SEED

What netem does, for kernels without it: a TUN device called DEVICE in each namespace, and this
process between them, so the TCP at both ends is the kernel's own. LOSS, SWAP and DOUBLE are shares
of the packets that leave FIRST; what leaves SECOND goes through unharmed. It writes "ready", then
obeys lines on standard input, ``cut FIRST`` or ``cut SECOND``: nothing leaves there any more. It
ends with its standard input.
"""

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import sys
import time

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MAX_PACKET = 1 << 16

libc = ctypes.CDLL(None, use_errno=True)


def open_device(namespace, device):
    # The device belongs to the namespace in which it is opened.
    with open(f"/run/netns/{namespace}") as place:
        if libc.setns(place.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    request = struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI)
    fcntl.ioctl(descriptor, TUNSETIFF, request)
    return descriptor


def main(first, second, device, loss, delay_ms, jitter_ms, swap, double, seed):
    loss, delay_ms, jitter_ms, swap, double = map(float, (loss, delay_ms, jitter_ms, swap, double))
    chance = random.Random(int(seed))
    ends = [open_device(namespace, device) for namespace in (first, second)]
    names = {first: ends[0], second: ends[1]}
    cut = set()
    under_way, number = [], itertools.count()
    poller = select.poll()
    for descriptor in (0, *ends):
        poller.register(descriptor, select.POLLIN)
    print("ready", flush=True)
    while True:
        wait = None
        if under_way:
            wait = max(0.0, under_way[0][0] - time.monotonic()) * 1000
        for source, _ in poller.poll(wait):
            if source == 0:
                words = os.read(0, 1000).decode().split()
                if not words:
                    return
                cut.add(names[words[1]])
                continue
            packet = os.read(source, MAX_PACKET)
            if source in cut:
                continue
            copies, due = 1, time.monotonic()
            if source == ends[0]:
                if chance.random() < loss:
                    continue
                copies += chance.random() < double
                # One that is swapped does not wait, and so comes before those that do.
                if chance.random() >= swap:
                    due += (delay_ms + chance.uniform(-jitter_ms, jitter_ms)) / 1000
            target = ends[source == ends[0]]
            for _ in range(copies):
                heapq.heappush(under_way, (due, next(number), target, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(under_way)
            try:
                os.write(target, packet)
            except OSError:
                # The device is going down, or is full: one more that is lost.
                continue


if __name__ == "__main__":
    main(*sys.argv[1:])
