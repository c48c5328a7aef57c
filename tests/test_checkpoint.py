"""The work directory: what survives, what is refused."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from lbllm_compile.checkpoint import WorkDir, WorkDirError

FACTS = {"model": "a", "pipeline": "ptq"}


def test_a_saved_piece_comes_back_bit_for_bit(tmp_path):
    tensors = {"w.scale": torch.randn(3, 4).half(), "w.sign": torch.randint(0, 255, (7,), dtype=torch.uint8)}
    WorkDir(tmp_path / "w", FACTS).save("ptq", 3, tensors, {"error": 0.1})
    again = WorkDir(tmp_path / "w", FACTS)
    loaded, metrics = again.load("ptq", 3)
    assert metrics == {"error": 0.1}
    assert all(torch.equal(loaded[k], v) for k, v in tensors.items()) and loaded.keys() == tensors.keys()
    assert again.load("ptq", 4) is None
    assert again.finished() == {"ptq": 1} and again.reused == 1


def test_another_compile_is_refused_and_told_what_changed(tmp_path):
    first = WorkDir(tmp_path / "w", FACTS)
    first.save("ptq", 0, {"x": torch.ones(1)}, {})
    first.release()
    with pytest.raises(WorkDirError, match=r"another model.*--fresh"):
        WorkDir(tmp_path / "w", {**FACTS, "model": "b"})
    WorkDir(tmp_path / "w", FACTS).release()


def test_a_directory_without_finished_work_is_taken_over(tmp_path):
    WorkDir(tmp_path / "w", FACTS).release()
    other = WorkDir(tmp_path / "w", {**FACTS, "model": "b"})
    other.save("ptq", 0, {"x": torch.ones(1)}, {})
    other.release()
    with pytest.raises(WorkDirError, match="another model"):
        WorkDir(tmp_path / "w", FACTS)


def test_fresh_starts_over(tmp_path):
    first = WorkDir(tmp_path / "w", FACTS)
    first.save("ptq", 0, {"x": torch.ones(1)}, {})
    first.release()
    fresh = WorkDir(tmp_path / "w", {**FACTS, "model": "b"}, fresh=True)
    assert fresh.load("ptq", 0) is None


def test_a_running_compile_keeps_others_out(tmp_path):
    first = WorkDir(tmp_path / "w", FACTS)
    with pytest.raises(WorkDirError, match="another compile is using"):
        WorkDir(tmp_path / "w", FACTS)
    first.release()


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(WorkDirError, match="not a work directory"):
        WorkDir(tmp_path, FACTS, fresh=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_damaged_piece_is_set_aside_not_fatal(tmp_path, caplog):
    work = WorkDir(tmp_path / "w", FACTS)
    work.save("ptq", 0, {"x": torch.ones(100)}, {})
    file = next((tmp_path / "w" / "stages" / "ptq").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:40])
    assert work.load("ptq", 0) is None
    assert "damaged" in caplog.text and not file.exists()


def test_remove_deletes_only_its_own(tmp_path):
    work = WorkDir(tmp_path / "w", FACTS)
    work.save("ptq", 0, {"x": torch.ones(1)}, {})
    work.remove()
    assert not (tmp_path / "w").exists()


def test_a_kill_while_saving_leaves_no_half_file(tmp_path):
    script = textwrap.dedent(
        f"""
        import torch
        from pathlib import Path
        from lbllm_compile.checkpoint import WorkDir
        work = WorkDir(Path({str(tmp_path / "w")!r}), {FACTS!r})
        print("ready", flush=True)
        index = 0
        while True:
            work.save("ptq", index, {{"x": torch.full((50_000,), float(index))}}, {{"index": index}})
            index += 1
        """
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=os.getcwd())
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    while not (tmp_path / "w" / "stages" / "ptq" / "00003.safetensors").exists():
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    work = WorkDir(tmp_path / "w", FACTS)
    count = work.finished()["ptq"]
    assert count >= 4
    for index in range(count):
        tensors, metrics = work.load("ptq", index)
        assert metrics["index"] == index and bool((tensors["x"] == index).all())
