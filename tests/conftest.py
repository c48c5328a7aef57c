"""Options of the test run: ``--runslow`` also runs what takes more than a few seconds."""

from __future__ import annotations

import pytest
from lbllm_compile.codegen.cuda.device import device_count


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = pytest.mark.skip(reason="slow; run with --runslow")
    gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(slow)
    on_device = [item for item in items if "gpu" in item.keywords]
    if on_device and not device_count():
        for item in on_device:
            item.add_marker(gpu)
