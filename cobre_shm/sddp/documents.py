"""The files of a case directory, read into plain values that can be sent to other ranks.

A case directory holds JSON files and Parquet tables in the format of the Cobre project,
https://github.com/cobre-rs/cobre. The result of reading is a dictionary from the file's path
inside the directory to its content: the JSON value, or for a table the columns as lists, in which
a time, a decimal or bytes stand as text: a reader that wants a number says so, and a column that
nothing reads has no effect. JSON text keeps every float exactly, so the ranks that receive the
dictionary build the same case.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cobre_shm.sddp.errors import (
    CaseError,
    MissingFile,
    ParseError,
    TypeMismatch,
    Unsupported,
    require,
)
from cobre_shm.sddp.findings import Findings

Documents = dict[str, Any]

REQUIRED = (
    "config.json",
    "penalties.json",
    "stages.json",
    "initial_conditions.json",
    "system/buses.json",
    "system/lines.json",
    "system/hydros.json",
    "system/thermals.json",
)
OPTIONAL = (
    "system/non_controllable_sources.json",
    "system/hydro_production_models.json",
    "system/pumping_stations.json",
    "system/energy_contracts.json",
    "scenarios/inflow_seasonal_stats.parquet",
    "scenarios/inflow_ar_coefficients.parquet",
    "scenarios/load_seasonal_stats.parquet",
    "scenarios/load_factors.json",
    "scenarios/non_controllable_stats.parquet",
    "scenarios/non_controllable_factors.json",
    "scenarios/correlation.json",
    "scenarios/noise_openings.parquet",
    "constraints/hydro_bounds.parquet",
    "constraints/thermal_bounds.parquet",
    "constraints/line_bounds.parquet",
    "constraints/ncs_bounds.parquet",
    "constraints/exchange_factors.json",
    "constraints/generic_constraints.json",
    "constraints/generic_constraint_bounds.parquet",
    "constraints/penalty_overrides_bus.parquet",
    "constraints/penalty_overrides_line.parquet",
    "constraints/penalty_overrides_hydro.parquet",
    "constraints/penalty_overrides_ncs.parquet",
)
_DATA_SUFFIXES = {".json", ".parquet", ".csv"}
_FOLDERS = ("system", "scenarios", "constraints")


def read_documents(directory: str | Path, findings: Findings) -> Documents:
    """Read every file of a case directory.

    Args:
        directory: The case directory.
        findings: Gets a :class:`MissingFile` for each required file that is absent, a
            :class:`ParseError` for each file that cannot be read or is not valid JSON or Parquet,
            and an :class:`Unsupported` for each data file that this program does not read.

    Returns:
        The content of each file by its path inside the directory, with forward slashes.

    Raises:
        MissingFile: There is no such directory, or it cannot be looked at.
        MissingDependency: pyarrow is not installed.
    """
    root = Path(directory)
    reason = ""
    try:
        exists = stat.S_ISDIR(_mode(root))
    except OSError as error:
        exists, reason = False, f": {error.strerror}"
    if not exists:
        raise MissingFile(
            f"there is no case directory {str(directory)!r}{reason}",
            context={"file": str(directory), "expected": "a directory"},
        )
    documents: Documents = {}
    for name in REQUIRED + OPTIONAL:
        path = root / name
        try:
            if stat.S_ISREG(_mode(path)):
                read = _read_json if path.suffix == ".json" else _read_parquet
                documents[name] = read(path, name)
            elif name in REQUIRED:
                raise MissingFile(
                    f"{name}: the file is missing in {str(directory)!r}",
                    context={"file": name, "directory": str(directory)},
                    suggestion=f"A case needs the files {', '.join(REQUIRED)}",
                )
        except OSError as error:
            findings.add(_unreadable(name, error))
        except CaseError as error:
            findings.add(error)
    _refuse_unread(root, findings)
    return documents


def _mode(path: Path) -> int:
    """Return the mode of a file, 0 where there is none.

    Unlike :meth:`Path.is_file`, whose answer depends on the version of Python, this tells what
    cannot be looked at from what is not there.

    Raises:
        OSError: It cannot be looked at.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        # The last is a name that no file can have.
        return 0


def _unreadable(name: str, error: OSError) -> ParseError:
    return ParseError(f"{name}: not readable: {error.strerror or error}", context={"file": name})


def with_config(documents: Documents, overrides: Mapping[str, Any] | None) -> Documents:
    """Return documents whose ``config.json`` has other values.

    Args:
        documents: Of a case.
        overrides: The values, nested as in the file; a list takes the place of a list.
    """
    if not overrides:
        return documents
    return {**documents, "config.json": overridden(documents.get("config.json", {}), overrides)}


def overridden(settings: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``config.json`` with other values, nested as in it.

    Raises:
        TypeMismatch: They are no mapping of JSON values.
    """
    context = {"file": "config.json", "field": "config_overrides", "expected": "JSON values"}
    if not isinstance(overrides, Mapping):
        raise TypeMismatch(
            f"config_overrides: must be a mapping, not {overrides!r}",
            context={**context, "expected": "a mapping"},
        )
    try:
        # As the file would have them: with names that are texts.
        values = json.loads(json.dumps(overrides, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeMismatch(
            f"config_overrides: must hold JSON values only: {error}", context=context
        ) from error
    return _merged(settings, values)


def _merged(base: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = dict(base) if isinstance(base, Mapping) else {}
    for key, value in overrides.items():
        merged[key] = _merged(merged.get(key), value) if isinstance(value, Mapping) else value
    return merged


def _refuse_unread(root: Path, findings: Findings) -> None:
    known = {*REQUIRED, *OPTIONAL}
    for folder in _FOLDERS:
        try:
            paths = sorted((root / folder).rglob("*"))
        except OSError as error:
            findings.add(_unreadable(folder, error))
            continue
        for path in paths:
            name = path.relative_to(root).as_posix()
            if path.suffix in _DATA_SUFFIXES and name not in known:
                findings.add(
                    Unsupported(
                        f"{name}: this file is not supported",
                        context={"file": name, "field": "", "value": path.name},
                        suggestion="Remove the file if the case is meant without it",
                    )
                )


def _read_json(path: Path, name: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"an object has the key {twice!r} twice")
        return found

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, OSError, RecursionError) as error:
        # The last is a file with too many brackets inside each other.
        raise ParseError(
            f"{name}: not readable as JSON: {error}", context={"file": name}
        ) from error
    if not isinstance(content, dict):
        raise ParseError(
            f"{name}: must hold a JSON object",
            context={"file": name, "expected": "an object"},
        )
    return content


def _read_parquet(path: Path, name: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise require("pyarrow") from error
    try:
        with path.open("rb") as file:
            # Without threads: Arrow's may still be starting when a rank that found a mistake ends,
            # and the C++ runtime then aborts the process.
            table = parquet.ParquetFile(file, pre_buffer=False).read(use_threads=False)
            columns = table.to_pydict()
    except MemoryError:
        # Arrow's own is an ArrowException too.
        raise
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        # Only some of pyarrow's own errors derive from the other two.
        reason = str(error).splitlines()[0]
        raise ParseError(
            f"{name}: not readable as Parquet: {reason}", context={"file": name}
        ) from error
    for field in table.schema:
        if not _is_number(field.type):
            columns[field.name] = json.loads(json.dumps(columns[field.name], default=str))
    return columns


def _is_number(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind) or types.is_floating(kind))


def encode(documents: Documents) -> bytes:
    """Return documents as UTF-8 JSON text."""
    return json.dumps(documents, separators=(",", ":")).encode()


def decode(data: bytes) -> Documents:
    """Return the documents that :func:`encode` wrote."""
    result: Documents = json.loads(data)
    return result
