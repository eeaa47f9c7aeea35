"""Ranks that are forked, compared with what the same program sees when it is started directly."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.parametrize("spawn", ["zygote"], indirect=True)

# Facts of a process that fork could carry over from the one that imported numpy.
FACTS = """
import json, os, signal, sys, threading
def facts():
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
    descriptors = sorted(os.listdir("/proc/self/fd"), key=int)
    return {
        "descriptors": [d for d in descriptors if os.path.exists(f"/proc/self/fd/{d}")],
        "ignored": status["SigIgn"], "blocked": status["SigBlk"],
        "handlers": {
            n: str(signal.getsignal(n)) for n in range(1, 35) if n not in (9, 19, 32, 33)
        },
        "wakeup": signal.set_wakeup_fd(-1),
        "threads": status["Threads"].strip(),
        "is_main": threading.current_thread() is threading.main_thread(),
        "native_id": threading.main_thread().native_id == os.getpid(),
        "names": sorted(vars(sys.modules["__main__"])),
        "shown": open("/proc/self/cmdline").read().rstrip("\\0").split("\\0")[-2:],
        "argv": sys.argv, "orig_argv": sys.orig_argv[-2:], "path": sys.path,
        "flags": str(sys.flags), "hook": str(sys.excepthook),
        "stdin": [sys.stdin.name, sys.stdin.mode, sys.stdin.encoding, sys.stdin.seekable()],
        "streams": [
            [s.name, s.mode, s.encoding, s.errors, s.line_buffering, s.write_through, s.seekable()]
            for s in (sys.stdout, sys.stderr)
        ],
        "stdin_is_original": sys.stdin is sys.__stdin__,
        "session": os.getsid(0) == os.getsid(os.getppid()),
        "gc": __import__("gc").isenabled(),
        "umask": os.umask(0o22), "cwd": os.getcwd(), "nice": os.nice(0),
    }
if __name__ == "__main__":
    print(json.dumps(facts()))
"""


@pytest.mark.parametrize("stdin", ["file", "pipe", "null"])
def test_forked_rank_has_no_trace_of_the_zygote(spawn, stdin):
    spawn.write("facts.py", FACTS)
    # What the launcher sets for ranks.
    defaults = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    seen = []
    for command in ([sys.executable, "facts.py", "a"], spawn.command("-n", 1, "facts.py", "a")):
        if stdin == "pipe":
            done = spawn.run(command=command, input=b"text", env=defaults)
        else:
            with open("/dev/null" if stdin == "null" else spawn.folder / "facts.py", "rb") as file:
                done = spawn.run(command=command, stdin=file, env=defaults)
        assert done.stderr == b""
        seen.append(json.loads(done.stdout))
    direct, forked = seen
    assert forked == direct


def test_process_table_shows_the_program(spawn):
    # What ps reads; it shows other characters than ASCII in some locales only.
    code = "import sys; sys.stdout.buffer.write(open('/proc/self/cmdline', 'rb').read())"
    spawn.write("a program.py", code)
    done = spawn.run("-n", 1, "a program.py", "ü", "last")
    assert done.stdout.rstrip(b"\0").endswith(b"\0a program.py\0\xc3\xbc\0last")


SCRIPTS = {
    "exception": "def f(): raise KeyError('ü')\ntry: 1 / 0\nexcept ZeroDivisionError: f()",
    "syntax": "x = (\n",
    "text": "import sys\nsys.exit('the reason')",
    "hook": (
        "import sys, traceback\n"
        "def show(kind, error, trace):\n"
        "    print(kind.__name__, len(traceback.extract_tb(trace)), sys.last_value is error)\n"
        "    print(len(traceback.extract_tb(sys.last_value.__traceback__)))\n"
        "sys.excepthook = show\n"
        "raise ValueError"
    ),
    "atexit": (
        "import atexit\n"
        "class Last:\n"
        "    def __del__(self): print('deleted')\n"
        "last = Last()\n"
        "atexit.register(print, 'first registered')\n"
        "atexit.register(print, 'last registered')\n"
        "file = open('kept-open', 'w')\n"
        "file.write('all of it')\n"
        "print('end')"
    ),
    "thread": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "print('main')"
    ),
    "late": (
        "import json, os, threading, numpy\n"
        "class Late:\n"
        "    def __init__(self): self.itself = self\n"
        "    def __del__(self):\n"
        "        import json, os.path, threading, numpy\n"
        "        print(json.dumps(numpy.arange(2).tolist()), os.path.basename('a/b'))\n"
        "        print(threading.current_thread() is threading.main_thread())\n"
        "        import traceback\n"
        "        try: 1 / 0\n"
        "        except ZeroDivisionError: traceback.print_exc()\n"
        "Late()"
    ),
    "interrupt": "raise KeyboardInterrupt",
    "crash": "import os\nos._exit(7)",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_forked_rank_ends_as_if_started_directly(spawn, name):
    spawn.write("script.py", SCRIPTS[name])
    direct = spawn.run(command=[sys.executable, "script.py"])
    kept = spawn.folder / "kept-open"
    if kept.exists():
        kept.write_text("")
    launched = spawn.run("-n", 1, "script.py")
    code = direct.returncode
    assert launched.returncode == (code if code >= 0 else 128 - code)
    assert launched.stdout == direct.stdout
    lines = launched.stderr.splitlines(keepends=True)
    if code:
        assert b"Rank 0 of 1" in lines.pop()
    assert b"".join(lines) == direct.stderr
    if kept.exists():
        assert kept.read_text() == "all of it"


def test_random_state_differs_from_rank_to_rank(spawn):
    code = (
        "import random, uuid, secrets, tempfile, json\n"
        "import numpy, multiprocessing.process\n"
        "print(json.dumps([random.random(), str(uuid.uuid4()), secrets.token_hex(),\n"
        "    next(tempfile._get_candidate_names()), numpy.random.random(),\n"
        "    numpy.random.default_rng().random(),\n"
        "    multiprocessing.process.current_process().authkey.hex()]))"
    )
    done = spawn.run("-n", 3, "-c", code)
    assert done.stderr == b""
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for column in zip(*rows, strict=True):
        assert len(set(column)) == 3


def test_seeded_numbers_are_those_of_a_direct_start(spawn):
    code = (
        "import random, numpy\n"
        "random.seed(5); numpy.random.seed(5)\n"
        "print(random.random(), numpy.random.random(), numpy.random.default_rng(5).random())"
    )
    direct = spawn.run(command=[sys.executable, "-c", code])
    assert spawn.run("-n", 1, "-c", code).stdout == direct.stdout


def test_launcher_is_the_parent_of_ranks_that_were_imported_once(spawn):
    code = (
        "import gc, os, sys, time\n"
        "print(os.getppid(), os.getpgid(0) == os.getpid(), 'numpy' in sys.modules,"
        " gc.get_freeze_count() > 5_000)\n"
        # Those that find no line fail and end the others, which may not have printed.
        "open('printed' + os.environ['RANK'], 'w').close()\n"
        "while not all(os.path.exists(f'printed{r}') for r in range(3)): time.sleep(0.001)\n"
        "input()"
    )
    reader, writer = os.pipe()
    process = spawn.start("-n", 3, "-c", code, stdin=reader)
    os.close(reader)
    seen = [process.stdout.readline().split() for _ in range(3)]
    assert seen == [[b"%d" % process.pid, b"True", b"True", b"True"]] * 3
    os.write(writer, b"\n")
    os.close(writer)
    process.communicate()
    assert process.returncode == 1  # the others found no line to read


def test_program_with_a_file_named_like_an_imported_module_gets_its_own(spawn):
    folder = Path(os.fsdecode(bytes(spawn.folder) + b"/\xff own"))
    folder.mkdir()
    (folder / "colorsys.py").write_text("mine = True")
    (folder / "numba.py").write_text("mine = True")
    (folder / "program.py").write_text("import colorsys, numba\nprint(numba.mine, colorsys.mine)")
    done = spawn.run("-n", 2, folder / "program.py")
    assert done.stdout == b"True True\n" * 2
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert b"one by one" in line
    assert b"\xff own/numba.py" in line
    # A name that nothing has imported is nobody's business.
    (folder / "numba.py").unlink()
    (folder / "program.py").write_text("import colorsys\nprint(colorsys.mine)")
    done = spawn.run("-n", 2, folder / "program.py")
    assert (done.stdout, done.stderr) == (b"True\n" * 2, b"")


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("import os; os.kill(os.getpid(), 9)", b"the zygote has died"),
        ("raise RuntimeError('broken')", b"RuntimeError: broken"),
        ("raise RuntimeError('broken' * 20_000)", b"RuntimeError: brokenbroken"),
        ("import threading, time; threading.Thread(target=time.sleep, args=[5]).start()", b""),
    ],
    ids=["killed", "raises", "raises at length", "thread"],
)
def test_import_that_goes_wrong_costs_the_fast_start_only(spawn, module, why):
    folder = spawn.folder / "installed"
    folder.mkdir()
    (folder / "heavy.py").write_text(module)
    paths = os.pathsep.join([str(folder), spawn.environment()["PYTHONPATH"]])
    spawn.write("program.py", "import os\nprint(os.environ['RANK'])")
    done = spawn.run("-n", 2, "--preload", "heavy", "program.py", env={"PYTHONPATH": paths})
    assert sorted(done.stdout.split()) == [b"0", b"1"]
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert b"one by one" in line
    assert why in line


@pytest.mark.parametrize("text", ["café →", r"\ud800"])
def test_reason_is_said_whatever_the_locale(spawn, text):
    folder = spawn.folder / "installed"
    folder.mkdir()
    (folder / "heavy.py").write_text(f"raise RuntimeError('{text}')", encoding="utf-8")
    paths = os.pathsep.join([str(folder), spawn.environment()["PYTHONPATH"]])
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": paths}
    done = spawn.run("-n", 1, "--preload", "heavy", "-c", "print('run')", env=plain)
    assert (done.stdout, done.returncode) == (b"run\n", 0), done.stderr
    assert f"one by one: RuntimeError: {text}\n".encode() in done.stderr


def test_module_beside_the_program_can_be_preloaded(spawn):
    spawn.write("heavy.py", "")
    code = "import sys\nbefore = 'heavy' in sys.modules\nimport heavy\nprint(before)"
    spawn.write("program.py", code)
    done = spawn.run("-n", 2, "--preload", "heavy", "program.py")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"True\n") == 2


@pytest.fixture
def importing(spawn):
    """A launcher whose zygote imports for as long as nobody ends it."""
    folder = spawn.folder / "installed"
    folder.mkdir()
    text = "open('importing', 'w').close()\nimport time\ntime.sleep(3600)"
    (folder / "heavy.py").write_text(text)
    paths = os.pathsep.join([str(folder), spawn.environment()["PYTHONPATH"]])
    words = ("-n", 4, "--preload", "heavy", "-c", "print('never')")
    process = spawn.start(*words, env={"PYTHONPATH": paths})
    spawn.wait_for((spawn.folder / "importing").exists)
    return process


USES = "import sys; print('numba' in sys.modules, 'json.tool' in sys.modules)\n"


@pytest.mark.parametrize(
    ("way", "line", "is_preloaded"),
    [
        ("script", "import numba", True),
        ("module", "import numba.core", True),
        ("directory", "from numba import njit", True),
        ("code", "from cobre_shm import jit", True),
        ("code", "import numbapro", False),
        ("code", "'import numba'", False),
    ],
)
def test_numba_is_preloaded_where_the_program_imports_it(spawn, way, line, is_preloaded):
    text = f"{USES}if not sys.argv:\n    {line}"
    folder = spawn.folder / "package"
    folder.mkdir()
    for name in ("program.py", "__main__.py"):
        (folder / name).write_text(text)
    words = {
        "script": ["package/program.py"],
        "code": ["-c", text],
        "module": ["-m", "package.program"],
        "directory": ["package"],
    }[way]
    done = spawn.run("-n", 1, *words)
    assert (done.stdout, done.stderr) == (b"%s False\n" % str(is_preloaded).encode(), b"")


@pytest.mark.parametrize(
    ("preload", "expected"),
    [
        ("none", b"False False\n"),
        ("json.tool", b"False True\n"),
        ("numba,json.tool", b"True True\n"),
    ],
)
def test_what_is_preloaded_can_be_chosen(spawn, preload, expected):
    done = spawn.run("-n", 1, "--preload", preload, "-c", USES + "import numba")
    assert (done.stdout, done.stderr) == (expected, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_while_the_zygote_imports_ends_the_run(importing, number):
    importing.send_signal(number)
    out, err = importing.communicate()
    assert (out, err) == (b"", b"")
    assert importing.returncode == 128 + number


def test_launcher_killed_while_the_zygote_imports_leaves_nothing(spawn, importing):
    importing.kill()
    spawn.wait_for(lambda: not spawn.processes())
    assert importing.wait() == -signal.SIGKILL


def test_rank_may_fork_and_launch_by_itself(spawn):
    code = (
        "import os, subprocess, sys\n"
        "if os.fork() == 0:\n"
        "    print('child', flush=True); os._exit(0)\n"
        "os.wait()\n"
        f"subprocess.run({spawn.command('-n', 2, '-c', 'print(2)')!r})"
    )
    done = spawn.run("-n", 1, "-c", code)
    assert done.stderr == b""
    assert done.stdout == b"child\n2\n2\n"
    assert done.returncode == 0


def test_program_compiles_its_own_functions(spawn):
    spawn.write(
        "compiles.py",
        """
import numba
import numpy as np

from cobre_shm import create_communicator, jit


@numba.njit
def total(handle, x, y):
    return jit.allreduce(handle, x, y, jit.SUM)


with create_communicator() as comm:
    x, y = np.full(3, comm.rank + 1.0), np.zeros(3)
    jit.check(comm, total(jit.handle(comm), x, y))
    print(y.sum())
""",
    )
    done = spawn.run("-n", 2, "compiles.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [b"9.0", b"9.0"]


def test_orphans_of_a_rank_are_not_adopted(spawn):
    code = (
        "import os\n"
        "reader, writer = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    child = os.getpid()\n"
        "    if os.fork() == 0:\n"
        "        while os.getppid() == child: pass\n"
        "        os.write(writer, str(os.getppid()).encode())\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print(os.getppid(), os.read(reader, 100).decode())"
    )
    done = spawn.run("-n", 1, "-c", code)
    launcher, adopter = done.stdout.split()
    assert launcher != adopter


def test_program_comes_from_standard_input(spawn):
    program = b"import os, sys\nprint(os.environ['RANK'], sys.argv, __file__, sys.stdin.read())"
    direct = subprocess.run(
        [sys.executable, "-", "a b"],
        input=program.replace(b"os.environ['RANK']", b"0"),
        capture_output=True,
        cwd=spawn.folder,
        check=False,
    )
    done = spawn.run("-n", 2, "-", "a b", input=program)
    assert min(done.stdout.splitlines()) == direct.stdout.rstrip(b"\n")
    assert len(done.stdout.splitlines()) == 2


def test_classes_of_the_script_can_be_pickled_between_processes(spawn):
    spawn.write(
        "program.py",
        "import multiprocessing, pickle\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "class Item:\n"
        "    def __init__(self, value): self.value = value\n"
        "def double(item): return Item(2 * item.value)\n"
        "if __name__ == '__main__':\n"
        "    assert pickle.loads(pickle.dumps(Item(1))).value == 1\n"
        "    for method in ('fork', 'spawn', 'forkserver'):\n"
        "        context = multiprocessing.get_context(method)\n"
        "        with ProcessPoolExecutor(1, mp_context=context) as pool:\n"
        "            print(method, pool.submit(double, Item(4)).result().value)\n",
    )
    done = spawn.run("-n", 1, "program.py")
    assert done.stderr == b""
    assert done.stdout == b"fork 8\nspawn 8\nforkserver 8\n"


@pytest.mark.parametrize("way", ["script", "module", "directory"])
def test_unusual_paths(spawn, way):
    folder = spawn.folder / "a b" / "größe 'x' $HOME"
    folder.mkdir(parents=True)
    (folder / "__main__.py").write_text("import sys; print(sys.path[0], sys.argv)")
    words = {"script": ["__main__.py"], "module": ["-m", "__main__"], "directory": ["."]}[way]
    # Module __main__ is the running one, so that -m finds another name.
    if way == "module":
        (folder / "prog.py").write_text("import sys; print(sys.path[0], sys.argv)")
        words = ["-m", "prog"]
    direct = spawn.run(command=[sys.executable, *words, "ä"], cwd=folder)
    done = spawn.run("-n", 1, *words, "ä", cwd=folder)
    assert done.stderr == b""
    assert done.stdout == direct.stdout
    assert Path(folder).name.encode() in done.stdout
