"""Models of a group's life: joining, a region's name, failure at any step.

They follow segment/join.py, segment/common.py and segment/poison.py.
"""

import pytest

from tests.support.explore import Violation, explore, replaced

DONE, FAILED, CRASHED = "done", "failed", "crashed"


# -- joining: the name is gone before anybody goes on ----------------------------------------------


def join_model(size, *, followers_wait=True, unlink_first=True):
    """Rank 0 makes the segment; all attach; rank 0 unlinks and then says joined; one may crash.

    State: (name exists, joined, attached, ranks, crashes). Steps of a rank: 0 find or create, 1
    attach, 2 wait, (rank 0: 3 unlink or say joined, 4 the other), then in the group. A rank that
    sees a dead one while it waits removes the name and fails.
    """
    inside = "inside"

    def successors(state):
        name, joined, attached, ranks, crashes = state
        for rank, at in enumerate(ranks):
            if at in (inside, FAILED, CRASHED):
                continue
            if crashes:
                yield name, joined, attached, replaced(ranks, rank, CRASHED), crashes - 1
            if at == 0:
                if rank == 0:
                    yield True, joined, attached, replaced(ranks, rank, 1), crashes
                elif name:
                    yield name, joined, attached, replaced(ranks, rank, 1), crashes
                elif ranks[0] in (FAILED, CRASHED):
                    yield name, joined, attached, replaced(ranks, rank, FAILED), crashes
            elif at == 1:
                yield name, joined, attached | {rank}, replaced(ranks, rank, 2), crashes
            elif at == 2:
                is_done = len(attached) == size if rank == 0 else (joined or not followers_wait)
                if is_done:
                    yield name, joined, attached, replaced(ranks, rank, 3), crashes
                elif CRASHED in ranks or FAILED in ranks:
                    yield False, joined, attached, replaced(ranks, rank, FAILED), crashes
            elif rank != 0:
                yield name, joined, attached, replaced(ranks, rank, inside), crashes
            elif (at == 3) == unlink_first:
                following = 4 if at == 3 else inside
                yield False, joined, attached, replaced(ranks, rank, following), crashes
            else:
                following = 4 if at == 3 else inside
                yield name, True, attached, replaced(ranks, rank, following), crashes
        if name and inside in ranks:
            raise Violation(f"a rank is inside while the name exists: {state}")

    def is_final(state):
        name, _, _, ranks, _ = state
        everybody_dead = all(at in (CRASHED, FAILED) for at in ranks) and CRASHED in ranks
        # Rank 0 killed before anybody attached: the next run of that name replaces it.
        return not name or (everybody_dead and ranks[0] == CRASHED)

    return (False, False, frozenset(), (0,) * size, 1), successors, is_final


@pytest.mark.parametrize("size", [2, 3])
def test_join_leaves_no_name_once_anybody_is_inside(size):
    assert explore(*join_model(size)) > 20


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"followers_wait": False}, id="followers do not wait"),
        pytest.param({"unlink_first": False}, id="joined before the name is gone"),
    ],
)
def test_join_protocol_broken_is_caught(broken):
    with pytest.raises(Violation):
        explore(*join_model(3, **broken))


# -- a region's name: gone after any ending that somebody survives -------------------------------


def region_model(size, *, all_remove=True, failed_remove=True):
    """Rank 0 makes a named region, the others map it, all agree, and remove the name.

    State: (name exists, rounds published by each rank, ranks, crashes left). Steps of a rank: 0
    makes it (rank 0); 1 publishes round 1, 2 waits for it; 3 maps (the others); 4 publishes round
    2, 5 waits for it; 6 removes. A rank that sees a dead one while it waits poisons the group,
    removes the name and fails; one that is to publish in a poisoned group likewise.
    """
    rounds = {1: 1, 4: 2}

    def successors(state):
        name, published, ranks, crashes = state
        for rank, at in enumerate(ranks):
            if at in (DONE, FAILED, CRASHED):
                continue
            if crashes:
                yield name, published, replaced(ranks, rank, CRASHED), crashes - 1
            failing = (name and not failed_remove, published, replaced(ranks, rank, FAILED))
            if at == 0:
                yield name or rank == 0, published, replaced(ranks, rank, 1), crashes
            elif at in rounds and FAILED in ranks:
                yield *failing, crashes
            elif at in rounds:
                told = replaced(published, rank, rounds[at])
                yield name, told, replaced(ranks, rank, at + 1), crashes
            elif at in (2, 5):
                if min(published) >= (1 if at == 2 else 2):
                    yield name, published, replaced(ranks, rank, at + 1), crashes
                elif CRASHED in ranks or FAILED in ranks:
                    yield *failing, crashes
            elif at == 3:
                if rank != 0 and not name and FAILED not in ranks:
                    raise Violation(f"rank {rank} finds no name to map: {state}")
                yield name, published, replaced(ranks, rank, 4), crashes
            else:
                after = name and not (all_remove or rank == 0)
                yield after, published, replaced(ranks, rank, DONE), crashes

    def is_final(state):
        name, _, ranks, _ = state
        return all(at in (DONE, FAILED, CRASHED) for at in ranks) and not name

    return (False, (0,) * size, (0,) * size, 1), successors, is_final


@pytest.mark.parametrize("size", [2, 3])
def test_region_leaves_no_name_when_somebody_survives(size):
    assert explore(*region_model(size)) > 40


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"all_remove": False}, id="only rank 0 removes the name"),
        pytest.param({"failed_remove": False}, id="who fails does not remove it"),
    ],
)
def test_region_protocol_broken_is_caught(broken):
    with pytest.raises(Violation):
        explore(*region_model(3, **broken))


# -- failure: a crash at any step ------------------------------------------------------------------


def failure_model(size, *, sees_death=True, looks_again=True, last_epoch=2):
    """Ranks run rounds; one may crash at any step; the others see it, or the poison, and fail.

    State: (arrived, poison, ranks, crashes left). A rank is (epoch, step, phase): step 0 looks at
    the poison and publishes, steps 1.. wait for a peer. Phases of a wait, each a look at one word:
    has it arrived; if not, is there a poison or a dead rank; if so, has it arrived after all.
    """
    look, doubt, last_look = range(3)

    def successors(state):
        arrived, poison, ranks, crashes = state
        for rank, at in enumerate(ranks):
            if at in (DONE, FAILED, CRASHED):
                continue
            if crashes:
                yield arrived, poison, replaced(ranks, rank, CRASHED), crashes - 1
            epoch, step, phase = at

            def become(following, rank=rank, arrived=arrived, poison=poison):
                return arrived, poison, replaced(ranks, rank, following), crashes

            if step == 0 and phase == look:
                yield become(FAILED if poison else (epoch, 0, doubt))
                continue
            if step == 0:
                yield become((epoch, 1, look), arrived=replaced(arrived, rank, epoch))
                continue
            has_arrived = arrived[(rank + step) % size] >= epoch
            if phase != doubt and has_arrived:
                if step + 1 < size:
                    yield become((epoch, step + 1, look))
                elif any(arrived[r] < epoch for r in range(size)):
                    raise Violation(f"rank {rank} left epoch {epoch} early: {arrived}")
                else:
                    yield become((epoch + 1, 0, look) if epoch < last_epoch else DONE)
            elif phase == last_look:
                yield become(FAILED)
            elif phase == look:
                yield become((epoch, step, doubt))
            else:
                following = (epoch, step, last_look) if looks_again else FAILED
                if poison:
                    yield become(following)
                elif CRASHED in ranks and sees_death:
                    # The model remembers whether all had reached the last round by then.
                    told = "late" if min(arrived) == last_epoch else "early"
                    yield become(following, poison=told)
                elif has_arrived:  # looking again in vain is no step
                    yield become((epoch, step, look))

    def is_final(state):
        _, poison, ranks, _ = state
        if not all(at in (DONE, FAILED, CRASHED) for at in ranks):
            return False
        # Arrival wins: a failure after all have published a round does not spoil that round.
        if poison == "late" and FAILED in ranks:
            raise Violation(f"rank failed in a round that all had reached before: {state}")
        return bool(poison) or FAILED not in ranks

    return ((0,) * size, False, ((1, 0, look),) * size, 1), successors, is_final


@pytest.mark.parametrize("size", [2, 3])
def test_crash_at_any_step_ends_every_survivor(size):
    assert explore(*failure_model(size)) > 50


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"sees_death": False}, id="death is not looked for"),
        pytest.param({"looks_again": False}, id="no second look at the arrival"),
    ],
)
def test_failure_protocol_broken_is_caught(broken):
    with pytest.raises(Violation):
        explore(*failure_model(3, **broken))
