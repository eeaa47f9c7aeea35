"""Segments that lie in shared memory: found, told apart, and removed only when dead."""

import json
import os
import pwd
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("posix_ipc")

from cobre_shm import info, layout
from cobre_shm.segment import leftovers
from cobre_shm.segment.leftovers import find_segments, remove_if_dead, remove_leftovers
from cobre_shm.segment.posix import DIRECTORY, create_object
from cobre_shm.segment.process import pid_namespace
from cobre_shm.segment.segment import Segment

ROOT = Path(info.__file__).parents[1]
MAKE_AND_DIE = """
import os, sys
from cobre_shm.segment.process import pid_namespace
from cobre_shm.segment.segment import Segment
Segment.create(sys.argv[1], 2, slot_bytes=4096)
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def name():
    name = f"/cobre-test-{secrets.token_hex(8)}"
    yield name
    Path("/dev/shm", name[1:]).unlink(missing_ok=True)


@pytest.fixture
def dead(name):
    """The segment of a process that was killed; returns its pid."""
    process = subprocess.Popen([sys.executable, "-c", MAKE_AND_DIE, name], cwd=ROOT)
    assert process.wait() == -9
    return process.pid


def found(name):
    return next((segment for segment in find_segments() if segment.name == name), None)


def test_segment_of_a_living_process_is_in_use_and_stays(name):
    segment = Segment.create(name, 1, slot_bytes=4096)
    seen = found(name)
    assert (seen.creator, seen.living, seen.is_dead) == (os.getpid(), os.getpid(), False)
    assert seen.user == pwd.getpwuid(os.geteuid()).pw_name
    assert seen.nbytes == segment.nbytes
    assert not remove_if_dead(name)
    assert found(name) == seen
    segment.unlink()
    segment.close()


def test_segment_of_a_dead_run_is_removed(name, dead):
    seen = found(name)
    assert (seen.creator, seen.living, seen.is_dead) == (dead, 0, True)
    assert remove_if_dead(name)
    assert found(name) is None
    assert not remove_if_dead(name)


def test_segment_of_another_version_is_shown_and_left_alone(name, dead):
    with Path("/dev/shm", name[1:]).open("r+b") as file:
        file.seek(layout.HEADER_VERSION)
        file.write((99).to_bytes(8, "little"))
    seen = found(name)
    assert "version is 99" in seen.problem
    assert not seen.is_dead
    assert not remove_if_dead(name)
    assert Path("/dev/shm", name[1:]).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("uid", [12345, pwd.getpwnam("nobody").pw_uid])
def test_segment_of_another_user_is_shown_with_its_owner_and_left_alone(name, uid):
    path = Path("/dev/shm", f"cobre-{secrets.token_hex(12)}")
    other = Path("/dev/shm", name[1:])
    try:
        for file in (path, other):
            file.write_bytes(layout.MAGIC.to_bytes(8, "little"))
            os.chown(file, uid, -1)
        seen = found(f"/{path.name}")
        owner = {12345: "12345"}.get(uid, "nobody")
        assert (seen.user, seen.nbytes, seen.is_dead) == (owner, 8, False)
        assert owner in seen.problem
        # A name of one's own choice says nothing.
        assert found(name) is None
        assert not remove_if_dead(f"/{path.name}")
        assert path.exists()
    finally:
        path.unlink()


@pytest.mark.parametrize("content", [b"", b"COBRE", b"something else"])
def test_file_that_is_no_segment_is_passed_over(name, content):
    Path("/dev/shm", name[1:]).write_bytes(content)
    assert found(name) is None
    assert not remove_if_dead(name)


@pytest.fixture
def nothing_else(name, monkeypatch):
    """Have --clean see this test's segment alone: the dead of other runs are theirs."""

    class Directory:
        def iterdir(self):
            return (path for path in DIRECTORY.iterdir() if path.name == name[1:])

    monkeypatch.setattr(leftovers, "DIRECTORY", Directory())


@pytest.mark.usefixtures("nothing_else")
def test_clean_removes_dead_segments_and_says_so(name, dead, capsys, monkeypatch):
    monkeypatch.delenv("COBRE_COMM_BACKEND", raising=False)
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert info.main([]) == 0
    out = capsys.readouterr().out
    assert f": dead, made by pid {dead} of user {user}; --clean removes it" in out
    assert "segments of dead runs hold memory: python -m cobre_shm.info --clean" in out
    assert info.main(["--output-format", "json"]) == 0
    (listed,) = [
        segment
        for segment in json.loads(capsys.readouterr().out)["segments"]
        if segment["name"] == name
    ]
    assert (listed["creator_pid"], listed["user"], listed["dead"]) == (dead, user, True)
    assert info.main(["--clean", "--output-format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["removed_segments"] == [name]
    assert report["segments"] == []


@pytest.mark.usefixtures("nothing_else")
def test_clean_says_to_people_what_it_removed(name, dead, capsys, monkeypatch):
    monkeypatch.delenv("COBRE_COMM_BACKEND", raising=False)
    assert info.main(["--clean"]) == 0
    assert f"  {name}: removed, its run was dead" in capsys.readouterr().out
    assert not Path("/dev/shm", name[1:]).exists()


@pytest.mark.usefixtures("nothing_else")
def test_clean_leaves_living_segments(name, capsys, monkeypatch):
    monkeypatch.delenv("COBRE_COMM_BACKEND", raising=False)
    segment = Segment.create(name, 1, slot_bytes=4096)
    assert info.main(["--clean"]) == 0
    assert f"{name} ({segment.nbytes / 1024:.4g} KiB): in use by pid {os.getpid()}" in (
        capsys.readouterr().out
    )
    segment.unlink()
    segment.close()


MAKE_REGION_AND_WAIT = """
import os, sys
from cobre_shm.segment.posix import create_object
fd = create_object(sys.argv[1], 8192)
print("there", flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.fixture
def region_name():
    namespace = pid_namespace()
    name = f"/cobre-{secrets.token_hex(16)}-{namespace}-3"
    yield name
    Path("/dev/shm", name[1:]).unlink(missing_ok=True)


def test_region_is_dead_when_nobody_has_it_open_and_removed_then(region_name):
    command = [sys.executable, "-c", MAKE_REGION_AND_WAIT, region_name]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe) as process:
        process.stdout.readline()
        seen = found(region_name)
        assert (seen.nbytes, seen.living, seen.is_dead) == (8192, process.pid, False)
        assert not remove_if_dead(region_name)
        remove_leftovers()
        assert found(region_name) == seen
        process.kill()
    assert found(region_name).is_dead
    assert remove_if_dead(region_name)
    assert found(region_name) is None
    assert not remove_if_dead(region_name)


def test_region_that_this_process_has_open_stays(region_name):
    fd = create_object(region_name, 4096)
    assert not remove_if_dead(region_name)
    os.close(fd)
    assert remove_if_dead(region_name)


def test_region_of_another_pid_namespace_is_left_alone(region_name):
    other = region_name.replace("-3", "-4").replace("-4026", "-9026")
    os.close(create_object(other, 4096))
    try:
        assert found(other) is None
        assert not remove_if_dead(other)
        remove_leftovers()
        assert Path("/dev/shm", other[1:]).exists()
    finally:
        Path("/dev/shm", other[1:]).unlink()


def test_leftovers_of_launchers_are_removed_and_names_that_somebody_chose_are_not(name, dead):
    random = Segment.random_name()
    assert subprocess.run([sys.executable, "-c", MAKE_AND_DIE, random], cwd=ROOT).returncode == -9
    living = Segment.create(Segment.random_name(), 1, slot_bytes=4096)
    remove_leftovers()
    assert found(random) is None
    assert found(name).is_dead
    assert found(living.name) is not None
    living.unlink()
    living.close()


def test_leftover_that_was_never_made_is_removed_when_it_is_old_and_nobody_has_it_open():
    paths = {what: Path("/dev/shm", Segment.random_name()[1:]) for what in ("old", "open", "new")}
    for what, path in paths.items():
        path.write_bytes(bytes(4096))
        path.chmod(0o600)
        if what != "new":
            os.utime(path, (0, 0))
    with paths["open"].open("rb"):
        remove_leftovers()
    assert [what for what, path in paths.items() if path.exists()] == ["open", "new"]
    for path in paths.values():
        path.unlink(missing_ok=True)


def test_machine_without_shared_memory_is_reported_and_not_a_crash(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(leftovers, "DIRECTORY", tmp_path / "shm")
    info.main(["--clean"])
    assert "not looked at" in capsys.readouterr().out
    assert info.collect()[0]["segments"] is None


@pytest.mark.parametrize("is_of_this_version", [True, False])
def test_dead_segment_with_the_name_of_a_region_is_removed(region_name, is_of_this_version):
    process = subprocess.Popen([sys.executable, "-c", MAKE_AND_DIE, region_name], cwd=ROOT)
    assert process.wait() == -9
    path = Path("/dev/shm", region_name[1:])
    if is_of_this_version:
        assert found(region_name).creator == process.pid
    else:
        content = bytearray(path.read_bytes())
        content[8:24] = b"of other version"
        path.write_bytes(content)
    assert remove_if_dead(region_name)
    assert not path.exists()


def test_living_segment_with_the_name_of_a_region_stays(region_name):
    segment = Segment.create(region_name, 1, slot_bytes=4096)
    assert not remove_if_dead(region_name)
    assert found(region_name).living == os.getpid()
    segment.unlink()
    segment.close()


def test_pipe_with_the_name_of_a_region_is_passed_over(region_name):
    os.mkfifo(Path("/dev/shm", region_name[1:]), 0o600)
    assert found(region_name) is None
    assert not remove_if_dead(region_name)
