"""The option ``--slow-share``: parts of the slow tests that are all of them together."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import share, shares


@dataclass(frozen=True)
class Item:
    """A test, as far as shares look at it."""

    nodeid: str
    seconds: int = 0

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return pytest.mark.timeout(self.seconds).mark if name == "timeout" and self.seconds else None


MANY = [Item(f"tests/test_many.py::test_some[{number}]") for number in range(60)]
LONG = [Item("tests/test_long.py::test_it", 1800), Item("tests/test_long.py::test_with_it")]
LONGER = [Item("tests/test_also.py::test_that", 3000), Item("tests/test_many.py::test_other", 900)]


def test_shares_are_disjoint_and_every_slow_test_is_in_one() -> None:
    items = [*MANY, *LONG, *LONGER]
    parts = shares(items, 5)
    assert parts[:2] == [LONGER[:1], LONG], "long tests are alone, but for those of their file"
    assert sorted(item.nodeid for part in parts for item in part) == sorted(item.nodeid for item in items)
    assert all(10 < len(part) < 30 for part in parts[2:])
    assert shares(items[::-1], 5)[3] == parts[3][::-1], "the order of tests means nothing"


def test_there_are_more_shares_than_files_with_long_tests() -> None:
    assert shares([*LONG, *LONGER], 3) == [LONGER[:1], LONG, LONGER[1:]]
    with pytest.raises(pytest.UsageError, match="more than 2 shares"):
        shares([*LONG, *LONGER], 2)


def test_numbers_of_shares_go_round() -> None:
    assert [share(f"{number}/5") for number in (0, 4, 5, 20418)] == [(0, 5), (4, 5), (0, 5), (3, 5)]


@pytest.mark.parametrize("text", ["3", "1/0", "a/b", "-1/3", "1/2/3"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(pytest.UsageError, match="two numbers"):
        share(text)


FILE = """
import pytest

def test_fast():
    pass

@pytest.mark.slow
@pytest.mark.parametrize("number", range(9))
def test_slow(number):
    pass
"""


def test_a_share_runs_with_what_is_fast_and_behind_what_always_runs(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: slow\n    gpu: gpu\n")
    (tmp_path / "test_some.py").write_text(FILE)
    (tmp_path / "test_whole.py").write_text(FILE.replace("test_", "test_whole_").replace("range(9)", "range(2)"))

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    def passed(*options: str) -> list[str]:
        done = run(*options)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line.rpartition("::")[2] for line in done.stdout.splitlines() if line.startswith("PASSED")]

    always, fast = {"test_whole_slow[0]", "test_whole_slow[1]"}, {"test_fast", "test_whole_fast"}
    parts = [passed(f"--slow-share={number}/2", "--slow-always=test_whole.py") for number in (6, 1)]
    for part in parts:
        assert always < {*part} and {*part[-2:]} == fast and len(part) == len({*part})
    shared = [{*part} - always - fast for part in parts]
    assert shared[0] | shared[1] == {f"test_slow[{number}]" for number in range(9)}
    assert not shared[0] & shared[1] and all(shared)
    assert {*passed("-m", "slow", "--slow-share=1/2", "--slow-always=test_whole.py")} == always | shared[1]
    for options, message in (
        (["--slow-share=1/2", "--slow-always=test_hole.py"], "no test marked slow is in 'test_hole.py'"),
        (["--runslow", "--slow-always=test_whole.py"], "--slow-always goes with --slow-share"),
    ):
        done = run(*options)
        assert done.returncode == pytest.ExitCode.USAGE_ERROR and message in done.stdout + done.stderr
