"""Kernels for tests of what stands above them: built and proven as for a user, each once in a process."""

from __future__ import annotations

import functools

from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.passes.ir.program import Program

from lbllm_compile.lowering.executor import requirements

CPU = Target.parse("cpu")


@functools.cache
def _proven(spec: LinearSpec | QuantizeSpec) -> KernelSet:
    linears, quantizers = ([spec], []) if isinstance(spec, LinearSpec) else ([], [spec])
    return KernelSet.build(linears, quantizers, CPU, trials=0)


def kernels_of(program: Program) -> KernelSet:
    """The kernels that a lowered program takes on this machine."""
    needed = requirements(program)
    linears = {spec: _proven(spec).linear(spec) for spec in needed.linears}
    quantizers = {spec: _proven(spec).quantizer(spec) for spec in needed.quantizers}
    records = [record for spec in needed.linears for record in _proven(spec).records()]
    return KernelSet(CPU, linears, quantizers, records, {}, 0)
