"""Random numbers against published and independently computed values."""

from __future__ import annotations

import numpy as np
import pytest

from cobre_shm.sddp.noise import (
    Pcg64,
    forward_seed,
    normal_vector,
    opening_seed,
    siphash13,
)


def test_forward_seed_matches_reference_value():
    assert forward_seed(42, 0, 0, 0) == 4418977803187233897


@pytest.mark.parametrize("length", range(20))
def test_siphash_depends_on_every_byte_and_on_the_length(length):
    data = bytes(range(length))
    hashes = {siphash13(data), siphash13(data + b"\0")}
    hashes |= {siphash13(data[:i] + b"\xff" + data[i + 1 :]) for i in range(length)}
    assert len(hashes) == length + 2


def test_opening_seeds_of_distinct_openings_and_stages_differ():
    seeds = {opening_seed(42, opening, stage) for opening in range(20) for stage in range(20)}
    assert len(seeds) == 400


@pytest.mark.parametrize("seed", [0, 1, 42, 2**64 - 1])
def test_generator_continues_as_numpy_does_from_the_same_state(seed):
    generator = Pcg64(seed)
    state, increment = generator.words
    reference = np.random.PCG64()
    reference.state = {
        "bit_generator": "PCG64",
        "state": {"state": state, "inc": increment},
        "has_uint32": 0,
        "uinteger": 0,
    }
    assert [generator.next_u64() for _ in range(200)] == reference.random_raw(200).tolist()


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 1000, 2**31 - 1])
def test_bounded_integers_stay_below_the_bound(bound):
    generator = Pcg64(7)
    assert all(0 <= generator.below(bound) < bound for _ in range(500))


def test_bounded_integers_reach_every_value_equally_often():
    generator = Pcg64(11)
    counts = np.bincount([generator.below(10) for _ in range(20_000)], minlength=10)
    assert abs(counts - 2000).max() < 5 * np.sqrt(2000)


def test_normal_deviates_have_normal_moments_and_tails():
    values = np.concatenate([normal_vector(seed, 500) for seed in range(200)])
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1.0) < 0.01
    assert abs((values**3).mean()) < 0.04
    assert abs((values**4).mean() - 3.0) < 0.08
    assert 0.001 < (abs(values) > 3.0).mean() < 0.0045
    assert (values > 3.654).any()
    assert (values < -3.654).any()


def test_normal_vector_is_a_prefix_of_a_longer_one():
    assert normal_vector(3, 5).tolist() == normal_vector(3, 9)[:5].tolist()
