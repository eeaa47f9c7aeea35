"""The table of variables, and reading it."""

import re
from pathlib import Path

import pytest

import cobre_shm
from cobre_shm import failpoints
from cobre_shm.errors import InitializationFailed, MissingConfiguration
from cobre_shm.selection.env import read_settings, unknown_variables
from cobre_shm.selection.kinds import ShmConfig, TcpConfig
from cobre_shm.selection.variables import VARIABLES, markdown_table, variables_of

REPOSITORY = Path(cobre_shm.__file__).parents[1]
SHM = {"COBRE_SHM_NAME": "run", "COBRE_SHM_RANK": "1", "COBRE_SHM_SIZE": "4"}
TCP = {"COBRE_TCP_COORDINATOR": "node-1", "COBRE_TCP_RANK": "0", "COBRE_TCP_SIZE": "2"}
# The variables that the specification fixes: name -> (required, default).
SPECIFIED = {
    "COBRE_COMM_BACKEND": (False, "auto"),
    "COBRE_TCP_COORDINATOR": (True, None),
    "COBRE_TCP_PORT": (False, "29500"),
    "COBRE_TCP_RANK": (True, None),
    "COBRE_TCP_SIZE": (True, None),
    "COBRE_TCP_BIND_ADDR": (False, "0.0.0.0"),
    "COBRE_TCP_CONNECT_TIMEOUT_MS": (False, "30000"),
    "COBRE_SHM_NAME": (True, None),
    "COBRE_SHM_RANK": (True, None),
    "COBRE_SHM_SIZE": (True, None),
}


def test_table_holds_every_specified_variable():
    table = {v.name: (v.required, v.default) for v in VARIABLES}
    assert {name: table.get(name) for name in SPECIFIED} == SPECIFIED


def test_table_names_follow_the_naming_rule():
    for variable in VARIABLES:
        if variable.name == failpoints.VARIABLE:
            continue  # for tests of every backend alike
        assert re.fullmatch(rf"COBRE_{variable.backend.upper()}_[A-Z]+(_[A-Z]+)*", variable.name)


def test_table_examples_and_defaults_are_valid_values():
    for variable in VARIABLES:
        for text in filter(None, (variable.example, variable.default)):
            variable.type.check(variable.type.parse(text))


def test_table_holds_every_variable_that_the_code_mentions():
    known = {variable.name for variable in VARIABLES}
    mentioned = {}
    for package in ("cobre_shm", "cobre_net"):
        for source in (REPOSITORY / package).rglob("*.py"):
            for name in re.findall(r"COBRE(?:_[A-Z]+){2,}(?![A-Z_*])", source.read_text()):
                mentioned[name] = source.name
    assert {name: mentioned[name] for name in mentioned.keys() - known} == {}
    assert set(SPECIFIED) <= mentioned.keys()


@pytest.mark.parametrize(("config", "env"), [(ShmConfig, SHM), (TcpConfig, TCP)])
def test_defaults_of_configuration_equal_those_of_the_table(config, env):
    made = config.from_env(env)
    for variable in variables_of(config.backend):
        if variable.default is not None:
            expected = variable.type.check(variable.type.parse(variable.default))
            assert getattr(made, variable.field) == expected


def test_markdown_table_has_one_row_per_variable():
    rows = markdown_table().splitlines()
    assert len(rows) == len(VARIABLES) + 2
    assert {row.count(" | ") for row in rows} == {4}
    for variable, row in zip(VARIABLES, rows[2:], strict=True):
        assert row.startswith(f"| `{variable.name}` |")


def test_markdown_table_is_the_one_of_the_readme():
    readme = (REPOSITORY / "README.md").read_text()
    shown = readme.partition("<!-- env-table -->\n")[2].partition("<!-- /env-table -->")[0]
    assert shown == markdown_table()


def test_read_settings_returns_only_what_is_set():
    settings = read_settings("shm", variables_of("shm"), {**SHM, "COBRE_SHM_TIMEOUT_SECS": ""})
    assert settings == {"name": "run", "rank": 1, "size": 4}


@pytest.mark.parametrize("absent", [None, ""])
def test_read_settings_missing_variables_are_reported_at_once(absent):
    env = {} if absent is None else dict.fromkeys(SHM, absent)
    with pytest.raises(MissingConfiguration) as caught:
        read_settings("shm", variables_of("shm"), env)
    assert caught.value.missing_vars == list(SHM)
    assert "export COBRE_SHM_NAME=" in caught.value.suggestion


def test_read_settings_misspelt_variable_is_suggested():
    env = {**TCP, "COBRE_SHM_NAEM": "x", "COBRE_SHM_RANK": "0", "COBRE_SHM_SIZE": "1"}
    with pytest.raises(MissingConfiguration) as caught:
        read_settings("shm", variables_of("shm"), env)
    assert caught.value.missing_vars == ["COBRE_SHM_NAME"]
    assert caught.value.suggestion.startswith(
        "COBRE_SHM_NAEM is set: did you mean COBRE_SHM_NAME? "
    )


def test_read_settings_variables_of_other_backend_are_not_taken_for_misspellings():
    with pytest.raises(MissingConfiguration) as caught:
        read_settings("shm", variables_of("shm"), TCP)
    assert "did you mean" not in caught.value.suggestion


@pytest.mark.parametrize(
    ("name", "value", "named_range"),
    [
        ("COBRE_SHM_RANK", "two", "0..COBRE_SHM_SIZE - 1"),
        ("COBRE_SHM_RANK", "-1", "0..3"),
        ("COBRE_SHM_RANK", "4", "0..3"),
        ("COBRE_SHM_RANK", "1.0", "0..COBRE_SHM_SIZE - 1"),
        ("COBRE_SHM_RANK", " 1", "0..COBRE_SHM_SIZE - 1"),
        ("COBRE_SHM_RANK", "1_0", "0..COBRE_SHM_SIZE - 1"),
        ("COBRE_SHM_RANK", "\u0661", "0..COBRE_SHM_SIZE - 1"),
        ("COBRE_SHM_SIZE", "0", "1..1024"),
        ("COBRE_SHM_SIZE", "1025", "1..1024"),
        ("COBRE_SHM_SIZE", "9" * 30, "1..1024"),
        ("COBRE_SHM_TIMEOUT_SECS", "0", "above 0"),
        ("COBRE_SHM_TIMEOUT_SECS", "-1", "above 0"),
        ("COBRE_SHM_TIMEOUT_SECS", "-inf", "above 0"),
        ("COBRE_SHM_TIMEOUT_SECS", "nan", "above 0"),
        ("COBRE_SHM_TIMEOUT_SECS", "60s", "above 0"),
        ("COBRE_SHM_TIMEOUT_SECS", "1.2.3", "above 0"),
        ("COBRE_SHM_NAME", "/", "1 to 250 bytes"),
        ("COBRE_SHM_NAME", "a\udcff", "bytes of UTF-8"),
        ("COBRE_SHM_NAME", "a/b", "1 to 250 bytes"),
        ("COBRE_SHM_NAME", "//a", "1 to 250 bytes"),
        ("COBRE_SHM_NAME", "a\0b", "1 to 250 bytes"),
        ("COBRE_SHM_NAME", "..", "1 to 250 bytes"),
        ("COBRE_SHM_NAME", "n" * 251, "1 to 250 bytes"),
        ("COBRE_SHM_NAME", "\u00e9" * 126, "1 to 250 bytes"),
        ("COBRE_SHM_NAME", "fd:", "fd:N for an inherited descriptor"),
        ("COBRE_SHM_NAME", "fd:x", "fd:N for an inherited descriptor"),
        ("COBRE_SHM_NAME", "fd:-1", "fd:N for an inherited descriptor"),
        ("COBRE_SHM_NAME", "fd:" + "9" * 10, "fd:N for an inherited descriptor"),
    ],
)
def test_shm_variable_out_of_range_names_variable_value_and_range(name, value, named_range):
    with pytest.raises(InitializationFailed) as caught:
        ShmConfig.from_env({**SHM, name: value})
    error = caught.value
    assert error.backend == "shm"
    assert error.context["setting"] == name
    assert error.context["value"] == value
    assert named_range in error.context["expected"]
    assert name in error.message
    assert repr(value) in error.message
    assert error.context["expected"] in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COBRE_TCP_PORT", "70000"),
        ("COBRE_TCP_PORT", "0"),
        ("COBRE_TCP_RANK", "2"),
        ("COBRE_TCP_SIZE", "0"),
        ("COBRE_TCP_CONNECT_TIMEOUT_MS", "0"),
        ("COBRE_TCP_CONNECT_TIMEOUT_MS", "0.5"),
        ("COBRE_TCP_TIMEOUT_SECS", "0"),
        ("COBRE_TCP_BIND_ADDR", "localhost"),
        ("COBRE_TCP_COORDINATOR", "host:"),
        ("COBRE_TCP_COORDINATOR", "host:70000"),
        ("COBRE_TCP_COORDINATOR", "http://host"),
        ("COBRE_TCP_COORDINATOR", "::1:99999"),
        ("COBRE_TCP_COORDINATOR", "[::1"),
        ("COBRE_TCP_COORDINATOR", "two words"),
    ],
)
def test_tcp_variable_out_of_range_names_variable_and_value(name, value):
    with pytest.raises(InitializationFailed) as caught:
        TcpConfig.from_env({**TCP, name: value})
    assert (caught.value.context["setting"], caught.value.context["value"]) == (name, value)


def test_secret_that_is_refused_is_not_quoted():
    with pytest.raises(InitializationFailed) as caught:
        TcpConfig("node-1", 0, 2, secret=b"open-sesame")
    error = caught.value
    assert error.message == "TcpConfig.secret=not shown is not valid: expected " + (
        "a text that is not empty"
    )
    assert error.context["value"] == "not shown"
    assert "open-sesame" not in str(error.to_dict())


@pytest.mark.parametrize(
    ("text", "seconds"), [("60", 60.0), ("0.25", 0.25), ("1e-3", 1e-3), ("inf", float("inf"))]
)
def test_timeout_takes_decimal_exponent_and_inf(text, seconds):
    assert ShmConfig.from_env({**SHM, "COBRE_SHM_TIMEOUT_SECS": text}).timeout_secs == seconds


@pytest.mark.parametrize("written", ["run", "/run"])
def test_segment_name_with_or_without_slash_is_one_name(written):
    assert ShmConfig.from_env({**SHM, "COBRE_SHM_NAME": written}).name == "/run"


def test_segment_name_longest_is_accepted():
    assert ShmConfig.from_env({**SHM, "COBRE_SHM_NAME": "n" * 250}).name == "/" + "n" * 250


@pytest.mark.parametrize(
    ("coordinator", "port", "address"),
    [
        ("node-1", None, ("node-1", 29500)),
        ("node-1:9000", None, ("node-1", 9000)),
        ("node-1", "9000", ("node-1", 9000)),
        ("node-1:9000", "9000", ("node-1", 9000)),
        ("10.0.0.1:9000", None, ("10.0.0.1", 9000)),
        ("[::1]:9000", None, ("::1", 9000)),
        ("[::1]", "9000", ("::1", 9000)),
        ("::1", None, ("::1", 29500)),
    ],
)
def test_coordinator_forms_give_host_and_port(coordinator, port, address):
    env = {**TCP, "COBRE_TCP_COORDINATOR": coordinator}
    if port:
        env["COBRE_TCP_PORT"] = port
    config = TcpConfig.from_env(env)
    assert (config.coordinator, config.port) == address


def test_coordinator_ports_that_differ_are_refused():
    env = {**TCP, "COBRE_TCP_COORDINATOR": "node-1:9000", "COBRE_TCP_PORT": "29500"}
    with pytest.raises(InitializationFailed) as caught:
        TcpConfig.from_env(env)
    assert caught.value.context["coordinator"] == "node-1:9000"
    assert caught.value.context["port"] == 29500


def test_unknown_variables_name_the_nearest_known():
    env = {"COBRE_COMM_BACKND": "shm", "COBRE_COLOUR": "x", "PATH": "/bin", **SHM}
    found = unknown_variables(env, [variable.name for variable in VARIABLES])
    assert found == {"COBRE_COLOUR": None, "COBRE_COMM_BACKND": "COBRE_COMM_BACKEND"}


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("INSECURE", "1", "insecure", True),
        ("INSECURE", "0", "insecure", False),
        ("INSECURE", "", "insecure", False),
        ("STALL_WARN_SECS", "2.5", "stall_warn_secs", 2.5),
        ("STALL_WARN_SECS", "1e2", "stall_warn_secs", 100.0),
        ("STALL_WARN_SECS", "inf", "stall_warn_secs", float("inf")),
    ],
)
def test_tcp_variable_fills_its_field(name, text, field, value):
    config = TcpConfig.from_env({**TCP, f"COBRE_TCP_{name}": text})
    assert getattr(config, field) == value
    assert type(getattr(config, field)) is type(value)


@pytest.mark.parametrize("text", ["2", "yes", "true", "auto", "-1", "1 0"])
def test_flag_that_is_neither_yes_nor_no_is_refused(text):
    with pytest.raises(InitializationFailed, match="expected 1 or 0") as caught:
        TcpConfig.from_env({**TCP, "COBRE_TCP_INSECURE": text})
    assert caught.value.context["setting"] == "COBRE_TCP_INSECURE"


@pytest.mark.parametrize("text", ["0", "-1", "nan", "1.2.3", "soon", "10s", "-inf"])
def test_stall_warning_that_is_no_duration_is_refused(text):
    with pytest.raises(InitializationFailed, match="seconds above 0, or inf") as caught:
        TcpConfig.from_env({**TCP, "COBRE_TCP_STALL_WARN_SECS": text})
    assert caught.value.context["setting"] == "COBRE_TCP_STALL_WARN_SECS"
