"""The schedule search: what identifies a result, how results are kept, and what a search does with candidates."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import random
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
from lbllm_compile.codegen.backend import bucket_named
from lbllm_compile.codegen.cache import cache_directory
from lbllm_compile.codegen.cpu.space import SPACE as CPUS
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.progress import NoProgress
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tune import tuner
from lbllm_compile.codegen.tune.database import SEEDS, Database, Key, Result, TuningFileError, parse_line, read_results
from lbllm_compile.codegen.tune.measure import Limits, Measurer, Outcome, Request
from lbllm_compile.codegen.tune.model import CostModel, encode
from lbllm_compile.codegen.tune.search import search, spread
from lbllm_compile.codegen.tune.tuner import Wanted, choose

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
            {"additive": True},
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


def test_a_result_keeps_the_candidates_of_its_search(tmp_path):
    candidates = tuple({"schedule": {"rows": rows}, "microseconds": time} for rows, time in ((16, 12.5), (8, 13.0)))
    result = Result({"rows": 16}, 12.5, 16, 16, candidates=candidates, discarded=("rows=4: it timed out",))
    Database(tmp_path).add(KEY, result)
    assert Database(tmp_path).find(KEY) == result
    for wrong in ([{"schedule": {"rows": [1]}, "microseconds": 1.0}], [{"schedule": {}, "microseconds": 0}], [3], 5):
        line = {**json.loads(result.line(KEY)), "candidates": wrong}
        with pytest.raises(ValueError):
            parse_line(json.dumps(line).encode())


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


def test_results_from_before_additive_levels_were_told_apart_are_found(tmp_path):
    line = json.loads(Result({}, 3.0, 1, 16).line(KEY))
    del line["key"]["spec"]["additive"]
    assert parse_line(json.dumps(line).encode())[0] == KEY


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


def _import_many(directory, file):
    Database(directory).merge(read_results(file))


def test_concurrent_imports_lose_nothing(tmp_path):
    """Four files with keys of their own and one they share, of which the fastest result stays."""
    for w in range(4):
        source = Database(tmp_path / f"machine{w}")
        for i in range(20):
            source.add(dataclasses.replace(KEY, threads=1 + 100 * w + i), Result({"i": i}, 5.0, 16, 16))
        source.add(dataclasses.replace(KEY, threads=999), Result({"from": w}, 10.0 + (w - 2) ** 2, 16, 16))
        assert source.export(tmp_path / f"{w}.jsonl") == 21
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    importers = [
        context.Process(target=_import_many, args=(tmp_path / "all", tmp_path / f"{w}.jsonl")) for w in range(4)
    ]
    for importer in importers:
        importer.start()
    for importer in importers:
        importer.join(60)
        assert importer.exitcode == 0
    database = Database(tmp_path / "all")
    for w in range(4):
        for i in range(20):
            assert database.find(dataclasses.replace(KEY, threads=1 + 100 * w + i)) == Result({"i": i}, 5.0, 16, 16)
    assert database.find(dataclasses.replace(KEY, threads=999)) == Result({"from": 2}, 10.0, 16, 16)


@pytest.mark.parametrize(
    ("stored", "offered", "taken"),
    [
        ((10.0, 16), (9.0, 16), True),
        ((10.0, 16), (10.0, 64), False),
        ((10.0, 16), (11.0, 64), False),
        ((10.0, 16), (5.0, 3), False),  # too few trials to be trusted against a whole search
        ((10.0, 3), (11.0, 16), True),
        ((10.0, 3), (9.0, 4), True),
    ],
)
def test_an_import_takes_what_is_faster_and_was_searched_enough(tmp_path, stored, offered, taken):
    database, other = Database(tmp_path / "a"), Database(tmp_path / "b")
    database.add(KEY, Result({"old": 1}, stored[0], 1, stored[1]))
    other.add(KEY, Result({"new": 1}, offered[0], 1, offered[1]))
    other.add(dataclasses.replace(KEY, threads=7), Result({}, 1.0, 1, 1))
    other.export(tmp_path / "file")
    merged = database.merge(read_results(tmp_path / "file"))
    assert (merged.added, merged.replaced, merged.kept) == (1, int(taken), int(not taken))
    for reader in (database, Database(tmp_path / "a")):
        assert reader.find(KEY).schedule == ({"new": 1} if taken else {"old": 1})


def test_an_export_of_one_target_leaves_out_the_others(tmp_path):
    database = Database(tmp_path)
    generic = dataclasses.replace(KEY, target="cpu:generic")
    database.add(KEY, Result({}, 1.0, 1, 16))
    database.add(KEY, Result({"rows": 16}, 2.0, 1, 16, 3.0, 1.5))
    database.add(generic, Result({}, 1.0, 1, 16))
    assert database.export(tmp_path / "file", KEY.target) == 1
    assert read_results(tmp_path / "file") == [(KEY, Result({"rows": 16}, 2.0, 1, 16, 3.0, 1.5))]
    assert database.export(tmp_path / "none", "cpu:nothing") == 0 and not (tmp_path / "none").exists()


def _changed(**changes):
    record = json.loads(Result({"rows": 16}, 2.0, 1, 16).line(KEY))
    return json.dumps(record | changes)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not a tuning result"),
        ("[1]", "not a JSON object"),
        (_changed(key=3), "fields of a Key"),
        (_changed(microseconds="fast"), "positive numbers"),
        (_changed(microseconds=-1.0), "positive numbers"),
        (_changed(trials=True), "whole numbers"),
        (_changed(schedule=[]), "plain values"),
        (_changed(key={**dataclasses.asdict(KEY), "threads": "2"}), "threads must be int"),
        (_changed(key={**dataclasses.asdict(KEY), "more": 1}), "fields of a Key"),
        (_changed(key={**dataclasses.asdict(KEY), "spec": {**dataclasses.asdict(SPEC), "group": 7}}), "group size 7"),
        (_changed(key={**dataclasses.asdict(KEY), "spec": {**dataclasses.asdict(SPEC), "bias": 1}}), "bias must be"),
    ],
)
def test_a_damaged_line_of_an_import_is_named(tmp_path, line, reason):
    file = tmp_path / "results.jsonl"
    file.write_text(f"{_changed()}\n\n{line}\n")
    with pytest.raises(TuningFileError, match="line 3") as error:
        read_results(file)
    assert reason in str(error.value)


def test_shipped_results_come_last(tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text(Result({"seed": 1}, 1.0, 16, 16).line(KEY) + "\n")
    database = Database(tmp_path, seeds)
    assert database.find(KEY).schedule == {"seed": 1} and database.ships(KEY)
    database.add(KEY, Result({"own": 1}, 2.0, 1, 1))
    assert database.find(KEY).schedule == {"own": 1} and not database.ships(KEY)
    assert Database(tmp_path / "other").find(KEY) is None


def test_results_of_other_machines_are_guesses_and_the_nearest_comes_first(tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text(Result({"seed": 1}, 1.0, 16, 16).line(dataclasses.replace(KEY, cpu="shipped")) + "\n")
    database = Database(tmp_path, seeds)
    assert database.find(KEY) is None and database.guess(KEY).schedule == {"seed": 1}
    for change in ({"cpu": "another"}, {"threads": 7}, {"tvm": "0.28"}):
        database.add(dataclasses.replace(KEY, **change), Result(dict.fromkeys(change, 1), 1.0, 16, 16))
        assert database.guess(KEY).schedule == dict.fromkeys(change, 1)
    for change in ({"tokens": "2-16"}, {"target": "cpu:generic"}, {"threads": 1}, {"version": 9}):
        assert database.guess(dataclasses.replace(KEY, **change)) is None
    assert database.guess(dataclasses.replace(KEY, spec=dataclasses.replace(SPEC, bias=True))) is None


def test_the_shipped_results_are_whole_and_fit_their_spaces():
    from lbllm_compile.codegen.cpu import space as cpu

    tokens: dict[object, set[str]] = {}
    for line in SEEDS.read_bytes().splitlines():
        key, result = parse_line(line)
        tokens.setdefault(dataclasses.replace(key, tokens=""), set()).add(key.tokens)
        assert key.version == cpu.SCHEDULE_VERSION
        schedule = cpu.schedule_from(result.schedule)
        implementation = cpu.of_layout(cpu.implementations(key.spec, Target.parse(key.target)), schedule.layout)
        assert schedule in implementation.schedules(bucket_named(key.tokens, cpu.BUCKETS))
    assert all(names == {bucket.name for bucket in cpu.BUCKETS} for names in tokens.values())


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


def test_a_failure_is_kept_as_one_short_line_without_folders():
    told = "ld: cannot find '/tmp/lbllm-object-x7/kernels.o' (/usr/bin/cc, a/b)\nand a lot more"

    def measure(batch):
        texts = {5: told, 6: "x" * 5000}
        return [Outcome(None, texts[s.a]) if s.a in texts else Outcome(s.time) for s in batch]

    failures = search(SPACE, measure, trials=len(SPACE)).failures
    assert {text.partition(": ")[2] for text in failures} == {"ld: cannot find 'kernels.o' (cc, a/b)", "x" * 200}


def test_a_search_without_a_working_candidate_has_no_result():
    assert search(SPACE, lambda batch: [Outcome(None, "wrong") for _ in batch], trials=12) is None


def test_a_search_stops_when_nothing_gets_better():
    found = search(SPACE, lambda batch: [Outcome(5.0) for _ in batch], trials=60)
    assert found.trials < 40 and found.complete


def test_a_search_past_its_deadline_still_measures_one_batch():
    found = search(SPACE, lambda batch: [Outcome(s.time) for s in batch], 60, deadline=time.monotonic() - 1)
    assert 0 < found.trials <= 4 and not found.complete


@dataclass(frozen=True)
class Tile:
    """A schedule of a space as large as a real one."""

    rows: int
    chains: int
    prefetch: int
    parallel: bool


TILES = [
    Tile(rows, chains, prefetch, parallel)
    for rows in (16, 32, 48, 64, 96, 128)
    for chains in (1, 2, 4)
    for prefetch in (0, 512, 1024, 2048, 3072, 4096, 6144, 8192)
    for parallel in (True, False)
]


def tile_times(seed: int) -> dict[Tile, float]:
    """Times whose best row count depends on the prefetch distance and the chains, with a cliff and a rough surface."""
    generator = random.Random(seed)
    rows, chains, prefetches = (sorted({getattr(t, name) for t in TILES}) for name in ("rows", "chains", "prefetch"))
    row, chain, prefetch = (generator.randrange(len(values)) for values in (rows, chains, prefetches))
    parallel = generator.random() < 0.5
    times = {}
    for tile in TILES:
        r, c = rows.index(tile.rows) - row, chains.index(tile.chains) - chain
        p = prefetches.index(tile.prefetch) - prefetch
        log = 0.08 * abs(r) + 0.1 * abs(c) + 0.05 * abs(p) + 0.1 * abs(r + 2 * c) + 0.06 * abs(p - r)
        log += 0.5 * (tile.parallel != parallel) + 0.3 * (tile.rows * tile.chains > 256) + 0.02 * generator.random()
        times[tile] = 100 * math.exp(log)
    return times


def test_a_tenth_of_a_space_whose_fields_interact_is_enough():
    close = 0
    for seed in range(40):
        times, space = tile_times(seed), random.Random(seed).sample(TILES, len(TILES))
        found = search(space, lambda batch, t=times: [Outcome(t[s]) for s in batch], len(space) // 10, seed=seed)
        assert found.trials <= len(space) // 10
        assert found.microseconds == times[found.schedule] == next(iter(found.times.values()))
        close += found.microseconds <= 1.05 * min(times.values())
    assert close >= 38


def test_a_search_stops_when_the_best_is_close_enough():
    seen = []

    def measure(batch):
        seen.extend(batch)
        return [Outcome(s.time) for s in batch]

    found = search(SPACE, measure, 60, close_enough=lambda: min(s.time for s in seen) <= 16)
    assert found.microseconds <= 16 and found.trials < 30


def test_a_spread_starts_with_the_guess_and_reaches_every_corner():
    chosen = spread(SPACE, 9)
    assert chosen[0] == SPACE[0] and len(set(chosen)) == 9
    assert (
        {s.c for s in chosen} == {True, False} and {0, 7} <= {s.a for s in chosen} and {0, 3} <= {s.b for s in chosen}
    )
    assert sorted(spread(SPACE, 1000), key=str) == sorted(SPACE, key=str)


def test_the_model_predicts_what_it_has_seen_and_doubts_what_it_has_not():
    points = encode(TILES)
    times = tile_times(0)
    seen = list(range(0, len(TILES), 9))
    model = CostModel(points[seen], np.log([times[TILES[i]] for i in seen]))
    mean, deviation = model.predict(points)
    errors = [abs(mean[i] - math.log(times[TILES[i]])) for i in range(len(TILES))]
    assert max(errors[i] for i in seen) < 0.1 and np.mean(errors) < 0.1
    assert deviation[seen].max() < np.delete(deviation, seen).mean()


def test_schedules_of_several_kinds_share_a_space():
    points = encode([Toy(1, 2, True), Tile(1, 2, 3, True), Toy(1, 2, False)])
    assert points.shape == (3, 8) and not np.isnan(points[:, 0]).any() and np.isnan(points[0]).sum() == 4
    model = CostModel(points, np.array([1.0, 1.0, 1.0]))
    assert np.allclose(model.predict(points)[0], 1.0)


class FakeMeasurer:
    """Times schedules without running anything."""

    def __init__(self, time, limits=None):
        self.time, self.limits, self.requests = time, limits or Limits(), []

    def measure(self, request):
        self.requests.append(request)
        return [Outcome(self.time(schedule)) for schedule in request.schedules]


def choose_one(tmp_path, measurer, trials=16, **options):
    """The choice for one linear and one token, with a database in ``tmp_path``."""
    from lbllm_compile.codegen.cpu import space as cpu

    target = Target.parse("cpu:generic")
    spec = LinearSpec("bit", 256, 128, 64)
    key = Key.here(spec, "1", target, 2, "0.27", 1)
    item = tuner.Wanted(cpu.implementations(spec, target), cpu.BUCKETS[0], key)
    database = Database(tmp_path, tmp_path / "seeds")
    options = {"trials": trials, "budget_s": None, "progress": NoProgress(), **options}
    (choice,) = tuner.choose([item], target, database, measurer, **options)
    return key, database, choice


def portable(rows):
    """The JSON form of a serial portable schedule."""
    return {"layout": "portable", "rows": rows, "parallel": False}


def rows_time(schedule):
    return 10.0 + abs(schedule["rows"] - 8) + 20 * schedule["parallel"]


def test_a_search_result_says_how_it_compares_with_the_default(tmp_path):
    measurer = FakeMeasurer(rows_time, Limits(roofline_microseconds=1.0))
    key, database, choice = choose_one(tmp_path, measurer)
    assert (choice.source, choice.schedule.rows, choice.schedule.parallel) == ("search", 8, False)
    assert choice.result == database.find(key)
    assert (choice.result.microseconds, choice.result.default_microseconds) == (10.0, 18.0)
    assert choice.result.roofline_microseconds == 1.0
    *_, final = measurer.requests
    assert final.seconds == tuner.FINAL_SECONDS and portable(16) in final.schedules


def test_stored_results_spare_a_search_and_shorter_searches_do_not_count(tmp_path):
    choose_one(tmp_path, FakeMeasurer(rows_time))
    *_, choice = choose_one(tmp_path, FakeMeasurer(None))
    assert (choice.source, choice.schedule.rows) == ("stored", 8)
    again = FakeMeasurer(rows_time)
    *_, choice = choose_one(tmp_path, again, trials=17)
    assert choice.source == "search" and again.requests[0].schedules[0] == portable(8)


def test_a_search_that_ran_out_of_time_is_continued_next_time(tmp_path):
    *_, choice = choose_one(tmp_path, FakeMeasurer(rows_time), budget_s=0.0)
    assert (choice.result.trials, choice.result.sought) == (4, 4)
    *_, choice = choose_one(tmp_path, FakeMeasurer(None), trials=4)
    assert choice.source == "stored"
    *_, choice = choose_one(tmp_path, FakeMeasurer(rows_time))
    assert (choice.source, choice.result.sought) == ("search", 16)


def test_another_machines_result_is_the_first_guess(tmp_path):
    key, database, _ = choose_one(tmp_path, FakeMeasurer(None), trials=0)
    other = dataclasses.replace(key, cpu="another")
    database.add(other, Result(portable(4), 1.0, 16, 16))
    *_, choice = choose_one(tmp_path, FakeMeasurer(None), trials=0)
    assert (choice.source, choice.schedule.rows) == ("guess", 4)
    measurer = FakeMeasurer(rows_time)
    *_, choice = choose_one(tmp_path, measurer)
    assert measurer.requests[0].schedules[0] == portable(4)
    assert (choice.source, choice.schedule.rows, choice.result.default_microseconds) == ("search", 8, 18.0)
    kept, times = choice.result.candidates, [item["microseconds"] for item in choice.result.candidates]
    assert kept[0] == {"schedule": choice.result.schedule, "microseconds": choice.result.microseconds}
    assert times == sorted(times) and 1 < len(kept) <= tuner.KEPT


@pytest.mark.parametrize(("roofline", "stops"), [(9.5, True), (5.0, False), (30.0, False)])
def test_the_roofline_ends_a_search_only_where_it_is_plausible(tmp_path, roofline, stops):
    measurer = FakeMeasurer(lambda schedule: 10.0, Limits(roofline_microseconds=roofline))
    *_, choice = choose_one(tmp_path, measurer)
    assert (choice.result.trials == 5) == stops


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
        "import sys; from lbllm_compile.codegen import operators, format, reference, prove, spec, targets;"
        " from lbllm_compile.codegen.cpu import build;"
        " from lbllm_compile.codegen.tune import database, measure, search; assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})


def test_results_for_one_token_hold_for_families_with_the_same_kernels_for_it():
    """Those with tile registers multiply one token as those without."""
    amx, vectors = (Target.parse(f"cpu:{family}") for family in ("avx512-amx", "avx512-vpopcnt"))
    one, *others = CPUS.buckets
    assert CPUS.measured_as(amx, one) == vectors == CPUS.measured_as(vectors, one)
    assert all(CPUS.measured_as(amx, bucket) == amx for bucket in others)
    for spec in (SPEC, LinearSpec("int8", 33, 70, 32, 8)):
        theirs = [i.schedules(one) for i in CPUS.implementations(spec, vectors)]
        assert [i.schedules(one) for i in CPUS.implementations(spec, amx)] == theirs


def test_records_of_one_token_are_used_on_families_with_the_same_kernels_for_it(tmp_path):
    amx, (one, *others) = Target.parse("cpu:avx512-amx"), CPUS.buckets
    candidates = CPUS.implementations(SPEC, amx)
    schedule = candidates[-1].schedules(one)[-1]
    fields = {"spec": dataclasses.asdict(SPEC), "tokens": one.name, "target": "cpu:avx512-vpopcnt", "threads": 2}
    record = {**fields, "schedule": dataclasses.asdict(schedule)}
    wanted = [
        Wanted(candidates, bucket, Key.here(SPEC, bucket.name, CPUS.measured_as(amx, bucket), 2, "0.27", 1))
        for bucket in CPUS.buckets
    ]
    options = {"trials": 0, "budget_s": None, "progress": NoProgress(), "records": [record]}
    choices = choose(wanted, amx, Database(tmp_path), None, **options)
    assert [choice.source for choice in choices] == ["record", *("default" for _ in others)]
    assert choices[0].schedule == schedule


def test_what_is_known_of_one_token_decides_the_layout_there_too(tmp_path):
    amx, (one, *others) = Target.parse("cpu:avx512-amx"), CPUS.buckets
    candidates = CPUS.implementations(SPEC, amx)
    assert [c.layout for c in candidates] == ["lut8", "popcount"]
    schedule = candidates[1].schedules(one)[0]
    database = Database(tmp_path)
    key = Key.here(SPEC, one.name, CPUS.measured_as(amx, one), 2, "0.27", 1)
    database.add(key, Result(dataclasses.asdict(schedule), 3.0, 1, 16))
    wanted = [Wanted(candidates, others[-1], Key.here(SPEC, others[-1].name, amx, 2, "0.27", 1))]
    (choice,) = choose(wanted, amx, database, None, trials=0, budget_s=None, progress=NoProgress())
    assert choice.schedule.layout == "popcount"
