"""What is typed goes to rank 0, and what ranks write comes to the terminal."""

import fcntl
import os
import pty
import selectors
import signal
import termios
import time
from array import array

import pytest

from cobre_shm.spawn import terminal as terminal_module
from cobre_shm.spawn.loop import Loop
from tests.spawn.terminals import Terminal, expect

pytestmark = pytest.mark.parametrize("spawn", ["zygote"], indirect=True)


def test_typed_lines_reach_rank_zero_only(spawn):
    code = (
        "import os, sys\n"
        "print('ready')\n"
        "for line in sys.stdin: print(os.environ['RANK'], line, end='')\n"
        "print('end')"
    )
    with Terminal(spawn, "-n", 2, "-c", code) as terminal:
        lines = [terminal.process.stdout.readline() for _ in range(3)]
        assert sorted(lines) == [b"end\n", b"ready\n", b"ready\n"]
        terminal.type(b"one\n")
        expect(terminal.process, 1, b"0 one\n")
        terminal.type(b"two\n")
        expect(terminal.process, 1, b"0 two\n")
        terminal.type(b"\x04")
        expect(terminal.process, 1, b"end\n")
        assert terminal.process.wait() == 0


@pytest.mark.parametrize("is_full", [False, True])
def test_line_typed_as_rank_zero_ends_is_dropped(spawn, monkeypatch, is_full):
    reader, writer = os.pipe()
    end, ended = os.pipe()
    master, slave = pty.openpty()
    monkeypatch.setattr(terminal_module, "_TERMINAL", slave)
    monkeypatch.setattr(os, "tcgetpgrp", lambda _: os.getpgrp())
    loop = Loop()
    # Rank 0's end is seen first of what one turn brings.
    loop.selector.register(end, selectors.EVENT_READ, lambda: typed.close())
    typed = terminal_module.TerminalInput(writer, loop.selector)
    if is_full:
        filled = os.write(writer, bytes(1 << 20))
        os.write(master, b"line\n")
        loop.turn_until(lambda: writer in loop.selector.get_map())
        os.read(reader, filled)
    else:
        os.write(master, b"line\n")
    os.write(ended, b"e")
    loop.turn_until(lambda: len(loop.selector.get_map()) == 1)
    loop.turn_until(iter([False, True]).__next__)
    assert list(loop.selector.get_map()) == [end]
    loop.close()
    for descriptor in (reader, end, ended, master, slave):
        os.close(descriptor)


def test_prompt_is_shown_before_it_is_answered(spawn):
    code = "print('hello', input('name? '))"
    shown, screen = pty.openpty()
    with Terminal(spawn, "-n", 1, "-c", code, stdout=screen) as terminal:
        os.close(screen)
        assert os.read(shown, 100) == b"name? "
        terminal.type(b"bob\n")
        assert os.read(shown, 100) == b"hello bob\r\n"
        assert terminal.process.wait() == 0
    os.close(shown)


def test_line_of_rank_zero_is_whole_where_no_terminal_shows_it(spawn):
    code = (
        "import os, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    print('one', end='', flush=True)\n"
        "    time.sleep(1)\n"
        "    print(' line')\n"
        "else:\n"
        "    time.sleep(0.5)\n"
        "    print('another')"
    )
    with Terminal(spawn, "-n", 2, "-c", code) as terminal:
        lines = terminal.process.stdout.read().splitlines()
        assert sorted(lines) == [b"another", b"one line"]
        assert terminal.process.wait() == 0


def test_terminal_that_takes_nothing_does_not_block_the_launcher(spawn):
    master, slave = pty.openpty()
    code = "import sys\nsys.stderr.write('start\\n')\nwhile True: print('x' * 70)"
    process = spawn.start("-n", 1, "--grace", 0.5, "-c", code, stdout=slave)
    os.close(slave)
    assert process.stderr.readline() == b"start\n"
    count = array("i", [0])

    def is_full():
        before = count[0]
        time.sleep(0.2)
        fcntl.ioctl(master, termios.FIONREAD, count)
        return before == count[0] > 0

    spawn.wait_for(is_full)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    os.close(master)


def test_output_to_a_terminal_is_passed_on(spawn):
    master, slave = pty.openpty()
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    process = spawn.start("-n", 1, "-c", code, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    while seen.count(b"\n") < 2:
        seen += os.read(master, 1024)
    os.close(master)
    assert seen == b"out\r\nerr\r\n"
    assert process.wait() == 0
