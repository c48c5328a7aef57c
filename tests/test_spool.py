"""Tensors in files: values outlive their pages, places are used again, nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from lbllm_compile.passes.ir import spool
from torch import Tensor, nn

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn((5, 7), generator=generator)
    return {
        "floats": floats,
        "halves": floats.half(),
        "brain": floats.bfloat16(),
        "bytes": (floats * 9).to(torch.uint8),
        "mask": floats > 0,
        "transposed": floats.t(),
        "number": torch.tensor(3.5),
        "none": torch.empty((0, 4)),
        "long": torch.arange(11),
    }


def resident_files() -> int:
    """Bytes of mapped files in this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")


@linux
def test_dropped_pages_leave_the_values() -> None:
    expected = torch.randn((8, 1 << 20), generator=torch.Generator().manual_seed(0))
    (copy,) = spool.mapped([("w", expected)]).values()
    before = resident_files()
    assert torch.equal(copy, expected)
    copy[3] = 1.0
    expected[3] = 1.0
    assert resident_files() - before > 24 << 20
    spool.release()
    assert abs(resident_files() - before) < 4 << 20
    assert torch.equal(copy, expected)


def test_mapped_tensors_are_copies_in_aligned_memory() -> None:
    given = tensors()
    copies = spool.mapped(given.items())
    assert copies.keys() == given.keys()
    for name, tensor in given.items():
        copy = copies[name]
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype and copy.is_contiguous()
        assert copy.data_ptr() % spool.ALIGNMENT == 0
        assert copy.data_ptr() != tensor.data_ptr() or not tensor.numel()
    assert spool.is_mapped(copies["floats"]) and not spool.is_mapped(given["floats"])
    assert spool.mapped([]) == {}


def test_tensors_are_taken_one_by_one() -> None:
    made: list[weakref.ref[Tensor]] = []

    def one(value: float) -> Tensor:
        assert all(earlier() is None for earlier in made[:-1])
        tensor = torch.full((3,), value)
        made.append(weakref.ref(tensor))
        return tensor

    copies = spool.mapped((str(i), one(float(i))) for i in range(4))
    assert copies["3"].tolist() == [3.0] * 3 and made[-1]() is None


def test_records_come_back_with_their_strides() -> None:
    base = torch.randn((2, 3, 4, 5))
    views = {
        **tensors(),
        "permuted": base.permute(0, 2, 1, 3),
        "sliced": base[:, 1:, ::2],
        "expanded": base[:, :1].expand(2, 6, 4, 5),
        "column": base[0, :, 0, 0],
        "repeated": torch.arange(3.0).expand(4, 3),
    }
    records = spool.Records()
    kept = {name: records.put(view) for name, view in views.items()}
    for name, view in views.items():
        back = kept[name].read()
        assert torch.equal(back, view) and back.dtype == view.dtype, name
    for name in ("permuted", "repeated", "transposed"):
        assert kept[name].read().stride() == views[name].stride(), name
    assert kept["expanded"].size == base[:, :1].nbytes


def test_the_place_of_a_forgotten_record_is_used_again() -> None:
    records = spool.Records()
    first, second = (records.put(torch.full((100,), float(i))) for i in (1, 2))
    place = first.start
    del first
    third = records.put(torch.full((100,), 3.0))
    assert third.start == place and third.read()[0] == 3.0 and second.read()[0] == 2.0


@linux
def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    program = """
        import os, signal, torch
        from lbllm_compile.passes.ir import spool
        weights = spool.mapped([("w", torch.ones(1000))])
        records = spool.Records()
        record = records.put(torch.ones(1000))
        assert spool.directory().samefile(os.environ["TMPDIR"])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, check=False)
    assert done.returncode == -9 and list(tmp_path.iterdir()) == []


@linux
def test_files_are_closed_with_their_tensors() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    weights = spool.mapped(tensors().items())
    records = spool.Records()
    record = records.put(torch.ones(3))
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del weights, records, record
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    records = spool.Records()
    monkeypatch.setattr(os, "pwrite", full)
    for write in (lambda: spool.mapped([("w", torch.ones(3))]), lambda: records.put(torch.ones(3))):
        with pytest.raises(spool.SpoolError, match="No space left on device; make room there, or set TMPDIR"):
            write()


def test_files_lie_on_the_disk_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tempfile

    monkeypatch.delenv("TMPDIR", raising=False)
    if os.access("/var/tmp", os.W_OK):
        assert spool.directory() == Path("/var/tmp")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert spool.directory() == tmp_path


@linux
def test_a_streamed_module_holds_few_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    width, depth = 1024, 8
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).requires_grad_(False)
    for path, weight in spool.mapped(module.named_parameters()).items():
        module.get_parameter(path).data = weight
    spool.release()
    before, layer_bytes = resident_files(), 4 * width * width
    monkeypatch.setattr(spool, "RESIDENT", layer_bytes)
    seen: list[int] = []
    hooks = [m.register_forward_hook(lambda *_: seen.append(resident_files() - before)) for m in module]
    x = torch.randn(2, width)
    whole = module(x)
    assert max(seen) > 7 * layer_bytes
    for hook in hooks:
        hook.remove()
    spool.release()
    seen.clear()
    with spool.streamed(module):
        for m in module:
            m.register_forward_pre_hook(lambda *_: seen.append(resident_files() - before))
        assert torch.equal(module(x), whole)
    assert max(seen) < 3 * layer_bytes
