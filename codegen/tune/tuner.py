"""Chooses the schedule of every linear and token bucket: what is stored, what ships, or what a search finds."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..backend import Bucket, Implementation, SearchSpace, backend_of
from ..errors import KernelError
from ..progress import Progress, Task
from ..spec import LinearSpec
from ..targets import Target
from ..threads import shares_work
from .database import Database, Key, Result
from .measure import Measurer, Outcome, Request
from .search import Found, search

Schedule = Any
"""A schedule of some backend's: a frozen dataclass with the field ``layout``."""

TIMING_SECONDS = 0.02
"""How long one candidate is timed in a search."""

FINALISTS = 3
"""The search's best candidates that are timed once more, side by side, together with the default."""

KEPT = 8
"""The search's best candidates whose times a result keeps, and the most failures."""

FINAL_SECONDS = 0.1
"""How long each of them is."""

CLOSE_ENOUGH = 0.9
"""Share of the roofline at which a search ends: no schedule can gain more than the tenth that is left."""

IMPLAUSIBLE = 1.05
"""Share of the roofline beyond which it is no limit: other load held the machine down while it was measured. Such a one
ends no search."""


@dataclass(frozen=True)
class Choice:
    """The schedule of a linear for a token bucket.

    Attributes:
        spec, bucket: what it is of.
        schedule: what to use.
        source: ``"record"`` (given), ``"stored"`` (the user's database), ``"seed"`` (shipped), ``"search"``,
            ``"guess"`` (a result of another CPU or number of threads, or an incomplete search) or ``"default"``.
        result: the measurement behind it; None for records and defaults.
    """

    spec: LinearSpec
    bucket: Bucket
    schedule: Schedule
    source: Literal["record", "stored", "seed", "search", "guess", "default"]
    result: Result | None = None

    @property
    def guessed(self) -> bool:
        """Whether no search for this CPU and these threads, and no earlier build, stands behind it."""
        return self.source in ("guess", "default")


@dataclass(frozen=True)
class Wanted:
    """A linear and a token bucket to choose a schedule for.

    Attributes:
        candidates: implementations of the linear, each with a weight layout of its own.
        bucket, key: what the choice is for.
    """

    candidates: Sequence[Implementation]
    bucket: Bucket
    key: Key

    @property
    def space(self) -> list[Schedule]:
        """Every valid schedule, a good guess first."""
        return [schedule for candidate in self.candidates for schedule in candidate.schedules(self.bucket)]

    @property
    def name(self) -> str:
        """For people, e.g. ``4096x11008, 2-16 tokens``."""
        spec = self.key.spec
        plural = "" if self.bucket.highest == 1 else "s"
        return f"{spec.out_features}x{spec.in_features}, {self.bucket.name} token{plural}"


def choose(
    wanted: Sequence[Wanted],
    target: Target,
    database: Database,
    measurer: Measurer,
    *,
    trials: int,
    budget_s: float | None,
    progress: Progress,
    records: Sequence[Mapping[str, Any]] = (),
) -> list[Choice]:
    """A valid schedule for everything wanted: from the database, records, a search, or the default.

    The choice for the first bucket, one token, decides the layout of a linear's weights, because decoding is bound by
    reading them. The other buckets follow it: a second layout would double the memory. Where one token is not wanted,
    what is known of it decides.

    Args:
        wanted: what is needed.
        target: one whose backend searches.
        database: results, old and new.
        measurer: measures candidates; not used where nothing has to be searched.
        trials: candidates measured per search, where no result of such a search is stored; 0 searches nothing.
        budget_s: seconds all searches may take.
        progress: told about each search and each candidate.
        records: ``{"spec", "tokens", "target", "threads", "schedule"}`` of an earlier build, maybe elsewhere. They
            spare a search, and give way only to results of this very machine. Those of one thread say nothing about
            several, nor the other way round.

    Raises:
        KernelError: no candidate of a search works, or no worker can be started.
    """
    space = backend_of(target).space()
    given = {
        (LinearSpec(**r["spec"]), r["tokens"], r["target"], shares_work(r["threads"])): r["schedule"]
        for r in records
        if isinstance(r.get("threads"), int)  # the first artifacts did not say
    }
    first = space.buckets[0]
    deciding: dict[LinearSpec, Choice] = {}

    def known(item: Wanted) -> tuple[Wanted, Choice, bool]:
        """The item, its candidates those of the decided layout; what is known of it, and whether that settles it."""
        spec = item.key.spec
        if item.bucket != first:
            if spec not in deciding:
                of, stored = item.key, space.measured_as(target, first)
                key = Key.on(of.cpu, spec, first.name, stored, of.threads, of.tvm, of.version)
                deciding[spec] = known(Wanted(item.candidates, first, key))[1]
            layout = deciding[spec].schedule.layout
            item = dataclasses.replace(item, candidates=[space.of_layout(item.candidates, layout)])
        record = given.get((spec, item.bucket.name, item.key.target, shares_work(item.key.threads)))
        return item, *_known(item, space, record, database, trials)

    choices: dict[int, Choice] = {}
    missing: list[int] = []
    undecided: set[LinearSpec] = set()
    order = sorted(range(len(wanted)), key=lambda index: wanted[index].bucket != first)
    for index in order:
        item, choices[index], settled = known(wanted[index])
        spec = item.key.spec
        if item.bucket == first:
            deciding[spec] = choices[index]
            if not settled and len(item.candidates) > 1:
                undecided.add(spec)
        if trials > 0 and (not settled or spec in undecided):
            missing.append(index)
    if missing:
        started = time.monotonic()
        with progress.task("tune kernels", len(missing)) as task:
            for done, index in enumerate(missing):
                # Once more: the layout may have been decided meanwhile.
                item, choices[index], settled = known(wanted[index])
                if settled:
                    task.advance()
                    continue
                deadline = math.inf
                if budget_s is not None:  # an equal share of what is left for each search that is left
                    now = time.monotonic()
                    deadline = now + max(0.0, started + budget_s - now) / (len(missing) - done)
                search_one = _Search(item, choices[index].schedule, target, measurer, progress)
                result = search_one.run(trials, deadline)
                database.add(item.key, result)
                choices[index] = Choice(item.key.spec, item.bucket, search_one.best, "search", result)
                if item.bucket == first:
                    deciding[item.key.spec] = choices[index]
                task.advance(f"{item.name}: {result.microseconds:.0f} us")
    return [choices[index] for index in range(len(wanted))]


def _known(
    item: Wanted, space: SearchSpace, record: Mapping[str, Any] | None, database: Database, trials: int
) -> tuple[Choice, bool]:
    """What to use without a search, and whether that is as good as a search of so many trials."""
    schedules = item.space

    def choice(fields: Mapping[str, Any], source: Any, result: Result | None) -> Choice | None:
        schedule = space.schedule_from(dict(fields))
        return Choice(item.key.spec, item.bucket, schedule, source, result) if schedule in schedules else None

    found = database.find(item.key)
    if found and found.sought >= trials:
        source = "seed" if database.ships(item.key) else "stored"
        if known := choice(found.schedule, source, found):
            return known, True
    if record is not None and (known := choice(record, "record", None)):
        return known, True
    if found and (known := choice(found.schedule, "guess", found)):
        return known, False
    if (result := database.guess(item.key)) and (known := choice(result.schedule, "guess", result)):
        return known, False
    return Choice(item.key.spec, item.bucket, schedules[0], "default"), False


class _Search:
    """One search: its measurements, and what it says while it runs."""

    def __init__(self, item: Wanted, guess: Schedule, target: Target, measurer: Measurer, progress: Progress):
        space = item.space
        self._default = space[0]
        self._space = [guess, *(s for s in space if s != guess)]
        self._item = item
        self._target = target
        self._measurer = measurer
        self._progress = progress
        self._best = math.inf
        self.best = guess

    def run(self, trials: int, deadline: float) -> Result:
        """Searches, times the finalists again and reports what was discarded.

        Raises:
            KernelError: no candidate works.
        """
        with self._progress.task(self._item.name, min(trials, len(self._space))) as task:
            found = search(
                self._space,
                lambda batch: self._measure(batch, TIMING_SECONDS, task),
                trials,
                deadline,
                self._close_enough,
            )
        if found is None:
            raise KernelError(
                f"no candidate kernel of {self._item.key.spec} works on this machine; run 'lbllm-compile doctor'"
            )
        for failure in found.failures:
            self._progress.note(f"a candidate kernel was discarded: {failure}")
        return self._result(found, trials, deadline)

    def _close_enough(self) -> bool:
        share = self._measurer.limits.roofline_microseconds / self._best
        return CLOSE_ENOUGH <= share <= IMPLAUSIBLE

    def _measure(self, schedules: list[Schedule], seconds: float, task: Task | None = None) -> list[Outcome]:
        forms = [dataclasses.asdict(schedule) for schedule in schedules]
        key = self._item.key
        outcomes = self._measurer.measure(Request(key.spec, self._target.name, self._item.bucket.name, forms, seconds))
        for outcome in outcomes:
            if outcome.microseconds is not None:
                self._best = min(self._best, outcome.microseconds)
            if task:
                task.advance(self._state())
        return outcomes

    def _state(self) -> str:
        """E.g. ``best 512 us, 71 % of the memory bandwidth``."""
        limits = self._measurer.limits
        if not math.isfinite(self._best):
            return "no candidate works yet"
        text = f"best {self._best:.0f} us"
        if self._item.bucket.highest == 1 and limits.bandwidth:
            return f"{text}, {limits.weight_bytes / limits.bandwidth / self._best * 1e8:.0f} % of the memory bandwidth"
        if limits.roofline_microseconds:
            return f"{text}, {100 * limits.roofline_microseconds / self._best:.0f} % of the roofline"
        return text

    def _result(self, found: Found, trials: int, deadline: float) -> Result:
        """The search's result, after a second measurement of the finalists where there is time for one.

        Other load makes a time longer and never shorter, so the shorter of two times of a schedule counts.
        """
        times = dict(found.times)
        if time.monotonic() < deadline:
            finalists = list(dict.fromkeys([*list(times)[:FINALISTS], self._default]))
            for schedule, outcome in zip(finalists, self._measure(finalists, FINAL_SECONDS), strict=True):
                if outcome.microseconds is not None:
                    times[schedule] = min(outcome.microseconds, times.get(schedule, math.inf))
        self.best = min(times, key=times.__getitem__)
        roofline = self._measurer.limits.roofline_microseconds or None
        fields = dataclasses.asdict(self.best)
        # One that was cut short counts for what it measured: a later search with as many trials does not take it.
        sought = trials if found.complete else found.trials
        fastest = sorted(times, key=times.__getitem__)[:KEPT]
        candidates = tuple({"schedule": dataclasses.asdict(s), "microseconds": times[s]} for s in fastest)
        return Result(
            fields,
            times[self.best],
            found.trials,
            sought,
            times.get(self._default),
            roofline,
            candidates,
            found.failures[:KEPT],
        )
