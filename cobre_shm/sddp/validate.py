"""``python -m cobre_shm.sddp validate CASE``: everything that is wrong with a case, at once.

Exit codes: 0 the case can be trained, 3 it has findings (also in ``config.json``), 1 wrong
arguments.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cobre_shm.sddp.envelope import envelope
from cobre_shm.sddp.errors import CaseError, MissingFile

if TYPE_CHECKING:
    from cobre_shm.sddp.case import Case

VALID = 0
INVALID = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of the command."""
    parser.add_argument("case", metavar="CASE", help="case directory")
    parser.add_argument(
        "--output-format",
        choices=("text", "json"),
        default="text",
        help="json: one object with every finding (default: text)",
    )


def run(options: argparse.Namespace) -> int:
    """Check a case directory, print the findings and return the exit code."""
    from cobre_shm.sddp.case import check_case

    case: Case | None = None
    warnings: list[str] = []
    findings: list[CaseError]
    try:
        case, found, warnings = check_case(options.case)
        findings, total = list(found), len(found)
    except MissingFile as error:
        findings, total = [error], 1
    code = INVALID if findings else VALID
    if options.output_format == "json":
        answer = envelope(
            "validate",
            code,
            errors=findings,
            warnings=warnings,
            data=None if case is None else case.sizes(),
            summary={"error_count": total, "warning_count": len(warnings)},
        )
        print(json.dumps(answer, indent=2))
    else:
        print("\n".join(_text(options.case, case, findings, total, warnings)))
    return code


def _text(
    directory: str,
    case: Case | None,
    findings: list[CaseError],
    total: int,
    warnings: Iterable[str],
) -> Iterable[str]:
    if case is not None:
        sizes = ", ".join(f"{name} {value}" for name, value in list(case.sizes().items())[1:])
        yield f"{directory}: the case is valid ({sizes.replace('_', ' ')})"
    else:
        count = "1 finding" if total == 1 else f"{total:,} findings"
        yield f"{directory}: {count}"
    for finding in findings:
        yield f"  {finding.kind}: {finding.message}"
        if finding.suggestion is not None:
            yield f"      {finding.suggestion}"
    for warning in warnings:
        yield f"  warning: {warning}"
