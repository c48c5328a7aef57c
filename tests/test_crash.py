"""A compile that is killed, at any point and again and again, ends with the same bytes as one that is left alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from lbllm_compile.codegen.progress import NoProgress
from test_driver import MODEL, ROOT, SMALL

from lbllm_compile import artifact, checkpoint, driver, preflight, recipe
from lbllm_compile.options import CompileOptions

KILLS = 10
"""Kills of each long test, at random points in time."""

SEEDS = range(10)
"""Of the points in time; each is a test of its own."""

PRESET = SMALL.model_copy(update={"distill_epochs": 2, "activate_steps": 6, "finetune_steps": 10, "tune_trials": 1})

FORKING = multiprocessing.get_context("forkserver")
"""Children begin with what takes seconds to import."""

FORKING.set_forkserver_preload(["torch", "transformers", "tvm", "lbllm_compile.driver", "lbllm_compile.kernels"])


class Child:
    """A compile in a process of its own, without rehearsal, that has the work directory.

    Args:
        model, out: of the compile.
        moment: when it kills itself: ``artifact`` as it writes that, a number after so many finished pieces of work.

    Attributes:
        notes: what it has told, once it has ended.
    """

    def __init__(self, model: Path, out: Path, moment: str = "never"):
        self._told, telling = FORKING.Pipe(duplex=False)
        self.process = FORKING.Process(target=compile_and_tell, args=(model, out, moment, telling))
        self.process.start()
        telling.close()
        self.notes: list[str] = []
        assert self._told.recv() == READY

    def killed(self, seconds: float) -> bool:
        """Kills it after so many seconds; False where it has ended by then."""
        self.process.join(seconds)
        ended = self.process.exitcode is not None
        self.process.kill()
        return not ended

    def finish(self) -> int:
        """Waits for the end; the exit code."""
        with contextlib.suppress(EOFError):
            while True:
                self.notes.append(self._told.recv())
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


READY = "ready"


def compile_and_tell(model: Path, out: Path, moment: str, telling: Connection) -> None:
    """What a child does."""
    os.environ["LBLLM_CACHE_DIR"] = str(model.parent / "cache")

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class WorkDir(checkpoint.WorkDir):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.left = int(moment) if moment.isdigit() else 0
            telling.send(READY)

        def save(self, *piece: Any) -> None:
            super().save(*piece)
            self.left -= 1
            if self.left == 0:
                die()

    class Notes(NoProgress):
        def note(self, text: str) -> None:
            telling.send(text)

    if moment == "artifact":
        artifact._write_weights = die
    driver.WorkDir = WorkDir
    preflight.rehearse = lambda *_, **__: None
    recipe.PRESETS["quick"] = PRESET
    driver.compile(CompileOptions(model=model, out=out, preset="quick"), progress=Notes())


def compared(out: Path) -> dict[str, bytes]:
    """What must be the same: all but times, schedules, kernels made from them, and the manifest."""
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    measured = ("kernels/", "tuning.json", "manifest.json", "report.")
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(measured)}


def pieces(out: Path) -> dict[str, int]:
    """Finished pieces of work, and when each was written; the running state of a training is not finished."""
    stages = out.with_name(out.name + ".lbllm-work") / "stages"
    return {
        str(p.relative_to(stages)): p.stat().st_mtime_ns
        for p in stages.glob("*/*.safetensors")
        if not (p.parent.name.endswith("-together") and p.stem == "00000")
    }


def whole(model: Path, out: Path) -> tuple[dict[str, bytes], float]:
    """What a compile that is left alone gives, and the seconds from when it has the work directory to its end."""
    child = Child(model, out)
    begin = time.monotonic()
    assert child.finish() == 0
    found, seconds = compared(out), time.monotonic() - begin
    assert {"model.safetensors", "graph.json", "lbllm.lock", "config.json", "program.json"} <= found.keys()
    assert sum(name.startswith("passes/") for name in found) == 13
    return found, seconds


def test_kills_in_training_and_while_writing_leave_no_trace(tmp_path):
    model = tmp_path / "mlp.py"
    shutil.copy(ROOT / "examples" / "mlp.py", model)
    expected, _ = whole(model, tmp_path / "whole")
    out = tmp_path / "out"
    # The fifth piece of work is the state of stage 3's training.
    for moment in ("5", "artifact"):
        assert Child(model, out, moment).finish() == -signal.SIGKILL
        assert not out.exists()
    assert len(pieces(out)) == 7
    child = Child(model, out)
    assert child.finish() == 0
    going_on = r"an interrupted compile goes on: (\d+) finished pieces of work are in '(.+)'"
    told = re.search(going_on, "\n".join(child.notes))
    assert told and int(told[1]) >= 7 and told[2] == f"{out}.lbllm-work"
    assert compared(out) == expected
    assert {p.name for p in tmp_path.iterdir()} == {"mlp.py", "cache", "whole", "out"}


@pytest.mark.slow
@pytest.mark.timeout(1790)
@pytest.mark.parametrize("seed", SEEDS)
def test_kills_at_random_points_change_nothing(seed, tmp_path):
    model = tmp_path / "small.py"
    model.write_text(MODEL)
    whole(model, tmp_path / "first")  # builds kernels, which those that follow find in the cache
    expected, seconds = whole(model, tmp_path / "whole")
    chance = random.Random(seed)
    kills = compiles = 0
    while kills < KILLS:
        folder = tmp_path / str(compiles)
        folder.mkdir()
        out = folder / "out"
        before: dict[str, int] = {}
        while True:
            child = Child(model, out)
            if kills < KILLS:
                kills += child.killed(chance.uniform(0, seconds))
            if child.finish() == 0:
                break
            now = pieces(out)
            # What was finished has not been done again.
            assert before.items() <= now.items() or out.exists()
            before = now
        compiles += 1
        found = compared(out)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
