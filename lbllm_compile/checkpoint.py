"""Finished pieces of a compile on disk, so that a kill at any point loses at most the piece in progress.

A work directory belongs to one compile, named by a *fingerprint*: hashes of everything that decides the result (model,
calibration tokens, pipeline, seed, versions). A file appears under its final name only when it is whole: written to a
temporary name, flushed to disk, then renamed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lbllm_compile.codegen.cache import replace_durably, sync, write_atomically, write_failure
from lbllm_compile.codegen.errors import LbllmError

_log = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"
LOCK = ".lock"

_UNFINISHED = f".{FINGERPRINT}."
"""How files begin that a kill while the fingerprint was written leaves behind."""


class WorkDirError(LbllmError):
    """The work directory is in use, belongs to another compile, or is not a work directory."""


class WorkDir:
    """Implements :class:`lbllm_compile.passes.base.Checkpoints` in a directory.

    Args:
        path: the directory; made when absent.
        fingerprint: named facts that decide the result; all must match what the directory was made for.
        fresh: start over, dropping what an earlier compile left here.
        option: what chooses the directory, in messages.
        holds: what is kept in it, in messages; the last word is what may use it.

    Raises:
        WorkDirError: the directory holds something else, is locked by a running compile, or has finished pieces of a
            different compile (the message names what changed).
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Mapping[str, str],
        *,
        fresh: bool = False,
        option: str = "--work-dir",
        holds: str = "an unfinished compile",
    ):
        self.path = path
        self.reused = 0
        self._option, self._holds = option, holds
        _make(path, option)
        self._lock = FileLock(path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            user = holds.split()[-1]
            raise WorkDirError(f"another {user} is using {path}; wait for it, or pass another {option}") from None
        try:
            self._claim(dict(fingerprint), fresh)
        except BaseException:
            self._lock.release()
            raise

    def _claim(self, fingerprint: dict[str, str], fresh: bool) -> None:
        record = self.path / FINGERPRINT
        if fresh:
            shutil.rmtree(self.path / "stages", ignore_errors=True)
            record.unlink(missing_ok=True)
        if record.exists():
            try:
                stored = json.loads(record.read_text(encoding="utf-8"))
            except ValueError:
                stored = None
            if not isinstance(stored, dict):
                raise WorkDirError(f"{record} is damaged; pass --fresh to start over")
            changed = sorted(k for k in stored.keys() | fingerprint.keys() if stored.get(k) != fingerprint.get(k))
            if changed and self.finished():
                raise WorkDirError(
                    f"{self.path} holds {self._holds} with another {', '.join(changed)};"
                    f" pass --fresh to start over, or another {self._option}"
                )
            if not changed:
                return
        write_atomically(record, json.dumps(fingerprint, indent=1, sort_keys=True).encode())

    def _file(self, stage: str, index: int) -> Path:
        return self.path / "stages" / stage / f"{index:05d}.safetensors"

    def load(self, stage: str, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """``(tensors, metrics)`` of a finished piece, or None. A damaged file is set aside and counts as absent."""
        file = self._file(stage, index)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                metrics = json.loads((stored.metadata() or {})["metrics"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            _log.warning("%s is damaged (%s); set aside, its layer will be redone", file, error)
            os.replace(file, file.with_suffix(".damaged"))
            return None
        self.reused += 1
        return tensors, metrics

    def save(self, stage: str, index: int, tensors: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> None:
        """Stores a finished piece; when this returns it survives a kill and a power cut.

        Raises:
            WorkDirError: it cannot be written, as when the disk is full.
        """
        file = self._file(stage, index)
        temporary = file.with_suffix(".partial")
        contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            if not file.parent.is_dir():
                file.parent.mkdir(parents=True)
                for folder in (self.path, file.parent.parent):
                    sync(folder)
            save_file(contiguous, temporary, metadata={"metrics": json.dumps(metrics, sort_keys=True)})
            replace_durably(temporary, file)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise WorkDirError(
                f"cannot keep finished work in {self.path}: {write_failure(error)}; make room or pass another"
                f" {self._option}, and run the same command again to resume"
            ) from error

    def forget(self, prefix: str) -> None:
        """Deletes the pieces of all stages whose names begin so."""
        for stage in (self.path / "stages").glob(f"{prefix}*"):
            shutil.rmtree(stage)

    def finished(self) -> dict[str, int]:
        """Number of finished pieces by stage."""
        return finished(self.path)

    def release(self) -> None:
        """Lets another compile use the directory; what is finished stays."""
        self._lock.release()

    def remove(self) -> None:
        """Deletes the directory after a successful compile: only what this class put there."""
        shutil.rmtree(self.path / "stages", ignore_errors=True)
        for file in (self.path / FINGERPRINT, *self.path.glob(f"{_UNFINISHED}*")):
            file.unlink(missing_ok=True)
        self._lock.release()
        (self.path / LOCK).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()


def finished(path: Path) -> dict[str, int]:
    """Number of finished pieces by stage in the work directory ``path``, which need not exist."""
    stages = path / "stages"
    if not stages.is_dir():
        return {}
    return {s.name: len(list(s.glob("*.safetensors"))) for s in sorted(stages.iterdir()) if s.is_dir()}


def check_work_dir(path: Path, option: str = "--work-dir") -> None:
    """Checks that ``path``, which ``option`` chooses, can be a work directory; writes nothing.

    Raises:
        WorkDirError: it holds other things, or cannot be written.
    """
    if check_writable(path, "work directory", option):
        _refuse_foreign(path, option)


def check_writable(path: Path, role: str, option: str) -> bool:
    """Checks that files can be put into a directory that may not exist yet; returns whether it does.

    Raises:
        WorkDirError: it is something else or cannot be written; the message names its role and the option.
    """
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise WorkDirError(
            f"cannot use {path} as {role}: '{existing}' is not a directory that can be written; pass another {option}"
        )
    return existing == path.absolute()


def _make(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkDirError(f"cannot use {path} as work directory: {error.strerror}; pass another {option}") from error
    _refuse_foreign(path, option)


def _refuse_foreign(path: Path, option: str) -> None:
    ours = {FINGERPRINT, LOCK, "stages"}
    try:
        foreign = [p.name for p in path.iterdir() if p.name not in ours and not p.name.startswith(_UNFINISHED)]
    except OSError as error:
        raise WorkDirError(f"cannot use {path} as work directory: {error.strerror}; pass another {option}") from error
    if foreign:
        raise WorkDirError(f"{path} is not a work directory (it holds '{foreign[0]}'); pass another {option}")
