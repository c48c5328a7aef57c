"""Prepares an artifact for this machine: translates its graph, compiles the program, packs and stores the weights.

This happens once for an artifact and a target; what is stored then runs without torch (:mod:`..native.program`). The
kernels in it were proven one by one before, or are once a device has loaded the program. The program that decodes a
token in few launches, in which kernels are joined with what is before and behind them, is held against them: where it
does not give, to the bit, what they give when they are called one after the other, it is not used. One that replays a
list of launches is held against these launches one by one. The whole is held against the executor (:mod:`.compare`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from lbllm_compile.codegen.backend import EagerKernels, Kernels, backend_of
from lbllm_compile.codegen.cache import sync, write_atomically, write_failure
from lbllm_compile.codegen.errors import KernelError, UntranslatableError
from lbllm_compile.codegen.program.builder import Layout
from lbllm_compile.codegen.progress import NoProgress, Progress, warn
from lbllm_compile.codegen.targets import Target
from lbllm_compile.lowering.compare import check_agreement, check_replay, merging_is_exact
from lbllm_compile.lowering.translate import Translated, translate
from lbllm_compile.native import text
from lbllm_compile.native.description import DESCRIPTION, LIBRARY, WEIGHTS, Description, Function, Member
from lbllm_compile.native.program import (
    SEAL,
    NativeProgram,
    StoredProgram,
    check_sealed,
    held_programs,
    machine_facts,
    opened,
    programs_directory,
    remove,
    schedules_key,
    seal,
    stored_at,
)
from lbllm_compile.native.replayed import ReplayedProgram
from lbllm_compile.passes.ir import graph_json
from lbllm_compile.passes.ir.program import Program

PAGE = 2 << 20
"""Bytes of a large page on most systems."""

UNUSED_DAYS = 30
"""A stored program that was not used for so long is removed when another is stored."""


def _unwritable(error: OSError) -> KernelError:
    return KernelError(
        f"cannot store a program in '{programs_directory()}': {write_failure(error)}; make room, or set LBLLM_CACHE_DIR"
        " to a directory that can be written"
    )


@contextmanager
def workshop() -> Iterator[Path]:
    """A folder beside the stored programs to build one in; what is still there at the end is removed.

    Raises:
        KernelError: it cannot be made.
    """
    try:
        programs_directory().mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".building-", dir=programs_directory()))
    except OSError as error:
        raise _unwritable(error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build_native(
    program: Program,
    kernels: Kernels,
    folder: Path,
    progress: Progress | None = None,
    executor: EagerKernels | None = None,
) -> StoredProgram | None:
    """Builds and stores the native program of a lowered graph.

    Args:
        program: the lowered graph.
        kernels: proven kernels of everything in it.
        folder: from :func:`workshop`.
        progress: told what goes on.
        executor: kernels that the graph itself runs on, to compare with, where ``kernels`` are only called by programs.

    Returns:
        The program; None where the graph has something that no program can hold, which ``progress`` is told.

    Raises:
        KernelError: it cannot be compiled; or no program can hold the graph, and nothing else runs it on the target.
        DisagreementError: it does not compute what the graph does.
    """
    progress = progress or NoProgress()
    if program.kind != "causal-lm":
        return None
    with progress.task("preparing the program", 4) as task:
        try:
            translation = translate(program, kernels)
            task.advance("translated")
            # Only here is every operator translated, and one may have a form that cannot be.
            workspaces, functions = _library(program, kernels, translation, folder / LIBRARY, progress)
        except UntranslatableError as error:
            if not backend_of(kernels.target).eager:
                raise KernelError(
                    f"the model does not run on {kernels.target.name}: {error}; use --target cpu"
                ) from error
            warn(progress, "in torch", f"the model runs operator by operator in torch, which is slower: {error}")
            return None
        task.advance("compiled")
        try:
            with (folder / WEIGHTS).open("wb") as file:
                weights = Hashing(file)
                write_in_blocks(weights, translation.weight_bytes())
        except OSError as error:
            raise _unwritable(error) from error
        description = _describe(program, kernels, translation, workspaces, functions)
        _store(description, folder)
        task.advance("stored")
        native = opened(folder, kernels.target)
        if isinstance(native, ReplayedProgram):
            native.backend.prove(native.machine, kernels, progress)
            check_replay(native)
        else:
            native = _exactly_merged(native, progress)
        # Its packed weights are in the file; the executor packs its own.
        del translation
        check_agreement(program, executor or kernels, native)
        seal(folder, {WEIGHTS: weights.digest.hexdigest()})
        task.advance("proven")
    return native


def _exactly_merged(native: NativeProgram, progress: Progress) -> NativeProgram:
    """The program without functions of few launches that do not give, to the bit, what their kernels do."""
    description = native.description
    functions = [f for f in description.functions if f.name in description.workspaces]
    exact = tuple(f.name for f in functions if merging_is_exact(native, f))
    if len(exact) == len(functions):
        return native
    slower = [f for f in functions if f.name not in exact]
    told = " and ".join("one sequence" if f.batch == 1 else "a few sequences together" for f in slower)
    warn(
        progress,
        "unmerged",
        f"tokens of {told} are decoded with a launch for every kernel, which is slower: on this CPU the program"
        " with few launches rounds otherwise than its kernels",
    )
    _store(dataclasses.replace(description, merged=exact), native.directory)
    return NativeProgram(native.directory)


class Hashing:
    """A file that is written, and the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | bytearray) -> None:
        self.digest.update(data)
        self._file.write(data)


class Writable(Protocol):
    """What bytes can be written to."""

    def write(self, data: bytes | bytearray, /) -> Any: ...


def write_in_blocks(file: Writable, pieces: Iterable[memoryview]) -> None:
    """Writes bytes in pieces of ``PAGE``, whatever pieces they come in.

    The system may then keep the file in pages of that size. Mapped into memory, all of it is read for every token, and
    every page costs a look at the page tables.
    """
    page = bytearray()
    for piece in pieces:
        while len(piece):
            taken = min(PAGE - len(page), len(piece))
            page += piece[:taken]
            piece = piece[taken:]
            if len(page) == PAGE:
                file.write(page)
                page.clear()
    file.write(page)


def _store(description: Description, folder: Path) -> None:
    (folder / DESCRIPTION).write_text(json.dumps(dataclasses.asdict(description)), encoding="utf-8")


def keep_native(native: StoredProgram, digest: str, target: Target) -> None:
    """Moves a program that was built in a workshop to where :func:`..native.program.find` looks for it.

    Args:
        native: from :func:`build_native`.
        digest: the artifact's.
        target: what it runs on.
    """
    place = stored_at(digest, target)
    try:
        _move(native.directory, place)
    except OSError as error:
        raise _unwritable(error) from error
    native.directory = place
    _forget_unused()


def _move(folder: Path, place: Path) -> None:
    """Moves a sealed program to its place, unless another process has put one there, which is the same."""
    try:
        folder.rename(place)
    except OSError:
        try:
            check_sealed(place)
            return
        except KernelError:
            remove(place)
        folder.rename(place)
    sync(place.parent)


def _forget_unused() -> None:
    """Removes programs, and folders of builds that were killed, that nothing has used for :data:`UNUSED_DAYS`.

    Nothing is removed while another process opens a program; another build will remove it.
    """
    oldest = time.time() - UNUSED_DAYS * 86400
    with held_programs(alone=True, wait=False) as free:
        for path in programs_directory().iterdir() if free else ():
            mark = path / SEAL if (path / SEAL).is_file() else path
            with suppress(FileNotFoundError):  # a build in another process ended
                if mark.stat().st_mtime >= oldest:
                    continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _library(
    program: Program, kernels: Kernels, translation: Translated, place: Path, progress: Progress
) -> tuple[dict[str, int], tuple[Function, ...]]:
    """Puts the program's library at ``place``; returns the working memory its functions take, and the functions.

    A library depends on the graph, the schedules and the shapes of the weights, and not on what is in them, so one that
    was compiled before for the same ones is used again.
    """
    layouts = (translation.layout, translation.state, translation.fixed)
    shapes = [dataclasses.astuple(spec) for layout in layouts for spec in layout.tensors.values()]
    backend, target = backend_of(kernels.target), kernels.target
    compiled_by = (*machine_facts(target), backend.compiler(target))
    facts = (graph_json.dumps(program.module), shapes, kernels.records(), *compiled_by)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    stored = programs_directory() / f"{key}.library"
    description = _stored_library(stored, place, progress)
    if description is None:
        compiled = backend.compile(translation.functions(), kernels)
        compiled.export(place)
        description = {
            "workspaces": dict(compiled.workspaces),
            "sizes": {name: list(tensors.items()) for name, tensors in compiled.index_sizes.items()},
        }
        _keep_library(stored, place.read_bytes(), description)
    functions = []
    for entry in backend.entry_points:
        if entry.name not in description["sizes"]:
            warn(
                progress,
                "few by kernel",
                "a few sequences are decoded together with a launch for every kernel, which is slower: something in the"
                " graph grows with the number of tokens",
            )
            continue
        tensors = tuple((tuple(symbols), count) for symbols, count in description["sizes"][entry.name])
        functions.append(Function(entry.name, entry.batch, entry.length, entry.most, entry.last, tensors))
    return description["workspaces"], tuple(functions)


def _keep_library(stored: Path, library: bytes, description: Mapping[str, Any]) -> None:
    """Stores a library and what is said of it in one file: of two, another process might replace one alone."""
    head = json.dumps({**description, "sha256": hashlib.sha256(library).hexdigest()})
    try:
        write_atomically(stored, head.encode() + b"\n" + library)
    except OSError as error:
        raise _unwritable(error) from error


def _stored_library(stored: Path, place: Path, progress: Progress) -> dict[str, Any] | None:
    """Copies a library that was compiled before to ``place``; returns its description, None if it is not whole."""
    try:
        with held_programs():
            head, _, content = stored.read_bytes().partition(b"\n")
        description = json.loads(head)
        whole = description["sha256"] == hashlib.sha256(content).hexdigest()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        whole, content, description = False, b"", None
    if not whole:
        warn(progress, "damaged library", f"the stored library {stored} is damaged; it is compiled anew")
        return None
    place.write_bytes(content)
    return description


def _describe(
    program: Program,
    kernels: Kernels,
    translation: Translated,
    workspaces: dict[str, int],
    functions: tuple[Function, ...],
) -> Description:
    return Description(
        target=kernels.target.name,
        schedules=schedules_key(kernels.records()),
        inputs=tuple(spec.name for spec in translation.inputs),
        weights=_members(translation.layout),
        state=_members(translation.state),
        state_bytes=translation.state.bytes,
        fixed=_members(translation.fixed),
        fixed_bytes=translation.fixed.bytes,
        functions=functions,
        workspaces=workspaces,
        bounds=translation.bounds,
        merged=tuple(workspaces),
        config=dict(program.config),
        plain_tokenizer=_has_plain_tokenizer(program),
    )


def _has_plain_tokenizer(program: Program) -> bool:
    if program.tokenizer is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        return text.agrees(program.tokenizer, Path(folder))


def _members(layout: Layout) -> tuple[Member, ...]:
    return tuple(Member(n, spec.shape, spec.dtype, layout.offsets[n]) for n, spec in layout.tensors.items())
