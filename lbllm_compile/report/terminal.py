"""What a person watches: progress with an estimate of the time left, and tables.

Progress goes to stderr. On a terminal it is a set of bars; elsewhere (a log file, a pipe) it is plain lines, the first
after two seconds and then one every ten, so that nothing long is ever silent.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.progress import Task as Bar
from rich.table import Table
from rich.text import Text

FIRST_LINE = 2.0
"""Seconds before a running task shows up in plain output; shorter ones stay silent."""

LINE_INTERVAL = 10.0
"""Seconds between plain lines."""

PLAIN_WIDTH = 160
"""Columns of output that is not a terminal."""

_RECENT = 8


class TaskState:
    """How far one task is. Implements :class:`codegen.progress.Task`.

    The time left is estimated from the latest steps alone, because steps restored from a checkpoint take no time.
    """

    def __init__(self, title: str, total: int):
        self.title = title
        self.total = total
        self.done = 0
        self.text = ""
        self.started = time.monotonic()
        self._last = self.started
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def advance(self, note: str = "") -> None:
        now = time.monotonic()
        self._recent.append(now - self._last)
        self._last = now
        self.done += 1
        self.text = note

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def remaining(self) -> float | None:
        """Seconds left, or None while nothing is known."""
        if not self._recent:
            return None
        step = sum(self._recent) / len(self._recent)
        # A step that takes longer than the ones before still has some of its time to go.
        return max(0.0, step * (self.total - self.done) - min(time.monotonic() - self._last, 0.9 * step))

    def line(self) -> str:
        """One plain line, e.g. ``distill: 12/30 (40 %), 1:04 so far, about 1:36 left; error 0.031``."""
        share = 100 * self.done // max(1, self.total)
        left = self.remaining()
        parts = [f"{self.title}: {self.done}/{self.total} ({share} %), {duration(self.elapsed)} so far"]
        if left is not None and self.done < self.total:
            parts.append(f", about {duration(left)} left")
        if self.text:
            parts.append(f"; {self.text}")
        return "".join(parts)

    def final_line(self) -> str:
        return f"{self.title}: {self.done}/{self.total} in {duration(self.elapsed)}" + (
            f"; {self.text}" if self.text else ""
        )


class PlainProgress:
    """Progress as lines, for output that is not a terminal. Implements :class:`codegen.progress.Progress`."""

    def __init__(self, console: Console):
        self._console = console
        self._tasks: list[TaskState] = []
        self._lock = threading.Lock()
        self.stopped: TaskState | None = None
        """The outermost task that did not finish."""

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[TaskState]:
        state = TaskState(title, total)
        stop = threading.Event()
        speaker = threading.Thread(target=self._speak, args=(state, stop), daemon=True)
        with self._lock:
            self._tasks.append(state)
        speaker.start()
        try:
            yield state
        except BaseException:
            self.stopped = state
            raise
        finally:
            stop.set()
            speaker.join()
            with self._lock:
                self._tasks.remove(state)
        if state.elapsed >= FIRST_LINE:
            self.note(state.final_line())

    def note(self, text: str) -> None:
        with self._lock:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _speak(self, state: TaskState, stop: threading.Event) -> None:
        """Prints ``state`` now and then while it is the innermost task."""
        wait = FIRST_LINE
        while not stop.wait(wait):
            wait = LINE_INTERVAL
            if self._tasks[-1] is state:
                held = memory()
                self.note(state.line() + (f"; {held} of memory" if held else ""))


class _TimeLeft(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: Bar) -> Text:
        state: TaskState = task.fields["state"]
        left = state.remaining()
        text = f"{duration(state.elapsed)} so far" if left is None else f"about {duration(left)} left"
        return Text(text, style="progress.remaining", no_wrap=True)


class _Memory(ProgressColumn):
    """What the process holds resident, beside the outermost bar."""

    max_refresh = 1.0

    def render(self, task: Bar) -> Text:
        return Text(memory() if task.fields["outermost"] else "", style="dim", no_wrap=True)


class _BarTask:
    """Moves a bar and its state together."""

    def __init__(self, state: TaskState, bars: Bars, bar: TaskID):
        self._state, self._bars, self._bar = state, bars, bar

    def advance(self, note: str = "") -> None:
        self._state.advance(note)
        self._bars.update(self._bar, completed=self._state.done, note=note)


class BarProgress:
    """Progress as bars on a terminal. Implements :class:`codegen.progress.Progress`."""

    def __init__(self, console: Console):
        self._console = console
        self._bars: Bars | None = None
        self.stopped: TaskState | None = None
        """The outermost task that did not finish."""

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[_BarTask]:
        state = TaskState(title, total)
        outermost = self._bars is None
        if outermost:
            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                _TimeLeft(),
                _Memory(),
                TextColumn("[dim]{task.fields[note]}"),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        bars = self._bars
        assert bars is not None
        bar = bars.add_task(title, total=total, note="", state=state, outermost=outermost)
        try:
            yield _BarTask(state, bars, bar)
        except BaseException:
            self.stopped = state
            raise
        finally:
            bars.remove_task(bar)
            if outermost:
                bars.stop()
                self._bars = None
        if outermost and state.elapsed >= FIRST_LINE:
            self.note(state.final_line())

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def make_console(*, stderr: bool = False, file: IO[str] | None = None) -> Console:
    """A console that is as wide as the terminal, or wide enough for every table where there is none."""
    console = Console(stderr=stderr, file=file)
    return console if console.is_terminal else Console(stderr=stderr, file=file, width=PLAIN_WIDTH)


@contextlib.contextmanager
def pager(console: Console) -> Iterator[None]:
    """What is printed meanwhile goes through the user's pager, ``less`` by default, on a terminal that has it.

    Where it fits on the terminal, ``less`` leaves it there and ends.
    """
    program = shlex.split(os.environ.get("PAGER") or "less")
    if not console.is_terminal or not sys.stdin.isatty() or shutil.which(program[0]) is None:
        yield
        return
    with console.capture() as captured:
        yield
    environment = {"LESS": "FRX", **os.environ}
    # The reader may leave before the end; the pager then breaks the pipe, and that is no error.
    subprocess.run(program, input=captured.get().encode(errors="replace"), env=environment, check=False)


def make_progress(console: Console) -> PlainProgress | BarProgress:
    """Bars on a terminal, plain lines elsewhere."""
    return BarProgress(console) if console.is_terminal else PlainProgress(console)


def memory() -> str:
    """What this process holds resident, e.g. ``1.2 GB``; empty where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return ""
    return size(pages * os.sysconf("SC_PAGE_SIZE"))


def duration(seconds: float) -> str:
    """``0.8 s`` below ten seconds, then ``m:ss``, then ``h:mm:ss``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: float) -> str:
    """Bytes in decimal units, e.g. ``134.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def figure(value: Any) -> str:
    """One value of a report as text: lists joined, None as a dash, floats with at least four digits.

    Zeros at the end of a rounded number stay, because they say how exact it is; a number with fewer digits is as it is.
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value) or float(f"{value:.4g}") == value:
            return f"{value:.4g}"
        if not 1e-3 <= abs(value) < 1e6:
            return f"{value:.3e}"
        return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {figure(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(figure(v) for v in value)
    return str(value)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table whose columns are right-aligned where every value is a number."""
    result = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        values = [row[index] for row in rows if row[index] is not None]
        numeric = bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        result.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*[Text(figure(value)) for value in row])
    return result


def rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of mappings: one column a key, in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return table(title, [c.replace("_", " ") for c in columns], [[row.get(c) for c in columns] for row in rows])


def pass_table(records: Sequence[Any], *, times: bool = True) -> Table:
    """One row a pass (:class:`passes.pipeline.PassRecord`): contract, measured error, graph size, time."""
    columns = ["#", "pass", "contract", "error on the probe", "nodes before", "after"]
    rows: list[list[Any]] = [
        [r.index, r.text, r.contract, "bit-equal" if r.error == 0 else r.error, r.nodes_before, r.nodes_after]
        for r in records
    ]
    if times:
        columns += ["time", "of it checks"]
        for row, record in zip(rows, records, strict=True):
            row += [duration(record.seconds + record.check_seconds), duration(record.check_seconds)]
    return table("Passes", columns, rows)
