"""Times all linears of decoder layers inside one launched program, against llama.cpp's products of them in one graph.

    python -m benchmarks.cpu_layer [--width 576 --heads 9 --kv-heads 3 --inner 1536 --group 64] [--threads 1 2]

One token. Ours: for each layer the quantizers and the linears query-key-value, output, gate-up and down, each fed by
the one before and the first by the same input, without what lies between in a model. llama.cpp: the same products,
independent of each other, in one graph, in the types that its quantizer gives the matrices of a TQ2_0 file: where 256
does not divide the columns that is Q4_0. *hot* is one layer again and again, *cold* is layers of 200 MB in all. Times
are per layer.

Last comes what a linear costs that is called from Python by itself: the time of a call of the smallest one, nearly all
of which is the call. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lbllm_compile.codegen.cpu.machine import aligned
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.threads import in_words, thread_count
from rich.table import Table

from lbllm_compile.bench import turns

from . import harness, llama

OWN, THEIRS = "generated", "llama.cpp TQ2_0"

CALL_COUNT = 2000
"""Calls of the smallest linear in a measurement."""


@dataclass(frozen=True)
class Shape:
    """A decoder layer of the LLaMA kind.

    Attributes:
        width: channels of the residual stream.
        keys: channels of keys, and of values.
        inner: channels of the gated MLP.
        group: columns per group.
    """

    width: int
    keys: int
    inner: int
    group: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """``(rows, columns)`` of the merged linears."""
        return [
            (self.width + 2 * self.keys, self.width),
            (self.width, self.width),
            (2 * self.inner, self.width),
            (self.width, self.inner),
        ]


class LayerProgram:
    """A program of nothing but the linears of layers.

    Args:
        shape: of the layers.
        layers: how many, each with weights of its own.
        trials: schedules to measure per linear.

    Attributes:
        bytes: of all weights.
    """

    def __init__(self, shape: Shape, layers: int, trials: int):
        from lbllm_compile.codegen import prove
        from lbllm_compile.codegen.cpu.build import PACKED, KernelSet
        from lbllm_compile.codegen.program.builder import Layout, TensorSpec
        from lbllm_compile.codegen.sizes import ALIGNMENT
        from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
        from lbllm_compile.codegen.targets import Target

        self.shape, self.layers = shape, layers
        self.linears = [LinearSpec("bit", rows, columns, shape.group, 4) for rows, columns in shape.matrices]
        self.quantizers = [QuantizeSpec(columns, shape.group, 4) for _, columns in shape.matrices]
        self.kernels = KernelSet.build(self.linears, self.quantizers, Target.parse("cpu"), trials=trials)
        cases = [prove.linear_cases(spec)[0] for spec in self.linears]
        packed = [
            self.kernels.linear(spec).pack(case.weight)[PACKED] for spec, case in zip(self.linears, cases, strict=True)
        ]
        specs = [
            TensorSpec(f"{layer}.{index}", (weight.numel(),), "uint8")
            for layer in range(layers)
            for index, weight in enumerate(packed)
        ]
        self.layout = Layout.of([*specs, TensorSpec("clip", (2,), "float32")], ALIGNMENT)
        self.bytes = self.layout.bytes
        self._packed = packed

    def build(self, folder: Path) -> Callable[[], np.ndarray]:
        """Compiles the program; returns a call of it."""
        from lbllm_compile.codegen.program.compile import compile_program
        from lbllm_compile.codegen.tvm_runtime import Machine, array

        linear = self.kernels.linear(self.linears[0]).tir("1").name
        compiled = compile_program(
            self._functions(), self.kernels.target.llvm, self.kernels.lanes, {"layers": {}}, segment=linear
        )
        compiled.executable.export_library(str(folder / "program.so"))
        machine = Machine(folder / "program.so")
        function = machine.function("layers")
        weights = aligned(self.layout.bytes)
        for name, offset in self.layout.offsets.items():
            content = np.ones(2, np.float32).view(np.uint8)
            if name != "clip":
                content = self._packed[int(name.partition(".")[2])].numpy()
            weights[offset : offset + content.size] = content
        x = aligned(4 * self.shape.width).view(np.float32).reshape(1, -1)
        x[:] = np.random.default_rng(0).standard_normal(x.shape, np.float32)
        state = aligned(1).reshape(1, 1, 1)
        blocks = (x, weights, state, aligned(compiled.workspaces["layers"]))
        arguments = [machine.tensor(block) for block in blocks]
        self._x, self._kept = x, (machine, blocks)
        return lambda: array(function(*arguments))

    def _functions(self) -> Any:
        from lbllm_compile.codegen.program.builder import FunctionBuilder, Layout, ProgramBuilder, TensorSpec
        from lbllm_compile.codegen.tvm_api import relax

        state = Layout.of([TensorSpec("unused", ("batch", "capacity", 1), "uint8")])
        whole = ProgramBuilder(self.layout, state)
        given = TensorSpec("x", (1, self.shape.width), "float32")
        function = FunctionBuilder(whole, "layers", [given], {"batch": 1}, blocks=True)
        x = total = function.value("x")
        for layer in range(self.layers):
            value = x
            for index, (linear, quantizer) in enumerate(zip(self.linears, self.quantizers, strict=True)):
                kernel = self.kernels.quantizer(quantizer).tir(parallel=False)
                outputs = ([1, quantizer.in_features], "int8"), ([1, quantizer.scales], "float32")
                taken = function.emit(relax.op.strided_slice(value, [1], [0], [quantizer.in_features]))
                codes = function.call(whole.kernel(kernel.name, kernel.make), [taken, function.value("clip")], *outputs)
                kernel = self.kernels.linear(linear).tir("1")
                arguments = [*codes, function.value(f"{layer}.{index}")]
                value = function.call(
                    whole.kernel(kernel.name, kernel.make), arguments, ([1, linear.out_features], "float32")
                )
            # Without norms in between, values would leave the range of numbers after some layers in a row.
            total = function.emit(relax.op.add(total, value))
        function.finish(total)
        return whole.finish()

    def expected(self) -> np.ndarray:
        """What the same kernels give when they are called one by one."""
        import torch
        from lbllm_compile.codegen.cpu.build import PACKED

        x = total = torch.from_numpy(self._x)
        clip = torch.ones(2)
        for _ in range(self.layers):
            value = x
            for index, (linear, quantizer) in enumerate(zip(self.linears, self.quantizers, strict=True)):
                taken = value[:, : quantizer.in_features].contiguous()
                codes = self.kernels.quantizer(quantizer)(taken, clip)
                value = self.kernels.linear(linear)(*codes, {PACKED: self._packed[index]})
            total = total + value
        return total.numpy()


def file_type(columns: int) -> str:
    """The type that llama.cpp's quantizer gives a matrix of a TQ2_0 file."""
    return "tq2_0" if columns % llama.BLOCK == 0 else "q4_0"


def measure(shape: Shape, cold: bool, trials: int, quick: bool) -> list[dict[str, Any]]:
    """Times per layer, of both where llama.cpp is there.

    Raises:
        LbllmError: the program does not give what its kernels give.
    """
    from lbllm_compile.bench.linears import COLD_BYTES

    single = LayerProgram(shape, 1, trials)
    layers = (2 if quick else -(-COLD_BYTES // single.bytes)) if cold else 1
    own = LayerProgram(shape, layers, trials) if cold else single
    runs: dict[str, Callable[[int], list[float]]] = {}
    sizes = {OWN: own.bytes // layers}
    with tempfile.TemporaryDirectory(prefix="lbllm-layer-") as folder:
        call = own.build(Path(folder))
        if not np.array_equal(call(), own.expected()):
            raise LbllmError("the program of many layers does not give what its kernels give")
        runs[OWN] = turns.timed([call])
        if not llama.missing():
            matrices = [(file_type(columns), rows, columns) for rows, columns in shape.matrices]
            sizes[THEIRS] = sum(llama.row_bytes(kind, columns) * rows for kind, rows, columns in matrices)
            count = (2 if quick else -(-COLD_BYTES // sizes[THEIRS])) if cold else 1
            products = llama.Products(matrices * count, 1, 1, thread_count())
            runs[THEIRS] = turns.timed(products.calls)
        times = turns.alternate(runs, quick)
    counts = {OWN: layers, THEIRS: count if THEIRS in runs else 0}
    return [
        {
            "contender": name,
            "cache": "cold" if cold else "hot",
            "microseconds_per_layer": 1e6 * statistics.median(found) / counts[name],
            "bytes_per_layer": sizes[name],
            "layers": counts[name],
            "calls": len(found),
        }
        for name, found in times.items()
    ]


def call_microseconds() -> dict[str, float]:
    """Medians of a call from Python: ``prepared``, its tensors known, and ``checked``, that of a linear's kernel."""
    import time

    import torch
    from lbllm_compile.codegen import prove
    from lbllm_compile.codegen.cpu.build import PACKED, KernelSet
    from lbllm_compile.codegen.spec import LinearSpec
    from lbllm_compile.codegen.targets import Target
    from lbllm_compile.codegen.tvm_api import prepared

    spec = LinearSpec("bit", 1, 32, 32, 4)
    kernel = KernelSet.build([spec], [], Target.parse("cpu"), trials=0).linear(spec)
    case = prove.linear_cases(spec)[0]
    values, scale = case.values[:1].contiguous(), case.x_scale[:1].contiguous()
    packed, out = kernel.pack(case.weight), torch.empty(1, 1)
    function = next(function for highest, function in kernel._functions if highest == 1)
    calls = {
        "prepared": prepared(function, values, scale, packed[PACKED], out),
        "checked": lambda: kernel(values, scale, packed, out),
    }
    found = {}
    for name, call in calls.items():
        rounds = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(CALL_COUNT):
                call()
            rounds.append((time.perf_counter() - start) / CALL_COUNT)
        found[name] = 1e6 * statistics.median(rounds)
    return found


def _measure_here(options: argparse.Namespace) -> dict[str, Any]:
    from lbllm_compile.codegen.targets import host

    head = options.width // options.heads
    shape = Shape(options.width, options.kv_heads * head, options.inner, options.group)
    trials = 0 if options.quick else options.trials
    rows = [row for cold in (False, True) for row in measure(shape, cold, trials, options.quick)]
    return {"cpu": host.cpu_name(), "rows": rows, "call_microseconds": call_microseconds()}


def _print(threads: int, document: dict[str, Any]) -> None:
    harness.CONSOLE.print(f"[bold]{document['cpu']}, {in_words(threads)}[/bold]: the linears of a layer, microseconds")
    table = Table("", "hot", "cold", "bytes")
    rows = document["rows"]
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == name]
        times = [f"{row['microseconds_per_layer']:.1f}" for row in own]
        table.add_row(name, *times, f"{own[0]['bytes_per_layer'] / 1e6:.2f} MB")
    harness.CONSOLE.print(table)
    for cache in ("hot", "cold"):
        times = {row["contender"]: row["microseconds_per_layer"] for row in rows if row["cache"] == cache}
        if THEIRS in times:
            harness.CONSOLE.print(f"{cache}: {times[THEIRS] / times[OWN]:.2f} times as fast")
    calls = ", ".join(f"{name} {value:.2f} us" for name, value in document["call_microseconds"].items())
    harness.CONSOLE.print(f"a call of the smallest linear from Python: {calls}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=576, help="channels of the residual stream")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--inner", type=int, default=1536, help="channels of the gated MLP")
    parser.add_argument("--group", type=int, default=64, help="columns per group")
    parser.add_argument("--trials", type=int, default=16, help="schedules to try per linear that is not tuned here")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}), metavar="N")
    parser.add_argument("--quick", action="store_true", help="check that everything runs; the times mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there instead of to stdout")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        try:
            print(json.dumps(_measure_here(options)))
        except LbllmError as error:
            sys.exit(str(error))
        return
    documents = []
    for threads in options.threads:
        found = harness.measure_with(threads, "benchmarks.cpu_layer", arguments or sys.argv[1:])
        documents.append({"threads": threads, **found})
        _print(threads, documents[-1])
    harness.write_json(documents, options.json)


if __name__ == "__main__":
    main()
