import contextlib
import os
import selectors
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest

from cobre_shm.spawn.loop import Loop
from cobre_shm.spawn.output import FileCopy, Output, Sink, Stream

# Lines of every length up to several times what a pipe takes in one piece, on both streams.
MANY_LINES = """
import os, sys
rank = int(os.environ["RANK"])
letter = "abcdefgh"[rank]
for i in range(1000):
    stream = sys.stderr if i % 7 == 0 else sys.stdout
    length = 30_000 if i % 250 == 249 else i * 37 % 300
    stream.write(f"{rank} {i} {letter * length}\\n")
"""


def expected_lines(rank):
    for i in range(1000):
        length = 30_000 if i % 250 == 249 else i * 37 % 300
        yield f"{rank} {i} {'abcdefgh'[rank] * length}".encode()


@pytest.mark.parametrize("target", ["pipe", "file"])
def test_lines_of_eight_ranks_are_complete_and_whole(spawn, target):
    spawn.write("lines.py", MANY_LINES)
    if target == "pipe":
        text = spawn.run("-n", 8, "lines.py", stderr=subprocess.STDOUT).stdout
    else:
        with (spawn.folder / "out").open("wb") as file:
            spawn.run("-n", 8, "lines.py", stdout=file, stderr=subprocess.STDOUT)
        text = (spawn.folder / "out").read_bytes()
    lines = text.splitlines()
    assert Counter(lines) == Counter(line for rank in range(8) for line in expected_lines(rank))
    for rank in range(8):
        mine = [line for line in lines if line.startswith(b"%d " % rank)]
        numbers = [int(line.split()[1]) for line in mine]
        assert [i for i in numbers if i % 7] == [i for i in range(1000) if i % 7]


def test_streams_stay_apart(spawn):
    spawn.write("lines.py", MANY_LINES)
    done = spawn.run("-n", 2, "lines.py")
    assert all(int(line.split()[1]) % 7 == 0 for line in done.stderr.splitlines())
    assert len(done.stderr.splitlines()) == 2 * 143
    assert len(done.stdout.splitlines()) == 2 * 857


@pytest.mark.parametrize("flag", ["-l", "--label"])
def test_labels_begin_every_line(spawn, flag):
    code = (
        "import os, sys\n"
        "sys.stdout.write('a\\n\\nb\\n')\n"
        "sys.stderr.write('e\\n' + os.environ['RANK'])\n"
    )
    done = spawn.run("-n", 2, flag, "-c", code)
    lines = [b"[%d] %s" % (rank, text) for rank in (0, 1) for text in (b"a", b"", b"b")]
    assert sorted(done.stdout.split(b"\n")) == sorted([*lines, b""])
    lines = [b"[%d:err] %s" % (rank, text) for rank in (0, 1) for text in (b"e", b"%d" % rank)]
    assert sorted(done.stderr.split(b"\n")) == sorted(lines)


def test_bytes_of_a_rank_pass_unchanged(spawn):
    data = bytes(range(256)) * 3 + b"\r\n\n\n\xff\xfe no line end"
    spawn.folder.joinpath("data").write_bytes(data)
    code = "import sys; sys.stdout.buffer.write(open('data', 'rb').read())"
    assert spawn.run("-n", 1, "-c", code).stdout == data


def test_unfinished_lines_of_two_ranks_do_not_run_together(spawn):
    done = spawn.run("-n", 2, "-c", "import sys; sys.stdout.write('half')")
    assert done.stdout == b"half\nhalf"


def test_line_appears_as_soon_as_it_is_written(spawn):
    code = "print('ready'); input(); print('over')"
    process = spawn.start("-n", 1, "-c", code, stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"over\n"
    assert process.wait() == 0


def test_endless_line_is_passed_on_in_bounded_memory(spawn):
    megabytes = 64
    code = (
        "import sys\n"
        f"for _ in range({megabytes}): sys.stdout.write('x' * (1 << 20))\n"
        "sys.stderr.write('written\\n'); sys.stdin.read()"
    )
    process = spawn.start("-n", 1, "-c", code, stdin=subprocess.PIPE)
    count = 0
    while count < megabytes << 20:
        count += len(process.stdout.read1(1 << 20))
    assert process.stderr.readline() == b"written\n"
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
    process.stdin.close()
    assert process.wait() == 0
    assert count == megabytes << 20
    assert peak_kib < 40 << 10


def test_output_that_nobody_wants_ends_the_run_quietly(spawn):
    code = "import itertools\nfor i in itertools.count(): print('line', i)"
    process = spawn.start("-n", 3, "-c", code)
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    assert process.wait() == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""


def test_output_that_nobody_took_is_noticed_after_the_ranks_have_ended(spawn):
    # More than the pipe to us takes, less than the launcher holds.
    process = spawn.start("-n", 1, "-c", "import os; print(os.getpid()); print('x' * 200_000)")
    rank = Path("/proc", process.stdout.readline().decode().strip(), "stat")
    spawn.wait_for(lambda: rank.read_text().rpartition(")")[2].split()[0] == "Z")
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""


def test_shell_pipeline_with_head_ends(spawn):
    program = " ".join(spawn.command("-n", 2, "-c", "'while True: print(1)'"))
    script = f"{program} | head -1; exit ${{PIPESTATUS[0]}}"
    done = spawn.run(command=["bash", "-c", script])
    assert done.stdout == b"1\n"
    assert done.stderr == b""
    assert done.returncode == 141


def test_full_disk_is_named(spawn):
    with Path("/dev/full").open("wb") as full:
        done = spawn.run("-n", 2, "-c", "print(1)", stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"cobre_shm.spawn: Output cannot be written: No space left on device\n"


def test_launcher_obeys_while_nobody_reads_its_output(spawn):
    code = "import sys\nsys.stderr.write('start\\n')\nwhile True: print('x' * 1000)"
    process = spawn.start("-n", 2, "--grace", "0.5", "-c", code)
    for _ in range(2):
        assert process.stderr.readline() == b"start\n"
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM


def test_time_limit_bounds_the_output_that_nobody_takes(spawn):
    process = spawn.start("-n", 1, "--timeout", 3, "--grace", 0.5, "-c", "print('x' * 300_000)")
    assert process.wait(60) == 124


def test_time_limit_bounds_the_last_output_of_a_run_that_failed(spawn):
    code = "print('x' * 300_000); raise SystemExit(3)"
    process = spawn.start("-n", 1, "--timeout", 8, "--grace", 0.5, "-c", code)
    assert process.wait(60) == 3


def test_output_that_was_taken_too_late_is_said_to_be(spawn):
    process = spawn.start("-n", 1, "--timeout", 2, "--grace", 60, "-c", "print('x' * 300_000)")
    # Nobody takes the output before the limit is said to be over.
    assert b"takes longer than 2 s" in process.stderr.readline()
    process.communicate(timeout=60)
    assert process.returncode == 124


def test_short_grace_does_not_keep_the_limit_from_being_said(spawn):
    words = ("-n", 1, "--timeout", 2, "--grace", 0.1, "-c", "print('x' * 300_000)")
    process = spawn.start(*words)
    assert b"takes longer than 2 s" in process.stderr.readline()
    assert process.wait(60) == 124


def test_all_streams_have_their_turn_where_the_reader_is_slow():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    pipes, loop = [os.pipe() for _ in range(40)], Loop()
    sink = Sink(writer, loop.selector, pytest.fail)
    seen = set()
    streams = [
        Stream(end, sink, loop.selector, label=lambda number=number: seen.add(number) or b"")
        for number, (end, _) in enumerate(pipes)
    ]
    for _, end in pipes:
        os.set_blocking(end, False)
    for _ in range(10):
        for _, end in pipes:
            with contextlib.suppress(BlockingIOError):
                os.write(end, b"x" * 65535 + b"\n")
        loop.turn_until(lambda: sink.is_paused)
        while sink.is_paused:
            loop.turn_until(iter([False, True]).__next__)
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 65536)
    assert seen == set(range(40))
    sink.discard()
    for stream in streams:
        stream.close()
    loop.close()
    for descriptor in (reader, writer, *(end for _, end in pipes)):
        os.close(descriptor)


def test_what_is_held_back_is_in_the_file_and_not_lost(tmp_path):
    reader, writer = os.pipe()
    lines = b"".join(b"line %d\n" % number for number in range(300_000))
    with selectors.PollSelector() as selector:
        output = Output(selector, pytest.fail)
        copy = FileCopy(tmp_path / "copy", False, pytest.fail)
        stream = output.add(reader, None, copy=copy)
        stream.hold()
        thread = threading.Thread(
            target=lambda: (_write_all(writer, lines), os.close(writer)), daemon=True
        )
        thread.start()
        while selector.get_map():
            for key, _ in selector.select():
                key.data()
        # As much as is held back at once; the rank waits in its write for the rest.
        held = stream.take_held()
        assert lines.startswith(held)
        assert 1 << 20 <= len(held) < 1 << 21
        while selector.get_map():
            for key, _ in selector.select():
                key.data()
        thread.join()
        output.discard()
    assert (tmp_path / "copy").read_bytes() == lines


def _write_all(descriptor, data):
    while data:
        data = data[os.write(descriptor, data) :]
