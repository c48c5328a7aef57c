"""From Relax functions that call kernels and fused loops to a launch list."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ...backend import EntryPoint
from ...errors import UntranslatableError
from ...program.builder import Layout
from ...program.compile import fused_loops
from ...program.launch import KernelCall, kernel_calls
from ...program.launch import Place as Tensor
from ...program.queries import size_at
from ...sizes import PAST, STATE
from ...tvm_api import renew_definitions, tirx, tvm
from ..limits import BLOCK_SHARED_BYTES
from ..quantize import QuantizeSchedule, quantize
from ..text import signature
from .kernels import CALLED, Called, ProgramKernels
from .launches import PART, TOKEN, Argument, Launch, LaunchList, Number, Place, ProgramKernel, Result, Size
from .loops import nests, parameter_name
from .prologue import MOST_STEPS, JoinError, Loops, Prologue, Value

INPUTS = {
    "attention_mask": Size(0, 8),
    "input_ids": Size(8),
    PAST: Size(4),
    "position_ids": Size(8),
    "sampling": Size(32),
}
"""Bytes of the blocks that steps hand on: an int64 mask of the slots, the token, the length (int32), the position, and
how the next token is chosen."""


_PART_TOKENS = PART.length or 1

PART_BYTES = Size(16 * _PART_TOKENS + 8)
"""Bytes of the block that a part is given: tokens and positions (int64 each), the number of past tokens, and how many
of the part's are none of its padding (int32 each)."""

_OF_PART = {"input_ids": Size(0), "position_ids": Size(8 * _PART_TOKENS), PAST: Size(16 * _PART_TOKENS)}
"""Where in that block the inputs of a part lie."""


def lower(
    module: Any,
    kernels: ProgramKernels,
    weights: Layout,
    state: Layout,
    fixed: Layout,
    *,
    apart: Collection[str] = (),
) -> LaunchList:
    """The launch list of the function :data:`~.launches.TOKEN` of a module, and of :data:`~.launches.PART` beside it,
    where the module has it and no padding changes a state.

    Args:
        module: of :class:`...program.builder.ProgramBuilder`, translated with ``kernels``.
        kernels: what stands behind the kernels that it calls.
        weights, state, fixed: layouts of the blocks.
        apart: symbols of kernels of another list of this module. What such a one computes in front of its own work has
            launches of its own in this list; all other kernels keep their symbols.

    Raises:
        UntranslatableError: the function has something that no launch computes.
    """
    names = {str(variable.name_hint) for variable in module.get_global_vars()}
    module = fused_loops(module, approximate=False)
    blocks = weights.bytes, state.bytes, fixed.bytes
    token = _lowered(module, TOKEN, kernels, blocks, apart)
    if PART.name not in names or fixed.bytes:
        return token
    return replace(token, part=_lowered(module, PART, kernels, blocks, apart))


def _lowered(
    module: Any, entry: EntryPoint, kernels: ProgramKernels, blocks: tuple[int, int, int], apart: Collection[str]
) -> LaunchList:
    calls, logits = kernel_calls(module, module[entry.name])
    calls = [_of_size(call) for call in calls]
    if logits.result < 0:
        raise UntranslatableError("the logits are no result of a kernel")
    lowering = _Lowering(kernels, calls, logits, apart, of_part=entry is PART)
    return LaunchList(
        tuple(lowering.texts.values()),
        tuple(lowering.launches),
        tuple(lowering.sizes),
        {PART.name: PART_BYTES} if entry is PART else INPUTS,
        lowering.result(logits).number,
        int(logits.shape[-1]),
        *blocks,
        tokens=entry.length or 1,
    )


class _Lowering:
    """Makes launches of calls.

    A call is small where it is a quantizer, or loops that thread blocks of other kernels can compute for themselves. It
    waits for the first kernel that needs it, and becomes part of its launch (:mod:`.prologue`). Of a part of a prompt
    no call is small: each has so much work that a launch is nothing, and no thread block should repeat it.

    Attributes:
        launches: in order.
        texts: by name, the kernels.
        sizes: of the results.
    """

    def __init__(
        self,
        kernels: ProgramKernels,
        calls: Sequence[KernelCall],
        logits: Tensor,
        apart: Collection[str] = (),
        of_part: bool = False,
    ):
        self.launches: list[Launch] = []
        self.texts: dict[str, ProgramKernel] = {}
        self.sizes: list[Size] = []
        calls = [call for call in calls if not all(map(_is_empty, call.writes))]
        self._kernels, self._calls, self._logits, self._apart = kernels, calls, logits, apart
        self._of_part = of_part
        self._results: dict[int, Result] = {}
        self._nests: dict[str, tuple[Sequence[Any], list[tuple[Called, Any]]]] = {}
        self._loops: dict[str, Loops | None] = {}
        self._joined: dict[Any, list[Called] | None] = {}
        self._orders: dict[tuple[str, Size], tuple[int | Number, ...]] = {}
        small = [i for i, call in enumerate(calls) if not of_part and self._is_small(call)]
        self._waiting = {write.result: i for i in small for write in calls[i].writes}
        for i in range(len(calls)):
            if i not in small:
                self._launch_with(i)
        self._launch_all(self._needed([logits]))
        self._end()

    def argument(self, tensor: Tensor) -> Argument:
        """Where a tensor lies."""
        if tensor.result >= 0:
            return self.result(tensor)
        if tensor.block == STATE:
            return Place(STATE, Size(0, tensor.offset))
        if self._of_part and tensor.block in _OF_PART:
            return Place(PART.name, _OF_PART[tensor.block])
        return Place(tensor.block, Size(tensor.offset))

    def result(self, tensor: Tensor) -> Result:
        """The result that a tensor is."""
        if tensor.result not in self._results:
            self._results[tensor.result] = self._fresh(tensor.shape, tensor.dtype)
        return self._results[tensor.result]

    def _fresh(self, shape: Any, dtype: Any) -> Result:
        self.sizes.append(size_of(math.prod(shape) * tvm.DataType(str(dtype)).itemsize))
        return Result(len(self.sizes) - 1)

    def _called(self, call: KernelCall) -> Called | None:
        """What a call launches; None for loops."""
        name = call.kernel.attrs.get(CALLED)
        return None if name is None else self._kernels.called[name]

    def _is_small(self, call: KernelCall) -> bool:
        called = self._called(call)
        if called is not None:
            return called.quantizer is not None
        if call.name not in self._loops:
            self._loops[call.name] = Loops.of(call.kernel)
        loops = self._loops[call.name]
        return loops is not None and all(stage.steps <= MOST_STEPS for stage in loops.stages)

    def _needed(self, tensors: Sequence[Tensor]) -> list[int]:
        """The calls that wait and are needed for tensors, in order. They wait no more."""
        found: set[int] = set()
        left = [*tensors]
        while left:
            number = self._waiting.get(left.pop().result)
            if number is not None and number not in found:
                found.add(number)
                left += self._calls[number].reads
        self._waiting = {result: number for result, number in self._waiting.items() if number not in found}
        return sorted(found)

    def _launch_with(self, number: int) -> None:
        """Launches a call with all that waits and that it needs."""
        call = self._calls[number]
        small = self._needed(call.reads)
        called = self._called(call)
        if called is None or not small or not self._launch_joined(call, called, small):
            self._launch_all([*small, number])

    def _launch_joined(self, call: KernelCall, called: Called, small: Sequence[int]) -> bool:
        """One launch for a kernel and the small calls in front of it; whether there can be one."""
        group = [self._calls[number] for number in small]
        inside = {write.result for part in group for write in part.writes}
        others = [other for i, other in enumerate(self._calls) if i not in small and other is not call]
        asked = {read.result for other in others for read in other.reads} | {self._logits.result}
        kept = [write for part in group for write in part.writes if write.result in asked]
        outside = [*{_where(r): r for part in group for r in part.reads if r.result not in inside}.values()]
        own = dict(zip(called.names, [*call.reads, *call.writes], strict=True))
        # Of layers that are alike the kernel is one.
        numbers: dict[Any, int] = {}
        parts = []
        for part in (*group, call):
            tensors = [_where(tensor) for tensor in (*part.reads, *part.writes)]
            parts.append((part.name, *(numbers.setdefault(tensor, len(numbers)) for tensor in tensors)))
        key = (*parts, tuple(numbers[_where(tensor)] for tensor in kept))
        forms = called.forms()
        if key not in self._joined:
            same = sum(name == call.name for *_, (name, *_), _ in self._joined)
            names = [f"{form.name}_{same}" for form, _ in forms]
            self._joined[key] = None
            if not any(f"{name}_kernel" in self._apart for name in names):
                with suppress(JoinError):
                    self._joined[key] = [
                        self._join(name, form, own, group, outside, kept)
                        for name, (form, _) in zip(names, forms, strict=True)
                    ]
        if (joined := self._joined[key]) is None:
            return False
        places = {name: self.argument(tensor) for name, tensor in own.items() if tensor.result not in inside}
        for form, (_, capacities) in zip(joined, forms, strict=True):
            before = {name: self.argument(t) for name, t in zip(form.names, (*outside, *kept), strict=False)}
            self._launch_form(form, {**places, **before}, capacities)
        return True

    def _join(
        self,
        name: str,
        called: Called,
        own: Mapping[str, Tensor],
        group: Sequence[KernelCall],
        outside: Sequence[Tensor],
        kept: Sequence[Tensor],
    ) -> Called:
        """A kernel with small calls in front of it.

        Args:
            name: of the new kernel.
            called: the kernel.
            own: its call's tensors, by name.
            group: the calls in front of it.
            outside: what these read and do not compute.
            kept: what they compute for others.

        Raises:
            JoinError: it cannot compute them, or shared memory has no room for them.
        """
        prologue = Prologue(called.function)
        values = {_where(tensor): Value.of(prologue.parameter(tensor.shape, tensor.dtype)) for tensor in outside}
        outs = [prologue.parameter(tensor.shape, tensor.dtype) for tensor in kept]
        inside: set[Any] = set()
        for part in group:
            given = [values[_where(tensor)].seen(tensor.shape) for tensor in part.reads]
            of, loops = self._called(part), self._loops.get(part.name)
            if of is not None and of.quantizer is not None:
                results = prologue.quantizer(quantize(of.quantizer, QuantizeSchedule(prologue.warps)), *given)
            elif loops is not None:
                results = prologue.loops(loops, given)
            else:
                raise AssertionError(f"{part.name} is not small")
            written = [_where(tensor) for tensor in part.writes]
            values |= zip(written, results, strict=True)
            inside |= {*written}
        for tensor, out in zip(kept, outs, strict=True):
            prologue.keep(values[_where(tensor)], out)
        if (taken := prologue.shared_bytes) > BLOCK_SHARED_BYTES:
            raise JoinError(f"{name} would take {taken} bytes of shared memory")
        given = {key: values[_where(tensor)] for key, tensor in own.items() if _where(tensor) in inside}
        names = [*prologue.names, *(key for key in called.names if key not in given)]
        return replace(
            called, name=name, function=prologue.kernel(given), names=names, work=Size(prologue.blocks), per_block=1
        )

    def _launch_all(self, numbers: Sequence[int]) -> None:
        """Launches calls one by one."""
        for number in numbers:
            call = self._calls[number]
            tensors = [*call.arguments, *call.writes]
            if not all(isinstance(tensor, Tensor) for tensor in tensors):
                raise UntranslatableError(f"{call.name} takes a size by itself")
            places = [self.argument(tensor) for tensor in tensors]
            called = self._called(call)
            if called is not None and called.of_rows is not None:
                called = called.of_rows(math.prod(int(size) for size in call.writes[0].shape[:-1]))
            if called is not None:
                for form, capacities in called.forms():
                    self._launch_form(form, dict(zip(called.names, places, strict=True)), capacities)
                continue
            _check_symbols(call)
            parameters, found = self._nests_of(call)
            between: dict[Any, Argument] = dict(zip(parameters, places, strict=True))
            for nest, buffers in found:
                for buffer in buffers:
                    if buffer not in between:
                        between[buffer] = self._fresh(buffer.ty.shape, buffer.ty.dtype)
                self._launch(nest, [between[buffer] for buffer in buffers])

    def _end(self) -> None:
        """The launch that chooses the next token."""
        blocks: Mapping[str, Argument] = {name: Place(name, Size(0)) for name in INPUTS}
        vocabulary = int(self._logits.shape[-1])
        blocks = {**blocks, "logits": self.result(self._logits), "shares": self._fresh((vocabulary,), "int64")}
        called = self._kernels.next_token(vocabulary)
        self._launch(called, [blocks[name] for name in called.names])

    def _launch_form(self, form: Called, places: Mapping[str, Argument], capacities: tuple[int, int | None]) -> None:
        """A kernel, and what is launched in front of it and behind it."""
        places = {**places, **{name: self._fresh(*left) for name, left in form.leaves.items()}}
        for called in (form.first, form, form.behind):
            if called is not None:
                self._launch(called, [places[name] for name in called.names], *capacities)

    def _launch(self, called: Called, places: Sequence[Argument], above: int = 0, most: int | None = None) -> None:
        """One launch of a kernel on the arguments of a call, for some capacities."""
        if called.name not in self.texts:
            source = self._kernels.text(called)
            self.texts[called.name] = ProgramKernel(signature(source).symbol, source, called.block)
        kernel = self.texts[called.name]
        # A kernel of any number of rows is passed that of each call.
        if (key := (called.name, called.number)) not in self._orders:
            self._orders[key] = called.order(kernel.source)
        order = self._orders[key]
        arguments = tuple(places[argument] if isinstance(argument, int) else argument for argument in order)
        self.launches.append(Launch(kernel.symbol, called.work, called.per_block, arguments, above, most))

    def _nests_of(self, call: KernelCall) -> tuple[Sequence[Any], list[tuple[Called, Any]]]:
        """The parameters that a call's arguments stand for, and the nests on them. Calls of one name share both: loops
        of any size are made loops of their sizes anew for each call (:func:`_of_size`), with other parameters."""
        if call.name not in self._nests:
            found = []
            for number, nest in enumerate(nests(call.kernel)):
                names = [parameter_name(i) for i in range(len(nest.buffers))]
                block, work = (nest.threads, 1, 1), size_of(nest.work)
                called = Called(f"{call.name}_{number}", nest.function, names, block, work, nest.per_block)
                found.append((called, nest.buffers))
            self._nests[call.name] = call.kernel.params, found
        return self._nests[call.name]


def _of_size(call: KernelCall) -> KernelCall:
    """A call of loops of any size as one of loops of its sizes, where these are known."""
    tensors = [*call.arguments, *call.writes]
    known = all(isinstance(t, Tensor) and all(isinstance(n, tirx.IntImm) for n in t.shape) for t in tensors)
    if CALLED in call.kernel.attrs or not known:
        return call
    kernel, sized = renew_definitions(call.kernel), {}
    for parameter, tensor in zip(kernel.params, tensors, strict=True):
        own = parameter.ty.shape
        if not all(isinstance(size, tirx.IntImm) for size in own):
            shape = [o if isinstance(o, tirx.IntImm) else n for o, n in zip(own, tensor.shape, strict=True)]
            sized[parameter] = tirx.decl_buffer(shape, parameter.ty.dtype, parameter.name)
    if not sized:
        return call
    shape = "_".join("x".join(str(int(size)) for size in tensor.shape) for tensor in tensors)
    return replace(call, name=f"{call.name}_{shape}", kernel=kernel.specialize(sized))


def _is_empty(tensor: Tensor) -> bool:
    return any(isinstance(size, (int, tirx.IntImm)) and int(size) == 0 for size in tensor.shape)


def _where(tensor: Tensor) -> tuple[str, int, int]:
    """What tells a tensor from others, whatever shape it is seen in."""
    return tensor.block, tensor.offset, tensor.result


def _check_symbols(call: KernelCall) -> None:
    """The only size that is not known is the capacity, and it is not part of another one where a kernel takes it."""
    for parameter, argument in zip(call.kernel.params, [*call.arguments, *call.writes], strict=True):
        for own, given in zip(parameter.ty.shape, argument.shape, strict=True):
            if isinstance(own, tirx.Var) and not isinstance(given, tirx.Var):
                raise UntranslatableError(f"{call.name} takes a size that is not the capacity")


def size_of(expression: Any) -> Size:
    """A size over the one symbol that a program leaves open.

    Raises:
        UntranslatableError: there are several, or it is not linear.
    """
    if isinstance(expression, (int, tirx.IntImm)):
        return Size(int(expression))
    symbols = tirx.analysis.undefined_vars(expression)
    if len(symbols) == 1:
        one, two, many = (size_at(expression, {symbols[0]: n}) for n in (1, 2, 97))
        size = Size(2 * one - two, two - one)
        if size.at(97) == many:
            return size
    raise UntranslatableError(f"a tensor has {expression} elements, which the capacity alone does not decide")
