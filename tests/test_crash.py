"""A compile that is killed, at any point and again and again, ends with the same bytes as one that is left alone."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_driver import MODEL, ROOT, SMALL

KILLS = 10
"""Kills of each long test, at random points in time."""

SEEDS = range(10)
"""Of the points in time; each is a test of its own."""

PRESET = SMALL.model_copy(update={"distill_epochs": 2, "activate_steps": 6, "finetune_steps": 10, "tune_trials": 1})

CHILD = """
import os, signal, sys
from pathlib import Path
from lbllm_compile import artifact, checkpoint, driver, preflight, recipe
from lbllm_compile.codegen.progress import NoProgress
from lbllm_compile.options import CompileOptions

model, out, moment = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "artifact":
    artifact._write_weights = die
elif moment.isdigit():
    save, left = checkpoint.WorkDir.save, int(moment)
    def counted(self, *piece):
        global left
        save(self, *piece)
        left -= 1
        if not left:
            die()
    checkpoint.WorkDir.save = counted

class WorkDir(checkpoint.WorkDir):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print("ready", flush=True)

class Notes(NoProgress):
    def note(self, text):
        print(text, flush=True)

driver.WorkDir = WorkDir
preflight.rehearse = lambda *_, **__: None
recipe.PRESETS["quick"] = recipe.Preset(**PRESET)
driver.compile(CompileOptions(model=model, out=Path(out), preset="quick"), progress=Notes())
"""


def start(model: Path, out: Path, moment: str = "never") -> subprocess.Popen[str]:
    """A compile in a process of its own, without rehearsal; returns when it has the work directory."""
    script = CHILD.replace("**PRESET", f"**{PRESET.model_dump()!r}")
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(model), str(out), moment],
        cwd=ROOT,
        env={**os.environ, "LBLLM_CACHE_DIR": str(model.parent / "cache")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def finish(child: subprocess.Popen[str]) -> int:
    """Waits for the end."""
    with child:
        return child.wait()


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
    child = start(model, out)
    begin = time.monotonic()
    assert finish(child) == 0
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
        assert finish(start(model, out, moment)) == -signal.SIGKILL
        assert not out.exists()
    assert len(pieces(out)) == 7
    child = start(model, out)
    assert child.stdout is not None
    told = re.search(
        r"an interrupted compile goes on: (\d+) finished pieces of work are in '(.+)'", child.stdout.read()
    )
    assert told and int(told[1]) >= 7 and told[2] == f"{out}.lbllm-work"
    assert finish(child) == 0
    assert compared(out) == expected
    assert {p.name for p in tmp_path.iterdir()} == {"mlp.py", "cache", "whole", "out"}


@pytest.mark.slow
@pytest.mark.timeout(1790)
@pytest.mark.parametrize("seed", SEEDS)
def test_kills_at_random_points_change_nothing(seed, tmp_path):
    model = tmp_path / "small.py"
    model.write_text(MODEL)
    expected, seconds = whole(model, tmp_path / "whole")
    chance = random.Random(seed)
    kills = compiles = 0
    while kills < KILLS:
        folder = tmp_path / str(compiles)
        folder.mkdir()
        out = folder / "out"
        before: dict[str, int] = {}
        while True:
            child = start(model, out)
            if kills < KILLS:
                try:
                    child.wait(timeout=chance.uniform(0, seconds))
                except subprocess.TimeoutExpired:
                    child.kill()
                    kills += 1
            if finish(child) == 0:
                break
            now = pieces(out)
            # What was finished has not been done again.
            assert before.items() <= now.items() or out.exists()
            before = now
        compiles += 1
        found = compared(out)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
