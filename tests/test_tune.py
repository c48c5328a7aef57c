"""The schedule search: what identifies a result, how results are kept, and what a search does with candidates."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from lbllm_compile.codegen.cache import cache_directory
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tune.database import Database, Key, Result
from lbllm_compile.codegen.tune.measure import Measurer, Outcome, Request
from lbllm_compile.codegen.tune.search import search

SPEC = LinearSpec("bit", 96, 128, 64)
KEY = Key.here(SPEC, "1", Target.parse("cpu:avx2"), threads=2, tvm="0.27", version=1)


def differing_keys() -> list[Key]:
    specs = [
        dataclasses.replace(SPEC, **change)
        for change in (
            {"kind": "int8"},
            {"out_features": 97},
            {"in_features": 129},
            {"group": 128},
            {"act_bits": 8},
            {"per_token": True},
            {"bias": True},
        )
    ]
    changed = [dataclasses.replace(KEY, spec=spec) for spec in specs]
    for field, value in (
        ("tokens", "2-16"),
        ("target", "cpu:generic"),
        ("features", "x86-64-v4"),
        ("cpu", "another"),
        ("threads", 3),
        ("tvm", "0.28"),
        ("version", 2),
    ):
        changed.append(dataclasses.replace(KEY, **{field: value}))
    return changed


def test_a_result_is_found_under_its_own_key_only(tmp_path):
    database = Database(tmp_path)
    database.add(KEY, Result({"rows": 16}, 12.5, 16, 16))
    assert Database(tmp_path).find(KEY) == Result({"rows": 16}, 12.5, 16, 16)
    for other in differing_keys():
        assert database.find(other) is None, other


def test_every_field_of_a_key_and_spec_is_covered_above():
    changed = differing_keys()
    assert {f.name for f in dataclasses.fields(Key)} == {
        f.name for f in dataclasses.fields(Key) for key in changed if getattr(key, f.name) != getattr(KEY, f.name)
    }
    assert {f.name for f in dataclasses.fields(LinearSpec)} == {
        f.name
        for f in dataclasses.fields(LinearSpec)
        for k in changed
        if getattr(k.spec, f.name) != getattr(SPEC, f.name)
    }


def test_the_target_features_are_part_of_the_key():
    avx2, vnni = (Key.here(SPEC, "1", Target.parse(t), 2, "0.27", 1) for t in ("cpu:avx2", "cpu:avx512-vnni"))
    assert avx2.features != vnni.features and "avx512vnni" in vnni.features


def test_the_later_result_of_a_key_counts(tmp_path):
    database = Database(tmp_path)
    for microseconds in (3.0, 2.0):
        database.add(KEY, Result({}, microseconds, 1, 16))
    assert Database(tmp_path).find(KEY).microseconds == 2.0


def test_results_of_other_processes_are_seen(tmp_path):
    reader, writer = Database(tmp_path), Database(tmp_path)
    assert reader.find(KEY) is None
    writer.add(KEY, Result({}, 1.0, 1, 16))
    assert reader.find(KEY) == Result({}, 1.0, 1, 16)


@pytest.mark.parametrize("damage", [b"not json\n", b'{"key": 1}\n', b"[]\n", b"\xff\xfe\n", b'{"key": {"a": 1}, "sch'])
def test_a_damaged_line_is_skipped_with_a_warning(tmp_path, damage):
    database = Database(tmp_path)
    database.add(KEY, Result({}, 1.0, 1, 16))
    with database.path.open("ab") as file:
        file.write(damage)
    other = dataclasses.replace(KEY, threads=7)
    database.add(other, Result({}, 2.0, 1, 16))
    fresh = Database(tmp_path)
    with pytest.warns(UserWarning, match="damaged line"):
        assert fresh.find(KEY) == Result({}, 1.0, 1, 16)
    assert fresh.find(other) == Result({}, 2.0, 1, 16)


def _write_many(directory, start):
    database = Database(directory)
    for i in range(start, start + 25):
        database.add(dataclasses.replace(KEY, threads=i), Result({"i": i}, 1.0 + i, 1, 16))


def test_concurrent_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path, 1000 * w)) for w in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    database = Database(tmp_path)
    for w in range(4):
        for i in range(1000 * w, 1000 * w + 25):
            assert database.find(dataclasses.replace(KEY, threads=i)) == Result({"i": i}, 1.0 + i, 1, 16)


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    database = Database(tmp_path / "file")
    with pytest.warns(UserWarning, match="set LBLLM_CACHE_DIR"):
        database.add(KEY, Result({}, 1.0, 1, 16))
    assert database.find(KEY) == Result({}, 1.0, 1, 16)


def test_lines_are_readable_json(tmp_path):
    Database(tmp_path).add(KEY, Result({"rows": 16}, 12.5, 16, 16))
    record = json.loads(Database(tmp_path).path.read_text())
    assert record["key"]["spec"]["out_features"] == 96 and record["schedule"] == {"rows": 16}


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path))
    assert cache_directory() == tmp_path


@dataclass(frozen=True)
class Toy:
    """A schedule whose time is known."""

    a: int
    b: int
    c: bool

    @property
    def time(self) -> float:
        return 10 + abs(self.a - 5) + 2 * abs(self.b - 1) + 3 * self.c


SPACE = [Toy(a, b, c) for a in range(8) for b in range(4) for c in (True, False)]


def test_a_search_finds_the_best_of_a_smooth_space_in_a_third_of_the_trials():
    measured = []

    def measure(batch):
        measured.extend(batch)
        return [Outcome(s.time) for s in batch]

    found = search(SPACE, measure, trials=len(SPACE) // 3)
    assert found.schedule.time <= 1.1 * min(s.time for s in SPACE)
    assert found.trials == len(measured) == len(set(measured)) <= len(SPACE) // 3
    assert SPACE[0] in measured


def test_wrong_candidates_never_win_however_fast():
    def measure(batch):
        return [Outcome(None, "wrong") if s.a == 5 else Outcome(s.time) for s in batch]

    found = search(SPACE, measure, trials=30)
    assert found.schedule.a != 5 and any("wrong" in failure for failure in found.failures)


def test_a_search_without_a_working_candidate_has_no_result():
    assert search(SPACE, lambda batch: [Outcome(None, "wrong") for _ in batch], trials=12) is None


def test_a_search_stops_when_nothing_gets_better():
    found = search(SPACE, lambda batch: [Outcome(5.0) for _ in batch], trials=60)
    assert found.trials < 40


def test_a_search_past_its_deadline_still_measures_one_batch():
    found = search(SPACE, lambda batch: [Outcome(s.time) for s in batch], 60, deadline=time.monotonic() - 1)
    assert 0 < found.trials <= 4


REQUEST = Request(SPEC, "cpu:generic", "1", [{"rows": 1}, {"rows": 2}, {"rows": 3}], 0.01)

_WORKER = """
import json, sys, time
print(json.dumps({"threads": 2}), flush=True)
for line in sys.stdin:
    rows = [s["rows"] for s in json.loads(line)["schedules"]]
    if 2 in rows:
        %s
    outcomes = [{"microseconds": float(r), "failure": ""} for r in rows]
    print(json.dumps({"outcomes": outcomes, "limits": {"roofline_microseconds": 0.5}}), flush=True)
"""


@pytest.mark.parametrize("harm", ["import os; os._exit(139)", "time.sleep(60)"])
def test_a_candidate_that_crashes_or_hangs_costs_only_itself(harm):
    with Measurer(candidate_seconds=0.4, command=[sys.executable, "-c", _WORKER % harm]) as measurer:
        outcomes = measurer.measure(REQUEST)
    assert [o.microseconds for o in outcomes] == [1.0, None, 3.0]
    assert "crashed or hung" in outcomes[1].failure


def test_a_worker_that_does_not_start_is_an_error():
    with (
        Measurer(command=[sys.executable, "-c", "raise SystemExit('no memory')"]) as measurer,
        pytest.raises(KernelError, match=r"does not start \(no memory\)"),
    ):
        measurer.measure(REQUEST)


def test_describing_work_does_not_import_tvm():
    code = (
        "import sys; from lbllm_compile.codegen import build, ops, format, reference, prove, spec, targets;"
        " from lbllm_compile.codegen.tune import database, measure, search; assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
