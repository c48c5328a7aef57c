"""The distinct linears of a program, each timed by itself: its kernels, and torch's product of the same shape.

    python -m lbllm_compile.bench.linears      # reads a JSON request from stdin, answers with lines of JSON

Calls cycle over copies of the weights, more than caches hold, because that is how decoding reads them. The time of a
quantized linear includes quantizing its input, although linears that read the same input share that in a program.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbllm_compile import artifact
from lbllm_compile.bench import turns
from lbllm_compile.bench.turns import Runs, Spread
from lbllm_compile.codegen import prove
from lbllm_compile.codegen.backend import Kernels, TirKernel, backend_of, bucket_of
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.progress import Progress
from lbllm_compile.codegen.reference import value_dtype
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.threads import one_torch_thread, thread_count
from lbllm_compile.codegen.tune import worker
from lbllm_compile.codegen.tune.machine import ThisMachine
from lbllm_compile.codegen.tune.roofline import Roofline
from lbllm_compile.codegen.tvm_api import compile_functions, prepared
from lbllm_compile.lowering.executor import linear_spec, quantize_spec, quantizer_of
from lbllm_compile.lowering.session import FEW_TOKENS
from lbllm_compile.native.program import find
from lbllm_compile.passes.ir.annotations import LINEAR, LinearInfo
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import INTEGER_LINEARS, LINEARS, constant, is_constant, operands_of
from lbllm_compile.report.terminal import make_console, make_progress
from lbllm_compile.runtime.loader import build_kernels

MODULE = "lbllm_compile.bench.linears"

COLD_BYTES = 208 << 20
"""Bytes of weights that calls cycle over, more than last-level caches hold."""

MOST_COPIES = 1024

OWN, KERNEL, DENSE = "own", "kernel", "dense"
"""Contenders that are the model's own: a whole linear, one without quantizing its input, and one that stays float."""

Call = Callable[[], object]

TORCH_DTYPES = {"torch": torch.float32, "torch-bf16": torch.bfloat16}
"""Contenders of torch: what they compute in."""


class Floats(enum.Enum):
    """What computes the linears that stay float."""

    KERNELS = enum.auto()
    """Generated kernels of a native program."""
    SESSION = enum.auto()
    """Torch in a language model without one, where few tokens have one of its threads."""
    TORCH = enum.auto()
    """Torch in another module."""

    @classmethod
    def of(cls, kind: str, native: bool) -> Floats:
        """Of a model of this :attr:`.Program.kind`.

        Args:
            kind: the program's.
            native: it runs as a native program.
        """
        if native:
            return cls.KERNELS
        return cls.SESSION if kind == "causal-lm" else cls.TORCH


@dataclass(frozen=True)
class Linear:
    """A linear and how it is computed.

    Attributes:
        rows, columns: of its matrix.
        spec, quantizer: its kernels'; None where it stays float.
    """

    rows: int
    columns: int
    spec: LinearSpec | None = None
    quantizer: QuantizeSpec | None = None

    def __str__(self) -> str:
        """In what it is computed, e.g. ``W(1+1) g64, A4``."""
        if self.spec is None or self.quantizer is None:
            return "float"
        table = " with knees" if self.quantizer.knees else " with planes" if self.quantizer.planes else ""
        return f"{self.spec.weights}, A{self.quantizer.bits}{table}"


def distinct(program: Program) -> dict[Linear, list[LinearInfo]]:
    """The linears of a lowered program that differ in how they are computed, each with those that are computed so."""
    found: dict[Linear, list[LinearInfo]] = {}
    for node in program.graph.nodes:
        info = node.meta.get(LINEAR)
        if info is None:
            continue
        if node.target in INTEGER_LINEARS:
            spec = linear_spec(program, node)
            linear = Linear(spec.out_features, spec.in_features, spec, quantize_spec(quantizer_of(node)))
        elif node.target in LINEARS and is_constant(operands_of(node)[1]):
            linear = Linear(*constant(program.module, operands_of(node)[1]).shape[-2:])
        else:
            continue
        found.setdefault(linear, []).append(info)
    return found


def names(infos: Sequence[LinearInfo]) -> list[str]:
    """Paths of linears with a star for the number of their layer, each once."""
    return list(dict.fromkeys(i.path if i.layer is None else i.path.replace(f".{i.layer}.", ".*.", 1) for i in infos))


class Timer:
    """Times linears in this process.

    Args:
        kernels: cover the linears.
        floats: what computes those that stay float.
        quick: too short to mean anything.
    """

    def __init__(self, kernels: Kernels, floats: Floats, quick: bool = False):
        self._kernels = kernels
        self._floats = floats
        self._quick = quick
        self._backend = backend_of(kernels.target)
        self._compiled: dict[str, Any] = {}
        self._limits: dict[int, Roofline] = {}

    @torch.no_grad()
    def times(self, linear: Linear, tokens: int, against: Sequence[str] = ()) -> dict[str, Spread]:
        """Seconds of a call with so many tokens: :data:`OWN`, :data:`KERNEL` where that differs, and contenders.

        Args:
            linear: what is computed.
            tokens: at once.
            against: of :data:`TORCH_DTYPES`.
        """
        runs = dict(self._own(linear, tokens))
        for name in against:
            runs[name] = turns.timed(self._torch(linear, tokens, TORCH_DTYPES[name]))
        return self._in_turns(runs)

    @torch.no_grad()
    def against_dense(self, linear: Linear, parts: Sequence[Linear], tokens: int) -> dict[str, Spread]:
        """Seconds of a call with so many tokens: :data:`OWN`, and :data:`DENSE`, all of its parts in float.

        Args:
            linear: what is computed.
            parts: linears that it can be computed by, one after the other.
            tokens: at once.
        """
        runs = dict(self._own(linear, tokens))
        return self._in_turns({OWN: runs[OWN], DENSE: self._float(parts, tokens)})

    def computed(self, linear: Linear) -> str:
        """How a linear is computed, e.g. ``W(1+1) g64, A4`` or ``float in torch``."""
        return f"{linear} in torch" if linear.spec is None and self._floats is not Floats.KERNELS else str(linear)

    def _in_turns(self, runs: Mapping[str, Runs]) -> dict[str, Spread]:
        return {name: Spread.of(taken) for name, taken in turns.alternate(runs, self._quick).items()}

    def _own(self, linear: Linear, tokens: int) -> Iterator[tuple[str, Runs]]:
        """What computes the linear in the model."""
        spec, quantizer = linear.spec, linear.quantizer
        if spec is None or quantizer is None:
            yield OWN, self._float([linear], tokens)
            return
        case = prove.linear_cases(spec)[0]
        kernel = self._kernels.linear(spec)
        function = self._function(kernel.tir(bucket_of(tokens, self._backend.space().buckets).name))
        values = torch.empty(tokens, spec.in_features, dtype=value_dtype(quantizer.value_bits))
        scale = torch.empty(tokens, quantizer.scales)
        x, *factors = next(prove.quantizer_inputs(quantizer))
        quantize = prepared(
            self._function(self._kernels.quantizer(quantizer).tir(parallel=tokens > 1)),
            _repeated(x, tokens),
            *factors,
            values,
            scale,
        )
        quantize()
        packed = tuple(kernel.pack(case.weight, case.bias).values())
        out = torch.empty(tokens, spec.out_features)
        calls = [prepared(function, values, scale, *copy, out) for copy in self._copies(packed)]
        both: list[Call] = [lambda call=call: (quantize(), call()) for call in calls]
        yield OWN, turns.timed(both)
        yield KERNEL, turns.timed(calls)

    def _float(self, linears: Sequence[Linear], tokens: int) -> Runs:
        """Linears that stay float, one after the other, as the model computes them."""
        if self._floats is Floats.KERNELS:
            calls = [self._dense(linear, tokens) for linear in linears]
        else:
            calls = [self._torch(linear, tokens, torch.float32) for linear in linears]
        runs = turns.timed([functools.partial(_call_all, together) for together in zip(*calls, strict=False)])
        return _on_one_thread(runs) if self._floats is Floats.SESSION and tokens <= FEW_TOKENS else runs

    def _dense(self, linear: Linear, tokens: int) -> list[Call]:
        """Calls of the generated kernel of a linear that stays float, each with a copy of its weights."""
        function = self._function(self._kernels.dense(linear.rows, linear.columns, tokens == 1))
        x, weight = _random(tokens, linear.columns), _random(linear.rows, linear.columns)
        out = torch.empty(tokens, linear.rows)
        return [prepared(function, x, *copy, out) for copy in self._copies((weight,))]

    def _torch(self, linear: Linear, tokens: int, dtype: torch.dtype) -> list[Call]:
        """Calls of torch's product of the same shape in a type, each with a copy of its weights."""
        x, weight = _random(tokens, linear.columns).to(dtype), _random(linear.rows, linear.columns).to(dtype)
        bias = torch.ones(linear.rows, dtype=dtype) if linear.spec is not None and linear.spec.bias else None
        product = torch.nn.functional.linear
        return [lambda w=w: product(x, w, bias) for (w,) in self._copies((weight,))]

    def roofline(self, linear: Linear, tokens: int) -> float | None:
        """Least seconds of the kernel's call, as the machine is measured here; None where that is not known."""
        spec = linear.spec
        if not self._backend.searches or (spec is None and tokens > 1):
            return None
        limits = self._machine(spec.act_bits if spec else 0)
        if tokens > 1 and limits.products is None:
            return None
        size = 4 * linear.rows * linear.columns
        if spec is not None:
            case = prove.linear_cases(spec)[0]
            size = sum(tensor.nbytes for tensor in self._kernels.linear(spec).pack(case.weight, case.bias).values())
        read = size if size * MOST_COPIES >= COLD_BYTES else 0  # else copies stay in caches, whose limit is not known
        least = limits.microseconds(read, linear.rows * linear.columns * tokens if tokens > 1 else 0)
        return 1e-6 * least if least else None

    def _machine(self, act_bits: int) -> Roofline:
        """What this machine can do at best with values of so many bits; 0 where nothing is multiplied in integers."""
        if act_bits not in self._limits:
            session, target = ThisMachine(), self._kernels.target.name
            products = worker.measure_products(session, target, act_bits) if act_bits else None
            known = next(iter(self._limits.values()), None)
            bandwidth = known.bandwidth if known else worker.measure_bandwidth(session, target)
            self._limits[act_bits] = Roofline(bandwidth, products)
        return self._limits[act_bits]

    def _function(self, kernel: TirKernel) -> Any:
        """A compiled kernel."""
        if kernel.name not in self._compiled:
            library = compile_functions({kernel.name: kernel.make()}, self._kernels.target.llvm)
            self._compiled[kernel.name] = library[kernel.name]
        return self._compiled[kernel.name]

    def _copies(self, weights: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """The weights and as many copies as take :data:`COLD_BYTES` together."""
        size = sum(tensor.nbytes for tensor in weights)
        count = 1 if self._quick else min(MOST_COPIES, -(-COLD_BYTES // size))
        return [weights, *(tuple(tensor.clone() for tensor in weights) for _ in range(count - 1))]


def _call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _on_one_thread(runs: Runs) -> Runs:
    def run(count: int) -> list[float]:
        with one_torch_thread():
            return runs(count)

    return run


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _repeated(rows: Tensor, count: int) -> Tensor:
    return rows.repeat(-(-count // len(rows)), 1)[:count].contiguous()


@dataclass(frozen=True)
class Request:
    """What to time.

    Attributes:
        directory: the artifact.
        target: what it runs on.
        tokens: at once, each a measurement of its own.
        against: of :data:`TORCH_DTYPES`.
        quick: too short to mean anything.
    """

    directory: str
    target: str
    tokens: tuple[int, ...]
    against: tuple[str, ...]
    quick: bool = False


def rows(request: Request, progress: Progress) -> Iterator[Mapping[str, Any]]:
    """First the artifact's facts, ``linears`` being the number of rows; then a row a distinct linear and number of
    tokens, JSON-able, whose times are in seconds. A language model whose native program is not stored yet counts as one
    without.

    Raises:
        ArtifactError, KernelError: the artifact cannot be loaded or run.
    """
    loaded = artifact.load(request.directory)
    program = loaded.program
    kernels = build_kernels(loaded, request.target, progress)
    found = distinct(program)
    yield {"linears": len(found) * len(request.tokens)}
    native = find(loaded.directory, request.target, progress) is not None
    timer = Timer(kernels, Floats.of(program.kind, native), request.quick)
    for linear, infos in found.items():
        for tokens in request.tokens:
            times = timer.times(linear, tokens, request.against)
            least = timer.roofline(linear, tokens)
            yield {
                "linears": names(infos),
                "count": sum(info.matrices for info in infos),
                "shape": f"{linear.rows}x{linear.columns}",
                "computed": timer.computed(linear),
                "tokens": tokens,
                "seconds": {name: dataclasses.asdict(spread) for name, spread in times.items()},
                "roofline_seconds": least,
                "roofline_share": least and least / times.get(KERNEL, times[OWN]).median,
            }


def main() -> None:
    """Answers one request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    replies, sys.stdout = sys.stdout, sys.stderr
    fields = json.loads(sys.stdin.readline())
    request = Request(**{**fields, "tokens": tuple(fields["tokens"]), "against": tuple(fields["against"])})
    torch.set_num_threads(thread_count())
    try:
        for row in rows(request, make_progress(make_console(stderr=True))):
            print(json.dumps(row), file=replies, flush=True)
    except LbllmError as error:
        print(json.dumps({"failure": str(error)}), file=replies, flush=True)


if __name__ == "__main__":
    main()
