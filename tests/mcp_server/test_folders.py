"""Which files a client may name: links and ``..`` lead nowhere else."""

import os

import pytest

from cobre_shm import LocalCommunicator
from cobre_shm.mcp_server.folders import Folders, NotAllowed
from cobre_shm.mcp_server.tools import Session
from tests.sddp.editing import random_case


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    random_case(folder / "case")
    return folder


def test_case_in_an_allowed_directory_is_found_by_any_path(allowed, monkeypatch):
    folders = Folders([allowed])
    found = (allowed / "case").resolve()
    assert folders.case(str(allowed / "case")) == found
    assert folders.case(f"{allowed}/other/../case/.") == found
    (allowed / "link").symlink_to("case")
    assert folders.case(str(allowed / "link")) == found
    monkeypatch.chdir(allowed)
    assert folders.case("case") == found


def test_allowed_directory_may_be_a_link_itself(allowed, tmp_path):
    (tmp_path / "alias").symlink_to(allowed)
    folders = Folders([tmp_path / "alias"])
    for way in (tmp_path / "alias" / "case", allowed / "case"):
        assert folders.case(str(way)) == (allowed / "case").resolve()


def ways_out(allowed, outside):
    """Paths that look as if they were inside."""
    case = allowed / "case"
    (allowed / "link").symlink_to(outside / "case")
    yield str(allowed / "link")
    (allowed / "chain").symlink_to("link")
    yield str(allowed / "chain")
    (allowed / "up").symlink_to("..")
    yield str(allowed / "up" / "outside" / "case")
    yield f"{allowed}/../outside/case"
    yield f"{case}/../../outside/case"
    yield str(outside / "case")
    yield "/"
    yield ""
    yield "."
    yield f"{allowed}x"
    yield f"{allowed}\0/case"
    yield "/proc/self/root" + str(outside / "case")
    yield f"/proc/{os.getpid()}/cwd"
    (allowed / "loop").symlink_to("loop")
    (case / "config.json").unlink()
    (case / "config.json").symlink_to(outside / "case" / "config.json")
    yield str(case)


def test_no_path_leads_out(allowed, outside):
    folders = Folders([allowed], may_write=True)
    for path in ways_out(allowed, outside):
        with pytest.raises(NotAllowed) as caught:
            folders.case(path)
        assert "path" in caught.value.context


@pytest.mark.parametrize("name", ["system", "scenarios", "system/hydros.json"])
def test_link_inside_a_case_leads_nowhere(allowed, outside, name):
    inside = allowed / "case" / name
    inside.rename(allowed / "moved")
    inside.symlink_to(outside / "case" / name)
    with pytest.raises(NotAllowed):
        Folders([allowed]).case(str(allowed / "case"))


@pytest.mark.parametrize("name", ["training", "policy", "simulation", "stochastic", "failed"])
def test_output_through_a_link_is_refused(allowed, outside, name):
    (allowed / "out").mkdir()
    (allowed / "out" / name).symlink_to(outside)
    with pytest.raises(NotAllowed):
        Folders([allowed], may_write=True).output(str(allowed / "out"))


def test_policy_and_convergence_are_looked_at_as_well(allowed, outside):
    folders = Folders([allowed])
    (allowed / "out").mkdir()
    (allowed / "out" / "policy").symlink_to(outside)
    (allowed / "out" / "training").symlink_to(outside)
    for find in (folders.policy, folders.convergence):
        with pytest.raises(NotAllowed):
            find(str(allowed / "out"))


def test_nothing_is_written_without_the_permission(allowed):
    with pytest.raises(NotAllowed, match="--allow-write"):
        Folders([allowed]).output(str(allowed / "out"))
    assert Folders([allowed], may_write=True).output(str(allowed / "out")) == allowed / "out"


def test_without_any_directory_nothing_is_allowed(allowed):
    with pytest.raises(NotAllowed):
        Folders([]).case(str(allowed / "case"))


def test_directory_that_does_not_exist_is_refused_at_the_start(tmp_path):
    with pytest.raises(NotAllowed, match="not a directory"):
        Folders([tmp_path / "absent"])


@pytest.mark.parametrize("mode", ["warm_start", "resume"])
def test_case_that_names_a_policy_elsewhere_is_refused(allowed, outside, mode):
    session = Session(LocalCommunicator(), Folders([allowed]))
    overrides = {"policy": {"mode": mode, "path": str(outside)}}
    with pytest.raises(NotAllowed, match="outside"):
        session.train(str(allowed / "case"), overrides, None, False, print, list)
