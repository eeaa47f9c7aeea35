"""What tests that feed parsers noise have in common."""

import os
import tracemalloc


def new_seed():
    """Return a seed, and print it for who has to repeat a failure."""
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    return seed


def check_memory(feed_noise, rounds, traced_rounds):
    """Feed noise; in some more rounds Python's memory may not grow by a megabyte."""
    seed = new_seed()
    feed_noise(rounds, seed)
    # Not all of them: to trace takes several times as long.
    tracemalloc.start()
    try:
        feed_noise(traced_rounds, seed + 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
