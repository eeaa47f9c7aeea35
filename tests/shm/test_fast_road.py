"""What a program calls in a loop reaches its kernel without Python code."""

import secrets
import sys
from pathlib import Path

import numpy as np
import pytest

import cobre_shm
from cobre_shm import ReduceOp, fastcall
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator


@pytest.fixture(scope="module")
def comm():
    name = f"/cobre-test-{secrets.token_hex(8)}"
    with ShmCommunicator(ShmConfig(name=name, rank=0, size=1)) as communicator:
        yield communicator


PACKAGE = str(Path(cobre_shm.__file__).parent)


def own_python_calls(call):
    """Return the names of the package's Python functions that ``call`` runs."""
    names = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names


SEND, RECV = np.array([3, 1, 2]), np.zeros(3, dtype=np.int64)
CALLS = {
    "default": lambda comm: comm.allreduce(SEND, RECV),
    "new result": lambda comm: comm.allreduce(SEND),
    "member": lambda comm: comm.allreduce(SEND, RECV, ReduceOp.MAX),
    "name": lambda comm: comm.allreduce(SEND, RECV, "max"),
    "keyword": lambda comm: comm.allreduce(SEND, RECV, op="min"),
    "new result, keyword": lambda comm: comm.allreduce(SEND, op="prod"),
    "shared result": lambda comm: comm.allreduce_shared(SEND),
    "shared result, name": lambda comm: comm.allreduce_shared(SEND, "max"),
    "shared result, keyword": lambda comm: comm.allreduce_shared(SEND, op=ReduceOp.MIN),
    "broadcast": lambda comm: comm.broadcast(RECV, root=0),
    "barrier": lambda comm: comm.barrier(),
}


def test_every_python_that_we_support_has_the_road():
    assert fastcall.is_installed(ShmCommunicator)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_second_call_runs_no_python_code(comm, call):
    call(comm)
    assert own_python_calls(lambda: call(comm)) == []


def test_reduction_by_a_name_that_was_not_met_is_the_same(comm):
    comm.allreduce(SEND, RECV, "max")
    for spelling in ("MAX", "".join(["m", "ax"]), " max "):
        assert np.array_equal(comm.allreduce(SEND, None, spelling), SEND)
    with pytest.raises(ValueError, match="median"):
        comm.allreduce(SEND, None, "median")


def test_shared_results_of_either_way_are_new_and_cannot_be_written(comm):
    unusual = [
        lambda: comm.allreduce_shared(send=SEND),
        lambda: comm.allreduce_shared(SEND.reshape(3, 1), op="prod"),
        lambda: comm.allreduce_shared(memoryview(SEND)),
    ]
    for call in *unusual, *(lambda call=call: call(comm) for call in list(CALLS.values())[6:9]):
        for _ in range(2):
            result = call()
            assert not result.flags.writeable
            assert not np.may_share_memory(result, SEND)
            with pytest.raises(ValueError, match="read-only"):
                result[0] = 1
    assert SEND.flags.writeable
    assert comm.allreduce(SEND).flags.writeable
    for wrong in {"kind": "max"}, {"op": "max", "recv": None}:
        with pytest.raises(TypeError):
            comm.allreduce_shared(SEND, **wrong)
    with pytest.raises(TypeError):
        comm.allreduce_shared()
    with pytest.raises(TypeError):
        comm.allreduce_shared(SEND, "max", None)


def test_dtype_is_known_again_after_many_others(comm):
    """A program that makes dtypes again and again keeps the fast road for those it uses."""
    for turn in range(200):
        comm.allgatherv(np.zeros(2, np.dtype([(f"x{turn}", "i4")])))
    recv = np.zeros(1)
    call = lambda: comm.allreduce(np.ones(1), recv)  # noqa: E731 - as in CALLS
    call()
    assert own_python_calls(call) == []
