"""Command lines that are not understood."""

import importlib

import pytest


@pytest.mark.parametrize("name", ["info", "top", "tune", "mcp_server.__main__"])
def test_wrong_argument_ends_with_code_one(capsys, name):
    module = importlib.import_module(f"cobre_shm.{name}")
    with pytest.raises(SystemExit) as caught:
        module.main(["--no-such-option"])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"usage: python -m cobre_shm.{name.removesuffix('.__main__')} ")
    assert "--no-such-option" in err
