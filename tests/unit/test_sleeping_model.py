"""Models of how a waiting rank sleeps and is woken; they follow kernels/waiting.py.

Where the order of a store and a later load of another word matters, each process has a store
buffer, as on x86-64 (Owens, Sarkar, Sewell 2009); elsewhere they are sequentially consistent.
"""

import pytest

from tests.support.explore import Violation, explore, replaced

# -- sleeping: no lost wake-up, with store buffers -----------------------------------------------


def sleep_model(*, publisher_fence=True, kernel_compares=True):
    """One publisher and one sleeper; the time slice that ends a sleep is left out.

    A store goes to the process's buffer and from there to memory at any later step; a fence
    empties the buffer first. State: memory (arrived, waiters), both buffers, both steps.
    """
    publish, check, wake, published = range(4)
    announce, look, sleep, asleep, awake = range(5)

    def successors(state):
        arrived, waiters, p_buffer, s_buffer, p, s = state
        if p_buffer is not None:
            yield p_buffer, waiters, None, s_buffer, p, s
        if s_buffer is not None:
            yield arrived, s_buffer, p_buffer, None, p, s
        if p == publish:
            yield arrived, waiters, 1, s_buffer, check, s
        elif p == check and not (publisher_fence and p_buffer is not None):
            following = wake if waiters else published
            yield arrived, waiters, p_buffer, s_buffer, following, s
        elif p == wake:
            # A system call drains the buffer.
            yield 1, waiters, None, s_buffer, published, awake if s == asleep else s
        if s == announce:
            yield arrived, waiters, p_buffer, 1, p, look
        elif s == look and s_buffer is None:
            yield arrived, waiters, p_buffer, s_buffer, p, awake if arrived else sleep
        elif s == sleep:
            memory_waiters = 1 if s_buffer is not None else waiters
            changed = arrived and kernel_compares
            yield arrived, memory_waiters, p_buffer, None, p, awake if changed else asleep

    def is_final(state):
        return state[4] == published and state[5] == awake

    return (0, 0, None, None, publish, announce), successors, is_final


def test_sleeper_is_always_woken():
    assert explore(*sleep_model()) > 10


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"publisher_fence": False}, id="publisher stores without a fence"),
        pytest.param({"kernel_compares": False}, id="sleep without comparing the word"),
    ],
)
def test_sleeper_protocol_broken_is_caught(broken):
    with pytest.raises(Violation):
        explore(*sleep_model(**broken))


# -- sleeping for long: what all are woken for, and a death, which wakes one ---------------------


def news_model(*, kernel_compares=True, word_first=True):
    """Poison, or that a rank has left: stored, then those are woken who sleep on a word of theirs.

    The kernel queues a sleeper at its word and compares the news, in this order; no time slice.
    """
    store, wake, written = range(3)
    look, first, second, asleep, awake = range(5)

    def successors(state):
        news, is_queued, writer, sleeper = state
        if writer == store:
            yield 1, is_queued, wake, sleeper
        elif writer == wake:
            # One that is queued and not asleep yet will not sleep.
            yield news, 0, written, awake if is_queued else sleeper
        if sleeper == look:
            yield news, is_queued, writer, awake if news else first
        elif sleeper in (first, second):
            following = second if sleeper == first else asleep
            if (sleeper == first) == word_first:
                yield news, 1, writer, following
            else:
                yield news, is_queued, writer, awake if news and kernel_compares else following

    return (0, 0, store, look), successors, lambda state: state[2:] == (written, awake)


def test_sleeper_is_woken_by_what_concerns_all():
    assert explore(*news_model()) > 5


@pytest.mark.parametrize("broken", [{"kernel_compares": False}, {"word_first": False}], ids=str)
def test_news_that_does_not_wake_is_caught(broken):
    with pytest.raises(Violation):
        explore(*news_model(**broken))


def death_model(sleepers, *, announces=True, kernel_compares=True, passes_on=True):
    """Rank 0 dies while the others go to sleep, each watching the marks of all; no time slice.

    The first sleeper may be called away once, by the word for which it waits, and may be killed
    at any step; a word of a poison, which wakes all, is written by who sees a mark. State: marks
    (announced, died, wake-ups due), then what each rank does. Who is woken, called or killed is
    still in the kernel's queues until it runs, and may be the one whom a death wakes.
    """
    look, announce, sleep, asleep, woken, called, killed, tell = range(8)
    away, done, dead = "away", "done", "dead"

    def wake_all(ranks):
        return tuple(woken if step == asleep else step for step in ranks)

    def successors(state):
        marks, ranks, may_call, may_kill = state
        died = [mark[1] for mark in marks]
        for rank, step in enumerate(ranks):

            def to(step, ranks=ranks, rank=rank):
                return replaced(ranks, rank, step)

            announced, _, due = marks[rank]
            if due:
                after = replaced(marks, rank, (announced, 1, 0))
                queued = [r for r, s in enumerate(ranks) if s in (asleep, woken, called, killed)]
                for other in queued:
                    new = replaced(ranks, other, woken) if ranks[other] == asleep else ranks
                    yield after, new, may_call, may_kill
                if not queued:
                    yield after, ranks, may_call, may_kill
            if rank == 1 and may_kill and step not in (killed, dead, done, away):
                yield marks, to(killed), may_call, False
            if rank == 1 and may_call and step == asleep:
                yield marks, to(called), False, may_kill
            if step == killed:
                yield replaced(marks, rank, (announced, 1, announced)), to(dead), may_call, may_kill
            elif step == look:
                yield marks, to(tell if any(died) else announce), may_call, may_kill
            elif step == announce:
                others = ((1, *mark[1:]) for mark in marks)
                told = tuple(others) if announces else marks
                yield replaced(told, rank, marks[rank]), to(sleep), may_call, may_kill
            elif step == sleep:
                refused = any(died) and kernel_compares
                yield marks, to(woken if refused else asleep), may_call, may_kill
            elif step in (woken, called):
                new = wake_all(ranks) if any(died) and passes_on else ranks
                following = look if step == woken else away
                yield marks, to(following, new), may_call, may_kill
            elif step == tell:
                yield marks, to(done, wake_all(ranks)), may_call, may_kill

    def is_final(state):
        return all(step in (away, done, dead) for step in state[1])

    ranks = (killed, *(look,) * sleepers)
    return (((0, 0, 0),) * (sleepers + 1), ranks, True, True), successors, is_final


@pytest.mark.parametrize("sleepers", [1, 2, 3])
def test_death_wakes_every_sleeper(sleepers):
    assert explore(*death_model(sleepers)) > 10


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"announces": False}, id="the kernel does not know that one sleeps"),
        pytest.param({"kernel_compares": False}, id="sleep without comparing the mark"),
        pytest.param({"passes_on": False}, id="the one that is woken keeps it for itself"),
    ],
)
def test_death_that_does_not_wake_is_caught(broken):
    with pytest.raises(Violation):
        explore(*death_model(3, **broken))
