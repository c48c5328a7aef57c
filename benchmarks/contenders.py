"""What competes in the CPU benchmarks: the generated kernels, their C twins, torch and llama.cpp."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from lbllm_compile.codegen import prove
from lbllm_compile.codegen.backend import bucket_of
from lbllm_compile.codegen.cpu import space as cpu
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.format import quantize_rows
from lbllm_compile.codegen.prove import LinearCase
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.threads import thread_count
from lbllm_compile.codegen.tvm_api import compile_functions, prepared
from torch import Tensor

from lbllm_compile.bench.linears import COLD_BYTES, MOST_COPIES
from lbllm_compile.bench.turns import timed

from . import limits, llama

TRIAL_CALLS = 5
"""Calls that each schedule gets when the best is picked."""


@dataclass(frozen=True)
class Contender:
    """Something that multiplies one matrix.

    Attributes:
        name: as in tables.
        bytes: bytes of one copy of its weights.
        run: makes that many calls, over the copies of the weights in turn, and returns the seconds each took.
    """

    name: str
    bytes: int
    run: Callable[[int], list[float]]


@dataclass(frozen=True)
class Problem:
    """What is multiplied.

    Attributes:
        spec: a W(1+1) linear with 4-bit activations.
        tokens: ``M``.
        cold: whether calls cycle over copies of the weights.
        quick: take the first guess of a schedule instead of timing all.
        case: inputs, weights and expected output.
    """

    spec: LinearSpec
    tokens: int
    cold: bool
    quick: bool
    case: LinearCase

    @classmethod
    def make(cls, rows: int, columns: int, group: int, tokens: int, cold: bool, quick: bool) -> Problem:
        spec = LinearSpec("bit", rows, columns, group, 4)
        return cls(spec, tokens, cold, quick, prove.linear_cases(spec)[0])

    @property
    def values(self) -> Tensor:
        return self._repeated(self.case.values)

    @property
    def x_scale(self) -> Tensor:
        return self._repeated(self.case.x_scale)

    def _repeated(self, rows: Tensor) -> Tensor:
        return rows.repeat(-(-self.tokens // len(rows)), 1)[: self.tokens].contiguous()

    def copies(self, size: int) -> int:
        """How many copies of ``size`` bytes a contender keeps."""
        return max(1, min(MOST_COPIES, -(-COLD_BYTES // size))) if self.cold else 1

    def check(self, name: str, out: Tensor) -> None:
        """Raises an error unless a result is the reference's."""
        known = min(self.tokens, len(self.case.expected))
        if not prove.agree(out[:known], self.case.expected[:known]):
            raise LbllmError(f"{name} gives wrong results")


def generated(problem: Problem, target: Target) -> Iterator[Contender]:
    """Our kernels, one for each weight layout, each with its best schedule for exactly this problem.

    The best comes once more behind the quantizer, whose work other contenders do as part of theirs.
    """
    quantize = _quantizer(problem, target)
    winners: list[tuple[float, Contender]] = []
    bucket = bucket_of(problem.tokens, cpu.BUCKETS)
    for implementation in cpu.implementations(problem.spec, target):
        space = [s for s in implementation.schedules(bucket) if s.parallel == (thread_count() > 1)]
        space = space[:1] if problem.quick else space
        functions = [implementation.function(schedule) for schedule in space]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            libraries = list(pool.map(lambda f: compile_functions({"kernel": f}, target.llvm), functions))
        packed = implementation.pack(problem.case.weight, None)
        copies = [packed, *(packed.clone() for _ in range(problem.copies(packed.numel()) - 1))]
        values, x_scale = problem.values, problem.x_scale
        out = torch.empty(problem.tokens, problem.spec.out_features)
        best: tuple[float, list[Callable[[], None]]] | None = None
        for library in libraries:
            calls = [prepared(library["kernel"], values, x_scale, copy, out) for copy in copies]
            seconds = min(timed(calls)(TRIAL_CALLS))
            problem.check(implementation.layout, out)
            if best is None or seconds < best[0]:
                best = seconds, calls
        assert best
        yield Contender(implementation.layout, packed.numel(), timed(best[1]))
        both = [lambda call=call: (quantize(), call()) for call in best[1]]
        winners.append((best[0], Contender(f"quantizer + {implementation.layout}", packed.numel(), timed(both))))
    yield min(winners, key=lambda winner: winner[0])[1]


def _quantizer(problem: Problem, target: Target) -> Callable[[], None]:
    """A call of the quantizer of this problem's activations."""
    spec = QuantizeSpec(problem.spec.in_features, problem.spec.group, 4)
    parallel = thread_count() > 1 < problem.tokens
    library = compile_functions({"quantize": cpu.quantizer(spec, target, parallel)}, target.llvm)
    x = torch.randn(problem.tokens, spec.in_features, generator=torch.Generator().manual_seed(0))
    return prepared(
        library["quantize"], x, torch.ones(2), torch.empty_like(problem.values), torch.empty_like(problem.x_scale)
    )


def twins(problem: Problem, target: Target) -> Iterator[Contender]:
    """The C twins, each with its best prefetch distance."""
    for implementation in cpu.implementations(problem.spec, target):
        kernel = implementation.layout if problem.tokens == 1 else "gemm"
        if problem.tokens > 1 and implementation.layout != "lut8":
            continue
        packed = implementation.pack(problem.case.weight, None)
        copies = [packed, *(packed.clone() for _ in range(problem.copies(packed.numel()) - 1))]
        values, x_scale = problem.values, problem.x_scale
        out = torch.empty(problem.tokens, problem.spec.out_features)

        def run(
            calls: int, prefetch: int, kernel=kernel, values=values, x_scale=x_scale, copies=copies, out=out
        ) -> list[float]:
            return limits.times(kernel, problem.spec.group, values, x_scale, copies, out, calls, prefetch)

        seconds = {prefetch: min(run(TRIAL_CALLS, prefetch)) for prefetch in limits.PREFETCHES}
        problem.check(f"the C twin of {kernel}", out)
        best = min(seconds, key=seconds.__getitem__)
        yield Contender(f"C {kernel}", packed.numel(), lambda calls, run=run, best=best: run(calls, best))


def torch_contenders(problem: Problem) -> Iterator[Contender]:
    """Dense products by torch: fp32, bf16, int8 activations times int8, and its dynamically quantized linear."""
    n, k = problem.spec.out_features, problem.spec.in_features
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator)
    x = torch.randn(problem.tokens, k, generator=generator)
    for name, dtype in (("torch fp32", torch.float32), ("torch bf16", torch.bfloat16)):
        cast = weight.to(dtype)
        size = cast.numel() * cast.element_size()
        matrices = [cast, *(cast.clone() for _ in range(problem.copies(size) - 1))]
        inputs = x.to(dtype)
        calls = [lambda w=w, inputs=inputs: torch.nn.functional.linear(inputs, w) for w in matrices]
        yield Contender(name, size, timed(calls))
    rows, scale = quantize_rows(weight)
    matrices = [rows, *(rows.clone() for _ in range(problem.copies(n * k) - 1))]
    values = problem.values
    yield Contender("torch int8", n * k, timed([lambda w=w: torch._int_mm(values, w.T) for w in matrices]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of this module
        from torch.ao.nn.quantized.dynamic import Linear

        stored = torch.quantize_per_channel(weight, scale.double(), torch.zeros(n, dtype=torch.long), 0, torch.qint8)
        modules = []
        for _ in range(problem.copies(n * k)):
            modules.append(Linear(k, n, bias_=False))
            modules[-1].set_weight_bias(stored, None)
    yield Contender("torch dynamic int8", n * k, timed([lambda m=m: m(x) for m in modules]))


def ggml_contenders(problem: Problem) -> Iterator[Contender]:
    """llama.cpp's product of its ternary type, the one nearest to two bits that has vector code.

    It quantizes the activations, too.
    """
    n, k = problem.spec.out_features, problem.spec.in_features
    if k % llama.BLOCK:
        return
    size = llama.row_bytes("tq2_0", k) * n
    products = llama.Products([("tq2_0", n, k)], problem.tokens, problem.copies(size), thread_count())
    yield Contender("llama.cpp TQ2_0", size, timed(products.calls))


def contenders(problem: Problem, target: Target) -> list[Contender]:
    """Everything that can compete on this machine; :func:`absent` says what cannot."""
    found = list(generated(problem, target))
    if not limits.missing() and problem.spec.group in limits.GROUPS:
        found += twins(problem, target)
    found += torch_contenders(problem)
    if not llama.missing():
        found += ggml_contenders(problem)
    return found


def absent() -> list[str]:
    """What is left out on this machine, and why."""
    reasons = {"C twins": limits.missing(), "llama.cpp": llama.missing()}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason]
