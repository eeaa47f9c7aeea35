"""The installed package imports without a warning, however Python is started."""

import json

import pytest

CODE = """
import importlib, json, pathlib
import cobre_shm
home = pathlib.Path(cobre_shm.__file__).parents[1]
found = []
for path in sorted([*home.glob("cobre_shm/**/*.py"), *home.glob("cobre_net/**/*.py")]):
    name = ".".join(path.relative_to(home).with_suffix("").parts).removesuffix(".__init__")
    if not name.startswith(EXTRAS) and not name.endswith("__main__"):
        importlib.import_module(name)
        found.append(name)
for name in cobre_shm.__all__:
    if name not in NEEDS_SDDP:
        getattr(cobre_shm, name)
print(json.dumps(found))
"""
# Those import what the plain install has not.
EXTRAS = ("cobre_shm.sddp", "cobre_shm.api", "cobre_shm.mcp_server", "cobre_net.mpi")
NEEDS_SDDP = (
    *("History", "Policy", "ProgressEvent", "SimulationResult", "TrainingResult", "WorkerInfo"),
    *("simulate", "train", "train_async"),
)


@pytest.mark.parametrize(
    ("flags", "env"),
    [
        (["-I"], {}),
        (["-I", "-O"], {}),
        (["-I", "-OO"], {}),
        ([], {"PYTHONSAFEPATH": "1"}),
        (["-X", "dev"], {}),
    ],
    ids=["isolated", "optimized", "without-docstrings", "safe-path", "dev"],
)
def test_every_module_imports_without_a_warning(wheel_profile, flags, env):
    code = CODE.replace("EXTRAS", repr(EXTRAS)).replace("NEEDS_SDDP", repr(NEEDS_SDDP))
    done = wheel_profile.run("-W", "error", "-c", code, flags=flags, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"cobre_shm.jit", "cobre_shm.shm", "cobre_net.tcp"} <= set(json.loads(done.stdout))


@pytest.mark.parametrize("module", ["spawn", "info", "top", "tune"])
def test_commands_explain_themselves_without_docstrings(wheel_profile, module):
    flags = ["-I", "-OO", "-W", "error"]
    done = wheel_profile.run("-m", f"cobre_shm.{module}", "--help", flags=flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout


def test_ranks_inherit_the_flags(wheel_profile):
    code = "import sys, cobre_shm; cobre_shm.create_communicator().barrier(); print(sys.flags)"
    done = wheel_profile.run("-m", "cobre_shm.spawn", "-n", "2", "-c", code, flags=["-I", "-O"])
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "isolated=1" in line
        assert "optimize=1" in line
