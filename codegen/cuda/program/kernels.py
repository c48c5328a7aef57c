"""The kernels of a program: how the translation of a graph calls them, and what is launched for a call.

To the translation a kernel is a TIR function without a body, whose parameters say what a call takes and gives. What it
stands for, a CUDA text and how its parameters get their arguments, is kept beside it (:class:`Called`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...backend import TirKernel
from ...errors import KernelError, UntranslatableError
from ...format import TABLE_LEVELS, Int4Weight, QuantizedWeight, Weight
from ...sizes import group_count
from ...spec import AttentionSpec, ConvolutionSpec, EmbeddingSpec, LinearSpec, QuantizeSpec
from ...targets import Target
from ...tvm_api import PrimFunc, cuda_source, symbolic_dimension, tirx
from ..dp4a import (
    ROWS,
    GemvSchedule,
    gemv,
    gemv_schedules,
    pack_weight,
    pitch,
)
from ..gemm import ManySchedule, gemm, gemm_schedules
from ..kernel import Form, kernel_name
from ..limits import WARP
from ..quantize import quantize, quantize_schedules
from ..text import begun, signature
from . import attention as of_attention
from . import choice, computed, elementary, heads
from .experts import gemv_by_expert
from .launches import PART, TOKEN, Number, Size

CAPACITY = Size(0, 1)
"""The slots of the KV state."""

_NUMBER_BYTES = {"int": 4, "int64_t": 8}

_VARIANTS: Mapping[Form, str] = {"gemv": r"(?:_\d+_of_\d+_experts)?", "gemm": r"_\d+"}
"""What follows the name of a linear in those of its kernels: nothing, or how many experts; the tokens of a tile."""

CALLED = "lbllm.cuda"
"""The attribute of a declared kernel: its name in :attr:`ProgramKernels.called`."""


@dataclass(frozen=True)
class Called:
    """What is launched where a program calls a kernel.

    Attributes:
        name: the kernel's own.
        function: a TIR function with thread bindings.
        names: of its buffers, in the order of a call: arguments and, behind those, results.
        block: threads along x, y, z.
        work: items that a launch shares out.
        per_block: items of a thread block.
        number: what it is passed by value, if anything.
        quantizer: what it computes, where that is a quantizer.
        of_rows: what is launched for so many rows of its first argument, where that decides.
        first: what is launched in front of it, on some of the same arguments and results.
        leaves: shapes and dtypes, by name, of results besides those of the call, for ``behind``.
        behind: what is launched behind it, on some of the same arguments and results.
        beyond: a capacity, and what is launched in its place where the KV state has more slots.
    """

    name: str
    function: PrimFunc
    names: Sequence[str]
    block: tuple[int, int, int]
    work: Size
    per_block: int = 1
    number: Size = CAPACITY
    quantizer: QuantizeSpec | None = None
    of_rows: Callable[[int], Called] | None = None
    first: Called | None = None
    leaves: Mapping[str, tuple[Sequence[int], str]] = field(default_factory=dict)
    behind: Called | None = None
    beyond: tuple[int, Called] | None = None

    def forms(self) -> list[tuple[Called, tuple[int, int | None]]]:
        """What is launched, itself first, and for which capacities: above the first number, up to the second one where
        there is one."""
        forms, form, above = list[tuple[Called, tuple[int, int | None]]](), self, 0
        while form.beyond is not None:
            most, other = form.beyond
            forms.append((form, (above, most)))
            form, above = other, most
        return [*forms, (form, (above, None))]

    def order(self, source: str) -> tuple[int | Number, ...]:
        """By parameter of its text: which of a call's arguments and results it is, or what is passed by value.

        Raises:
            KernelError: the text takes a number of an unknown type.
        """
        head = signature(source)
        order: list[int | Number] = []
        for parameter in head.parameters:
            if parameter.pointer:
                order.append(self.names.index(parameter.name))
            elif parameter.ctype in _NUMBER_BYTES:
                order.append(Number(self.number, _NUMBER_BYTES[parameter.ctype]))
            else:
                raise KernelError(f"{head.symbol} takes a number of the unknown type {parameter.ctype}")
        return tuple(order)


class ProgramKernels:
    """Implements :class:`...backend.Kernels` for programs of :data:`~.launches.TOKEN` and :data:`~.launches.PART` on
    NVIDIA GPUs.

    Attributes:
        called: by name, what stands behind the functions that the translation was given.
        linears, quantizers: what the translation has asked for.

    Args:
        target: the architecture; kernels' text is the same for all.
    """

    guessed = 0

    def __init__(self, target: Target):
        self.target = target
        self.called: dict[str, Called] = {}
        self.linears: dict[LinearSpec, ProgramLinear] = {}
        self.quantizers: dict[QuantizeSpec, ProgramQuantizer] = {}
        self._attentions: dict[AttentionSpec, str] = {}
        self._makers: dict[str, Callable[[], Called]] = {}
        self._given_up: dict[tuple[LinearSpec, Form], int] = {}
        self._undivided: set[AttentionSpec] = set()

    def declared(
        self, name: str, parameters: Mapping[str, tuple[Sequence[Any], str]], make: Callable[[], Called]
    ) -> TirKernel:
        """A kernel as the translation takes it.

        Args:
            name: its own.
            parameters: shapes and dtypes by name, in the order of a call.
            make: generates what stands behind it.
        """

        def function() -> Any:
            self.called[name], self._makers[name] = make(), make
            buffers = [tirx.decl_buffer([*shape], dtype, key) for key, (shape, dtype) in parameters.items()]
            empty: Any = PrimFunc(buffers, tirx.Evaluate(tirx.const(0, "int32")))
            return empty.with_attr({"s_tir": True, CALLED: name})

        return TirKernel(name, function)

    def cut(self, spec: LinearSpec) -> GemvSchedule:
        """How a linear's kernel of one token is cut."""
        return gemv_schedules(spec)[self._given_up.get((spec, "gemv"), 0)]

    def tile(self, spec: LinearSpec, rows: int) -> ManySchedule:
        """How a linear's kernel for several rows is cut.

        Raises:
            UntranslatableError: no such kernel takes so many.
        """
        tiles = gemm_schedules(spec, rows)[self._given_up.get((spec, "gemm"), 0) :]
        if not tiles:
            raise UntranslatableError(f"CUDA programs have no kernel for a linear of {rows} rows at once")
        return tiles[0]

    def give_up(self, symbols: Collection[str]) -> bool:
        """Takes the next schedule of the kernels of linears, those of experts among them, that have one of these
        symbols, and shares the keys of no attention out whose kernels for that have one.

        Returns:
            Whether there was anything to take instead for any.
        """
        left: dict[tuple[LinearSpec, Form], int] = {}
        for spec in self.linears:
            forms: Mapping[Form, int] = {
                "gemv": len(gemv_schedules(spec)),
                "gemm": len(gemm_schedules(spec, PART.length)),
            }
            for form, count in forms.items():
                following = self._given_up.get((spec, form), 0) + 1
                own = re.compile(re.escape(kernel_name(spec, form)) + _VARIANTS[form] + "_kernel")
                if following < count and any(own.fullmatch(symbol) for symbol in symbols):
                    left[spec, form] = following
        self._given_up |= left
        for_shares = {spec: (f"{name}_split_", f"{name}_merge_") for spec, name in self._attentions.items()}
        shared = {spec for spec, own in for_shares.items() if any(symbol.startswith(own) for symbol in symbols)}
        self._undivided |= shared
        self.called |= {name: self._makers[name]() for name in self.called} if left or shared else {}
        return bool(left or shared)

    def linear(self, spec: LinearSpec) -> ProgramLinear:
        return self.linears.setdefault(spec, ProgramLinear(spec, self))

    def quantizer(self, spec: QuantizeSpec) -> ProgramQuantizer:
        return self.quantizers.setdefault(spec, ProgramQuantizer(spec, self))

    def attention(self, spec: AttentionSpec, queries: int | None, parallel: bool) -> TirKernel:
        if queries is None:
            raise UntranslatableError("CUDA programs have no attention of any number of tokens")
        capacity = tirx.Var("capacity", "int64")
        whole = spec.bits == 16
        code_type, parameter_type = ("float16" if whole else "uint8"), "float16"
        state = {}
        for name, width in (("key", spec.key_width), ("value", spec.value_width)):
            stored = spec.stored(width)
            state[f"{name}_codes"] = (1, spec.kv_heads, capacity, stored), code_type
            state[f"{name}_params"] = (1, spec.kv_heads, capacity, stored if whole else 2), parameter_type
        parameters = {
            "query": ((1, spec.heads, queries, spec.key_width), "float32"),
            "key": ((1, spec.kv_heads, queries, spec.key_width), "float32"),
            "value": ((1, spec.kv_heads, queries, spec.value_width), "float32"),
            **state,
            "key_mask": ((1, capacity), "int64"),
            "past": ((1 if queries == 1 else 2,), "int32"),
            **({"sinks": ((spec.heads,), "float32"), "slopes": ((spec.heads,), "float32")} if spec.per_head else {}),
            "out": ((1, spec.heads, queries, spec.value_width), "float32"),
        }
        name = self._attentions.setdefault(spec, f"attention_{len(self._attentions)}")
        names, block = [*parameters], (heads.THREADS, 1, 1)
        split = heads.split_of(spec, (self.target.arch or "").replace("compute", "sm"))

        def of_token() -> Called:
            whole = Called(name, of_attention.attention(spec), names, block, Size(spec.kv_heads))
            if split.shares == 1 or spec in self._undivided:
                return whole
            leaves = {"shares": (split.left(spec), "float32")}
            function, work = of_attention.merge(spec, split), Size(spec.heads)
            merge = Called(f"{name}_merge", function, ["past", *leaves, "out"], block, work)
            function, work = of_attention.split_attention(spec, split), Size(spec.kv_heads * split.shares)
            taken = [*names[:-1], *leaves]
            shared = Called(f"{name}_split", function, taken, block, work, leaves=leaves, behind=merge)
            return replace(whole, beyond=(split.undivided, shared))

        def of_part() -> Called:
            function, work = of_attention.append_part(spec, queries), Size(spec.kv_heads * queries)
            append = Called(f"{name}_append", function, names, block, work)
            function, work = of_attention.attend_part(spec, queries), Size(spec.heads * queries)
            return Called(f"{name}_part", function, names, block, work, first=append)

        if queries == 1:
            return self.declared(name, parameters, of_token)
        return self.declared(f"{name}_part", parameters, of_part)

    def embedding(self, spec: EmbeddingSpec) -> TirKernel:
        name, tokens = f"embedding_{spec}", symbolic_dimension("tokens")
        table = {"rows": ((spec.rows, spec.columns), "int8"), "scale": ((spec.rows,), "float32")}
        if spec.group:
            table = {
                "codes": ((spec.rows, (spec.columns + 1) // 2), "uint8"),
                "levels": ((TABLE_LEVELS,), "int8"),
                "scale": ((spec.rows, group_count(spec.columns, spec.group)), "float16"),
            }
        parameters = {
            **table,
            "ids": ((1, tokens), "int64"),
            "out": ((1, tokens, spec.columns), "float32"),
        }
        block = elementary.THREADS, 1, 1

        def of_tokens(count: int) -> Called:
            own, blocks = name if count == 1 else f"{name}_{count}", -(-spec.columns // elementary.THREADS)
            return Called(own, elementary.embedding(spec, count), [*parameters], block, Size(count * blocks))

        return self.declared(name, parameters, lambda: replace(of_tokens(1), of_rows=of_tokens))

    def next_token(self, vocabulary: int) -> Called:
        """The kernel that ends a step."""
        block = (choice.threads(vocabulary), 1, 1)
        return Called("next_token", choice.next_token(vocabulary), choice.PARAMETERS, block, Size(1))

    def dense(self, rows: int, columns: int, one_token: bool) -> TirKernel:
        name = f"dense_{rows}x{columns}"

        def by_expert(matrices: Sequence[Sequence[int]], count: int) -> TirKernel:
            experts = int(matrices[0][0])
            return TirKernel(f"{name}_{experts}_experts", lambda: computed.dense_by_expert(experts, rows, columns))

        return TirKernel(name, lambda: computed.dense(rows, columns), by_expert)

    def order(self, dtype: str, descending: bool, parallel: bool) -> TirKernel:
        name = f"order_{'descending' if descending else 'ascending'}_{dtype}"
        return TirKernel(name, lambda: computed.order(dtype, descending))

    def scatter(self, dtype: str, adds: bool, parallel: bool) -> TirKernel:
        name = f"scatter_{'add_' if adds else ''}{dtype}"
        return TirKernel(name, lambda: computed.scatter(dtype, adds))

    def convolution(self, spec: ConvolutionSpec, parallel: bool) -> NoReturn:
        raise UntranslatableError("CUDA programs have no kernel for short convolutions")

    def text(self, called: Called) -> str:
        """A kernel's CUDA text."""
        return begun(cuda_source(called.function, called.name, self.target.arch or ""))

    def records(self) -> list[dict[str, Any]]:
        """No schedule is searched."""
        return []

    def sources(self) -> dict[str, str]:
        return {name: self.text(found) for name, found in self.called.items()}


@dataclass(frozen=True)
class ProgramLinear:
    """The kernel of one linear for one token."""

    spec: LinearSpec
    kernels: ProgramKernels = field(repr=False)

    def pack(self, weight: Weight, bias: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors that the kernel reads."""
        packed = pack_weight(weight, self.spec.group)
        return packed if bias is None else {**packed, "bias": bias.detach().float().contiguous()}

    def __call__(self, values: Tensor, x_scale: Tensor, packed: Mapping[str, Tensor]) -> NoReturn:
        raise KernelError("CUDA kernels are launched by programs, not on tensors")

    def of_tile(self, tile: ManySchedule) -> str:
        """That kernel's name."""
        return f"{kernel_name(self.spec, 'gemm')}_{tile.tokens}"

    def tir(self, bucket: str) -> TirKernel:
        """``(values, x_scale, *packed, out)``, for any number of rows where the bucket is not of one."""
        spec, own = self.spec, self._packed_shapes()
        rows = 1 if bucket == TOKEN.bucket else symbolic_dimension("rows")
        parameters = {
            "values": ((rows, pitch(spec.in_features)), "int8"),
            "x_scale": ((rows, spec.x_scales), "float32"),
            **own,
            "output": ((rows, spec.out_features), "float32"),
        }
        name, work = kernel_name(spec, "gemv"), Size(spec.out_features)

        def block(cut: GemvSchedule) -> tuple[int, int, int]:
            return ROWS, cut.row_warps * cut.slice_warps, 1

        def make() -> Called:
            cut = self.kernels.cut(spec)
            return Called(name, gemv(spec, cut), [*parameters], block(cut), work, ROWS * cut.row_warps)

        def of_rows(count: int) -> Called:
            if count == 1:
                return make()
            tile = self.kernels.tile(spec, count)
            function, threads = gemm(spec, tile), (*tile.threads, 1)
            return Called(self.of_tile(tile), function, [*parameters], threads, work, tile.rows, number=Size(count))

        def by_expert(matrices: Sequence[Sequence[int]], rows: int) -> TirKernel:
            packed = {key: (shape, dtype) for (key, (_, dtype)), shape in zip(own.items(), matrices, strict=True)}
            experts = f"{name}_{rows}_of_{matrices[0][0]}_experts"
            places = ("values", "x_scale", "output")
            of_rows = {key: ((rows, parameters[key][0][1]), parameters[key][1]) for key in places}
            output = of_rows.pop("output")
            given = {**of_rows, **packed, "offsets": ((matrices[0][0],), "int32"), "output": output}

            def made() -> Called:
                cut = self.kernels.cut(spec)
                function = gemv_by_expert(gemv(spec, cut), {key: shape for key, (shape, _) in packed.items()}, rows)
                blocks = -(-spec.out_features // (ROWS * cut.row_warps))
                return Called(experts, function, [*given], block(cut), Size(rows * blocks))

            return self.kernels.declared(experts, given, made)

        if rows == 1:
            return replace(self.kernels.declared(name, parameters, make), by_expert=by_expert)
        many = self.kernels.declared(f"{name}_rows", parameters, lambda: replace(make(), of_rows=of_rows))
        return replace(many, by_expert=by_expert)

    def _packed_shapes(self) -> dict[str, tuple[Sequence[int], str]]:
        """Shapes and dtypes of what :meth:`pack` gives."""
        spec = self.spec
        with torch.device("meta"):
            if spec.kind == "bit":
                given: Any = QuantizedWeight(
                    torch.empty((spec.out_features, -(-spec.in_features // 8)), dtype=torch.uint8),
                    torch.empty((spec.out_features, -(-spec.in_features // 8)), dtype=torch.uint8),
                    torch.empty((spec.out_features, spec.groups, 4), dtype=torch.int8),
                    torch.empty((spec.out_features, spec.groups), dtype=torch.float16),
                    spec.in_features,
                    spec.group,
                )
            elif spec.kind == "int4":
                given = Int4Weight(
                    torch.empty((spec.out_features, -(-spec.in_features // 2)), dtype=torch.uint8),
                    torch.empty((TABLE_LEVELS,), dtype=torch.int8),
                    torch.empty((spec.out_features, spec.groups), dtype=torch.float16),
                    spec.in_features,
                    spec.group,
                )
            else:
                rows = torch.empty((spec.out_features, spec.in_features), dtype=torch.int8)
                given = rows, torch.empty((spec.out_features,), dtype=torch.float32)
            bias = torch.empty((spec.out_features,)) if spec.bias else None
            packed = self.pack(given, bias)
        return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in packed.items()}


@dataclass(frozen=True)
class ProgramQuantizer:
    """The kernel of one quantizer for one token."""

    spec: QuantizeSpec
    kernels: ProgramKernels = field(repr=False)

    def __call__(self, x: Tensor, clip: Tensor, *shape: Tensor) -> NoReturn:
        raise KernelError("CUDA kernels are launched by programs, not on tensors")

    def tir(self, parallel: bool) -> TirKernel:
        """``(x, clip, [shape,] values, scale)``; behind a row's values are zeros, as the linears read them."""
        spec, rows = self.spec, symbolic_dimension("rows")
        parameters = {
            "x": ((rows, spec.in_features), "float32"),
            "clip": ((2,), "float32"),
            **({"shape": ((spec.shape_size,), "float32")} if spec.tabled else {}),
            "values": ((rows, pitch(spec.in_features)), "int8"),
            "scale": ((rows, spec.scales), "float32"),
        }
        name, cut = kernel_name(spec, "quantize"), quantize_schedules(spec)[0]
        block = WARP, cut.warps, 1

        def make() -> Called:
            return of_rows(1)

        def of_rows(count: int) -> Called:
            rows = Size(count)
            function = quantize(spec, cut)
            return Called(name, function, [*parameters], block, rows, number=rows, quantizer=spec, of_rows=of_rows)

        return self.kernels.declared(name, parameters, make)
