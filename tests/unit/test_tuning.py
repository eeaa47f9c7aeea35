"""The file of switch points: what is read, and what is refused with its name."""

import json
import platform
from pathlib import Path

import pytest

from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.tuning import AUTO, NAMES, NEVER, default_tuning, load_tuning, tuned_file

SHM = {"COBRE_SHM_NAME": "run", "COBRE_SHM_RANK": "0", "COBRE_SHM_SIZE": "1"}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tuning.json"


@pytest.fixture
def machine_file(tmp_path, monkeypatch):
    """Where the file of this machine would be; there is none yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cobre-shm" / f"tuning-{platform.node()}.json"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[1]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ('{"direct_byte": 1}', "unknown switch point 'direct_byte'; known: direct_bytes, "),
        ('{"direct_bytes": -1}', "direct_bytes must be an integer from 0, got -1"),
        ('{"direct_bytes": 1.0}', "direct_bytes must be an integer from 0, got 1.0"),
        ('{"direct_bytes": "1"}', "direct_bytes must be an integer from 0, got '1'"),
        ('{"direct_bytes": true}', "direct_bytes must be an integer from 0, got True"),
        (json.dumps({"direct_bytes": NEVER + 1}), f"direct_bytes must be .* got {NEVER + 1}"),
        ('{"chain_chunk": 2048}', "chain_chunk must be a power of two from 4096, got 2048"),
        ('{"chain_chunk": 12288}', "chain_chunk must be a power of two from 4096, got 12288"),
        # Each is looked at, not the first alone.
        ('{"direct_bytes": 0, "gather_chunk": 0}', "gather_chunk must be a power of two"),
    ],
)
def test_file_that_is_none_is_refused_with_its_name(file, content, words):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as caught:
        load_tuning(str(file))
    assert str(caught.value).startswith(f"{file}: ")
    with pytest.raises(InitializationFailed, match="COBRE_SHM_TUNING") as refused:
        ShmConfig.from_env({**SHM, "COBRE_SHM_TUNING": str(file)})
    assert refused.value.context["value"] == str(file)
    assert str(caught.value) in str(refused.value)


def test_file_that_cannot_be_read_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json: No such file or directory"):
        load_tuning(str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match="Is a directory"):
        load_tuning(str(tmp_path))


def test_values_at_the_limits_are_taken(file):
    points = {"direct_bytes": 0, "chain_chunk": 4096, "read_bytes": NEVER, "gather_chunk": 1 << 20}
    file.write_text(json.dumps(points))
    assert load_tuning(str(file)) == points
    file.write_text("{}")
    assert load_tuning(str(file)) == {}


def test_auto_is_the_file_of_this_machine_or_nothing(machine_file):
    assert tuned_file() == machine_file
    assert load_tuning(AUTO) == {}
    machine_file.parent.mkdir(parents=True)
    machine_file.write_text('{"direct_bytes": 77}')
    assert load_tuning(AUTO) == {"direct_bytes": 77}
    assert ShmConfig.from_env({**SHM, "COBRE_SHM_TUNING": AUTO}).tuning == AUTO
    machine_file.write_text("nonsense")
    # A file that is there and wrong is never passed over: the user believes it is in use.
    with pytest.raises(ValueError, match=f"{machine_file}: not JSON"):
        load_tuning(AUTO)


def test_auto_is_nothing_for_a_user_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert load_tuning(AUTO) == {}


def test_file_of_this_machine_lies_in_the_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned_file() == tmp_path / ".cache" / "cobre-shm" / f"tuning-{platform.node()}.json"


@pytest.mark.parametrize(("size", "cpus"), [(2, 2), (4, 8), (8, 2)])
def test_every_default_could_stand_in_a_file(file, size, cpus):
    points = default_tuning(size, cpus)
    assert set(points) == set(NAMES)
    file.write_text(json.dumps(points))
    assert load_tuning(str(file)) == points
