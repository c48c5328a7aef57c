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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lbllm_compile import codegen
from lbllm_compile.codegen import installed
from lbllm_compile.codegen.backend import Array, backend_of
from lbllm_compile.codegen.cache import cache_directory, known_sha256, remember_sha256, sha256, sync
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.progress import Progress, warn
from lbllm_compile.codegen.sizes import CAPACITY_MULTIPLE, MIN_CAPACITY, MOST_ELEMENTS
from lbllm_compile.codegen.targets import Target
from lbllm_compile.manifest import MANIFEST, ArtifactError, check_files
from lbllm_compile.native.generate import GenerationError
from lbllm_compile.native.language import InputBounds, LanguageModel
from lbllm_compile.version import __version__

LIBRARY, WEIGHTS, DESCRIPTION = "program.so", "weights.bin", "program.json"
"""Files of a stored program."""

SEAL = "files.json"
"""Sizes and SHA-256 of the others; its time is that of the last use."""

LOCK = "programs.lock"
"""Held, in the cache directory, by whoever opens or removes stored programs."""

PART_TOKENS = 1024
"""Longer prompts are fed in parts of so many tokens, which bounds the working memory."""


PAGE = 4096
"""Bytes of memory that the system gives at once."""

FORMAT_VERSION = 4
"""Counts changes of what a stored program is; part of its key."""


def programs_directory() -> Path:
    """Where programs are stored."""
    return cache_directory() / "programs"


def stored_at(digest: str, target: str) -> Path:
    """Where the program of an artifact is stored for a target on this machine.

    Args:
        digest: SHA-256 of the artifact's manifest.
        target: the target's name.
    """
    facts = (digest, *machine_facts(target))
    return programs_directory() / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def machine_facts(target: str) -> tuple[str | int, ...]:
    """What a program for a target depends on besides the model.

    What its backend names, the code that generates kernels and calls them, and operators of installed packages.
    """
    generators = hashlib.sha256()
    folders = Path(codegen.__file__).parent, Path(__file__).parent.parent / "lowering"
    for file in (file for folder in folders for file in sorted(folder.rglob("*.py"))):
        generators.update(file.read_bytes())
    facts = backend_of(Target.parse(target)).facts(Target.parse(target))
    return target, *facts, *installed.facts(installed.OPERATORS), __version__, FORMAT_VERSION, generators.hexdigest()


def schedules_key(records: Sequence[Mapping[str, Any]]) -> str:
    """One text for the schedules of a set of kernels.

    Args:
        records: of all its kernels, JSON-able.
    """
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def find(directory: Path, target: str = "cpu", progress: Progress | None = None) -> NativeProgram | None:
    """The stored program of an artifact, where there is one and the artifact is whole.

    All files of both are checked against their SHA-256; large ones are read for that only once, and again when their
    inode, size or times have changed. A stored program that is damaged is removed, which ``progress`` is told.

    Raises:
        TargetError: the target is unknown.
        KernelError: the program cannot be loaded.
    """
    name = Target.parse(target).name
    try:
        _, digest = check_files(directory, known_sha256)
    except ArtifactError:
        return None  # who reads the artifact says what is wrong with it
    place = stored_at(digest, name)
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
            return NativeProgram(place)
    remove(place)
    return None


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
    remove(stored_at(digest, target))


def remove(place: Path) -> None:
    """Removes a stored program, while no other process opens one."""
    removed = place.with_name(f".removed-{place.name}-{os.getpid()}")
    with held_programs(alone=True), contextlib.suppress(OSError):
        place.rename(removed)  # at once: a program is there whole or not at all
    shutil.rmtree(removed, ignore_errors=True)


@dataclass(frozen=True)
class Member:
    """A tensor within a block of bytes.

    Attributes:
        name: of the weight or state.
        shape: dimensions; in KV state ``"batch"`` and ``"capacity"`` stand for what a session chooses; state
            of fixed size has no capacity.
        dtype: numpy's name of the dtype.
        offset: in bytes; in KV state per sequence and slot, in state of fixed size per sequence.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    offset: int


@dataclass(frozen=True)
class Function:
    """One function of a stored program.

    Attributes:
        name: in the library.
        batch, length: sequences and tokens of a call; None for any number.
        most: tokens of all sequences together that a call takes at most; None for any number.
        last: gives the logits of the last token only.
        tensors: the tensors that its kernels index, as pairs of the symbols in a shape and the elements there are
            where each symbol is one.
    """

    name: str
    batch: int | None
    length: int | None
    most: int | None
    last: bool
    tensors: tuple[tuple[tuple[str, ...], int], ...]

    def takes(self, batch: int, length: int, last: bool) -> bool:
        """Whether it computes a call of that kind, however large its tensors get."""
        fits = self.batch in (None, batch) and self.length in (None, length)
        return fits and (self.most is None or batch * length <= self.most) and self.last == last

    def sequences(self, sizes: Mapping[str, int]) -> int:
        """Most sequences, at least one, for which every tensor can be indexed.

        Args:
            sizes: what the symbols ``length``, ``total`` and ``capacity`` stand for.

        Raises:
            GenerationError: not even one sequence fits.
        """
        elements = [
            count * math.prod(sizes[symbol] for symbol in symbols if symbol != "batch")
            for symbols, count in self.tensors
            if "batch" in symbols
        ]
        most = MOST_ELEMENTS // max(elements, default=1)
        if most < 1:
            raise GenerationError(
                f"{sizes['length']} tokens of a sequence with room for {sizes['capacity']} are too many for one call;"
                " use a shorter context"
            )
        return most


@dataclass(frozen=True)
class Description:
    """What a stored program says of itself.

    Attributes:
        target: what it runs on.
        schedules: of its kernels, as :func:`schedules_key` gives them.
        inputs: arguments of its functions before the blocks: some of ``input_ids``, ``attention_mask``,
            ``position_ids``.
        weights, state, fixed: tensors of the blocks: weights, KV state and state of fixed size.
        state_bytes: of the KV state per sequence and slot.
        fixed_bytes: of the state of fixed size per sequence.
        functions: what the library computes; the first that takes a call is the best for it.
        workspaces: bytes of working memory of the functions that take some.
        bounds: of the token ids and positions that the functions take.
        merged: whether one token is decoded in few launches, else with one for every kernel.
        config: the model's configuration.
        plain_tokenizer: whether :class:`~.text.TextTokenizer` does what the model's tokenizer does.
    """

    target: str
    schedules: str
    inputs: tuple[str, ...]
    weights: tuple[Member, ...]
    state: tuple[Member, ...]
    state_bytes: int
    fixed: tuple[Member, ...]
    fixed_bytes: int
    functions: tuple[Function, ...]
    workspaces: Mapping[str, int]
    bounds: InputBounds
    merged: bool
    config: Mapping[str, Any]
    plain_tokenizer: bool

    @classmethod
    def from_json(cls, text: str) -> Description:
        fields = json.loads(text)
        for block in ("weights", "state", "fixed"):
            fields[block] = tuple(Member(**{**m, "shape": tuple(m["shape"])}) for m in fields[block])
        functions = []
        for function in fields["functions"]:
            tensors = tuple((tuple(symbols), count) for symbols, count in function["tensors"])
            functions.append(Function(**{**function, "tensors": tensors}))
        fields["bounds"] = InputBounds(**fields["bounds"])
        return cls(**{**fields, "inputs": tuple(fields["inputs"]), "functions": tuple(functions)})

    def function(self, batch: int, length: int, last: bool, merged: bool = False) -> Function:
        """The best function for a call; without ``merged`` of those that do not run in few launches."""
        usable = (f for f in self.functions if merged or f.name not in self.workspaces)
        return next(f for f in usable if f.takes(batch, length, last))


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

    def call(self, name: str, inputs: Mapping[str, Any], state: State, part: slice | None = None) -> np.ndarray:
        """Runs a function of the program on input tensors, by name, and a state, which it changes.

        Args:
            name: of the function.
            inputs: tensors.
            state: of the whole batch.
            part: the sequences that ``inputs`` are of, where they are not all.
        """
        description, function = self.description, self.machine.function(name)
        arguments = [inputs[name] for name in description.inputs]
        if name in description.workspaces:
            arguments += [self._weights, *state.blocks, state.workspace(name)]
        else:
            arguments += [self._weight_tuple, *(state.tuples if part is None else state.part(part))]
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
        capacity: tokens there is room for.
        arrays: every tensor, those of keys and values first.
        blocks, tuples: the same memory in the two forms in which functions take it.
    """

    def __init__(self, program: NativeProgram, batch: int, capacity: int):
        self._program, self._batch = program, batch
        self.capacity = -(-max(capacity, MIN_CAPACITY) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
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
        self._parts: dict[tuple[int | None, int | None], list[Any]] = {}
        self.tuples = self.part(slice(None))
        self._workspaces: dict[str, Any] = {}

    def part(self, sequences: slice) -> list[Any]:
        """:attr:`tuples` of some sequences, which follow one another."""
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
        larger = State(self._program, self._batch, max(tokens, 2 * self.capacity))
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
        self._fastest = program.description.function(1, 1, last=True, merged=True).name
        self._one = {"input_ids": tensor(self._token), "position_ids": tensor(self._position)}

    def start(self, mask: np.ndarray) -> None:
        """Sets which tokens of the prompt, fed next, are not padding: ``[B, S]``."""
        self._prompt_mask = np.asarray(mask, np.int64)

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Feeds ``[B, S]`` more token ids; returns the logits behind the last one, ``[B, V]``."""
        if ids.shape != (1, 1) or self._prompt_mask is not None:
            return self._feed(ids, last=True)[-1][:, -1]
        description = self._program.description
        return self._feed_one(ids, self._fastest) if description.merged else self.step_by_kernel(ids)

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
        """:meth:`step` of one token, ``[1, 1]``, with a launch for every kernel."""
        return self._feed_one(ids, self._program.description.function(1, 1, last=True).name)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Feeds ``[B, S]`` more token ids; returns the logits of all of them, ``[B, S, V]``."""
        return joined(self._feed(ids, last=False), 1)

    def _feed(self, ids: np.ndarray, last: bool) -> list[np.ndarray]:
        """Feeds token ids part by part; returns the logits of each part, or of its last token."""
        ids = np.ascontiguousarray(ids, np.int64)
        if ids.size:
            self._program.description.bounds.check_ids(int(ids.min()), int(ids.max()))
        mask = np.ones_like(ids) if self._prompt_mask is None else self._prompt_mask
        self._prompt_mask = None
        tokens = int((self._lengths + mask.sum(1, keepdims=True)).max(initial=0))
        self._program.description.bounds.check_length(tokens, self.past + ids.shape[1])
        return [
            self._feed_part(ids[:, i : i + PART_TOKENS], mask[:, i : i + PART_TOKENS], last)
            for i in range(0, ids.shape[1], PART_TOKENS)
        ]

    def _make_room(self, end: int) -> None:
        if end > self.state.capacity:
            self.state = self.state.grown(end, self.past)
            self._mask = np.pad(self._mask, ((0, 0), (0, self.state.capacity - self._mask.shape[1])))

    def _feed_part(self, ids: np.ndarray, new: np.ndarray, last: bool) -> np.ndarray:
        batch, length = ids.shape
        end = self.past + length
        self._make_room(end)
        self._mask[:, self.past : end] = new
        inputs = {
            "input_ids": ids,
            "attention_mask": self._mask[:, :end],
            "position_ids": (self._lengths + new.cumsum(1) - 1).clip(min=0),
        }
        function = self._program.description.function(batch, length, last)
        most = function.sequences({"length": length, "total": end, "capacity": self.state.capacity})
        parts = [slice(i, i + most) for i in range(0, batch, most)] if most < batch else [None]
        result = joined([self._call(function, inputs, part) for part in parts], 0)
        self._lengths += new.sum(1, keepdims=True)
        self.past = end
        return result

    def _call(self, function: Function, inputs: Mapping[str, np.ndarray], part: slice | None) -> np.ndarray:
        """Runs a function for all sequences, or for a part of them."""
        tensor, chosen = self._program.machine.tensor, slice(None) if part is None else part
        tensors = {name: tensor(np.ascontiguousarray(array[chosen])) for name, array in inputs.items()}
        return self._program.call(function.name, tensors, self.state, part)

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


class NativeModel(LanguageModel):
    """A stored program and a tokenizer."""

    def __init__(self, program: NativeProgram, tokenizer: Any):
        self.program = program
        self.config = program.description.config
        self.tokenizer = tokenizer

    @property
    def context_length(self) -> int | None:
        """Tokens the model can attend to: as its configuration says, and as many as its graph has positions for."""
        bounds = self.program.description.bounds
        known = [most for most in (super().context_length, bounds.positions, bounds.slots) if most is not None]
        return min(known, default=None)

    def session(self, batch: int, capacity: int = 0) -> NativeSession:
        return self.program.session(batch, capacity)
