"""TVM's runtime library is kept for installs that have no TVM, and is the file that it was."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from lbllm_compile.codegen import tvm_runtime
from lbllm_compile.codegen.cache import sha256


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The library kept in a cache of its own, for a process that then has no TVM."""
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path))
    tvm_runtime._keep()
    (place,) = (tmp_path / "runtimes").iterdir()

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tvm_runtime.metadata, "version", absent)
    monkeypatch.setattr(tvm_runtime, "_packaged", lambda: None)
    return place


def test_a_library_is_kept_once_with_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path))
    packaged = tvm_runtime._packaged()
    assert packaged is not None and tvm_runtime._library() == packaged
    tvm_runtime._keep()
    (place,) = (tmp_path / "runtimes").iterdir()
    os.utime(place, (1, 1))
    tvm_runtime._keep()
    assert [*(tmp_path / "runtimes").iterdir()] == [place] and place.stat().st_mtime > 1
    assert sha256(place) == sha256(packaged)
    assert tvm_runtime.version() == metadata.version("apache-tvm") and tvm_runtime.version() in place.name


def test_an_install_without_tvm_uses_what_was_kept_last(kept: Path) -> None:
    version = tvm_runtime.version()
    assert version and tvm_runtime._library() == kept
    older = kept.with_name(kept.name.replace(version, "0.1"))
    shutil.copy(kept, older)
    os.utime(older, (1, 1))
    assert (tvm_runtime.version(), tvm_runtime._library()) == (version, kept)
    os.utime(kept, (0, 0))
    assert (tvm_runtime.version(), tvm_runtime._library()) == ("0.1", older)


def test_a_library_that_was_altered_is_not_loaded(kept: Path) -> None:
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(ImportError, match="is damaged; delete it, and prepare the artifact again"):
        tvm_runtime._library()


def test_nothing_is_kept(kept: Path) -> None:
    kept.unlink()
    assert tvm_runtime.version() == ""
    with pytest.raises(ImportError, match="apache-tvm is missing"):
        tvm_runtime._library()


def test_a_cache_that_cannot_be_written_keeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "file"))
    tvm_runtime._keep()
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]
