"""Rules of the house that no general tool checks."""

import re
import time
from pathlib import Path

from tests import faults

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "cobre_shm", ROOT / "cobre_net")
PROTOCOL = (ROOT / "cobre_shm/kernels", ROOT / "cobre_shm/segment")


def sources(*folders):
    return {path: path.read_text() for folder in folders for path in sorted(folder.rglob("*.py"))}


def test_every_sync_tag_stands_on_both_sides():
    """A published word without an observer, or the reverse, is a protocol with a hole."""
    writers = re.compile(r"exchange_seq_cst|fetch_\w+|store|words\.store|\.store\(")
    sides = {}
    for path, text in sources(*PROTOCOL).items():
        code = re.sub(r'"""(?s:.*?)"""', "", text)
        for line in code.splitlines():
            for tag in re.findall(r"# .*<SYNC (\w+)>", line):
                side = "write" if writers.search(line.split("#")[0]) else "read"
                sides.setdefault(tag, {}).setdefault(side, []).append(path.name)
    assert {"arrived", "waiters", "died", "poison", "state", "joined", "ready"} <= sides.keys()
    for tag, found in sides.items():
        assert set(found) == {"read", "write"}, f"<SYNC {tag}> has only {found}"


def test_atomics_stand_in_one_module():
    pattern = re.compile(r"atomic_rmw|load_atomic|store_atomic|cmpxchg|builder\.fence")
    users = {path.name for path, text in sources(*PACKAGES).items() if pattern.search(text)}
    assert users == {"atomics.py"}


def test_kernels_look_at_clocks_that_nobody_sets():
    kernels = sources(ROOT / "cobre_shm/kernels")
    users = {path.name: text for path, text in kernels.items() if re.search("CLOCK|clock_", text)}
    assert set(users) == {"system.py"}
    text = users["system.py"]
    assert text.count('"clock_gettime"') == 1
    assert dict(re.findall(r"^(\w*CLOCK\w*) = (\d+)", text, re.MULTILINE)) == {
        "_CLOCK_MONOTONIC": str(time.CLOCK_MONOTONIC),
        # CLOCK_MONOTONIC_COARSE, which Python does not name.
        "_CLOCK_MONOTONIC_COARSE": "6",
    }
    assert "_I32(clock), address]" in text
    assert set(re.findall(r"_clock_code\((.*?)\)", text)) == {
        *("clock: int", "_CLOCK_MONOTONIC", "_CLOCK_MONOTONIC_COARSE")
    }


def test_segment_and_launcher_do_not_import_numba():
    for path, text in sources(ROOT / "cobre_shm/segment", ROOT / "cobre_shm/spawn").items():
        assert not re.search(r"^\s*(from|import) (numba|cobre_shm\.kernels)", text, re.MULTILINE), (
            path
        )


def test_no_workload_word_in_the_interface():
    words = re.compile(r"\b(hydro|reservoir|sddp|scenario|thermal)", re.IGNORECASE)
    for folder in ("kernels", "segment", "selection", "shm", "testing"):
        for path, text in sources(ROOT / "cobre_shm" / folder).items():
            assert not words.search(text), path
    for name in ("communicator", "validate", "heap", "local", "layout", "errors"):
        text = (ROOT / f"cobre_shm/{name}.py").read_text()
        assert not words.search(text), name


def test_list_of_faults_names_tests_that_exist():
    listed = re.findall(r"([a-z_]+/test_\w+\.py)(?:::(\w+))?", faults.__doc__)
    assert len(listed) > 40
    for path, test in listed:
        text = (ROOT / "tests" / path).read_text()
        assert (f"def {test}(" if test else "def test_") in text, (path, test)
