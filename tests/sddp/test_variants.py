"""The parts of the format one by one, against figures of the reference program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cobre_shm.sddp import train
from tests.sddp.variants import VARIANTS, write_variant

EXPECTED = json.loads(Path(__file__).with_name("variants.json").read_text())


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_agrees_with_the_reference(name, tmp_path, comm):
    result = train(write_variant(name, tmp_path / name), comm)
    expected = EXPECTED["variants"][name]
    assert result.lower_bound[0] == pytest.approx(expected["lower_bound"][0], rel=1e-9)
    assert result.upper_bound_mean[0] == pytest.approx(expected["upper_bound_mean"][0], rel=1e-9)
    assert result.upper_bound_std[0] == pytest.approx(expected["upper_bound_std"][0], rel=1e-7)
    # Where an optimum has several dual solutions the programs may add different, equally valid
    # cuts from the second iteration on.
    assert result.lower_bound[-1] == pytest.approx(expected["lower_bound"][-1], rel=1e-3)
