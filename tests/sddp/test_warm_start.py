"""A training that begins with the cuts of an earlier policy."""

from __future__ import annotations

import numpy as np
import pytest

from cobre_shm.local import LocalCommunicator
from cobre_shm.sddp import CheckpointError, load_case, series_digest, shipped_case_path, train
from tests.sddp.editing import edit, write_table
from tests.sddp.results import checkpoint_of, train_until
from tests.sddp.threads import run_ranks


def test_warm_start_begins_with_the_cuts_of_a_policy(random_path, tmp_path, comm):
    first = train(random_path, comm, iterations=5, output_dir=tmp_path / "out")
    second = train(random_path, comm, iterations=2, warm_start=tmp_path / "out" / "policy")
    assert second.lower_bound[0] >= first.lower_bound[-1] * (1 - 1e-12)
    for before, after in zip(first.cuts, second.cuts, strict=True):
        given = after.iteration == 0
        assert after.intercept[given].tolist() == before.intercept.tolist()
        assert after.coefficients[given].tolist() == before.coefficients.tolist()
    assert [len(cuts) for cuts in second.cuts] == [14, 14, 0]
    assert second.history[-1].cuts_active == 28


def test_warm_start_has_same_bits_on_any_number_of_ranks_and_after_a_pause(random_path, tmp_path):
    policy = tmp_path / "first" / "policy"
    train(random_path, LocalCommunicator(), iterations=3, output_dir=tmp_path / "first")
    alone = train(random_path, LocalCommunicator(), iterations=4, warm_start=policy)
    out = tmp_path / "out"
    for size, iterations in ((3, 2), (2, 4)):
        results = run_ranks(
            size,
            lambda comm, n=iterations: train_until(
                random_path, out, n, comm, warm_start=policy, resume=True
            ),
        )
    assert {series_digest(result) for result in results} == {series_digest(alone)}


def test_checkpoint_that_began_with_other_cuts_is_refused_on_every_rank(random_path, tmp_path):
    out, alone = tmp_path / "out", LocalCommunicator()
    for name, iterations in (("a", 1), ("b", 2)):
        train(random_path, alone, iterations=iterations, output_dir=tmp_path / name)
    policies = [tmp_path / name / "policy" for name in ("a", "b")]

    def begin(policy, comm=alone):
        return train_until(random_path, out, 3, comm, warm_start=policy, resume=True)

    train_until(random_path, out, 2)
    with pytest.raises(CheckpointError, match="began with other cuts"):
        begin(policies[0])
    checkpoint_of(out).unlink()
    train_until(random_path, out, 2, warm_start=policies[0])
    errors = run_ranks(3, lambda comm: begin(policies[1], comm))
    assert [type(error) for error in errors] == [CheckpointError] * 3
    assert begin(policies[0]).iterations == 3


@pytest.mark.parametrize("place", ["out", "gone"])
def test_policy_that_is_no_more_what_it_was_is_not_needed(random_path, tmp_path, comm, place):
    """It is that of the training's own output directory, or was removed."""
    out, policy = tmp_path / "out", tmp_path / place / "policy"
    train(random_path, comm, iterations=2, output_dir=tmp_path / place)
    train_until(random_path, out, 1, warm_start=policy)
    if place == "gone":
        (policy / "cuts.parquet").unlink()
    assert train_until(random_path, out, 2, warm_start=policy, resume=True).iterations == 2


def test_configuration_may_ask_for_a_warm_start(random_path, tmp_path, comm):
    out = tmp_path / "out"
    first = train(random_path, comm, iterations=5, output_dir=out)
    edit(random_path, "config.json", lambda content: content.update(policy={"mode": "warm_start"}))
    second = train(random_path, comm, iterations=1, output_dir=out)
    assert second.lower_bound[0] >= first.lower_bound[-1] * (1 - 1e-12)


def test_policy_of_another_system_is_refused(random_path, tmp_path, comm):
    out = tmp_path / "out"
    train(shipped_case_path(), comm, iterations=1, output_dir=out)
    with pytest.raises(CheckpointError, match="other plants or lags"):
        train(random_path, comm, iterations=1, warm_start=out / "policy")
    with pytest.raises(CheckpointError, match="no such file"):
        train(random_path, comm, iterations=1, warm_start=tmp_path / "absent")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(2, 0.0)], "cuts of stage 2"),
        ([(0, float("nan"))], "no number"),
        (None, "not readable"),
    ],
)
def test_damaged_policy_is_refused(random_path, tmp_path, comm, rows, words):
    policy = tmp_path / "out" / "policy"
    train(random_path, comm, iterations=1, output_dir=tmp_path / "out")
    if rows is None:
        (policy / "cuts.parquet").write_bytes(b"PAR1")
    else:
        size = load_case(random_path).state_size
        names = ["stage_id", "intercept", *(f"coef_{j}" for j in range(size))]
        names += ["iteration", "scenario"]
        write_table(policy, "cuts.parquet", names, [(*row, *np.zeros(size), 1, 0) for row in rows])
    with pytest.raises(CheckpointError, match=words):
        train(random_path, comm, iterations=1, warm_start=policy)


def test_cuts_beside_the_description_of_another_state_are_refused(random_path, tmp_path, comm):
    policy = tmp_path / "out" / "policy"
    train(random_path, comm, iterations=1, output_dir=tmp_path / "out")
    edit(policy, "state.json", lambda content: content["components"].pop())
    with pytest.raises(CheckpointError, match=r"coef_8, of which state\.json knows nothing"):
        train(random_path, comm, iterations=1, warm_start=policy)
