"""Runs a native program: a lowered graph that was translated, compiled and stored with its packed weights.

Needs neither torch nor TVM's compiler. The weights are mapped into memory, not read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lbllm_compile import codegen
from lbllm_compile.codegen import installed
from lbllm_compile.codegen.backend import Array, SequenceBackend, backend_of
from lbllm_compile.codegen.cache import cache_directory, known_sha256, remember_sha256, sha256, sync
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.progress import Progress, warn
from lbllm_compile.codegen.sizes import capacity_for
from lbllm_compile.codegen.targets import Target
from lbllm_compile.manifest import MANIFEST, ArtifactError, check_files
from lbllm_compile.native.description import DESCRIPTION, LIBRARY, WEIGHTS, Description, Member, StoredModel
from lbllm_compile.native.replayed import ReplayedProgram
from lbllm_compile.version import __version__

SEAL = "files.json"
"""Sizes and SHA-256 of the others; its time is that of the last use."""

LOCK = "programs.lock"
"""Held, in the cache directory, by whoever opens or removes stored programs."""

PART_TOKENS = 1024
"""Longer prompts are fed in parts of so many tokens, which bounds the working memory."""


PAGE = 4096
"""Bytes of memory that the system gives at once."""

FORMAT_VERSION = 5
"""Counts changes of what a stored program is; part of its key."""


def programs_directory() -> Path:
    """Where programs are stored."""
    return cache_directory() / "programs"


def stored_at(digest: str, target: Target) -> Path:
    """Where the program of an artifact is stored for a target on this machine.

    Args:
        digest: SHA-256 of the artifact's manifest.
        target: the target.
    """
    facts = (digest, *machine_facts(target))
    return programs_directory() / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def machine_facts(target: Target) -> tuple[str | int, ...]:
    """What a program for a target depends on besides the model.

    What its backend names, the code that generates kernels and calls them, and operators of installed packages.
    """
    generators = hashlib.sha256()
    folders = Path(codegen.__file__).parent, Path(__file__).parent.parent / "lowering"
    for file in (file for folder in folders for file in sorted(folder.rglob("*.py"))):
        generators.update(file.read_bytes())
    facts = backend_of(target).facts(target)
    return (
        target.name,
        *facts,
        *installed.facts(installed.OPERATORS),
        __version__,
        FORMAT_VERSION,
        generators.hexdigest(),
    )


def schedules_key(records: Sequence[Mapping[str, Any]]) -> str:
    """One text for the schedules of a set of kernels.

    Args:
        records: of all its kernels, JSON-able.
    """
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def find(directory: Path, target: str = "cpu", progress: Progress | None = None) -> StoredProgram | None:
    """The stored program of an artifact, where there is one that runs here and the artifact is whole.

    All files of both are checked against their SHA-256; large ones are read for that only once, and again when their
    inode, size or times have changed. A stored program that is damaged is removed, which ``progress`` is told.

    Raises:
        TargetError: the target is unknown.
        KernelError: the program cannot be loaded.
    """
    parsed = Target.parse(target)
    if not parsed.runs_here:
        return None  # a process may be refused what another one on this CPU was granted
    try:
        _, digest = check_files(directory, known_sha256)
    except ArtifactError:
        return None  # who reads the artifact says what is wrong with it
    place = stored_at(digest, parsed)
    with held_programs():
        if not (place / DESCRIPTION).is_file():
            return None
        with contextlib.suppress(OSError):  # when it was used last; a cache that cannot be written does not tell
            os.utime(place / SEAL)
        try:
            check_sealed(place)
        except KernelError as error:
            warn(progress, "damaged program", f"{error}; it is prepared anew")
        else:
            return opened(place, parsed)
    remove(place)
    return None


def opened(place: Path, target: Target) -> StoredProgram:
    """The program in a folder, as the target's backend runs it.

    Raises:
        KernelError: it cannot be loaded.
    """
    is_of_sequences = isinstance(backend_of(target), SequenceBackend)
    return ReplayedProgram(place, target) if is_of_sequences else NativeProgram(place)


@contextlib.contextmanager
def held_programs(*, alone: bool = False, wait: bool = True) -> Iterator[bool]:
    """Keeps other processes from removing stored programs in this block; with ``alone``, from opening any.

    Args:
        alone: for what removes programs.
        wait: until no other process is in the way; otherwise gives False where one is.
    """
    mode = (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
        file = (cache_directory() / LOCK).open("ab")
    except OSError:  # a cache that cannot be written, where nobody removes anything
        yield not alone
        return
    with file:
        try:
            fcntl.flock(file, mode)
            free = True
        except OSError:  # another process is in the way, or the file system has no locks
            free = not alone
        yield free


def seal(folder: Path, known: Mapping[str, str]) -> None:
    """Writes down what the files of a program in a folder are, and flushes all of them to disk.

    Args:
        folder: holds the program.
        known: SHA-256 of files, by name, that need not be read for it.
    """
    files = {}
    for name in (LIBRARY, WEIGHTS, DESCRIPTION):
        sync(folder / name)
        checksum = known.get(name) or sha256(folder / name)
        remember_sha256(folder / name, checksum)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": checksum}
    (folder / SEAL).write_text(json.dumps(files))
    sync(folder / SEAL)
    sync(folder)


def check_sealed(place: Path) -> None:
    """Checks that the files of a stored program are what :func:`seal` saw.

    Raises:
        KernelError: they are not.
    """
    try:
        files = json.loads((place / SEAL).read_bytes())
        for name in (LIBRARY, WEIGHTS, DESCRIPTION):
            size, expected = (place / name).stat().st_size, files[name]["bytes"]
            if size != expected:
                raise KernelError(f"the stored program {place} is damaged: {name} has {size} bytes, not {expected}")
            if known_sha256(place / name) != files[name]["sha256"]:
                raise KernelError(f"the stored program {place} is damaged: {name} was altered")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise KernelError(f"the stored program {place} is damaged ({error})") from error


def forget(directory: Path, target: str) -> None:
    """Removes the stored program of an artifact, so that the next load prepares one with the schedules known then.

    Args:
        directory: the artifact.
        target: the target's name.
    """
    digest = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    remove(stored_at(digest, Target.parse(target)))


def remove(place: Path) -> None:
    """Removes a stored program, while no other process opens one."""
    removed = place.with_name(f".removed-{place.name}-{os.getpid()}")
    with held_programs(alone=True), contextlib.suppress(OSError):
        place.rename(removed)  # at once: a program is there whole or not at all
    shutil.rmtree(removed, ignore_errors=True)


class NativeProgram:
    """A program in memory. Its sessions may be in different threads, each in one.

    Args:
        directory: what :func:`lbllm_compile.lowering.build.build_native` wrote.

    Raises:
        KernelError: it cannot be loaded.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        # The virtual machine has one stack of frames; sessions in other threads wait for each other's calls.
        self._calling = threading.Lock()
        try:
            self.description = Description.from_json((directory / DESCRIPTION).read_text(encoding="utf-8"))
            self.machine = backend_of(Target.parse(self.description.target)).machine(directory / LIBRARY)
            self._block = self.machine.mapped(directory / WEIGHTS)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise KernelError(f"the stored program {directory} is damaged ({error})") from error
        self._weights = self.machine.tensor(self._block)
        self._weight_tuple = self.machine.tuple([_view(self._block, m, m.offset, {}) for m in self.description.weights])

    def session(self, batch: int, capacity: int = 0) -> NativeSession:
        """An empty conversation with ``batch`` sequences and room for ``capacity`` tokens, which grows."""
        return NativeSession(self, batch, capacity)

    def model(self, tokenizer: Any) -> NativeModel:
        """The program with a tokenizer, or without one."""
        return NativeModel(self, tokenizer)

    def feed(self, inputs: Mapping[str, np.ndarray], state: State, last: bool, merged: bool = True) -> np.ndarray:
        """Feeds tokens to the first sequences of a state, some at a time where they are too many for one call.

        Args:
            inputs: arrays of these sequences by name, ``input_ids`` among them.
            state: is changed.
            last: give the logits of the last token only.
            merged: in few launches, where a function can.

        Returns:
            Logits ``[B, S, V]``, ``[B, 1, V]`` with ``last``.
        """
        batch, length = inputs["input_ids"].shape
        sizes = {"length": length, "total": inputs["attention_mask"].shape[1], "capacity": state.capacity}
        function = self.description.function(batch, length, last, merged)
        most = function.sequences(sizes)
        # Of few launches each takes all of its sequences at once, and one for a number of them no larger state.
        at_once = most >= batch and function.batch in (None, state.sequences)
        if function.name in self.description.workspaces and not at_once:
            function = self.description.function(batch, length, last, merged=False)
            most = function.sequences(sizes)
        results = []
        for first in range(0, batch, most):
            part = slice(first, min(first + most, batch))
            tensors = {n: self.machine.tensor(np.ascontiguousarray(a[part])) for n, a in inputs.items()}
            results.append(self.call(function.name, tensors, state, part))
        return joined(results, 0)

    def call(self, name: str, inputs: Mapping[str, Any], state: State, part: slice | None = None) -> np.ndarray:
        """Runs a function of the program on input tensors, by name, and a state, which it changes.

        Args:
            name: of the function.
            inputs: tensors.
            state: of the whole batch.
            part: the sequences that ``inputs`` are of, where they are not all; the first ones for a function of few
                launches.
        """
        description, function = self.description, self.machine.function(name)
        arguments = [inputs[name] for name in description.inputs]
        if name in description.workspaces:
            arguments += [self._weights, *state.blocks, state.workspace(name)]
        else:
            arguments += [self._weight_tuple, *state.part(part or slice(0, state.sequences))]
        with self._calling:
            return self.machine.array(function(*arguments))


def _view(block: Array, member: Member, offset: int, sizes: Mapping[str, int]) -> Array:
    """A tensor of a block; ``sizes`` are what its symbols stand for."""
    shape = [sizes[d] if isinstance(d, str) else d for d in member.shape]
    dtype = np.dtype(member.dtype)
    return block[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


class State:
    """Quantized keys and values of one batch of sequences, what else it keeps, and the working memory of a step.

    Attributes:
        sequences, capacity: sequences and tokens of each that there is room for.
        arrays: every tensor, those of keys and values first.
        blocks: the same memory in the form of functions of few launches.
    """

    def __init__(self, program: NativeProgram, batch: int, capacity: int):
        self._program, self.sequences = program, batch
        self.capacity = capacity_for(capacity)
        description, machine = program.description, program.machine
        sizes = {"batch": batch, "capacity": self.capacity}
        leading: list[tuple[int, ...]] = [(batch, self.capacity)]
        blocks = [(description.state, description.state_bytes)]
        if description.fixed:
            leading.append((batch,))
            blocks.append((description.fixed, description.fixed_bytes))
        self._arrays, self.blocks = [], []
        for dimensions, (members, size) in zip(leading, blocks, strict=True):
            count = math.prod(dimensions)
            memory = machine.zeros(count * size)
            self._arrays.append([_view(memory, m, m.offset * count, sizes) for m in members])
            self.blocks.append(machine.tensor(memory.reshape(*dimensions, size)))
        self.arrays = list(itertools.chain(*self._arrays))
        self._parts: dict[tuple[int, int], list[Any]] = {}
        self._workspaces: dict[str, Any] = {}

    def part(self, sequences: slice) -> list[Any]:
        """The same memory in the form of functions with a launch for every kernel, of sequences that follow one
        another."""
        key = sequences.start, sequences.stop
        if key not in self._parts:
            parts = [[array[sequences] for array in arrays] for arrays in self._arrays]
            self._parts[key] = [self._program.machine.tuple(arrays) for arrays in parts]
        return self._parts[key]

    def workspace(self, name: str) -> Any:
        """The working memory of a function."""
        if name not in self._workspaces:
            machine = self._program.machine
            self._workspaces[name] = machine.tensor(machine.zeros(self._program.description.workspaces[name]))
        return self._workspaces[name]

    def take(self, sequence: int, first: int, source: State, taken: int, start: int, count: int) -> None:
        """Copies ``count`` slots of a sequence, and what it keeps of fixed size, from a state of the same program.

        Args:
            sequence, first: what is written, from that slot on.
            source: may be this state; the slots may overlap.
            taken, start: the sequence to copy, from that slot on.
            count: slots; of none, what is of fixed size is copied all the same.
        """
        for new, old in zip(self._arrays[0], source._arrays[0], strict=True):
            new[sequence, :, first : first + count] = old[taken, :, start : start + count]
        for new, old in zip(itertools.chain(*self._arrays[1:]), itertools.chain(*source._arrays[1:]), strict=True):
            new[sequence] = old[taken]

    def memory(self, tokens: int) -> int:
        """Bytes that a single sequence of so many tokens touches, in whole pages."""
        rows = (a[0].reshape(a.shape[1], -1) for a in self._arrays[0])
        pages = sum(len(r) * -(-r.nbytes // len(r) * tokens // self.capacity // PAGE) for r in rows)
        return pages * PAGE + sum(a.nbytes for a in itertools.chain(*self._arrays[1:]))

    def grown(self, tokens: int, past: int) -> State:
        """A state with room for ``tokens``, at least twice as much as before, that holds the first ``past`` slots and
        what is of fixed size."""
        larger = State(self._program, self.sequences, max(tokens, 2 * self.capacity))
        for old, new in zip(self._arrays[0], larger._arrays[0], strict=True):
            new[:, :, :past] = old[:, :, :past]
        for old, new in zip(itertools.chain(*self._arrays[1:]), itertools.chain(*larger._arrays[1:]), strict=True):
            new[...] = old
        return larger


class NativeSession:
    """One generation in progress: the KV state and the attention mask of a batch of sequences.

    Attributes:
        past: tokens stored so far, padding included.
    """

    def __init__(self, program: NativeProgram, batch: int, capacity: int):
        self._program = program
        self.state = State(program, batch, capacity)
        self.past = 0
        self._mask = np.zeros((batch, self.state.capacity), np.int64)
        self._lengths = np.zeros((batch, 1), np.int64)
        self._prompt_mask: np.ndarray | None = None
        # A step of one token writes to the same memory every time, so that its tensors are made once.
        self._token, self._position = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64)
        tensor = program.machine.tensor
        self._fastest = program.description.function(1, 1, last=True).name
        self._one = {"input_ids": tensor(self._token), "position_ids": tensor(self._position)}

    def start(self, mask: np.ndarray) -> None:
        """Sets which tokens of the prompt, fed next, are not padding: ``[B, S]``."""
        self._prompt_mask = np.asarray(mask, np.int64)

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Feeds ``[B, S]`` more token ids; returns the logits behind the last one, ``[B, V]``."""
        if ids.shape != (1, 1) or self._prompt_mask is not None:
            return self._feed(ids, last=True)[-1][:, -1]
        return self._feed_one(ids, self._fastest)

    def rewind(self, tokens: int) -> bool:
        """Forgets all but the first ``tokens`` of a single sequence without padding.

        Returns:
            False, with nothing changed, where the model keeps a state that cannot go back.
        """
        if tokens < self.past and self._program.description.fixed:
            return False
        self.past = tokens
        self._lengths[:], self._mask[:, tokens:] = tokens, 0
        return True

    def take(self, source: State, sequence: int, start: int, count: int) -> None:
        """Goes on from a sequence of a state: its next ``count`` tokens, from slot ``start`` on, come behind those that
        this session, of a single sequence without padding, holds."""
        end = self.past + count
        self._make_room(end)
        self.state.take(0, self.past, source, sequence, start, count)
        self._mask[:, self.past : end] = 1
        self._lengths += count
        self.past = end

    def step_by_kernel(self, ids: np.ndarray) -> np.ndarray:
        """:meth:`step` of one token of each sequence, ``[B, 1]``, with a launch for every kernel."""
        if ids.shape == (1, 1):
            return self._feed_one(ids, self._program.description.function(1, 1, last=True, merged=False).name)
        return self._feed(ids, last=True, merged=False)[-1][:, -1]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Feeds ``[B, S]`` more token ids; returns the logits of all of them, ``[B, S, V]``."""
        return joined(self._feed(ids, last=False), 1)

    def _feed(self, ids: np.ndarray, last: bool, merged: bool = True) -> list[np.ndarray]:
        """Feeds token ids part by part; returns the logits of each part, or of its last token."""
        ids = np.ascontiguousarray(ids, np.int64)
        if ids.size:
            self._program.description.bounds.check_ids(int(ids.min()), int(ids.max()))
        mask = np.ones_like(ids) if self._prompt_mask is None else self._prompt_mask
        self._prompt_mask = None
        tokens = int((self._lengths + mask.sum(1, keepdims=True)).max(initial=0))
        self._program.description.bounds.check_length(tokens, self.past + ids.shape[1])
        return [
            self._feed_part(ids[:, i : i + PART_TOKENS], mask[:, i : i + PART_TOKENS], last, merged)
            for i in range(0, ids.shape[1], PART_TOKENS)
        ]

    def _make_room(self, end: int) -> None:
        if end > self.state.capacity:
            self.state = self.state.grown(end, self.past)
            self._mask = np.pad(self._mask, ((0, 0), (0, self.state.capacity - self._mask.shape[1])))

    def _feed_part(self, ids: np.ndarray, new: np.ndarray, last: bool, merged: bool) -> np.ndarray:
        end = self.past + ids.shape[1]
        self._make_room(end)
        self._mask[:, self.past : end] = new
        inputs = {
            "input_ids": ids,
            "attention_mask": self._mask[:, :end],
            "position_ids": (self._lengths + new.cumsum(1) - 1).clip(min=0),
        }
        result = self._program.feed(inputs, self.state, last, merged)
        self._lengths += new.sum(1, keepdims=True)
        self.past = end
        return result

    def _feed_one(self, ids: np.ndarray, function: str) -> np.ndarray:
        """Feeds one token of one sequence; returns its logits, ``[1, V]``."""
        token = int(ids[0, 0])
        self._program.description.bounds.check_ids(token, token)
        self._program.description.bounds.check_length(int(self._lengths[0, 0]) + 1, self.past + 1)
        end = self.past + 1
        self._make_room(end)
        self._mask[0, self.past] = 1
        self._token[0, 0], self._position[0, 0] = token, self._lengths[0, 0]
        mask = self._program.machine.tensor(self._mask[:, :end])
        result = self._program.call(function, {**self._one, "attention_mask": mask}, self.state)
        self._lengths += 1
        self.past = end
        return result[:, 0]


def joined(parts: list[np.ndarray], axis: int) -> np.ndarray:
    """Arrays one behind the other along an axis; a single one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


class NativeModel(StoredModel):
    """A stored program and a tokenizer."""

    def __init__(self, program: NativeProgram, tokenizer: Any):
        super().__init__(program.description, tokenizer)
        self.program = program

    def session(self, batch: int, capacity: int = 0) -> NativeSession:
        return self.program.session(batch, capacity)


StoredProgram = NativeProgram | ReplayedProgram
"""A program of either kind: functions for any call, or sequences that are decoded one by one."""
