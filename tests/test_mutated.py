"""Nothing that a damaged or crafted artifact holds does harm: it is refused in a sentence, or gives its graph's answer.

What is tried, and what counts as wrong, is in :mod:`mutations`. Artifacts are read and run in processes of their own,
on bounded memory, which may crash and hang there.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mutations
import pytest

ROOT = Path(__file__).resolve().parent.parent

COUNT = 10_000
"""Mutations of the long test."""

SHORT = 300
"""Mutations of the short test."""

SEED = 1_000_000
"""The first of the long test's; the short one begins at 0."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artifacts")
    mutations.make(directory)
    return directory


def start(base: Path, first: int, last: int) -> subprocess.Popen[str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "mutations.py"), str(base), str(first), str(last)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "LBLLM_CACHE_DIR": str(base / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def outcomes(base: Path, first: int, last: int) -> Iterator[dict[str, Any]]:
    """What became of the mutations of some seeds. One that ends its process is wrong, and another process goes on."""
    while first < last:
        child, begun = start(base, first, last), None
        with child:
            assert child.stdout is not None
            for line in child.stdout:
                said = json.loads(line)
                begun = said["seed"]
                if "verdict" in said:
                    yield said
                    first = begun + 1
        if child.returncode:
            assert begun == first, f"seed {first}: the process ended with {child.returncode} before it began"
            yield {"seed": first, "verdict": "wrong", "text": f"the process ended with {child.returncode}"}
            first += 1


def none_is_wrong(found: list[dict[str, Any]]) -> None:
    wrong = [f"{said['seed']}: {said['text']}" for said in found if said["verdict"] == "wrong"]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(found)}; python tests/mutations.py SEED repeats one", *wrong])


def test_no_mutation_does_harm(base):
    found = list(outcomes(base, 0, SHORT))
    none_is_wrong(found)
    counts = collections.Counter(said["verdict"] for said in found)
    # Neither is everything refused nor is what is changed without effect.
    assert sum(counts.values()) == SHORT and min(counts[v] for v in ("refused", "same", "other")) > SHORT // 50


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_none_of_many_mutations_does_harm(base, capsys):
    begin, workers = time.monotonic(), os.cpu_count() or 1
    edges = [SEED + COUNT * part // workers for part in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(lambda first, last: list(outcomes(base, first, last)), edges, edges[1:])
        found = [said for part in parts for said in part]
    seconds = time.monotonic() - begin
    with capsys.disabled():
        print(f"\n{len(found)} mutations in {seconds:.0f} s, {len(found) / seconds:.1f} a second")
    none_is_wrong(found)
    assert len(found) == COUNT
