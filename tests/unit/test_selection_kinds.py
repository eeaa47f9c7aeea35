"""Configurations and kinds as values of a program."""

import dataclasses
import re

import numpy as np
import pytest

from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.kinds import BackendKind, LocalConfig, MpiConfig, ShmConfig, TcpConfig


def test_shm_config_normalises_its_fields():
    config = ShmConfig("run", np.int64(1), np.int32(2), timeout_secs=5, slot_bytes=8192)
    assert dataclasses.astuple(config) == ("/run", 1, 2, 5.0, 8192, 10.0, "auto", False, None)
    types = [type(value) for value in dataclasses.astuple(config)]
    assert types == [str, int, int, float, int, float, str, bool, type(None)]


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ShmConfig("run", 0, 1).rank = 1


def test_config_survives_replace():
    config = TcpConfig("host:9000", 0, 2)
    assert dataclasses.replace(config, rank=1) == TcpConfig("host", 1, 2, port=9000)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", b"run"),
        ("rank", "1"),
        ("rank", 1.0),
        ("rank", True),
        ("rank", 4),
        ("size", 0),
        ("size", None),
        ("timeout_secs", 0),
        ("timeout_secs", -1.0),
        ("timeout_secs", float("nan")),
        ("timeout_secs", "60"),
        ("timeout_secs", None),
        ("hugepages", "sometimes"),
        ("hugepages", True),
        ("numa_interleave", "1"),
        ("numa_interleave", 2),
    ],
)
def test_shm_config_field_out_of_range_names_field_and_value(field, value):
    fields = {"name": "run", "rank": 0, "size": 4, field: value}
    with pytest.raises(InitializationFailed) as caught:
        ShmConfig(**fields)
    assert caught.value.context["setting"] == f"ShmConfig.{field}"
    assert caught.value.context["value"] == str(value)
    assert caught.value.suggestion.startswith(f"Example: {field}=")
    # What is suggested can be pasted into the call, and is right there.
    example = eval(f"dict({caught.value.suggestion.removeprefix('Example: ')})")
    ShmConfig(**{"name": "run", "rank": 0, "size": 4} | example)


@pytest.mark.parametrize("slot_bytes", [0, 64, 5000, -4096, 2**31, 4096.0, "4096", True])
def test_shm_config_slot_bytes_out_of_range_is_refused(slot_bytes):
    with pytest.raises(InitializationFailed, match="slot_bytes"):
        ShmConfig("run", 0, 4, slot_bytes=slot_bytes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("coordinator", 7),
        ("port", 0),
        ("port", 70000),
        ("rank", 2),
        ("bind_addr", "somewhere"),
        ("connect_timeout_ms", 0),
        ("timeout_secs", 0),
    ],
)
def test_tcp_config_field_out_of_range_names_field(field, value):
    fields = {"coordinator": "host", "rank": 0, "size": 2, field: value}
    with pytest.raises(InitializationFailed) as caught:
        TcpConfig(**fields)
    assert caught.value.context["setting"] == f"TcpConfig.{field}"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BackendKind.LOCAL, LocalConfig()),
        (BackendKind.MPI, MpiConfig()),
        (BackendKind.SHM, ShmConfig("run", 0, 1)),
        (BackendKind.TCP, TcpConfig("host", 0, 1)),
    ],
)
def test_kind_called_with_its_configuration_is_the_configuration(kind, config):
    assert kind(config) is config


@pytest.mark.parametrize("other", [LocalConfig(), "shm", None])
def test_kind_called_with_another_configuration_is_refused(other):
    with pytest.raises(TypeError, match="shm"):
        BackendKind.SHM(other)


@pytest.mark.parametrize("config", [LocalConfig, MpiConfig, ShmConfig, TcpConfig])
def test_config_documents_every_field_and_its_unit(config):
    units = {"_secs": "Seconds", "_ms": "Milliseconds", "_bytes": "Bytes"}
    assert config.__doc__
    for field in dataclasses.fields(config):
        # The line that begins a field's description.
        told = re.search(rf"^ +{field.name}: (.*)", config.__doc__, re.MULTILINE)
        assert told, field.name
        for suffix, unit in units.items():
            if field.name.endswith(suffix):
                assert told[1].startswith(unit), field.name


@pytest.mark.parametrize(
    "config",
    [
        TcpConfig("host", 0, 2, secret="s" * 32),
        TcpConfig("host", 0, 2, secret_file="fd:7", report="fd:8"),
        ShmConfig("run", 0, 2),
    ],
)
def test_none_is_a_value_only_of_fields_whose_default_it_is(config):
    kind = type(config)
    for field in dataclasses.fields(config):
        if field.default is None:
            dataclasses.replace(config, **{field.name: None})
            continue
        with pytest.raises(InitializationFailed) as caught:
            dataclasses.replace(config, **{field.name: None})
        assert f"{kind.__name__}.{field.name}=None" in caught.value.message
