"""``python -m cobre_shm.sddp report DIR``: an output directory as one HTML page with pictures."""

from __future__ import annotations

import argparse
import base64
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.envelope import envelope
from cobre_shm.sddp.errors import CaseError, OutputError
from cobre_shm.sddp.results import (
    SIMULATION_SUMMARY,
    TRAINING_METADATA,
    read_table,
    write_atomically,
    write_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = dict[str, npt.NDArray[Any]]
_Kind = type | UnionType

_NUMBER = int | float
_WORDS: dict[_Kind, str] = {str: "text", int: "integer", _NUMBER: "number", dict: "object"}
# What the report needs of training/metadata.json and of simulation/summary.json.
_METADATA: dict[str, _Kind] = {
    **dict.fromkeys(("case", "stop_reason", "backend"), str),
    **dict.fromkeys(("iterations", "lp_solves", "lp_retries", "ranks"), int),
    **dict.fromkeys(("lower_bound", "upper_bound_mean", "gap_percent", "seconds"), _NUMBER),
    **dict.fromkeys(("dimensions", "versions", "block_hours"), dict),
}
_COSTS = ("mean", "ci95_half_width", "std", "minimum", "maximum")
_SUMMARY: dict[str, _Kind] = {
    "scenarios": int,
    **dict.fromkeys(_COSTS, _NUMBER),
    "quantiles": dict,
}

_ROWS = 24
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.15em .8em;text-align:right}
th{border-bottom:2px solid}td{border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}
img{max-width:100%}h2{margin-top:2em}@media print{h2{break-after:avoid}img{break-inside:avoid}}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of the command."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="output directory of a run")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="runs of the same case on other numbers of ranks, for the speed-up",
    )
    parser.add_argument(
        "--output-format", choices=("text", "json"), default="text", help="(default: text)"
    )


def run(options: argparse.Namespace) -> int:
    """Write the report and print where it is."""
    page = write_report(options.directory, options.compare)
    if options.output_format == "json":
        print(json.dumps(envelope("report", 0, data={"path": str(page)})))
    else:
        print(page)
    return 0


def write_report(directory: Path, others: Sequence[Path] = ()) -> Path:
    """Write ``directory/report/index.html``, and every picture as a PNG file beside it.

    Args:
        directory: The output directory of a training, with a simulation or without.
        others: Output directories of the same case, for the speed-up over ranks.

    Returns:
        The path of the page.

    Raises:
        MissingDependency: matplotlib or pyarrow is not installed.
        OutputError: A directory has no result of a training or one of another case, or cannot be
            written.
    """
    runs = [_facts(path) for path in (directory, *others)]
    for path, facts in zip(others, runs[1:], strict=True):
        _check_same_case(path, facts, runs[0])
    report = _Report(directory, runs)
    body = "\n".join(report.parts())
    name = html.escape(report.facts["case"])
    page = directory / "report" / "index.html"
    write_text(
        page,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style><h1>{name}</h1>\n{body}\n</html>\n",
    )
    return page


def _facts(directory: Path) -> dict[str, Any]:
    path = directory / TRAINING_METADATA
    try:
        return _read_object(path, _METADATA)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{str(directory)!r} has no result of a training: {path}: {error}",
            context={"path": str(path)},
            suggestion="Give a directory that was the --output-dir of a training",
        ) from error


def _read_object(path: Path, members: Mapping[str, _Kind]) -> dict[str, Any]:
    """Return the object in a JSON file, which has the ``members``.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("too many brackets inside each other") from error
    if not isinstance(found, dict):
        raise ValueError("must hold a JSON object")
    for name, kind in members.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{name!r} is missing or no {_WORDS[kind]}")
    # A name may hold half of a character, which neither a page nor a picture can show.
    whole = json.dumps(found, ensure_ascii=False).encode(errors="replace")
    result: dict[str, Any] = json.loads(whole)
    return result


def _check_same_case(path: Path, facts: dict[str, Any], ours: dict[str, Any]) -> None:
    if facts.get("case_digest") != ours.get("case_digest"):
        raise OutputError(
            f"{str(path)!r} cannot be compared: it is a run of another case, or of this one before "
            f"it was changed ({facts.get('case')!r}, and here {ours.get('case')!r})",
            context={"path": str(path)},
            suggestion="Compare runs of one case that differ in ranks or backend only",
        )


class _Report:
    def __init__(self, directory: Path, runs: list[dict[str, Any]]) -> None:
        self.directory, self.facts, self.runs = directory, runs[0], runs

    def parts(self) -> Iterator[str]:
        """Yield the page from top to bottom."""
        yield from self._training()
        if (self.directory / SIMULATION_SUMMARY).is_file():
            yield from self._simulation()
        else:
            yield "<h2>Simulation</h2><p>The policy was not simulated.</p>"
        yield from self._time()
        yield from self._speed_up()

    def _read(self, name: str) -> Table:
        path = self.directory / f"{name}.parquet"
        try:
            return read_table(path)
        except CaseError as error:
            raise OutputError(error.message, context={"path": str(path)}) from error

    def _picture(self, name: str, title: str, figure: Figure) -> str:
        from cobre_shm.sddp import plots

        data = plots.png(figure)
        path = self.directory / "report" / f"{name}.png"
        write_atomically(path, lambda file: _ignore(file.write_bytes(data)))
        text = base64.b64encode(data).decode()
        return f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{text}">'

    def _names(self, kind: str) -> dict[int, str]:
        return {int(key): name for key, name in self.facts.get("names", {}).get(kind, {}).items()}

    def _training(self) -> Iterator[str]:
        from cobre_shm.sddp import plots

        facts = self.facts
        sizes = ", ".join(f"{value} {key}" for key, value in facts["dimensions"].items() if value)
        yield _table(
            ("", ""),
            [
                ("stopped by", f"{facts['stop_reason']} after {facts['iterations']} iterations"),
                ("lower bound", f"{facts['lower_bound']:,.2f} $"),
                ("upper bound, mean", f"{facts['upper_bound_mean']:,.2f} $"),
                ("gap", f"{facts['gap_percent']:.2f} %"),
                ("time", f"{facts['seconds']:.2f} s"),
                ("LPs", f"{facts['lp_solves']:,} ({facts['lp_retries']} with a retry)"),
                ("ranks", f"{facts['ranks']}, backend {facts['backend']}"),
                ("size", sizes.replace("_", " ")),
                ("versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)),
            ],
        )
        table = self._read("training/convergence")
        yield self._picture("convergence", "Convergence", plots.convergence(table))
        for note in facts.get("notes", []):
            yield f"<p>{html.escape(note)}</p>"
        count = len(table["iteration"])
        shown = np.unique(np.linspace(0, count - 1, min(_ROWS, count)).round().astype(int))
        yield _table(
            ("iteration", "lower bound [$]", "upper bound [$]", "std [$]", "gap [%]", "LPs"),
            [
                (
                    f"{table['iteration'][i]}",
                    f"{table['lower_bound'][i]:,.0f}",
                    f"{table['upper_bound_mean'][i]:,.0f}",
                    f"{table['upper_bound_std'][i]:,.0f}",
                    f"{table['gap_percent'][i]:.2f}",
                    f"{table['lp_solves'][i]:,}",
                )
                for i in shown
            ],
        )

    def _simulation(self) -> Iterator[str]:
        from cobre_shm.sddp import plots

        path = self.directory / SIMULATION_SUMMARY
        try:
            summary = _read_object(path, _SUMMARY)
        except (OSError, ValueError) as error:
            raise OutputError(f"{path}: {error}", context={"path": str(path)}) from error
        yield f"<h2>Simulation of {summary['scenarios']} scenarios</h2>"
        yield _table(
            ("total cost", "$"),
            [(name.replace("_", " "), f"{summary[name]:,.2f}") for name in _COSTS]
            + [(f"{float(q):.0%} quantile", f"{v:,.2f}") for q, v in summary["quantiles"].items()],
        )
        if not self.facts["dimensions"].get("buses"):
            yield "<p>The case has no buses.</p>"
            return
        buses = self._over_blocks(self._read("simulation/buses"), "bus_id")
        folder, parts = self.directory / "simulation", {}
        if (folder / "hydros.parquet").is_file():
            hydros = self._read("simulation/hydros")
            names = self._names("hydros")
            figure = plots.fans(
                hydros, "hydro_id", "storage_final_hm3", names, "storage [hm³]",
                start="storage_initial_hm3",
            )  # fmt: skip
            yield self._picture("storage", "Storage at the end of each stage", figure)
            parts["hydro"] = hydros
        figure = plots.fans(buses, "bus_id", "spot_price", self._names("buses"), "price [$/MWh]")
        yield self._picture("spot_price", "Spot price, mean over the hours of a stage", figure)
        for name, file, key in (
            ("thermal", "thermals", "thermal_id"),
            ("non-controllable", "non_controllables", "ncs_id"),
        ):
            if (folder / f"{file}.parquet").is_file():
                parts[name] = self._over_blocks(self._read(f"simulation/{file}"), key)
        scenarios = summary["scenarios"]
        stages = np.unique(buses["stage_id"])
        mix = {
            name: _mean_by_stage(rows["stage_id"], rows["generation_mw"], scenarios)
            for name, rows in parts.items()
        }
        mix["deficit"] = _mean_by_stage(buses["stage_id"], buses["deficit_mw"], scenarios)
        load = _mean_by_stage(buses["stage_id"], buses["load_mw"], scenarios)
        figure = plots.generation(stages, mix, load)
        yield self._picture("generation", "Generation by stage", figure)
        header = ("stage", *(f"{name} [MW]" for name in mix), "load [MW]")
        columns = [*mix.values(), load]
        yield _table(
            header,
            [
                (f"{stage}", *(f"{column[i]:,.1f}" for column in columns))
                for i, stage in enumerate(stages)
            ],
        )

    def _over_blocks(self, rows: Table, key: str) -> Table:
        """Return the mean over the blocks of each stage, weighted by their hours."""
        hours = {int(stage): values for stage, values in self.facts["block_hours"].items()}
        stages = np.array(sorted(hours))
        # By position: an id may be as large as 2**31 - 1.
        table = np.zeros((len(stages), max(len(values) for values in hours.values())))
        for shares, stage in zip(table, stages.tolist(), strict=True):
            values = hours[stage]
            shares[: len(values)] = np.array(values) / sum(values)
        weight = table[np.searchsorted(stages, rows["stage_id"]), rows["block_id"]]
        # The first block of each group; the rows of a group follow each other.
        first = np.flatnonzero(rows["block_id"] == 0)
        result = {name: rows[name][first] for name in ("scenario_id", "stage_id", key)}
        for name in rows.keys() - result.keys() - {"block_id"}:
            result[name] = np.add.reduceat(rows[name] * weight, first)
        return result

    def _time(self) -> Iterator[str]:
        from cobre_shm.sddp import plots

        table = self._read("training/timing")
        ranks = int(table["rank"].max()) + 1
        parts = plots.time_parts()
        totals = {
            key: np.bincount(table["rank"], weights=table[key], minlength=ranks) / 1e3
            for key, _ in parts
        }
        whole = np.sum(list(totals.values()), axis=0)
        yield self._picture("time", "Time of each rank", plots.time_split(totals))
        yield _table(
            ("rank", *(f"{name} [s]" for _, name in parts), "LPs"),
            [
                (
                    f"{rank}",
                    *(f"{v[rank]:.2f} ({v[rank] / whole[rank]:.0%})" for v in totals.values()),
                    f"{int(table['lp_solves'][table['rank'] == rank].sum()):,}",
                )
                for rank in range(ranks)
            ],
        )

    def _speed_up(self) -> Iterator[str]:
        from cobre_shm.sddp import plots

        if len(self.runs) == 1:
            yield (
                "<h2>Speed-up</h2><p>One run; <code>report DIR --compare DIR ...</code> compares "
                "runs on other numbers of ranks.</p>"
            )
            return
        best: dict[str, dict[int, float]] = {}
        for run_facts in self.runs:
            rates = best.setdefault(run_facts["backend"], {})
            rate = run_facts["lp_solves"] / run_facts["seconds"]
            rates[run_facts["ranks"]] = max(rate, rates.get(run_facts["ranks"], 0.0))
        # One run is the measure of all: a backend that was run on two ranks only is not ideal.
        fewest = min(ranks for rates in best.values() for ranks in rates)
        one_rank = max(rates.get(fewest, 0.0) for rates in best.values()) / fewest
        runs = {
            backend: [(ranks, rate / one_rank) for ranks, rate in sorted(rates.items())]
            for backend, rates in sorted(best.items())
        }
        yield self._picture("speed_up", "Speed-up over ranks", plots.speed_up(runs))
        yield _table(
            ("backend", "ranks", "LPs/s", "speed-up"),
            [
                (backend, f"{ranks}", f"{best[backend][ranks]:,.0f}", f"{speed_up:.2f}")
                for backend, points in runs.items()
                for ranks, speed_up in points
            ],
        )


def _ignore(_count: int) -> None:
    return None


def _mean_by_stage(
    stages: npt.NDArray[Any], values: npt.NDArray[np.float64], scenarios: int
) -> npt.NDArray[np.float64]:
    """Return the sum over entities, mean over scenarios, in order of the stage ids."""
    ids, place = np.unique(stages, return_inverse=True)
    return np.bincount(place, weights=values, minlength=len(ids)) / scenarios


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    head = f"<tr>{line(header, 'th')}</tr>" if any(header) else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table>{head}{body}</table>"
