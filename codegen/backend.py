"""What depends on where code runs, behind one interface: a :class:`Backend` for each kind of targets.

Everything else, the lowering, the runtime, the tuner and the command line, asks :func:`backend_of` and knows no target
by name. CPUs (:mod:`.cpu.backend`) and CUDA (:mod:`.cuda.backend`) are built in; other packages register theirs with
:func:`register_backend`.

This module needs neither torch nor TVM, and a backend must need neither for what the runtime asks: its ``facts`` and
its ``machine``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .errors import KernelError, TargetError
from .progress import Progress
from .spec import AttentionSpec, ConvolutionSpec, EmbeddingSpec, LinearSpec, QuantizeSpec
from .targets import Target, TargetKind, register_kind

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from .sampling import Draw

Array = Any
"""Memory of a machine as a tensor: slices, reshapes, casts and is assigned to as numpy's arrays are, which it is on
CPUs."""


@dataclass(frozen=True)
class Bucket:
    """A range of token counts served by one kernel.

    Attributes:
        name: as in records.
        lowest: fewest tokens.
        highest: most tokens; a call with more is cut into pieces of this many.
        probe: tokens at which candidates are measured.
    """

    name: str
    lowest: int
    highest: int
    probe: int


@dataclass(frozen=True)
class EntryPoint:
    """One function of a program.

    Attributes:
        name: the function's.
        batch, length: sequences and tokens of a call; None for any number.
        last: give the logits of the last token only.
        bucket: token bucket whose kernels are called.
        most: tokens of all sequences together that a call takes at most; None for any number.
        blocks: takes weights and state as blocks, and runs in few launches. Either ``batch`` or ``most`` is given.
        joined: kernels take over what is before or behind them: quantizers norms, linears additions.
        static: no size changes from call to call: the mask has a column for every slot of the KV state, and the number
            of past tokens is an input, int32 ``[1]``. Where a call has several tokens it is ``[2]``, with the number of
            the call's last tokens that are none of the padding in front of them.
    """

    name: str
    batch: int | None
    length: int | None
    last: bool
    bucket: str
    most: int | None = None
    blocks: bool = False
    joined: bool = True
    static: bool = False


@dataclass(frozen=True)
class TirKernel:
    """A kernel that programs call.

    Attributes:
        name: its symbol; kernels of one name are the same.
        make: generates it as TIR, which takes a good part of a second.
        by_expert: the kernel of several matrices, given their shapes and how many rows there are, where it is another
            one than :func:`.program.experts.by_expert` makes of this one.
    """

    name: str
    make: Callable[[], Any]
    by_expert: Callable[[Sequence[Sequence[int]], int], TirKernel] | None = None

    @classmethod
    def made(cls, name: str, function: Any) -> TirKernel:
        """One that is generated already."""
        return cls(name, lambda: function)


class EagerLinear(Protocol):
    """The proven kernels of one :class:`LinearSpec`, called on tensors."""

    def pack(self, weight: Any, bias: Tensor | None = None) -> Any:
        """A weight (:data:`.format.Weight`) and its bias in the kernels' layout."""
        ...

    def __call__(self, values: Tensor, x_scale: Tensor, packed: Any) -> Tensor:
        """``[M, K]`` values with scales ``[M, G]`` or ``[M, 1]`` times the packed weight: float32 ``[M, N]``."""
        ...


class EagerQuantizer(Protocol):
    """The proven kernels of one :class:`QuantizeSpec`, called on tensors."""

    def __call__(self, x: Tensor, clip: Tensor, *shape: Tensor) -> tuple[Tensor, Tensor]:
        """Values and scales of ``[M, K]``."""
        ...


class EagerKernels(Protocol):
    """What a graph that runs operator by operator needs of :class:`Kernels`."""

    def linear(self, spec: LinearSpec) -> EagerLinear:
        """The kernels of a linear that :meth:`Backend.build` was asked for."""
        ...

    def quantizer(self, spec: QuantizeSpec) -> EagerQuantizer:
        """The kernels of a quantizer that :meth:`Backend.build` was asked for."""
        ...


class LinearKernel(EagerLinear, Protocol):
    """The proven kernels of one :class:`LinearSpec`."""

    def pack(self, weight: Any, bias: Tensor | None = None) -> Mapping[str, Tensor]:
        """As :meth:`EagerLinear.pack`: the tensors that the kernels read, in the order of their parameters."""
        ...

    def tir(self, bucket: str) -> TirKernel:
        """A token bucket's kernel ``(values, x_scale, *packed, out)``."""
        ...


class QuantizeKernel(EagerQuantizer, Protocol):
    """The proven kernels of one :class:`QuantizeSpec`."""

    def tir(self, parallel: bool) -> TirKernel:
        """The kernel ``(x, clip, [table's shape,] values, scale)``; ``parallel``: shares its rows out by itself."""
        ...


@runtime_checkable
class Kernels(EagerKernels, Protocol):
    """Proven kernels of a model on one target.

    Attributes:
        target: what they run on.
        guessed: how many of the schedules neither a search here nor an earlier build stands behind.
    """

    target: Target
    guessed: int

    def linear(self, spec: LinearSpec) -> LinearKernel: ...

    def quantizer(self, spec: QuantizeSpec) -> QuantizeKernel: ...

    def attention(self, spec: AttentionSpec, queries: int | None, parallel: bool) -> TirKernel:
        """``(query, key, value, key_codes, key_params, value_codes, value_params, key_mask, out)``.

        That of a static entry point takes the number of past tokens, int32 ``[1]``, behind the mask.

        Args:
            spec: the attention.
            queries: tokens of a call where that is known.
            parallel: it shares its work out by itself.
        """
        ...

    def embedding(self, spec: EmbeddingSpec) -> TirKernel:
        """``(rows, scale, ids, out)``; of a table of 4-bit codes ``(codes, levels, scale, ids, out)``."""
        ...

    def convolution(self, spec: ConvolutionSpec, parallel: bool) -> TirKernel:
        """``(x, weight, [bias,] state, out)``; ``parallel``: it shares its work out by itself."""
        ...

    def dense(self, rows: int, columns: int, one_token: bool) -> TirKernel:
        """A float linear ``(x [M, columns], weight [rows, columns], out [M, rows])``."""
        ...

    def order(self, dtype: str, descending: bool, parallel: bool) -> TirKernel:
        """``(x [A, N, B], places int64 [A, N, B])``: where the elements of ``x`` in order along ``N`` are.

        Args:
            dtype: of ``x``.
            descending: the greatest comes first. Of equal ones the earlier does, and NaN is above everything.
            parallel: it shares its work out by itself.
        """
        ...

    def scatter(self, dtype: str, adds: bool, parallel: bool) -> TirKernel:
        """``(x [N, W], places int64 [P], rows [P, W], out [N, W])``: ``x`` with some rows replaced.

        Rows are written in order; places are within ``x``.

        Args:
            dtype: of ``x`` and ``rows``.
            adds: rows are added to those of ``x``.
            parallel: it shares its work out by itself.
        """
        ...

    def records(self) -> list[dict[str, Any]]:
        """The chosen schedules, JSON-able, for ``Backend.build(records=...)``."""
        ...

    def sources(self) -> dict[str, str]:
        """Text of each kernel by name, for reading only."""
        ...


@dataclass(frozen=True)
class Emitted:
    """Kernels that were compiled for targets which this machine is none of.

    Attributes:
        sources: text by file name, for reading.
        binaries: compiled kernels by file name.
        proofs: how kernels were checked, for people.
    """

    sources: Mapping[str, str] = field(default_factory=dict)
    binaries: Mapping[str, bytes] = field(default_factory=dict)
    proofs: Sequence[str] = ()


class CompiledProgram(Protocol):
    """A program for one target.

    Attributes:
        workspaces: bytes of working memory that entry points with blocks take, by name.
        index_sizes: by entry point: the symbols in a shape, sorted, and elements of the largest such tensor that
            kernels index where each symbol is one.
    """

    @property
    def workspaces(self) -> Mapping[str, int]: ...

    @property
    def index_sizes(self) -> Mapping[str, Mapping[tuple[str, ...], int]]: ...

    def export(self, file: Path) -> None:
        """Writes what :meth:`Backend.machine` reads."""
        ...


class Machine(Protocol):
    """A compiled program in a device's memory, and that memory."""

    def function(self, name: str) -> Callable[..., Any]:
        """An entry point, on and to tensors."""
        ...

    def mapped(self, file: Path) -> Array:
        """A file's bytes ``uint8 [size]`` in memory that the program reads, aligned; changes do not reach the file."""
        ...

    def zeros(self, size: int) -> Array:
        """``size`` zero bytes, aligned."""
        ...

    def tensor(self, array: Array) -> Any:
        """What a function takes for memory of this machine, or for an array of the host."""
        ...

    def tuple(self, arrays: Sequence[Array]) -> Any:
        """What a function takes for several."""
        ...

    def array(self, tensor: Any) -> np.ndarray:
        """A function's result on the host."""
        ...


@dataclass(frozen=True)
class StateTensor:
    """A tensor ``[heads, capacity, ...]`` of the KV state of one sequence.

    Attributes:
        offset: of its beginning in the state, in bytes a slot.
        heads: how many.
        bytes: of a slot of a head.
    """

    offset: int
    heads: int
    bytes: int


class DecodedSequence(Protocol):
    """One sequence in a device's memory, which a program of a static entry point decodes token by token.

    Attributes:
        capacity: tokens that there is room for.
        past: tokens decoded so far.
    """

    capacity: int
    past: int

    def step(self, token: int | None = None, draw: Draw | None = None) -> None:
        """Decodes one token, and waits for nothing: this one, or the one that the step before has chosen. Chooses the
        next one: that of the draw, or of the greatest logit."""
        ...

    def step_by_launch(self, token: int | None = None, draw: Draw | None = None) -> None:
        """As :meth:`step`, kernel by kernel."""
        ...

    def feed(self, tokens: Sequence[int], draw: Draw | None = None) -> None:
        """Decodes several tokens, and waits for nothing: in parts of many at once where that is worth it. Chooses the
        token behind the last one as :meth:`step` does."""
        ...

    def feed_by_launch(self, tokens: Sequence[int], draw: Draw | None = None) -> None:
        """As :meth:`feed`, kernel by kernel."""
        ...

    def choice(self) -> tuple[int, float]:
        """The token that the last step has chosen, and its logit: the one of :func:`.sampling.drawn`, or that of the
        greatest logit, the first of equal ones. Where a logit is no number, or the greatest is infinite, the token is
        of such a one whatever was drawn."""
        ...

    def logits(self) -> np.ndarray:
        """The last step's logits, float32 ``[V]``; zeros before the first one."""
        ...

    def state(self) -> bytes:
        """The whole KV state."""
        ...

    def rewind(self, past: int) -> None:
        """Forgets all tokens but the first ones; state of fixed size does not go back."""
        ...

    def grow(self, capacity: int) -> None:
        """Makes room for more tokens.

        Raises:
            OutOfMemoryError: the device has none.
            KernelError: it reports another error. Nothing has changed then, either.
        """
        ...


class SequenceMachine(Protocol):
    """A program of a static entry point in a device's memory, with its weights."""

    def sequence(self, capacity: int) -> DecodedSequence:
        """An empty sequence.

        Raises:
            KernelError: the device has no room for it.
        """
        ...


class Implementation(Protocol):
    """The kernels of one linear that read one layout of its weights."""

    @property
    def spec(self) -> LinearSpec:
        """What is computed."""
        ...

    @property
    def layout(self) -> str:
        """The layout's name, the one in the schedules: that of the kernel family it was made for."""
        ...

    def schedules(self, bucket: Bucket) -> list[Any]:
        """Every valid schedule of a bucket, a good guess first; schedules of two layouts differ."""
        ...


class SearchSpace(Protocol):
    """What the tuner chooses from.

    Attributes:
        buckets: token buckets; the first decides the layout of the weights.
        version: counts changes of what a schedule's fields mean or of the code generated from them.
    """

    @property
    def buckets(self) -> Sequence[Bucket]: ...

    @property
    def version(self) -> int: ...

    def implementations(self, spec: LinearSpec, target: Target) -> Sequence[Any]:
        """The :class:`Implementation` of every layout, a good guess first."""
        ...

    def of_layout(self, candidates: Sequence[Any], layout: str) -> Any:
        """The implementation that reads a layout."""
        ...

    def schedule_from(self, record: dict[str, Any]) -> Any:
        """A schedule, which is a dataclass, from its fields."""
        ...

    def measured_as(self, target: Target, bucket: Bucket) -> Target:
        """The target that results for so many tokens are stored under: another one where its kernels are the same."""
        ...


def bucket_named(name: str, buckets: Iterable[Bucket]) -> Bucket:
    """The bucket of that name.

    Raises:
        KernelError: there is none.
    """
    known = {bucket.name: bucket for bucket in buckets}
    if name not in known:
        raise KernelError(f"no token range is named {name!r}; use one of {', '.join(known)}")
    return known[name]


def bucket_of(tokens: int, buckets: Iterable[Bucket]) -> Bucket:
    """The bucket whose kernels a call of so many tokens runs on; the last has pieces of longer ones."""
    *others, last = buckets
    return next((bucket for bucket in others if tokens <= bucket.highest), last)


class Backend(Protocol):
    """Everything that depends on the kind of machine.

    Attributes:
        kind: the targets it serves.
        entry_points: the functions of its programs; of those that take a call, the first is the best for it.
        eager: whether its kernels are called on tensors, too, so that a compile checks itself on them. Those of other
            backends are compiled for machines elsewhere (:meth:`emit`), and programs of them checked when they load.
        searches: whether it has a :meth:`space` to search schedules in.
    """

    kind: TargetKind
    entry_points: Sequence[EntryPoint]
    eager: bool
    searches: bool

    def present(self, target: Target) -> bool:
        """Whether this machine has such a device."""
        ...

    def check(self, target: Target) -> None:
        """Refuses a target for which a compile here could make nothing that it can stand behind.

        Raises:
            TargetError: saying why.
        """
        ...

    def build(
        self,
        linears: Iterable[LinearSpec],
        quantizers: Iterable[QuantizeSpec],
        target: Target,
        *,
        cache_dir: Path | None = None,
        trials: int = 16,
        budget_s: float | None = None,
        progress: Progress | None = None,
        records: Sequence[Mapping[str, Any]] | None = None,
    ) -> Kernels:
        """Picks schedules, compiles kernels and proves them on this machine, bit for bit against the reference.

        Args:
            linears, quantizers: what is needed; duplicates are fine.
            target: one that this machine runs.
            cache_dir: where tuning results live; the user's cache folder by default.
            trials: schedules measured per shape and token bucket where no result of such a search is stored; 0 takes
                what is stored, else the first guess.
            budget_s: seconds the search may take in all.
            progress: told about each shape.
            records: results of an earlier build; they spare the search, never the proof.

        Raises:
            KernelError: a kernel does not compile, or disagrees with the reference.
            TargetError: this machine cannot run the target.
        """
        ...

    def emit(
        self,
        linears: Iterable[LinearSpec],
        quantizers: Iterable[QuantizeSpec],
        targets: Sequence[Target],
        *,
        progress: Progress | None = None,
    ) -> Emitted:
        """Compiles kernels for machines elsewhere and proves them as far as this machine can.

        Raises:
            KernelError: a kernel cannot be generated or compiled, or is wrong.
        """
        ...

    def space(self) -> SearchSpace:
        """What the tuner searches."""
        ...

    def assembly(self, spec: LinearSpec, schedule: Mapping[str, Any], target: Target) -> str:
        """What a linear's kernel of a tuning record's schedule compiles to, as people read it.

        Raises:
            KernelError: it does not compile.
            TargetError: such kernels are not shown so; says what shows them.
        """
        ...

    def compile(self, module: Any, kernels: Any) -> CompiledProgram:
        """Schedules the loops of a module of :class:`.program.builder.ProgramBuilder`, and compiles all of it.

        Args:
            module: translated with ``kernels``.
            kernels: from :meth:`build`.

        Raises:
            KernelError: the program cannot be built.
            UntranslatableError: the module has something that this backend's programs cannot hold.
        """
        ...

    def facts(self, target: Target) -> Sequence[str | int]:
        """What a stored program depends on besides the model, its schedules and this package's code."""
        ...

    def compiler(self, target: Target) -> str:
        """What compiles programs, where :meth:`facts` does not say it: those of another one are not taken for its own.

        Raises:
            KernelError: there is none.
        """
        ...

    def machine(self, file: Path) -> Machine:
        """Loads what :meth:`CompiledProgram.export` wrote.

        Raises:
            KernelError: it cannot be loaded.
        """
        ...


@dataclass(frozen=True)
class Prediction:
    """How long a token of a model would take on a device that is not here: a prediction, not a measurement.

    Attributes:
        device: which.
        seconds: of a token, in all.
        gaps_s: of these, between launches.
        limit: what most of the rest waits for, e.g. ``"bandwidth"``.
    """

    device: str
    seconds: float
    gaps_s: float
    limit: str


@runtime_checkable
class PredictingBackend(Protocol):
    """A :class:`Backend` that knows how long a token would take on devices that it is for."""

    def predict(
        self, linears: Mapping[LinearSpec, int], quantizers: Collection[QuantizeSpec], layers: int
    ) -> Sequence[Prediction]:
        """How long it would take on each.

        Args:
            linears: of the model, how many of each there are.
            quantizers: of their inputs.
            layers: its decoder layers.

        Raises:
            KernelError: there is no kernel for one of the linears or quantizers.
        """
        ...


@runtime_checkable
class SequenceBackend(Protocol):
    """A :class:`Backend` whose programs have one static entry point, and decode sequences one by one."""

    def sequences(self, file: Path, weights: Path, state: Sequence[StateTensor], target: Target) -> SequenceMachine:
        """Loads what :meth:`CompiledProgram.export` wrote, in place of :meth:`Backend.machine`.

        Args:
            file: the program.
            weights: the file of its weights.
            state: the tensors of its KV state.
            target: the device.

        Raises:
            TargetError: this machine has no such device.
            KernelError: it cannot be loaded.
        """
        ...

    def prove(self, machine: Any, kernels: Any, progress: Progress | None = None) -> None:
        """Proves the kernels of a program on the device that has loaded it, as :meth:`Backend.build` does those of
        other backends.

        Args:
            machine: from :meth:`sequences`.
            kernels: what the program was translated with.
            progress: told about each kernel.

        Raises:
            DisprovedError: a kernel disagrees with the reference; says which.
            KernelError: one cannot be run.
        """
        ...


_BACKENDS: dict[str, Backend] = {}

_BUILT_IN = {"cpu": (".cpu.backend", "CpuBackend"), "cuda": (".cuda.backend", "CudaBackend")}
"""Modules and classes of the backends that this package comes with; imported when they are asked for."""


def register_backend(backend: Backend) -> None:
    """Makes a backend and its targets known. One for the same kind of targets is replaced."""
    _BACKENDS[backend.kind.name] = backend
    register_kind(backend.kind)


def backend_named(kind: str) -> Backend:
    """The backend for targets of a kind.

    Raises:
        TargetError: there is none.
    """
    if kind not in _BACKENDS and kind in _BUILT_IN:
        module, name = _BUILT_IN[kind]
        register_backend(getattr(importlib.import_module(module, __package__), name)())
    if kind not in _BACKENDS:
        raise TargetError(f"no backend serves targets of the kind {kind!r}; register one with register_backend()")
    return _BACKENDS[kind]


def predicting(targets: Iterable[Target] | None = None) -> list[PredictingBackend]:
    """The backends of targets, or of all that are known, that predict."""
    kinds = [*_BUILT_IN, *_BACKENDS] if targets is None else [target.kind for target in targets]
    found = (backend_named(kind) for kind in dict.fromkeys(kinds))
    return [backend for backend in found if isinstance(backend, PredictingBackend)]


def predictions(
    linears: Mapping[LinearSpec, int],
    quantizers: Collection[QuantizeSpec],
    layers: int,
    targets: Iterable[Target] | None = None,
) -> list[Prediction]:
    """What the backends of targets, or all that are known, predict of a model: see :class:`PredictingBackend`.

    Raises:
        KernelError: there is no kernel for one of the linears or quantizers.
    """
    return [p for backend in predicting(targets) for p in backend.predict(linears, quantizers, layers)]


def backend_of(target: Target) -> Backend:
    """The backend of a target.

    Raises:
        TargetError: there is none.
    """
    return backend_named(target.kind)
