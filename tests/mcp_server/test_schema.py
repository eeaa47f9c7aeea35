"""The schema of ``config.json`` says what the reader of it accepts."""

import copy
import json

import jsonschema
import pytest

from cobre_shm.mcp_server.schema import config_schema
from cobre_shm.sddp import shipped_case_path
from cobre_shm.sddp.config import parse_config
from cobre_shm.sddp.fields import Record
from cobre_shm.sddp.findings import Findings

BASE = json.loads((shipped_case_path() / "config.json").read_text())
STALLING = {"type": "bound_stalling", "iterations": 5, "tolerance": 0.01}
LIMIT = {"type": "iteration_limit", "limit": 5}
CHANGES = [
    ("training.forward_passes", [1, 8, 0, -1, 1.5, "4", None, 2**31, True]),
    ("training.stopping_rules", [[], [LIMIT], [STALLING], [LIMIT, STALLING], [LIMIT, {}]]),
    ("training.stopping_rules", [[{**LIMIT, "limit": 0}], [{**LIMIT, "type": "other"}], {}]),
    ("training.stopping_rules", [[LIMIT, {"type": "time_limit", "seconds": s}] for s in (1, 0)]),
    ("training.stopping_rules", [[LIMIT, {**STALLING, "tolerance": t}] for t in (0.1, 0, "1")]),
    ("training.stopping_mode", ["any", "all", "most", 1]),
    ("training.tree_seed", [1, -7, 1.5, "1"]),
    ("training.enabled", [True, False, 1]),
    ("training.scenario_source", [{}, {"inflow": {"scheme": "in_sample"}}]),
    ("training.scenario_source", [{"inflow": {"scheme": "historical"}}]),
    ("simulation.enabled", [True, False, "yes"]),
    ("modeling.inflow_non_negativity", [{"method": m} for m in ("none", "penalty", "other")]),
    ("policy.mode", ["fresh", "warm_start", "resume", "other", 1]),
    ("policy.path", ["policy", 3]),
    ("policy.checkpointing", [{"enabled": True, "interval_iterations": n} for n in (1, 0, 1.5)]),
    ("policy.checkpointing", [{}, {"enabled": False}, {"enabled": True}, {"enabled": 1}]),
    ("exports.stochastic", [True, False, 0]),
]


@pytest.mark.parametrize(
    ("place", "value"), [(place, value) for place, values in CHANGES for value in values]
)
def test_schema_and_reader_agree(place, value):
    config = copy.deepcopy(BASE)
    section, name = place.split(".")
    config.setdefault(section, {})[name] = value
    findings = Findings()
    parse_config(Record(config, "config.json", findings))
    accepted = jsonschema.Draft202012Validator(config_schema()).is_valid(config)
    assert accepted == (len(findings) == 0), list(findings)


def test_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(config_schema())
