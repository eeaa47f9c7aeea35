"""A rank that the kernel kills for want of memory, in a control group made for the test."""

import os

PROGRAM = """
import os, time
held = []
while os.environ["RANK"] == "1":
    held.append(b"x" * 10_000_000)
time.sleep(3600)
"""


def test_rank_out_of_memory_is_named_with_peak_and_limit(spawn, limited_group):
    def enter():
        (limited_group / "cgroup.procs").write_text(str(os.getpid()))

    done = spawn.run("-n", 2, "-c", PROGRAM, preexec_fn=enter)
    assert done.returncode == 137
    last = done.stderr.decode().splitlines()[-1]
    assert "Rank 1 of 2" in last
    assert "(SIGKILL): out of memory" in last
    assert "a limit of 300 MiB" in last
    assert "a peak of " in last
    # Somebody else's kill is none.
    code = "import os; os.kill(os.getpid(), 9)"
    done = spawn.run("-n", 1, "-c", code, preexec_fn=enter)
    assert done.returncode == 137
    assert b"memory" not in done.stderr
