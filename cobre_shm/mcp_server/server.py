"""The protocol's side of the tools and resources.

Every answer is the workload's envelope, as structured content and as text; a failure is a tool
error whose ``errors`` are records of kind, message, context and suggestion. Work runs in threads,
one training or simulation at a time, so the server answers while it trains. A call that the client
cancels ends after the problem that it solves.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import anyio
import anyio.from_thread
import anyio.to_thread
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceNotFoundError
from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import Field

import cobre_shm
from cobre_shm.api.result import ProgressEvent
from cobre_shm.errors import CobreError
from cobre_shm.mcp_server.schema import config_schema
from cobre_shm.mcp_server.tools import Findings, Session, Values
from cobre_shm.sddp.envelope import envelope

__all__ = ["make_server"]

logger: logging.Logger = logging.getLogger(__name__)

_FAILED = 1
# How long a training waits for its client to take a report. One that has gone never does, and what
# its going cancels may have been over when the report began.
_REPORT_SECS = 1.0
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_COMPUTES = ToolAnnotations(read_only_hint=True, open_world_hint=False, idempotent_hint=True)
_WRITES = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False)

CaseName = Annotated[
    str,
    Field(description="Case directory, or 'shipped' for the case that comes with the program"),
]
PolicyName = Annotated[
    str,
    Field(description="Result of a training in this session, or a folder with a saved policy"),
]
Overrides = Annotated[
    dict[str, Any] | None,
    Field(description="Values that replace those of config.json, nested as in get-config-schema"),
]


def make_server(session: Session) -> MCPServer[Any]:
    """Return a server whose tools work on ``session``."""
    server: MCPServer[Any] = MCPServer(
        "cobre-shm",
        version=cobre_shm.__version__,
        instructions="Trains, simulates and inspects operation policies of hydrothermal systems. "
        "Begin with inspect-case or train on the case 'shipped'.",
        log_level="WARNING",
    )
    work = anyio.CapacityLimiter(1)
    check = anyio.from_thread.check_cancelled

    async def answer(
        command: str, function: Callable[[], Values], limiter: anyio.CapacityLimiter | None = None
    ) -> CallToolResult:
        return await anyio.to_thread.run_sync(partial(_answer, command, function), limiter=limiter)

    @server.tool(name="validate", annotations=_READS)
    async def validate(case: CaseName) -> CallToolResult:
        """Find everything that is wrong with a case, all at once."""
        return await answer("validate", lambda: session.validate(case))

    @server.tool(name="inspect-case", annotations=_READS)
    async def inspect_case(case: CaseName) -> CallToolResult:
        """Describe a case: sizes, settings, plants, buses and lines, components of the state."""
        return await answer("inspect-case", lambda: session.inspect_case(case))

    @server.tool(name="train", annotations=_WRITES)
    async def train(
        ctx: Context[Any, Any],
        case: CaseName,
        config_overrides: Overrides = None,
        output_dir: Annotated[
            str | None, Field(description="Where to write the results; needs --allow-write")
        ] = None,
        resume: Annotated[
            bool, Field(description="Go on from the checkpoint in output_dir")
        ] = False,
    ) -> CallToolResult:
        """Train a policy. Tells progress after every iteration; the answer names the result."""

        def tell(event: ProgressEvent) -> None:
            message = f"lower bound {event.lower_bound:.6g} $, gap {event.gap_percent:.2f} %"
            anyio.from_thread.run(_report, ctx, event.iteration, event.iteration_limit, message)

        return await answer(
            "train",
            lambda: session.train(case, config_overrides, output_dir, resume, tell, check),
            work,
        )

    @server.tool(name="simulate", annotations=_COMPUTES)
    async def simulate(
        case: CaseName,
        policy: PolicyName,
        scenarios: Annotated[int | None, Field(ge=1, le=1_000_000)] = None,
        config_overrides: Overrides = None,
    ) -> CallToolResult:
        """Run a policy on random scenarios; the answer sums up the cost and names the result."""
        return await answer(
            "simulate",
            lambda: session.simulate(case, policy, scenarios, config_overrides, check),
            work,
        )

    @server.tool(name="query-convergence", annotations=_READS)
    async def query_convergence(
        result: Annotated[
            str, Field(description="Result of a training in this session, or its output directory")
        ],
        first: Annotated[int, Field(ge=1, description="First iteration")] = 1,
        last: Annotated[int | None, Field(ge=1, description="Last iteration")] = None,
    ) -> CallToolResult:
        """Return bounds, gap, cuts and times by iteration, at most 1,000 rows."""
        return await answer(
            "query-convergence", lambda: session.query_convergence(result, first, last)
        )

    @server.tool(name="inspect-policy", annotations=_READS)
    async def inspect_policy(
        policy: PolicyName,
        stage: Annotated[int | None, Field(description="Id of a stage; all if left out")] = None,
        state: Annotated[
            list[float] | None,
            Field(description="One value per component: the future cost there is returned"),
        ] = None,
    ) -> CallToolResult:
        """Describe a policy: cuts by stage, the slopes of a stage, the future cost of a state."""
        return await answer("inspect-policy", lambda: session.inspect_policy(policy, stage, state))

    @server.tool(name="compare-policies", annotations=_READS)
    async def compare_policies(
        first: PolicyName,
        second: PolicyName,
        states: Annotated[
            list[list[float]] | None,
            Field(description="Where to compare; the state of all zeros if left out"),
        ] = None,
    ) -> CallToolResult:
        """Compare the future costs of two policies of one case, stage by stage."""
        return await answer(
            "compare-policies", lambda: session.compare_policies(first, second, states or [])
        )

    @server.tool(name="export-results", annotations=_WRITES)
    async def export_results(
        result: Annotated[str, Field(description="A result of this session")],
        output_dir: Annotated[str, Field(description="Where; needs --allow-write")],
    ) -> CallToolResult:
        """Write the files of a training or a simulation."""
        return await answer("export-results", lambda: session.export_results(result, output_dir))

    @server.tool(name="get-config-schema", annotations=_READS)
    async def get_config_schema() -> CallToolResult:
        """Return what a case's config.json, and so config_overrides, may hold: a JSON Schema."""
        return await answer("get-config-schema", config_schema)

    @server.resource("cobre://results", name="results", mime_type="application/json")
    def results() -> str:
        """The results of this session."""
        return json.dumps(session.names())

    @server.resource("cobre://results/{name}", name="result", mime_type="application/json")
    def result(name: str) -> str:
        """Summary of a result."""
        return _resource(lambda: session.describe(name))

    @server.resource(
        "cobre://results/{name}/convergence", name="convergence", mime_type="application/json"
    )
    def convergence(name: str) -> str:
        """Bounds by iteration of a training of this session."""
        return _resource(lambda: session.convergence_of(name))

    @server.resource("cobre://results/{name}/policy", name="policy", mime_type="application/json")
    def policy(name: str) -> str:
        """Cuts by stage of a training of this session."""
        return _resource(lambda: session.policy_of(name))

    return server


async def _report(ctx: Context[Any, Any], done: int, total: int, message: str) -> None:
    with anyio.move_on_after(_REPORT_SECS):
        await ctx.report_progress(done, total, message)


def _answer(command: str, function: Callable[[], Values]) -> CallToolResult:
    errors: list[CobreError] = []
    warnings: list[str] = []
    data: Values | None = None
    try:
        data = function()
    except Findings as found:
        errors, warnings = list(found.errors), found.warnings
    except CobreError as error:
        errors = [error]
    except (ValueError, ArithmeticError, OSError, MemoryError) as error:
        logger.exception("tool %s failed", command)
        errors = [CobreError(f"{type(error).__name__}: {error}", context={"command": command})]
    values = envelope(
        command, _FAILED if errors else 0, errors=errors, warnings=warnings, data=data
    )
    # One text for both: what is no JSON value (a path in a context) is told by its text.
    text = json.dumps(_finite(values), default=str)
    return CallToolResult(
        content=[TextContent(type="text", text=text)],
        structured_content=json.loads(text),
        is_error=bool(errors),
    )


def _finite(value: Any) -> Any:
    """Return values with None for the numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _resource(function: Callable[[], Values]) -> str:
    try:
        return json.dumps(function())
    except CobreError as error:
        raise ResourceNotFoundError(json.dumps(error.to_dict())) from error
