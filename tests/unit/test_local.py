"""The local backend, where it differs from a group of one rank elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from cobre_shm.errors import AllocationFailed, InvalidCommunicator
from cobre_shm.heap import HeapRegion
from cobre_shm.local import LocalCommunicator
from cobre_shm.testing.conformance import CHECKS, run_all


def test_local_communicator_is_rank_zero_of_one():
    comm = LocalCommunicator()
    assert (comm.rank, comm.size, comm.backend, comm.is_leader) == (0, 1, "local", True)
    assert repr(comm) == "<LocalCommunicator rank 0 of 1>"


def test_run_all_local_group_runs_every_check_for_one_rank():
    expected = {check.name for check in CHECKS.values() if check.min_size == 1 and not check.huge}
    assert set(run_all(LocalCommunicator)) == expected


@pytest.mark.parametrize("code", [0, 1, 77])
def test_abort_ends_the_process_with_its_code(code):
    with pytest.raises(SystemExit) as caught:
        LocalCommunicator().abort(code)
    assert caught.value.code == code


def test_allgatherv_in_place_returns_the_same_array():
    buf = np.arange(5.0)
    assert LocalCommunicator().allgatherv(buf, buf, [5], [0]) is buf
    assert buf.tolist() == [0, 1, 2, 3, 4]


def test_allreduce_result_is_no_alias_of_send():
    send = np.arange(3.0)
    result = LocalCommunicator().allreduce(send)
    send[:] = -1
    assert result.tolist() == [0, 1, 2]


def test_split_local_result_is_independent():
    comm = LocalCommunicator()
    node = comm.split_local()
    comm.close()
    node.barrier()
    with pytest.raises(InvalidCommunicator):
        comm.barrier()


def test_shared_region_is_private_and_stays_writable():
    comm = LocalCommunicator()
    region = comm.create_shared_region((2, 3), "i4")
    assert isinstance(region, HeapRegion)
    region.freeze()
    region.fill_slice(1, np.ones((1, 3)))
    assert region.array.tolist() == [[0, 0, 0], [1, 1, 1]]
    view = region.array
    region.close()
    region.close()
    assert region.array.size == 0
    assert view.tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("extent", [2**50, 2**61, 2**63])
def test_shared_region_too_large_names_the_bytes(extent):
    with pytest.raises(AllocationFailed) as caught:
        LocalCommunicator().create_shared_region(extent)
    assert caught.value.requested_bytes == 8 * extent
    assert caught.value.message.startswith(f"Allocation of {8 * extent} bytes failed: ")
