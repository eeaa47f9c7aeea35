"""README is checked against the code: its table, its program, its commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cobre_shm.selection.variables import VARIABLES, markdown_table

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_environment_table_is_that_of_the_code():
    table = TEXT.split("<!-- env-table -->")[1].split("<!-- /env-table -->")[0]
    assert table.strip() == markdown_table().strip()


def test_every_variable_read_in_the_code_is_in_the_table():
    known = {variable.name for variable in VARIABLES}
    for path in [*(ROOT / "cobre_shm").rglob("*.py"), *(ROOT / "cobre_net").rglob("*.py")]:
        for name in re.findall(r"\bCOBRE_[A-Z]+_[A-Z_]*[A-Z]\b", path.read_text()):
            assert name in known, f"{name} in {path}"


@pytest.mark.parametrize("launcher", [[], ["-m", "cobre_shm.spawn", "-n", "4"]])
def test_example_program_runs_alone_and_on_four_ranks(tmp_path, launcher):
    program = re.search(r"```python\n(# mean\.py\n.*?)```", TEXT, re.DOTALL)[1]
    assert len(program.splitlines()) <= 24
    (tmp_path / "mean.py").write_text(program)
    done = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "mean.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    size, backend = (4, "shm") if launcher else (1, "local")
    assert f"{size} rank(s) over {backend}: mean" in done.stdout
    assert done.stdout.count("\n") == 2


def test_failure_shown_is_the_failure_seen():
    shown = re.search(r"```text\n\$ (python .*?)\n\.\.\.\n(.*?)```", TEXT, re.DOTALL)
    code = re.search(r"-c '(.*)'", shown[1], re.DOTALL)[1]
    done = subprocess.run(
        [sys.executable, "-m", "cobre_shm.spawn", "-n", "2", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    pattern = re.escape(shown[2].strip()).replace("4242", r"\d+")
    assert re.search(pattern, done.stderr), done.stderr


def test_files_named_in_readme_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
