"""What lives once per machine is what every rank would have made alone."""

from pathlib import Path

import numpy as np
import pytest

from cobre_shm.local import LocalCommunicator
from cobre_shm.sddp import load_case, series_digest, share_case, train
from cobre_shm.sddp.cut_store import CutStore
from cobre_shm.sddp.node_arrays import NodeArrays
from cobre_shm.sddp.noise_bounds import noise_bounds
from cobre_shm.sddp.passes import Passes
from cobre_shm.sddp.stage_lp import build_stage, cost_scale
from tests.sddp.editing import edit, write_table
from tests.support.ranks import results_of, run_ranks


def made_together(comm, path):
    """The tree and the bounds as bytes, and how much of them is private or can be written."""
    case = share_case(path, comm)
    node = NodeArrays(comm)
    tree = node.opening_tree(case)
    scale = cost_scale(case)
    made = [*tree]
    for t, noise in enumerate(tree):
        for mean_load in (False, True):
            lp = build_stage(case, t, scale)
            bounds = node.noise_bounds(case, lp, noise, mean_load=mean_load)
            made += [part for part in vars(bounds).values() if part is not None]
    assert all(part.flags.c_contiguous for part in made)
    return [part.tobytes() for part in made], *private_and_writable(comm, made)


def private_and_writable(comm, arrays):
    """How many arrays are not in memory of the group, and how many can be written."""
    shared = [
        [int(text, 16) for text in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if comm._segment.region_prefix in line
    ]
    private = [
        each
        for each in arrays
        if each.size and not any(first <= each.ctypes.data < last for first, last in shared)
    ]
    return len(private), sum(each.flags.writeable for each in arrays)


def made_alone(path):
    case = load_case(path)
    tree = NodeArrays(LocalCommunicator()).opening_tree(case)
    made = [*tree]
    for t, noise in enumerate(tree):
        for mean_load in (False, True):
            lp = build_stage(case, t, cost_scale(case))
            bounds = noise_bounds(case, lp, noise, mean_load=mean_load)
            made += [part for part in vars(bounds).values() if part is not None]
    return [part.tobytes() for part in made]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("method", ["penalty", "truncation"])
def test_tree_and_bounds_are_shared_and_have_the_same_bits(random_path, method, size):
    edit(
        random_path,
        "config.json",
        lambda content: content["modeling"]["inflow_non_negativity"].update(method=method),
    )
    expected = made_alone(random_path)
    for made, private, writable in results_of(run_ranks(made_together, size, "shm", random_path)):
        assert made == expected
        assert (private, writable) == (0, 0)


def noise_of_a_training(comm, path):
    passes = Passes(share_case(path, comm), comm, None, None)
    held = [*passes.tree]
    for solver in (*passes.solvers, passes.bound_solver):
        held += [part for part in vars(solver._noise).values() if part is not None]
    return private_and_writable(comm, held)


def test_all_noise_that_a_training_holds_is_shared(random_path):
    work = (noise_of_a_training, 2, "shm", random_path)
    assert results_of(run_ranks(*work)) == [(0, 0)] * 2


def test_tree_of_the_user_is_shared_too(random_path):
    tree = train(random_path, LocalCommunicator(), iterations=1).tree
    rows = [
        (stage, opening, entity, float(value))
        for stage, noise in enumerate(tree)
        for (opening, entity), value in np.ndenumerate(noise)
    ]
    columns = ["stage_id", "opening_index", "entity_index", "value"]
    write_table(random_path, "scenarios/noise_openings.parquet", columns, rows)
    expected = made_alone(random_path)
    assert expected[: len(tree)] == [noise.tobytes() for noise in tree]
    for made, private, writable in results_of(run_ranks(made_together, 3, "shm", random_path)):
        assert made == expected
        assert (private, writable) == (0, 0)


def keep_batches(comm, batches, rows, width):
    store = CutStore(comm, width)
    batch = np.empty((rows, width))
    kept = []
    for turn in range(batches):
        batch[:] = turn + np.arange(width)
        kept.append(store.keep(batch))
    comm.barrier()
    for turn, cuts in enumerate(kept):
        assert (cuts == turn + np.arange(width)).all(), turn
    bases = {id(cuts.base) for cuts in kept}
    return len(bases), *private_and_writable(comm, kept)


@pytest.mark.parametrize("size", [1, 3])
def test_cuts_are_kept_once_in_few_regions(size):
    work = (keep_batches, size, "shm", 300, 16, 50)
    for regions, private, writable in results_of(run_ranks(*work)):
        assert 5 <= regions <= 12
        assert (private, writable) == (0, 0)


def train_with_one_owner(comm, path):
    """Cuts that followers have found come out of memory that the leader has written."""
    result = train(path, comm, iterations=3)
    return series_digest(result)


def test_training_with_shared_cuts_has_the_same_bits(random_path):
    alone = series_digest(train(random_path, LocalCommunicator(), iterations=3))
    assert results_of(run_ranks(train_with_one_owner, 3, "shm", random_path)) == [alone] * 3
