"""Reading a case: what is wrong is named, what is not supported is refused."""

from __future__ import annotations

import numpy as np
import pytest

from cobre_shm.sddp import (
    DuplicateId,
    InvalidEnum,
    MissingReference,
    OutOfRange,
    SchemaViolation,
    TypeMismatch,
    Unsupported,
    load_case,
    shipped_case_path,
)
from tests.sddp.editing import delete_path, edit, set_path, write_json, write_table


def test_shipped_case_is_valid():
    case = load_case(shipped_case_path())
    assert case.name == "four_reservoirs"
    assert (case.stages, len(case.hydros), case.state_size) == (12, 4, 4)
    assert case.config.forward_passes >= 8
    assert case.warnings == ()


@pytest.mark.parametrize(
    ("file", "change", "error", "field"),
    [
        ("config.json", delete_path("training"), SchemaViolation, "training"),
        (
            "config.json",
            delete_path("training", "forward_passes"),
            SchemaViolation,
            "training.forward_passes",
        ),
        (
            "config.json",
            set_path("training", "forward_passes", value=0),
            OutOfRange,
            "training.forward_passes",
        ),
        (
            "config.json",
            set_path("training", "forward_passes", value="8"),
            TypeMismatch,
            "training.forward_passes",
        ),
        (
            "config.json",
            set_path("simulation", value={"enabled": True, "num_scenarios": 2**31}),
            OutOfRange,
            "simulation.num_scenarios",
        ),
        (
            "config.json",
            set_path("training", "stopping_rules", value=[]),
            SchemaViolation,
            "training.stopping_rules",
        ),
        (
            "config.json",
            set_path("training", "stopping_rules", 0, "limit", value=0),
            OutOfRange,
            "training.stopping_rules[0].limit",
        ),
        (
            "config.json",
            set_path("training", "stopping_rules", 0, "type", value="simulation"),
            Unsupported,
            "training.stopping_rules[0].type",
        ),
        (
            "config.json",
            set_path("training", "cut_selection", value={"enabled": True}),
            Unsupported,
            "training.cut_selection.enabled",
        ),
        (
            "config.json",
            set_path("training", "scenario_source", "inflow", "scheme", value="external"),
            Unsupported,
            "training.scenario_source.inflow.scheme",
        ),
        (
            "config.json",
            set_path("modeling", "inflow_non_negativity", "method", value="fold"),
            InvalidEnum,
            "modeling.inflow_non_negativity.method",
        ),
        ("config.json", set_path("policy", value={"mode": "later"}), InvalidEnum, "policy.mode"),
        (
            "config.json",
            set_path("policy", value={"boundary": {"path": "x"}}),
            Unsupported,
            "policy.boundary",
        ),
        (
            "config.json",
            set_path("policy", value={"checkpointing": {"enabled": True}}),
            SchemaViolation,
            "policy.checkpointing.interval_iterations",
        ),
        (
            "config.json",
            set_path("simulation", value={"scenario_source": {"load": {"scheme": "historical"}}}),
            Unsupported,
            "simulation.scenario_source.load.scheme",
        ),
        (
            "config.json",
            set_path("training", "forward_pass", value={"type": "backward"}),
            Unsupported,
            "training.forward_pass.type",
        ),
        (
            "system/hydros.json",
            set_path("hydros", 1, "filling", value={"start_stage_id": 1}),
            Unsupported,
            "hydros[1].filling",
        ),
        (
            "system/thermals.json",
            set_path("thermals", 0, "gnl_config", value={"lag_stages": 1}),
            Unsupported,
            "thermals[0].gnl_config",
        ),
        (
            "initial_conditions.json",
            set_path("recent_observations", value=[{}]),
            Unsupported,
            "recent_observations",
        ),
        (
            "stages.json",
            set_path("policy_graph", "type", value="cyclic"),
            Unsupported,
            "policy_graph.type",
        ),
        (
            "stages.json",
            set_path("policy_graph", "annual_discount_rate", value=-0.1),
            OutOfRange,
            "policy_graph.annual_discount_rate",
        ),
        (
            "stages.json",
            set_path("stages", 2, "num_scenarios", value=0),
            OutOfRange,
            "stages[2].num_scenarios",
        ),
        (
            "stages.json",
            set_path("stages", 2, "block_mode", value="chronological"),
            Unsupported,
            "stages[2].block_mode",
        ),
        (
            "stages.json",
            set_path("stages", 2, "sampling_method", value="lhs"),
            Unsupported,
            "stages[2].sampling_method",
        ),
        (
            "stages.json",
            set_path("stages", 2, "blocks", 1, "id", value=2),
            SchemaViolation,
            "stages[2].blocks[1].id",
        ),
        (
            "stages.json",
            set_path("stages", 2, "blocks", 1, "hours", value=0),
            OutOfRange,
            "stages[2].blocks[1].hours",
        ),
        (
            "stages.json",
            set_path("stages", 2, "end_date", value="2030-13-01"),
            TypeMismatch,
            "stages[2].end_date",
        ),
        (
            "stages.json",
            set_path("stages", 2, "risk_measure", value={"cvar": {"alpha": 0.0}}),
            OutOfRange,
            "stages[2].risk_measure.cvar.alpha",
        ),
        ("stages.json", set_path("stages", 2, "id", value=1), DuplicateId, "stages[2].id"),
        ("stages.json", set_path("stages", 11, "id", value=2**31), OutOfRange, "stages[11].id"),
        (
            "system/hydros.json",
            set_path("hydros", 3, "id", value=-(2**31) - 1),
            OutOfRange,
            "hydros[3].id",
        ),
        (
            "penalties.json",
            delete_path("hydro", "spillage_cost"),
            SchemaViolation,
            "hydro.spillage_cost",
        ),
        (
            "penalties.json",
            set_path("bus", "deficit_segments", 1, "depth_mw", value=5.0),
            OutOfRange,
            "bus.deficit_segments[1].depth_mw",
        ),
        (
            "penalties.json",
            set_path("bus", "deficit_segments", 1, "cost", value=1.0),
            OutOfRange,
            "bus.deficit_segments[1].cost",
        ),
        (
            "system/thermals.json",
            set_path("thermals", 3, "bus_id", value=99),
            MissingReference,
            "thermals[3].bus_id",
        ),
        (
            "system/thermals.json",
            set_path("thermals", 0, "cost_per_mwh", value=10**400),
            OutOfRange,
            "thermals[0].cost_per_mwh",
        ),
        (
            "system/thermals.json",
            set_path("thermals", 0, "generation", "max_mw", value=1.0),
            OutOfRange,
            "thermals[0].generation.max_mw",
        ),
        (
            "system/lines.json",
            set_path("lines", 0, "target_bus_id", value=7),
            MissingReference,
            "lines[0].target_bus_id",
        ),
        (
            "system/hydros.json",
            set_path("hydros", 3, "downstream_id", value=0),
            OutOfRange,
            "hydros[0].downstream_id",
        ),
        (
            "system/hydros.json",
            set_path("hydros", 1, "diversion", value={"downstream_id": 1, "max_flow_m3s": 5.0}),
            OutOfRange,
            "hydros[1].diversion.downstream_id",
        ),
        (
            "system/hydros.json",
            set_path("hydros", 3, "diversion", value={"downstream_id": 0, "max_flow_m3s": 5.0}),
            OutOfRange,
            "hydros[3].diversion.downstream_id",
        ),
        (
            "system/hydros.json",
            set_path("hydros", 1, "generation", "model", value="fpha"),
            Unsupported,
            "hydros[1].generation.model",
        ),
        (
            "system/hydros.json",
            set_path("hydros", 1, "evaporation", value={"a": 1}),
            Unsupported,
            "hydros[1].evaporation",
        ),
        (
            "system/hydros.json",
            set_path("hydros", 1, "reservoir", "max_storage_hm3", value=True),
            TypeMismatch,
            "hydros[1].reservoir.max_storage_hm3",
        ),
        *(
            (
                "system/hydros.json",
                set_path("hydros", 1, "generation", f"min_{name}", value=1e6),
                OutOfRange,
                f"hydros[1].generation.max_{name}",
            )
            for name in ("turbined_m3s", "generation_mw")
        ),
        (
            "initial_conditions.json",
            set_path("storage", 0, "hydro_id", value=44),
            MissingReference,
            "storage[0].hydro_id",
        ),
        (
            "initial_conditions.json",
            set_path("filling_storage", value=[{}]),
            Unsupported,
            "filling_storage",
        ),
    ],
)
def test_wrong_value_is_reported_with_file_and_field(shipped_copy, file, change, error, field):
    edit(shipped_copy, file, change)
    with pytest.raises(error) as caught:
        load_case(shipped_copy)
    assert type(caught.value) is error
    assert caught.value.context["file"] == file
    assert caught.value.context["field"] == field
    assert file in caught.value.message
    assert field in caught.value.message


def test_pumping_stations_are_refused_unless_empty(shipped_copy):
    write_json(shipped_copy, "system/pumping_stations.json", {"pumping_stations": []})
    load_case(shipped_copy)
    write_json(shipped_copy, "system/pumping_stations.json", {"pumping_stations": [{"id": 0}]})
    with pytest.raises(Unsupported, match="pumping stations"):
        load_case(shipped_copy)


def test_entities_are_sorted_by_id(shipped_copy):
    before = load_case(shipped_copy)
    for file, key in (("system/hydros.json", "hydros"), ("stages.json", "stages")):
        edit(shipped_copy, file, lambda content, key=key: content[key].reverse())
    after = load_case(shipped_copy)
    assert after.hydros == before.hydros
    assert after.horizon == before.horizon
    assert after.initial_state.tolist() == before.initial_state.tolist()


def test_statistics_of_an_unknown_plant_are_refused(shipped_copy):
    write_table(
        shipped_copy,
        "scenarios/inflow_seasonal_stats.parquet",
        ["hydro_id", "stage_id", "mean_m3s", "std_m3s"],
        [(9, 0, 1.0, 0.0)],
    )
    with pytest.raises(MissingReference, match="hydro plant with id 9"):
        load_case(shipped_copy)


def test_stage_bounds_that_cross_are_refused(shipped_copy):
    write_table(
        shipped_copy,
        "constraints/hydro_bounds.parquet",
        ["hydro_id", "stage_id", "max_storage_hm3"],
        [(0, 3, 0.5)],
    )
    with pytest.raises(OutOfRange, match="hydro 0 at stage 3"):
        load_case(shipped_copy)


def test_lags_need_monthly_seasons(random_path):
    edit(random_path, "stages.json", set_path("season_definitions", "cycle_type", value="weekly"))
    with pytest.raises(Unsupported, match="weekly"):
        load_case(random_path)


def test_lags_with_a_gap_are_refused(random_path):
    write_table(
        random_path,
        "scenarios/inflow_ar_coefficients.parquet",
        ["hydro_id", "stage_id", "lag", "coefficient", "residual_std_ratio"],
        [(0, 1, 2, 0.5, 0.9)],
    )
    with pytest.raises(SchemaViolation, match="without gaps"):
        load_case(random_path)


def test_correlation_matrix_must_be_one(random_path):
    def change(content):
        content["profiles"]["default"]["correlation_groups"][0]["matrix"][0][1] = 0.2

    edit(random_path, "scenarios/correlation.json", change)
    with pytest.raises(OutOfRange, match="symmetric"):
        load_case(random_path)


def test_correlation_beyond_one_is_refused(random_path):
    def change(content):
        matrix = content["profiles"]["default"]["correlation_groups"][0]["matrix"]
        matrix[0][1] = matrix[1][0] = -1.5

    edit(random_path, "scenarios/correlation.json", change)
    with pytest.raises(OutOfRange, match="above 1 in size"):
        load_case(random_path)


@pytest.mark.parametrize("group", [0, 1])
def test_entity_has_one_place_in_a_correlation_profile(random_path, group):
    def change(content):
        groups = content["profiles"]["default"]["correlation_groups"]
        groups.append({"name": "more", "entities": [], "matrix": []})
        groups[group]["entities"].append({"type": "inflow", "id": 1})
        groups[group]["matrix"] = np.eye(len(groups[group]["entities"])).tolist()

    edit(random_path, "scenarios/correlation.json", change)
    with pytest.raises(DuplicateId, match=rf"correlation_groups\[{group}\].*twice in a profile"):
        load_case(random_path)


def test_profiles_may_have_an_entity_in_common(random_path):
    def change(content):
        content["profiles"]["other"] = content["profiles"]["default"]

    edit(random_path, "scenarios/correlation.json", change)
    load_case(random_path)


def test_plant_has_one_production_model(random_path):
    span = {"start_stage_id": 0, "end_stage_id": 0, "model": "constant_productivity"}
    model = {"hydro_id": 1, "selection_mode": "stage_ranges", "stage_ranges": [span]}
    models = {"production_models": [model, {**model, "hydro_id": 0}, model]}
    write_json(random_path, "system/hydro_production_models.json", models)
    with pytest.raises(DuplicateId, match=r"production_models\[2\].hydro_id"):
        load_case(random_path)


@pytest.mark.parametrize(
    ("expression", "error", "words"),
    [
        ("", SchemaViolation, "not readable"),
        ("hydro_turbined(0) hydro_turbined(1)", SchemaViolation, "not readable"),
        ("2 * * hydro_turbined(0)", SchemaViolation, "not readable"),
        ("hydro_turbined(0) +", SchemaViolation, "not readable"),
        ("hydro_turbined(99)", MissingReference, "hydro with id 99"),
        ("1e999 * hydro_turbined(0)", OutOfRange, "1e999 is too large"),
        (f"hydro_turbined({'9' * 5000})", SchemaViolation, "not readable"),
        ("hydro_evaporation(0)", Unsupported, "hydro_evaporation"),
    ],
)
def test_unreadable_expression_is_reported(shipped_copy, expression, error, words):
    constraint = {"id": 0, "name": "C", "expression": expression, "sense": "<="}
    write_json(shipped_copy, "constraints/generic_constraints.json", {"constraints": [constraint]})
    with pytest.raises(error, match=words):
        load_case(shipped_copy)


@pytest.mark.parametrize(("stage", "is_wrong"), [(0, False), (1, True)])
def test_block_of_a_term_must_be_one_of_each_bounded_stage(random_path, stage, is_wrong):
    def change(content):
        content["stages"][1]["blocks"] = [{"id": 0, "name": "ALL", "hours": 100.0}]

    edit(random_path, "stages.json", change)
    (random_path / "scenarios" / "load_factors.json").unlink()
    expression = "hydro_turbined(0, 0) + thermal_generation(0, 1)"
    constraint = {"id": 0, "name": "C", "expression": expression, "sense": "<="}
    write_json(random_path, "constraints/generic_constraints.json", {"constraints": [constraint]})
    write_table(
        random_path,
        "constraints/generic_constraint_bounds.parquet",
        ["constraint_id", "stage_id", "bound"],
        [(0, stage, 5.0)],
    )
    if not is_wrong:
        assert load_case(random_path).constraints[0].terms[1].block == 1
        return
    with pytest.raises(OutOfRange, match=r"expression .*no block 1 at stage 1"):
        load_case(random_path)


_COUNT_THREADS = """
import os, sys
import pyarrow.parquet
from cobre_shm.sddp import load_case, shipped_case_path
before = len(os.listdir("/proc/self/task"))
load_case(shipped_case_path())
sys.exit(len(os.listdir("/proc/self/task")) - before)
"""
