import json
import os
import subprocess
import sys
import zipfile

import pytest

pytestmark = pytest.mark.parametrize("spawn", ["zygote"], indirect=True)

SHOW = """
import json, os, sys
if __name__ == "__main__":
    print(json.dumps({
        "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(),
        "file": globals().get("__file__"),
        "spec": getattr(__spec__, "name", None), "package": __package__,
        "utf8": sys.flags.utf8_mode, "warn": sys.warnoptions, "dev": sys.flags.dev_mode,
        "isolated": sys.flags.isolated, "hash": sys.flags.hash_randomization,
    }))
"""


@pytest.fixture
def programs(spawn):
    folder = spawn.folder
    (folder / "show.py").write_text(SHOW)
    (folder / "with space ü").mkdir()
    (folder / "with space ü" / "show it.py").write_text(SHOW)
    for name in ("package", "namespace/inner", "directory"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__main__.py").write_text(SHOW)
    (folder / "package" / "__init__.py").write_text("")
    (folder / "package" / "module.py").write_text(SHOW)
    # The module is found only after the parent has run.
    (folder / "shifting").mkdir()
    (folder / "shifting" / "__init__.py").write_text("__path__.append('elsewhere')")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "moved.py").write_text(SHOW)
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", SHOW)
    return spawn


@pytest.mark.parametrize(
    ("flags", "program"),
    [
        ([], ["show.py", "a", "--b"]),
        ([], ["./show.py"]),
        ([], ["with space ü/show it.py", "ä b"]),
        ([], ["directory", "a"]),
        ([], ["archive.zip", "a"]),
        ([], ["-m", "show", "a"]),
        ([], ["-m", "package"]),
        ([], ["-m", "package.module", "-m"]),
        ([], ["-m", "namespace.inner"]),
        ([], ["-m", "shifting.moved"]),
        ([], ["-c", SHOW, "a"]),
        (["-X", "utf8=1", "-W", "ignore"], ["show.py"]),
        (["-X", "dev"], ["show.py"]),
    ],
    ids=lambda words: " ".join(words[:2])[:24],
)
def test_rank_sees_what_it_would_see_started_directly(programs, flags, program):
    python = [sys.executable, *flags]
    direct = programs.run(command=[*python, *program])
    launched = programs.run(command=[*python, "-m", "cobre_shm.spawn", "-n", "1", *program])
    assert launched.stderr == b""
    assert json.loads(launched.stdout) == json.loads(direct.stdout)


def test_rank_runs_in_the_directory_of_the_launcher(programs):
    (programs.folder / "directory" / "below").mkdir()
    done = programs.run(*("-n", 1, "../../show.py"), cwd=programs.folder / "directory" / "below")
    assert json.loads(done.stdout)["cwd"] == str(programs.folder / "directory" / "below")


def test_multiprocessing_works_inside_a_rank(spawn):
    (spawn.folder / "pool.py").write_text(
        "import multiprocessing\n"
        "class Item:\n"
        "    def __init__(self, value): self.value = value\n"
        "def square(item): return Item(item.value ** 2)\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print([i.value for i in pool.map(square, [Item(2), Item(3)])])\n"
    )
    done = spawn.run("-n", 2, "pool.py")
    assert done.stderr == b""
    assert done.stdout == b"[4, 9]\n" * 2
    assert done.returncode == 0


def test_rank_zero_reads_standard_input_and_others_read_nothing(spawn):
    code = "import os, sys; print(os.environ['RANK'], len(sys.stdin.buffer.read()))"
    text = os.urandom(300_000)
    done = spawn.run("-n", 3, "-c", code, input=text)
    assert sorted(done.stdout.splitlines()) == [b"0 300000", b"1 0", b"2 0"]


def test_closed_standard_descriptors_do_no_harm(spawn):
    def close_all():
        for descriptor in (0, 1, 2):
            os.close(descriptor)

    code = "import os, sys; sys.stdin.read(); print(1); open('seen', 'w').close(); sys.exit(6)"
    done = spawn.run(
        "-n", 1, "-c", code, preexec_fn=close_all, stdin=None, stdout=None, stderr=None
    )
    assert (spawn.folder / "seen").exists()
    assert done.returncode == 6


def test_sixty_four_ranks(spawn):
    done = spawn.run("-n", 64, "-c", "import os; print(os.environ['RANK'])")
    assert done.stderr == b""
    assert sorted(map(int, done.stdout.split())) == list(range(64))
    assert done.returncode == 0


def test_group_without_pidfds_is_watched_all_the_same(spawn):
    spawn.write(
        "program.py",
        "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(5)\ntime.sleep(3600)",
    )
    code = (
        "import os, sys\n"
        "def refuse(*_): raise PermissionError(1, 'refused')\n"
        "os.pidfd_open = refuse\n"
        "from cobre_shm.spawn.__main__ import main\n"
        "sys.exit(main(['-n', '3', 'program.py']))"
    )
    done = spawn.run(command=[sys.executable, "-c", code])
    assert done.returncode == 5
    assert b"Rank 1 of 3" in done.stderr


def test_rank_that_cannot_be_started_ends_the_others(spawn):
    def allow_few_descriptors():
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))

    done = spawn.run(
        *("-n", 20, "-c", "import time; time.sleep(3600)"), preexec_fn=allow_few_descriptors
    )
    assert done.returncode == 126
    assert b"of 20 cannot be started" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_console_script_is_the_same(spawn):
    script = spawn.folder / "cobrerun"
    script.write_text("import sys; from cobre_shm.spawn.__main__ import run; sys.exit(run())")
    shown = spawn.run(command=[sys.executable, str(script), "--help"])
    assert shown.stdout.startswith(b"usage: cobrerun ")
    (spawn.folder / "local.py").write_text("raise SystemExit(3)")
    done = spawn.run(
        command=[sys.executable, str(script), "-n", "1", "-m", "local"], stderr=subprocess.DEVNULL
    )
    assert done.returncode == 3
