"""Chooses the schedule of every linear and token bucket: what is stored, what ships, or what a search finds."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import KernelError
from ..progress import Progress, Task
from ..spec import LinearSpec
from ..targets import Target
from .database import Database, Key, Result
from .measure import Measurer, Outcome, Request
from .search import Found, search

if TYPE_CHECKING:
    from ..kernels.cpu import Bucket, Schedule

TIMING_SECONDS = 0.02
"""How long one candidate is timed in a search."""

FINALISTS = 3
"""The search's best candidates that are timed once more, side by side, together with the default."""

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
            ``"guess"`` (a result of another CPU or an incomplete search) or ``"default"``.
        result: the measurement behind it; None for records and defaults.
    """

    spec: LinearSpec
    bucket: Bucket
    schedule: Schedule
    source: Literal["record", "stored", "seed", "search", "guess", "default"]
    result: Result | None = None


@dataclass(frozen=True)
class Wanted:
    """A linear and a token bucket to choose a schedule for."""

    key: Key
    bucket: Bucket

    @property
    def name(self) -> str:
        """For people, e.g. ``4096x11008, 2-16 tokens``."""
        spec = self.key.spec
        plural = "" if self.bucket.highest == 1 else "s"
        return f"{spec.out_features}x{spec.in_features}, {self.bucket.name} token{plural}"


Chosen = Mapping[Wanted, "Choice"]
Space = Callable[[Wanted, Chosen], "list[Schedule]"]
"""The valid schedules of what is wanted, the default first, given the choices for what was wanted before it."""


def choose(
    wanted: Sequence[Wanted],
    space: Space,
    target: Target,
    database: Database,
    measurer: Measurer,
    *,
    trials: int,
    budget_s: float | None,
    progress: Progress,
    records: Sequence[Mapping[str, Any]] = (),
) -> list[Choice]:
    """A valid schedule for everything wanted: from records, the database, a search, or the default.

    Args:
        wanted: what is needed, in the order in which choices may depend on each other.
        space: what there is to choose from.
        target: a CPU target.
        database: results, old and new.
        measurer: measures candidates; not used where nothing has to be searched.
        trials: candidates measured per search, where no result of such a search is stored; 0 searches nothing.
        budget_s: seconds all searches may take.
        progress: told about each search and each candidate.
        records: ``{"spec", "tokens", "target", "schedule"}`` of an earlier build; they come first.

    Raises:
        KernelError: no candidate of a search works, or no worker can be started.
    """
    given = {(LinearSpec(**r["spec"]), r["tokens"]): r["schedule"] for r in records if r["target"] == target.name}
    chosen: dict[Wanted, Choice] = {}
    missing: list[Wanted] = []
    for item in wanted:
        record = given.get((item.key.spec, item.bucket.name))
        chosen[item], settled = _known(item, space(item, chosen), record, database, trials)
        # What depends on a choice not made yet is looked up again once it is.
        if not settled or any(item.key.spec == other.key.spec for other in missing):
            missing.append(item)
    if not missing or trials < 1:
        return list(chosen.values())
    started = time.monotonic()
    with progress.task("tune kernels", len(missing)) as task:
        for done, item in enumerate(missing):
            record = given.get((item.key.spec, item.bucket.name))
            valid = space(item, chosen)
            chosen[item], settled = _known(item, valid, record, database, trials)
            if settled:
                task.advance()
                continue
            deadline = math.inf
            if budget_s is not None:  # an equal share of what is left for each search that is left
                now = time.monotonic()
                deadline = now + max(0.0, started + budget_s - now) / (len(missing) - done)
            search_one = _Search(item, valid, chosen[item].schedule, target, measurer, progress)
            result = search_one.run(trials, deadline)
            database.add(item.key, result)
            chosen[item] = Choice(item.key.spec, item.bucket, search_one.best, "search", result)
            task.advance(f"{item.name}: {result.microseconds:.0f} us")
    return list(chosen.values())


def _known(
    item: Wanted, space: list[Schedule], record: Mapping[str, Any] | None, database: Database, trials: int
) -> tuple[Choice, bool]:
    """What to use without a search, and whether that is as good as a search of so many trials."""
    from ..kernels import cpu

    def choice(fields: Mapping[str, Any], source: Any, result: Result | None) -> Choice | None:
        schedule = cpu.schedule_from(dict(fields))
        return Choice(item.key.spec, item.bucket, schedule, source, result) if schedule in space else None

    if record is not None and (known := choice(record, "record", None)):
        return known, True
    if result := database.find(item.key):
        settled = result.sought >= trials
        source = ("seed" if database.ships(item.key) else "stored") if settled else "guess"
        if known := choice(result.schedule, source, result):
            return known, settled
    if (result := database.guess(item.key)) and (known := choice(result.schedule, "guess", result)):
        return known, False
    return Choice(item.key.spec, item.bucket, space[0], "default"), False


class _Search:
    """One search: its measurements, and what it says while it runs."""

    def __init__(
        self,
        item: Wanted,
        space: list[Schedule],
        guess: Schedule,
        target: Target,
        measurer: Measurer,
        progress: Progress,
    ):
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
        return Result(fields, times[self.best], found.trials, sought, times.get(self._default), roofline)
