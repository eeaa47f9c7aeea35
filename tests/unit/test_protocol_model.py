"""Models of the kernels' protocols: rounds, chains, buffers that peers read.

They follow kernels/rounds.py, kernels/chain.py and kernels/sharing.py, and are sequentially
consistent.
"""

import pytest

from tests.support.explore import Violation, explore, replaced

# -- the exchange round: visibility and reuse of slots -----------------------------------------

EPOCHS = 4


def exchange_model(
    size, *, slot_sets=2, arrival=lambda arrived, e: arrived >= e, skip=False, swap=False
):
    """All ranks run epochs 1..EPOCHS; a slot holds the epoch it was written for.

    State of a rank: (epoch, step). Steps: 0 write slot, 1 publish, then one step per peer to
    observe and one per rank to read.
    """

    def successors(state):
        arrived, slots, ranks = state
        for rank, (epoch, step) in enumerate(ranks):
            if epoch > EPOCHS:
                continue
            parity = epoch % slot_sets
            if step == 0:
                yield (
                    arrived,
                    replaced(slots, rank * slot_sets + parity, epoch),
                    replaced(ranks, rank, (epoch, 1)),
                )
            elif step == 1:
                yield replaced(arrived, rank, epoch), slots, replaced(ranks, rank, (epoch, 2))
            elif step < size + 1:
                peer = (rank + step - 1) % size
                skipped = skip and rank == 0 and step == 2
                if skipped or arrival(arrived[peer], epoch):
                    yield arrived, slots, replaced(ranks, rank, (epoch, step + 1))
            else:
                peer = step - (size + 1)
                found = slots[peer * slot_sets + (parity ^ swap)]
                if found != epoch:
                    raise Violation(f"rank {rank} read {found} of rank {peer} in epoch {epoch}")
                following = (epoch, step + 1) if peer + 1 < size else (epoch + 1, 0)
                yield arrived, slots, replaced(ranks, rank, following)

    start = ((0,) * size, (0,) * (size * slot_sets), ((1, 0),) * size)
    return start, successors, lambda state: all(epoch > EPOCHS for epoch, _ in state[2])


@pytest.mark.parametrize("size", [2, 3])
def test_exchange_round_reads_what_was_written_for_its_epoch(size):
    assert explore(*exchange_model(size)) > 100


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"slot_sets": 1}, id="one slot set"),
        pytest.param({"arrival": lambda arrived, e: arrived == e}, id="== for >="),
        pytest.param({"skip": True}, id="one wait dropped"),
        pytest.param({"swap": True}, id="parity swapped"),
        pytest.param({"arrival": lambda arrived, e: arrived >= e - 1}, id="old epoch accepted"),
    ],
)
def test_exchange_round_broken_is_caught(broken):
    with pytest.raises(Violation):
        explore(*exchange_model(3, **broken))


def test_two_rounds_per_chunk_write_the_coming_parity_while_others_read_the_last():
    """Reduce-scatter writes slot[e+1] after its wait for e, before publishing e+1: as modelled.

    The exchange model writes at step 0 of each epoch, which directly follows the reads of the
    epoch before; so the write of a reduced part is the write of the coming epoch.
    """
    start, successors, is_final = exchange_model(2)
    writes_while_reading = 0

    def watched(state):
        nonlocal writes_while_reading
        _, _, ranks = state
        (a, step_a), (b, step_b) = ranks
        writes_while_reading += a == b + 1 and step_a == 0 and step_b >= 3
        yield from successors(state)

    explore(start, watched, is_final)
    assert writes_while_reading > 0


# -- the chain: one accumulator, handed from rank to rank ----------------------------------------

PARTS = 3


def chain_model(
    size,
    *,
    blocks=2,
    reached=lambda steps, target: steps >= target,
    adds_unasked=False,
    copies_unasked=False,
    round_between=True,
):
    """Blocks one after the other, in the same slots, with one round before each.

    Two chains have two rounds between their blocks. A part of the accumulator holds (block, ranks
    that have added); a copy must find all of them. State of a rank: (block, step). Steps: 0 enter
    the round, 1 leave it, then one step per part to add, one per part to copy out.
    """
    add, copy, last = 2, 2 + PARTS, 1 + 2 * PARTS

    def successors(state):
        entered, steps, parts, ranks = state
        for rank, (block, step) in enumerate(ranks):
            if block > blocks:
                continue
            base = (block - 1) * PARTS
            onward = replaced(ranks, rank, (block, step + 1) if step < last else (block + 1, 0))
            if step == 0:
                yield replaced(entered, rank, block), steps, parts, onward
            elif step == 1:
                if not round_between or all(seen >= block for seen in entered):
                    yield entered, steps, parts, onward
            elif step < copy:
                part = step - add
                if rank == 0:
                    content = (block, 1)
                elif adds_unasked or reached(steps[rank - 1], base + part + 1):
                    if parts[part] != (block, rank):
                        raise Violation(f"rank {rank} adds to {parts[part]} in block {block}")
                    content = (block, rank + 1)
                else:
                    continue
                yield (
                    entered,
                    replaced(steps, rank, base + part + 1),
                    replaced(parts, part, content),
                    onward,
                )
            else:
                part = step - copy
                if copies_unasked or reached(steps[size - 1], base + part + 1):
                    if parts[part] != (block, size):
                        raise Violation(f"rank {rank} copies {parts[part]} in block {block}")
                    yield entered, steps, parts, onward

    start = ((0,) * size, (0,) * size, ((0, 0),) * PARTS, ((1, 0),) * size)
    return start, successors, lambda state: all(block > blocks for block, _ in state[3])


@pytest.mark.parametrize("size", [2, 3])
def test_chain_adds_in_rank_order_and_copies_what_is_complete(size):
    assert explore(*chain_model(size)) > 50


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"reached": lambda steps, target: steps == target}, id="== for >="),
        pytest.param({"adds_unasked": True}, id="wait for the rank before dropped"),
        pytest.param({"copies_unasked": True}, id="wait for the last rank dropped"),
        pytest.param({"round_between": False}, id="round between blocks dropped"),
        pytest.param(
            {"reached": lambda steps, target: steps >= target - 1}, id="old part accepted"
        ),
    ],
)
def test_chain_broken_is_caught(broken):
    with pytest.raises(Violation):
        explore(*chain_model(3, **broken))


# -- zero copy: a buffer belongs to its rank again when the collective returns --------------------


def shared_buffer_model(size, *, ending_round=True, probe=True):
    """Each rank writes its buffer, enters, reads all peers' buffers, ends, and writes it again."""

    def successors(state):
        entered, buffers, ranks = state
        for rank, (turn, step) in enumerate(ranks):
            if turn > 2:
                continue
            onward = replaced(ranks, rank, (turn, step + 1))
            if step == 0:
                yield entered, replaced(buffers, rank, turn), onward
            elif step in (1, size + 3):
                yield replaced(entered, rank, 2 * turn - (step == 1)), buffers, onward
            elif step == 2:
                if not probe or all(seen >= 2 * turn - 1 for seen in entered):
                    yield entered, buffers, onward
            elif step < size + 3:
                if buffers[step - 3] != turn:
                    raise Violation(f"rank {rank} reads {buffers[step - 3]} in turn {turn}")
                yield entered, buffers, onward
            elif not ending_round or all(seen >= 2 * turn for seen in entered):
                yield entered, buffers, replaced(ranks, rank, (turn + 1, 0))

    start = ((0,) * size, (0,) * size, ((1, 0),) * size)
    return start, successors, lambda state: all(turn > 2 for turn, _ in state[2])


@pytest.mark.parametrize("size", [2, 3])
def test_shared_buffers_are_read_before_their_rank_writes_them_again(size):
    assert explore(*shared_buffer_model(size)) > 50


@pytest.mark.parametrize("broken", [{"ending_round": False}, {"probe": False}], ids=str)
def test_shared_buffers_without_a_round_are_caught(broken):
    with pytest.raises(Violation):
        explore(*shared_buffer_model(2, **broken))


# -- private memory that peers read: it goes with its rank ----------------------------------------

DEAD, LOST = "dead", "lost"


def private_buffer_model(size, *, goes_on=False, ending_round=True):
    """One collective by reading, in which rank 0 may die at any step.

    A rank probes, reads each peer, publishes its end and waits for all ends. Who finds the memory
    gone ends as LOST, and so does who waits for a rank that is dead or lost and has not published.
    """

    def successors(state):
        published, ranks = state
        for rank, step in enumerate(ranks):
            if step in (DEAD, LOST) or step == size + 4:
                continue
            if rank == 0:
                yield published, replaced(ranks, 0, DEAD)
            onward = replaced(ranks, rank, step + 1)
            if step in (0, size + 2):
                yield replaced(published, rank, published[rank] + 1), onward
            elif step in (1, size + 3):
                wanted = 1 if step == 1 else 2
                skips = step == size + 3 and not ending_round
                late = [p for p in range(size) if published[p] < wanted]
                if not late or skips:
                    yield published, onward
                elif any(ranks[p] in (DEAD, LOST) for p in late):
                    yield published, replaced(ranks, rank, LOST)
            elif ranks[step - 2] == DEAD and not goes_on:
                yield published, replaced(ranks, rank, LOST)
            elif ranks[step - 2] == DEAD:
                raise Violation(f"rank {rank} returns what it has not read")
            else:
                yield published, onward

    def is_final(state):
        ends = set(state[1][1:])
        if len(ends) > 1:
            raise Violation(f"the collective is done on some survivors only: {state[1]}")
        return ends <= {size + 4, LOST}

    return ((0,) * size, (0,) * size), successors, is_final


@pytest.mark.parametrize("size", [2, 3])
def test_a_death_ends_a_collective_by_reading_on_all_survivors_or_on_none(size):
    assert explore(*private_buffer_model(size)) > 20


@pytest.mark.parametrize("broken", [{"goes_on": True}, {"ending_round": False}], ids=str)
def test_a_read_that_is_not_checked_or_not_ended_together_is_caught(broken):
    with pytest.raises(Violation):
        explore(*private_buffer_model(3, **broken))
