"""The tools and resources, through the SDK's own client, over both transports."""

import json
from pathlib import Path

import anyio
import mcp
import numpy as np
import pytest
from mcp.server.mcpserver import Context

from cobre_shm.local import LocalCommunicator
from cobre_shm.mcp_server import server
from cobre_shm.mcp_server.folders import Folders
from cobre_shm.mcp_server.tools import Session
from cobre_shm.sddp.results import write_table
from tests.library.conftest import limit

TOOLS = {
    "validate",
    "inspect-case",
    "train",
    "simulate",
    "query-convergence",
    "inspect-policy",
    "compare-policies",
    "export-results",
    "get-config-schema",
}


async def call(client, name, **arguments):
    """Call a tool that succeeds; return its data."""
    answer = await client.call_tool(name, arguments)
    assert not answer.is_error, answer.content
    assert json.loads(answer.content[0].text) == answer.structured_content
    assert answer.structured_content["success"]
    return answer.structured_content["data"]


async def refusal(client, name, **arguments):
    """Call a tool that fails; return its error records."""
    answer = await client.call_tool(name, arguments)
    assert answer.is_error
    return answer.structured_content["errors"]


def test_session_from_the_case_to_the_files(session, allowed):
    case, output = str(allowed / "case"), str(allowed / "out")
    config = json.loads((allowed / "case" / "config.json").read_text())
    rules = [
        {"type": "iteration_limit", "limit": 9},
        {"type": "time_limit", "seconds": 1e6},
        {"type": "bound_stalling", "iterations": 9, "tolerance": 1e-9},
    ]
    config["training"]["stopping_rules"] = rules
    (allowed / "case" / "config.json").write_text(json.dumps(config))

    async def use(client):
        listed = await client.list_tools()
        assert {tool.name for tool in listed.tools} == TOOLS
        assert all(tool.description and tool.annotations for tool in listed.tools)
        writing = {tool.name for tool in listed.tools if not tool.annotations.read_only_hint}
        assert writing == {"train", "export-results"}

        assert (await call(client, "validate", case=case))["warnings"] == []
        described = await call(client, "inspect-case", case=case)
        # As they are written, so that they can be given back.
        assert described["stopping_rules"] == rules
        stages, state = described["stage_ids"], described["initial_state"]

        progress = []

        async def tell(done, total, message):
            progress.append((done, total, message))

        trained = await client.call_tool(
            "train", {"case": case, "config_overrides": limit(4)}, progress_callback=tell
        )
        trained = trained.structured_content["data"]
        assert trained["iterations"] == 4
        assert [(done, total) for done, total, _ in progress] == [(i, 4) for i in range(1, 5)]
        name = trained["result"]

        table = await call(client, "query-convergence", result=name, first=2, last=3)
        assert [row["iteration"] for row in table["rows"]] == [2, 3]
        assert table["iterations"] == 4

        whole = await call(client, "inspect-policy", policy=name)
        assert sum(item["cuts"] for item in whole["stages"]) == trained["cuts"]
        assert [item["stage"] for item in whole["stages"]] == stages
        one = await call(client, "inspect-policy", policy=name, stage=stages[0], state=state)
        assert one["future_cost"] > 0

        exported = await call(client, "export-results", result=name, output_dir=output)
        assert "policy/cuts.parquet" in exported["files"]
        again = await call(client, "query-convergence", result=output)
        assert again["rows"][-1]["lower_bound"] == trained["lower_bound"]
        same = await call(
            client, "compare-policies", first=name, second=output, states=[state, state]
        )
        assert {stage["largest_difference"] for stage in same["stages"]} == {0.0}

        cost = await call(client, "simulate", case=case, policy=name, scenarios=3)
        assert cost["total_cost"]["scenarios"] == 3

        schema = await call(client, "get-config-schema")
        assert "stopping_rules" in schema["properties"]["training"]["properties"]

        kept = await client.read_resource("cobre://results")
        kept = json.loads(kept.contents[0].text)
        assert [item["result"] for item in kept] == [name, cost["result"]]
        for path in ("", "/convergence", "/policy"):
            resource = await client.read_resource(f"cobre://results/{name}{path}")
            assert json.loads(resource.contents[0].text)

    session(use)


@pytest.mark.parametrize("session", ["stdio"], indirect=True)
@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({"stage": np.arange(3)}, "no column 'iteration'"),
        ({"iteration": np.arange(0)}, "no rows"),
        ({"iteration": np.array(["one"])}, "without numbers: iteration"),
    ],
)
def test_table_of_something_else_is_an_error_record(session, allowed, columns, word):
    path = allowed / "out" / "training" / "convergence.parquet"
    path.parent.mkdir(parents=True)
    write_table(path, columns)

    async def use(client):
        (error,) = await refusal(client, "query-convergence", result=str(allowed / "out"))
        assert (error["kind"], error["context"]) == ("ParseError", {"file": str(path)})
        assert word in error["message"]

    session(use)


@pytest.mark.parametrize("session", ["stdio"], indirect=True)
def test_mistakes_are_error_records(session, allowed):
    case = allowed / "case"
    config = json.loads((case / "config.json").read_text())
    config["training"]["forward_passes"] = 0
    config["training"]["stopping_rules"] = []
    (case / "config.json").write_text(json.dumps(config))

    async def use(client):
        found = await refusal(client, "validate", case=str(case))
        assert [error["kind"] for error in found] == ["SchemaViolation", "OutOfRange"]
        assert {error["context"]["file"] for error in found} == {"config.json"}
        (error,) = await refusal(client, "train", case=str(case))
        assert set(error) == {"kind", "message", "context", "suggestion"}
        (error,) = await refusal(client, "validate", case=str(allowed / "absent"))
        assert error["kind"] == "MissingFile"
        (error,) = await refusal(client, "inspect-policy", policy="train-9")
        assert error["kind"] in ("NotAllowed", "MissingFile")
        (error,) = await refusal(client, "export-results", result="train-9", output_dir="x")
        assert error["kind"] == "OutOfRange"
        answer = await client.call_tool("simulate", {"case": "shipped"})
        assert answer.is_error
        assert "policy" in answer.content[0].text

    session(use)


def test_cancelled_training_ends_and_the_server_goes_on(session, allowed):
    case = str(allowed / "case")

    async def use(client):
        told = anyio.Event()

        async def tell(done, total, message):
            told.set()

        async def train():
            await client.call_tool(
                "train", {"case": case, "config_overrides": limit(10**6)}, progress_callback=tell
            )

        async with anyio.create_task_group() as group:
            group.start_soon(train)
            await told.wait()
            # While it trains, other calls are answered.
            await call(client, "inspect-case", case=case)
            group.cancel_scope.cancel()
        # One training at a time: this one could not begin if the other went on.
        answer = await call(client, "train", case=case, config_overrides=limit(1))
        assert answer["iterations"] == 1

    session(use)


@pytest.mark.parametrize("tool", ["train", "simulate"])
def test_cancelled_work_ends_between_two_problems(session, allowed, tool):
    """An iteration or a simulation that would take far longer than the test may."""
    case = str(allowed / "case")
    many = {"training": {"forward_passes": 500_000}}

    async def use(client):
        policy = (await call(client, "train", case=case, config_overrides=limit(1)))["result"]
        arguments = {
            "train": {"case": case, "config_overrides": many},
            "simulate": {"case": case, "policy": policy, "scenarios": 200_000},
        }[tool]
        with anyio.move_on_after(1.0) as scope:
            await client.call_tool(tool, arguments)
        assert scope.cancelled_caught
        answer = await call(client, "train", case=case, config_overrides=limit(1))
        assert answer["iterations"] == 1
        assert (await call(client, "query-convergence", result=answer["result"]))["iterations"] == 1

    session(use, transport="stdio")


def test_report_that_nobody_takes_does_not_hold_a_training_up(allowed, monkeypatch):
    """Over HTTP a report can begin when its client has gone, and then nothing ends it."""
    begun = []

    async def never(*_):
        begun.append(1)
        await anyio.sleep_forever()

    monkeypatch.setattr(Context, "report_progress", never)
    monkeypatch.setattr(server, "_REPORT_SECS", 0.01)

    async def use():
        made = server.make_server(Session(LocalCommunicator(), Folders([allowed])))
        with anyio.fail_after(100):
            async with mcp.Client(made) as client:
                case = str(allowed / "case")
                return await call(client, "train", case=case, config_overrides=limit(3))

    assert anyio.run(use)["iterations"] == 3
    assert len(begun) == 3


def test_results_can_be_listed_while_another_is_kept(allowed):
    session = Session(LocalCommunicator(), Folders([allowed]))

    class Result:
        """Has another one kept while it is looked at, as a worker's thread may."""

        @property
        def case(self):
            session._keep("simulate", Result())
            return Path("case")

    for _ in range(20):
        session._keep("simulate", Result())
    names = [f"simulate-{number}" for number in range(5, 21)]
    assert [each["result"] for each in session.names()] == names
