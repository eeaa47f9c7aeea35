"""Figures of the reference program on its own cases."""

from __future__ import annotations

import numpy as np
import pytest

from cobre_shm.sddp import load_case, simulate, train

DETERMINISTIC = (
    "d01-thermal-dispatch",
    "d02-single-hydro",
    "d03-two-hydro-cascade",
    "d04-transmission",
    "d14-block-factors",
    "d15-non-controllable-source",
    "d25-discount-rate",
)


@pytest.fixture(scope="module")
def toy(reference_cases):
    from cobre_shm.local import LocalCommunicator

    return train(load_case(reference_cases / "1dtoy"), LocalCommunicator())


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_case_reaches_reference_bound(reference_cases, expected, comm, name):
    result = train(reference_cases / name, comm)
    assert result.iterations == expected[name]["iterations"]
    assert result.lower_bound[-1] == pytest.approx(expected[name]["lower_bound"][-1], rel=1e-9)


def test_toy_case_follows_reference_in_every_iteration(toy, expected):
    series = expected["1dtoy"]
    assert toy.iterations == 128
    np.testing.assert_allclose(toy.lower_bound, series["lower_bound"], rtol=1e-9)
    np.testing.assert_allclose(toy.upper_bound_mean, series["upper_bound_mean"], rtol=1e-9)
    np.testing.assert_allclose(toy.upper_bound_std, series["upper_bound_std"], rtol=1e-7)
    assert toy.lower_bound[-1] == pytest.approx(2605295.121009, abs=1e-5)


def test_toy_simulation_costs_what_the_reference_costs(toy, expected, comm):
    simulation = simulate(toy.case, toy.cuts, comm)
    reference = expected["1dtoy"]["simulation_total_cost"]
    np.testing.assert_allclose(simulation.total_cost, reference, rtol=1e-9)


def test_four_reservoir_system_starts_as_reference(reference_cases, comm):
    result = train(reference_cases / "4ree", comm, iterations=1)
    assert result.lower_bound[0] == pytest.approx(60252226351.29029, rel=1e-9)
    assert result.upper_bound_mean[0] == pytest.approx(102803523496.72043, rel=1e-9)
    assert result.upper_bound_std[0] == pytest.approx(3195627770.3682866, rel=1e-9)


def test_four_reservoir_system_converges_to_reference(reference_cases, comm):
    result = train(reference_cases / "4ree", comm, iterations=64)
    assert result.lower_bound[15] == pytest.approx(60720875254, rel=1e-3)
    assert result.lower_bound[63] == pytest.approx(60839769631, rel=3e-4)


@pytest.mark.slow
def test_four_reservoir_system_converges_closely_to_reference(reference_cases, comm):
    result = train(reference_cases / "4ree", comm, iterations=256)
    assert result.lower_bound[255] == pytest.approx(60865459307, rel=1e-4)
