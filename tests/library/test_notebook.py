"""Library mode in a real Jupyter kernel, as a person would use it."""

import asyncio
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbclient")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
pytest.importorskip("ipykernel", reason="needs ipykernel")
pytest.importorskip("cloudpickle", reason='needs the extra "notebook"')

ROOT = Path(__file__).resolve().parents[2]

RUN = """
from cobre_shm import create_communicator, spawn
factor = 3
class Answer:
    def __init__(self, value): self.value = value
def work(offset):
    import numpy as np
    with create_communicator() as comm:
        return Answer(factor * float(comm.allreduce(np.ones(1))[0]) + offset)
[isinstance(a, Answer) and a.value for a in spawn.run(work, nprocs=2, args=(1.0,))]
"""
FAIL = """
def fail():
    with create_communicator() as comm:
        if comm.rank == 1:
            raise ValueError("in the notebook")
        comm.barrier()
try:
    spawn.run(fail, nprocs=2)
except Exception as error:
    print(type(error).__name__, error.rank, repr(error.inner))
"""
TRAIN = """
import cobre_shm
limit = {"training": {"stopping_rules": [{"type": "iteration_limit", "limit": 3}]}}
events = []
result = cobre_shm.train(case, num_workers=2, config_overrides=limit,
                         progress_callback=events.append)
print(len(events), result.workers[1].rank)
result
"""
AWAIT = """
print((await cobre_shm.train_async(case, num_workers=2, config_overrides=limit)).iterations)
"""
LEFT = """
import pathlib
print(repr(pathlib.Path("/proc/self/task/%d/children" % __import__("os").getpid()).read_text()))
"""


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_notebook_runs_functions_and_trainings(case_path, tmp_path, monkeypatch):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    # Nothing of the user's own Jupyter.
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    cells = [f"case = {str(case_path)!r}", RUN, FAIL, TRAIN, AWAIT, LEFT]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(
        notebook, timeout=360, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    # Not execute(): it would leave an event loop behind.
    asyncio.run(client.async_execute())
    _, run, fail, train, awaited, left = notebook.cells
    assert run.outputs[-1]["data"]["text/plain"] == "[7.0, 7.0]"
    assert text_of(fail) == "WorkerError 1 ValueError('in the notebook')\n"
    assert text_of(train) == "6 1\n"
    assert "<svg" in train.outputs[-1]["data"]["text/html"]
    assert text_of(awaited) == "3\n"
    assert text_of(left) == "''\n"
