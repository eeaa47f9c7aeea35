"""What the gates measured is kept: ``.benchmarks`` gets a JSON file of every run."""

import time

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Save under the time, unless another name was given, which one would have to remember."""
    if config.getoption("benchmark_only", default=False) and not config.option.benchmark_save:
        config.option.benchmark_save = time.strftime("%Y%m%dT%H%M%S")
