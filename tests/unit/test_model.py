"""The model of larger machines: bench/model.py."""

import dataclasses

import pytest

from bench import model

MEASURED = model.Link(1e-6, 1e-9, ((100.0, 2e-8), (1000.0, 3e-7)))


@pytest.mark.parametrize(
    ("nbytes", "gap"), [(0, 0.0), (50, 1e-8), (100, 2e-8), (550, 1.6e-7), (2000, 3e-7 + 1e-6)]
)
def test_bytes_between_measured_sizes_lie_on_straight_lines(nbytes, gap):
    assert MEASURED.gap(nbytes) == pytest.approx(gap)


def test_parameters_give_back_what_they_were_taken_from():
    found = {nbytes: 1e-6 + 1e-10 * nbytes**1.1 for nbytes in model.SIZES}
    machine = model.fit(found, found, cores=2)
    for nbytes, secs in found.items():
        for hierarchical in (False, True):
            guess = model.allgather_secs(machine, 2, nbytes, hierarchical=hierarchical)
            assert guess == pytest.approx(secs)
    assert model.read_machine(dataclasses.asdict(machine)) == machine


@pytest.mark.parametrize("passes", [16, 17])
def test_times_of_one_rank_and_of_two_tell_what_is_not_divided(passes):
    machine = dataclasses.replace(model.CLUSTER, ranks_per_node=8, cores=2)
    case = model.Case(12, passes, 40, 6272, 9e-3, 14e-6)
    alone = dataclasses.replace(case, pass_secs=9e-3 + 12 * 14e-6, cut_secs=0.0)
    two = sum(model.iteration_secs(case, machine, 2, hierarchical=False))
    found = model.divide(alone, machine, two)
    assert found.pass_secs == pytest.approx(case.pass_secs)
    assert found.cut_secs == pytest.approx(case.cut_secs)
    ideal = sum(model.iteration_secs(alone, machine, 2, hierarchical=False))
    found = model.divide(alone, machine, ideal)
    assert found.pass_secs == pytest.approx(alone.pass_secs)
    assert found.cut_secs == pytest.approx(0.0, abs=1e-12)


def test_ranks_that_share_a_core_wait_for_it_in_every_round_or_twice():
    machine = dataclasses.replace(model.CLUSTER, ranks_per_node=8, cores=2, sigma=1e-3)
    assert model.meeting_secs(machine, 8, hierarchical=True) == pytest.approx(8e-3)
    assert model.meeting_secs(machine, 8, hierarchical=False) == pytest.approx(3 * 4e-3)
    crowded = dataclasses.replace(machine, cores=1)
    assert model.meeting_secs(crowded, 2, hierarchical=True) == pytest.approx(2e-3)
