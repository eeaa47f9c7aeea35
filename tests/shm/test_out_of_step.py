"""Ranks that are out of step by an exception on one of them: all are told, and none goes on."""

import json
import secrets

import numpy as np
import pytest

from cobre_shm.errors import CollectiveMismatch, RankFailed
from cobre_shm.kernels import context
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator, collectives
from tests.support.ranks import results_of, run_ranks


class Late(Exception):
    pass


def reduce_and_be_interrupted(comm, moment, at):
    """Rank 0 is interrupted at a moment of block ``at`` of three, and calls again."""
    send = np.ones(5 * comm.slot_bytes // 4, np.float16)
    reduce, run, blocks = collectives.reduce_with_numpy, comm._run, []

    def interrupt(*words):
        blocks.append(words)
        if len(blocks) == at:
            raise Late
        return reduce(*words)

    def run_and_interrupt(*words):
        run(*words)
        interrupt(*words[-2:])

    if comm.rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            if moment == "behind the exchange":
                reduce = _nothing
                patch.setattr(comm, "_run", run_and_interrupt)
            else:
                patch.setattr(collectives, "reduce_with_numpy", interrupt)
            with pytest.raises(Late):
                comm.allreduce(send)
    try:
        return comm.allreduce(send).max()
    except RankFailed as error:
        return error.rank


def _nothing(*_):
    pass


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("moment", ["behind the exchange", "in the reduction"])
def test_reduction_that_is_left_between_two_blocks_fails_the_group(moment, at):
    assert results_of(run_ranks(reduce_and_be_interrupted, 2, "shm", moment, at)) == [0, 0]


def reduce_and_forget(comm):
    send = np.ones(20_000)
    comm.allreduce_shared(send)
    if comm.rank == 0:
        # As an exception between making a result and keeping it would.
        comm._results.clear()
    with pytest.raises(CollectiveMismatch, match="a new result"):
        comm.allreduce_shared(send)


def test_new_result_is_another_call_than_the_reduction():
    results_of(run_ranks(reduce_and_forget, 2, "shm"))


def test_no_tuning_lets_a_rank_spin_without_looking(tmp_path):
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps({"spin_pauses": 1 << 40}))
    name = f"/cobre-test-{secrets.token_hex(8)}"
    with ShmCommunicator(ShmConfig(name=name, rank=0, size=1, tuning=str(file))) as comm:
        state = comm._context
        assert state[context.SPIN_LIMIT] <= state[context.SPIN_LIMIT_MAX] < 1 << 20
