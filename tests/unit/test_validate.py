"""Argument checks: what is refused, with which error, and that nothing is copied."""

from __future__ import annotations

import array
import ctypes
import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import (
    AllocationFailed,
    CommError,
    InvalidBufferSize,
    InvalidDatatype,
    InvalidRoot,
)
from cobre_shm.testing.conformance.foreign import InterfaceOnly, unaligned
from cobre_shm.validate import (
    as_buffer,
    check_allgatherv,
    check_allreduce,
    check_broadcast,
    check_gather_buffers,
    check_region,
)

TOP = 2**63 - 1

_near_limits = st.sampled_from([0, 1, 2, 5, TOP - 1, TOP, TOP + 1, 2**64, -1, -(2**63), -(2**70)])
_numbers = st.one_of(st.integers(0, 8), st.integers(-2, 40), _near_limits)
_lists = st.integers(1, 6).flatmap(lambda n: st.lists(_numbers, min_size=n, max_size=n))


def is_valid(size, rank, send_size, room, counts, displs):
    """The rule, in numbers without a limit."""
    if len(counts) != size or len(displs) != size:
        return False
    if any(not 0 <= number <= TOP for number in [*counts, *displs]):
        return False
    if counts[rank] != send_size:
        return False
    blocks = sorted(
        (displ, displ + count) for count, displ in zip(counts, displs, strict=True) if count
    )
    if any(first[1] > second[0] for first, second in pairwise(blocks)):
        return False
    needed = max(displ + count for count, displ in zip(counts, displs, strict=True))
    return needed <= room


@given(_lists, _lists, st.integers(0, 5), st.integers(0, 9), st.integers(0, 60))
@example([1, TOP], [0, 1], 0, 1, 60)
@example([1, 1], [TOP, 0], 0, 1, 60)
@example([0, 1], [TOP, 0], 0, 0, 60)
@example([2, 0, 2], [0, 1, 2], 0, 2, 4)
def test_check_allgatherv_any_layout_accepted_when_valid(counts, displs, rank, send_size, room):
    size = len(counts)
    rank %= size
    if send_size == 9:
        send_size = min(max(counts[rank], 0), 100)
    send, recv = np.zeros(send_size), np.zeros(room)
    if is_valid(size, rank, send_size, room, counts, displs):
        layout = check_allgatherv(rank, size, send, recv, counts, displs)
        assert layout.send is send
        assert layout.recv is recv
        assert layout.counts.tolist() == counts
        assert layout.displs.tolist() == displs
        assert layout.counts.dtype == layout.displs.dtype == np.int64
    else:
        with pytest.raises(InvalidBufferSize):
            check_allgatherv(rank, size, send, recv, counts, displs)


@given(_lists, st.integers(0, 5))
@example([1, TOP, TOP, 1], 0)
@example([TOP, 1], 1)
def test_check_allgatherv_packed_layout_accepted_when_sum_is_in_range(counts, rank):
    size = len(counts)
    rank %= size
    send = np.zeros(min(max(counts[rank], 0), 100))
    recv = np.zeros(100)
    packed = [sum(counts[:before]) for before in range(size)]
    if is_valid(size, rank, send.size, recv.size, counts, packed):
        layout = check_allgatherv(rank, size, send, recv, counts, None)
        assert layout.displs.tolist() == packed
    else:
        with pytest.raises(InvalidBufferSize):
            check_allgatherv(rank, size, send, recv, counts, None)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5), st.sampled_from("bBhHiIlLqQ"), st.data()
)
def test_check_allgatherv_counts_of_any_integer_dtype_accepted(counts, code, data):
    rank = data.draw(st.integers(0, len(counts) - 1))
    layout = check_allgatherv(
        rank, len(counts), np.zeros(counts[rank]), None, np.array(counts, code), None
    )
    assert layout.counts.tolist() == counts
    assert layout.recv.size == sum(counts)


@pytest.mark.parametrize(
    "counts",
    [
        None,
        2,
        "2",
        b"2",
        [[2]],
        [],
        [2, 2],
        [2.0],
        [True],
        ["2"],
        [None],
        [[2], [3, 4]],
        [object()],
    ],
)
def test_check_allgatherv_malformed_counts_refused(counts):
    with pytest.raises(InvalidBufferSize) as caught:
        check_allgatherv(0, 1, np.zeros(2), np.zeros(2), counts, None)
    json.dumps(caught.value.to_dict())
    assert pickle.loads(pickle.dumps(caught.value)).context == caught.value.context


def test_check_allgatherv_wrong_send_size_names_both_sizes():
    with pytest.raises(InvalidBufferSize) as caught:
        check_allgatherv(1, 2, np.zeros(3), np.zeros(9), [1, 4], None)
    assert (caught.value.operation, caught.value.expected, caught.value.actual) == (
        "allgatherv",
        4,
        3,
    )


def test_check_allgatherv_recv_left_out_holds_every_block():
    layout = check_allgatherv(0, 2, np.zeros(2, "i4"), None, [2, 3], [10, 0])
    assert layout.recv.shape == (12,)
    assert layout.recv.dtype == np.int32


def test_result_for_which_there_is_no_memory_is_refused():
    with pytest.raises(AllocationFailed):
        check_allgatherv(0, 2, np.zeros(2), None, [2, 1 << 56], None)


@pytest.mark.parametrize(
    ("start", "is_allowed"), [(0, False), (3, False), (4, True), (5, False), (7, False), (8, True)]
)
def test_check_allgatherv_overlap_allowed_as_own_block_only(start, is_allowed):
    memory = np.zeros(12)
    send, recv = memory[start : start + 4], memory[:8]
    if is_allowed:
        check_allgatherv(1, 2, send, recv, [4, 4], None)
    else:
        with pytest.raises(InvalidBufferSize):
            check_allgatherv(1, 2, send, recv, [4, 4], None)


def test_check_gather_buffers_mistakes_refused_without_counts():
    send = np.zeros(2)
    with pytest.raises(InvalidDatatype):
        check_gather_buffers(2, send, np.zeros(4, "f4"), None)
    with pytest.raises(InvalidDatatype):
        check_gather_buffers(2, send, np.zeros(8)[::2], None)
    with pytest.raises(InvalidBufferSize):
        check_gather_buffers(2, send, None, [0])
    with pytest.raises(InvalidBufferSize):
        check_gather_buffers(2, send, None, [0, -1])


def test_check_gather_buffers_right_arguments_returned_themselves():
    send, recv = np.zeros(2), np.zeros(4)
    checked = check_gather_buffers(2, send, recv, [0, 2])
    assert checked[0] is send
    assert checked[1] is recv
    assert check_gather_buffers(2, send, None, None)[1] is None


@pytest.mark.parametrize(
    "make",
    [
        lambda memory: memory,
        lambda memory: memory.reshape(2, 4),
        bytearray,
        lambda memory: memoryview(bytearray(memory)),
        lambda memory: array.array("b", memory),
        InterfaceOnly,
        unaligned,
        lambda memory: memory.view(np.recarray),
        lambda memory: memory[3:4].reshape(()),
    ],
)
def test_as_buffer_exporter_taken_without_copying(make):
    exporter = make(np.arange(8, dtype=np.uint8))
    first = as_buffer("broadcast", "buf", exporter, writable=True)
    second = as_buffer("broadcast", "buf", exporter, writable=True)
    first.reshape(-1)[0] = 77
    assert second.reshape(-1)[0] == 77
    assert np.shares_memory(first, second)


def test_as_buffer_array_returned_itself():
    given_array = np.zeros((2, 3))
    assert as_buffer("allreduce", "send", given_array, writable=True) is given_array


def released():
    view = memoryview(b"abc")
    view.release()
    return view


@pytest.mark.parametrize(
    "bad",
    [
        None,
        3,
        3.0,
        "text",
        [1.0],
        (1.0,),
        {1.0},
        object(),
        np.zeros(4)[::2],
        np.zeros((2, 2), order="F"),
        np.array([None]),
        np.zeros(2, [("a", "O")]),
        memoryview(b"abcdef")[::2],
        released(),
        (ctypes.c_void_p * 2)(),
    ],
    ids=repr,
)
def test_as_buffer_not_a_buffer_refused(bad):
    with pytest.raises(InvalidDatatype):
        as_buffer("broadcast", "buf", bad, writable=False)


@pytest.mark.parametrize(
    "constant",
    [b"abc", memoryview(b"abc"), np.float64(1.0), np.int8(1), np.broadcast_to(np.zeros(1), (1,))],
    ids=lambda value: type(value).__name__,
)
def test_as_buffer_constant_refused_where_written(constant):
    as_buffer("broadcast", "buf", constant, writable=False)
    with pytest.raises(InvalidDatatype):
        as_buffer("broadcast", "buf", constant, writable=True)


@given(st.integers(1, 8), st.one_of(st.integers(-10, 10), st.integers(), st.booleans()))
def test_check_broadcast_root_accepted_when_a_rank(size, root):
    if not isinstance(root, bool) and 0 <= root < size:
        check_broadcast(size, 0, np.zeros(1), root)
    else:
        with pytest.raises(InvalidRoot) as caught:
            check_broadcast(size, 0, np.zeros(1), root)
        assert caught.value.size == size
        json.dumps(caught.value.to_dict())


@pytest.mark.parametrize("root", [np.int8(2), np.uint64(2), np.int64(2)])
def test_check_broadcast_numpy_root_accepted(root):
    check_broadcast(3, 0, np.zeros(1), root)


@pytest.mark.parametrize("root", [0.0, None, "0", np.bool_(False), np.float64(0), [0], np.array(0)])
def test_check_broadcast_root_of_other_type_refused(root):
    with pytest.raises(InvalidRoot):
        check_broadcast(1, 0, np.zeros(1), root)


def test_check_broadcast_read_only_accepted_at_root_only():
    constant = np.zeros(3)
    constant.flags.writeable = False
    check_broadcast(2, 1, constant, 1)
    with pytest.raises(InvalidDatatype):
        check_broadcast(2, 0, constant, 1)


@pytest.mark.parametrize(("count", "room"), [(0, 0), (0, None), (3, 2), (3, 4), (1, 0)])
def test_check_allreduce_sizes_refused(count, room):
    with pytest.raises(InvalidBufferSize):
        check_allreduce(np.zeros(count), None if room is None else np.zeros(room), ReduceOp.SUM)


@given(st.integers(0, 10), st.integers(0, 10))
def test_check_allreduce_overlap_accepted_when_same_or_apart(left, right):
    memory = np.zeros(15)
    send, recv = memory[left : left + 5], memory[right : right + 5]
    if left == right or abs(left - right) >= 5:
        assert check_allreduce(send, recv, "sum")[1] is recv
    else:
        with pytest.raises(InvalidBufferSize):
            check_allreduce(send, recv, "sum")


def test_check_allreduce_recv_left_out_has_the_shape_of_send():
    send, recv, op = check_allreduce(np.zeros((2, 3), "f4"), None, "max")
    assert recv.shape == (2, 3)
    assert recv.dtype == np.float32
    assert op is ReduceOp.MAX
    assert not np.shares_memory(send, recv)


@pytest.mark.parametrize(
    ("dtype", "op"), [("D", "min"), ("?", "sum"), ("S3", "sum"), ("M8[s]", "max"), ("i4,f8", "sum")]
)
def test_check_allreduce_undefined_operation_refused(dtype, op):
    with pytest.raises(InvalidDatatype):
        check_allreduce(np.zeros(2, dtype), None, op)


@pytest.mark.parametrize(
    ("shape", "extents"),
    [(3, (3,)), ((3,), (3,)), ([2, 3], (2, 3)), (np.int64(4), (4,)), (0, (0,)), ((), ())],
)
def test_check_region_shape_normalised(shape, extents):
    checked, dtype = check_region(shape, "f4")
    assert checked == extents
    assert all(type(extent) is int for extent in checked)
    assert dtype == np.float32


@pytest.mark.parametrize(
    "shape", [-1, (2, -1), 2.0, (2.0,), True, (True,), "3", None, (None,), np.array(3)]
)
def test_check_region_malformed_shape_refused(shape):
    with pytest.raises(InvalidBufferSize) as caught:
        check_region(shape, "f8")
    json.dumps(caught.value.to_dict())


@pytest.mark.parametrize("shape", [(0, 2**63), (2**70, 0), (0, 2**62, 8), (1,) * 99])
def test_check_region_shape_that_no_array_can_have_refused(shape):
    with pytest.raises(InvalidBufferSize, match="what numpy can express"):
        check_region(shape, "f8")


@pytest.mark.parametrize("shape", [2**63, (2**40, 2**40)])
def test_check_region_shape_of_too_much_memory_left_to_its_allocation(shape):
    check_region(shape, "f8")


@pytest.mark.parametrize(
    "dtype",
    [
        *(object, "S0", [("a", "O")], np.dtype(("f8", 3))),
        *("nonsense", 3, "(1,2", [("a", "f8"), ("a", "f8")]),
    ],
)
def test_check_region_dtype_that_cannot_be_shared_refused(dtype):
    with pytest.raises(InvalidDatatype):
        check_region(3, dtype)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: check_allgatherv(0, 1, np.zeros(2), np.zeros(1), [2], None),
        lambda: check_allreduce(np.zeros(2), np.zeros(2, "i4"), "sum"),
        lambda: check_broadcast(2, 0, np.zeros(2), 2),
        lambda: check_region(-1, "f8"),
    ],
)
def test_mistake_error_survives_pickling_and_json(mistake):
    with pytest.raises(CommError) as caught:
        mistake()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is type(caught.value)
    assert copy.to_dict() == caught.value.to_dict()
    assert copy.__dict__ == caught.value.__dict__
    json.dumps(copy.to_dict())
