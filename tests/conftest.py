"""Options of the test run: ``--runslow`` also runs what takes more than a few seconds, ``--slow-share`` a part."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pytest
from lbllm_compile.codegen.targets import cuda

LONG = 1800
"""Files with a test that may take so many seconds, by a ``timeout`` mark of its own, have a share to themselves."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run tests marked slow")
    parser.addoption(
        "--slow-share",
        metavar="I/N",
        type=share,
        help="run one of N parts of the tests marked slow: every N numbers I in a row, in any place, run them all",
    )
    parser.addoption(
        "--slow-always",
        metavar="FILE",
        action="append",
        default=[],
        help="with --slow-share: a file of which all tests marked slow are run, and in no part",
    )


def share(text: str) -> tuple[int, int]:
    """Number and count of shares from a text such as ``3/8``; numbers go round.

    Raises:
        pytest.UsageError: the text is none such.
    """
    number, _, count = text.partition("/")
    if not number.isdecimal() or not count.isdecimal() or int(count) == 0:
        raise pytest.UsageError(f"--slow-share wants two numbers such as 3/8, not '{text}'")
    return int(number) % int(count), int(count)


def shares(items: Sequence[pytest.Item], count: int) -> list[list[pytest.Item]]:
    """Slow tests in ``count`` parts: files with long ones each in a part of its own, other tests by their names.

    Raises:
        pytest.UsageError: there are as many files with long tests as parts.
    """
    long = sorted({_file(item) for item in items if _seconds(item) >= LONG})
    if len(long) >= count:
        raise pytest.UsageError(f"--slow-share wants more than {len(long)} shares: so many files have long tests")
    parts: list[list[pytest.Item]] = [[] for _ in range(count)]
    for item in items:
        rest = zlib.crc32(item.nodeid.encode()) % (count - len(long))
        parts[long.index(_file(item)) if _file(item) in long else len(long) + rest].append(item)
    return parts


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _seconds(item: pytest.Item) -> float:
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0]) if mark else 0.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [item for item in items if "slow" in item.keywords]
    chosen = config.getoption("--slow-share")
    if config.getoption("--slow-always") and not chosen:
        raise pytest.UsageError("--slow-always goes with --slow-share")
    if chosen:
        number, count = chosen
        always = config.getoption("--slow-always")
        if missing := sorted({*always} - {_file(item) for item in slow}):
            raise pytest.UsageError(f"--slow-always: no test marked slow is in '{missing[0]}'")
        left = [item for item in slow if _file(item) not in always]
        run = shares(left, count)[number]
        left = [item for item in left if item not in run]
        config.hook.pytest_deselected(items=left)
        # Long ones first: while the last one runs, other workers would have nothing to do.
        rest = [item for item in items if item not in left]
        items[:] = sorted(rest, key=lambda item: "slow" not in item.keywords)
    elif not config.getoption("--runslow"):
        for item in slow:
            item.add_marker(pytest.mark.skip(reason="slow; run with --runslow"))
    on_device = [item for item in items if "gpu" in item.keywords]
    if on_device and not cuda.present().devices:
        for item in on_device:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
