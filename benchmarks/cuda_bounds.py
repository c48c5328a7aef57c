"""Writes docs/cuda-bounds.md: what CUDA kernels are known to take on each architecture, without a GPU.

    python -m benchmarks.cuda_bounds [--out docs/cuda-bounds.md]

Every kernel of the linears of four models is compiled for every architecture, disassembled and counted. What was
compiled is kept in the cache directory, so a second run takes seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lbllm_compile.codegen.backend import Prediction
from lbllm_compile.codegen.cache import cache_directory
from lbllm_compile.codegen.cuda.bounds import Bound, bounds, bytes_moved
from lbllm_compile.codegen.cuda.compiler import CudaCompiler, SpillError
from lbllm_compile.codegen.cuda.disassembly import nvdisasm
from lbllm_compile.codegen.cuda.emit import cached_binary, emit, schedules
from lbllm_compile.codegen.cuda.kernel import EmittedKernel, Form
from lbllm_compile.codegen.cuda.predict import GPUS, predict
from lbllm_compile.codegen.cuda.text import PREAMBLE
from lbllm_compile.codegen.errors import KernelError, LbllmError
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets.cuda import ARCHITECTURES

PAGE = Path(__file__).parents[1] / "docs" / "cuda-bounds.md"
GROUPS = (64, 128)
SHOWN = "sm_90"
"""The architecture whose instructions are shown by pipe."""

TOGETHER = 16
"""Kernels of one compilation: starting the compiler takes longer than most of them."""

FORMS: Mapping[Form, str] = {
    "gemv": "Linears, one token",
    "gemm": "Linears, many tokens",
    "quantize": "Quantizers",
}


@dataclass(frozen=True)
class Shapes:
    """The linears of a model, merged as a compile merges them: q, k, v into one, gate and up into one.

    Attributes:
        layers: decoder layers.
        hidden, intermediate: widths.
        merged: rows of q, k and v together.
        vocabulary: rows of the head.
        bias: of q, k and v.
    """

    layers: int
    hidden: int
    intermediate: int
    merged: int
    vocabulary: int
    bias: bool = False

    def linears(self, group: int) -> dict[LinearSpec, int]:
        """How many there are of each."""
        width, inner, layers = self.hidden, self.intermediate, self.layers
        return {
            LinearSpec("bit", self.merged, width, group, bias=self.bias): layers,
            LinearSpec("bit", width, width, group): layers,
            LinearSpec("bit", 2 * inner, width, group): layers,
            LinearSpec("bit", width, inner, group): layers,
            LinearSpec("int8", self.vocabulary, width, group, 8): 1,
        }


MODELS = {
    "SmolLM2-135M": Shapes(30, 576, 1536, 960, 49152),
    "LLaMA-2-7B": Shapes(32, 4096, 11008, 12288, 32000),
    "LLaMA-3-8B": Shapes(32, 4096, 14336, 6144, 128256),
    "Qwen2.5-3B": Shapes(36, 2048, 11008, 2560, 151936, bias=True),
}


def specs(models: Iterable[Shapes], groups: Sequence[int] = GROUPS) -> list[LinearSpec | QuantizeSpec]:
    """What models' linears and their quantizers compute, each once."""
    found: dict[LinearSpec | QuantizeSpec, None] = {}
    for model in models:
        for group in groups:
            for spec in model.linears(group):
                found[spec] = None
                found[QuantizeSpec(spec.in_features, spec.group, spec.act_bits)] = None
    return [*found]


def kernels_of(wanted: Iterable[LinearSpec | QuantizeSpec]) -> list[EmittedKernel]:
    """The text of every kernel, the same for all architectures."""
    kernels = []
    for spec in wanted:
        forms: tuple[Form, ...] = ("quantize",) if isinstance(spec, QuantizeSpec) else ("gemv", "gemm")
        kernels += [emit(spec, form, ARCHITECTURES[0]) for form in forms]
    return kernels


def measured(kernels: Sequence[EmittedKernel], archs: Sequence[str] = ARCHITECTURES) -> list[Bound]:
    """What is known of each kernel on each architecture; a schedule that spills on one is dropped for the next.

    Raises:
        LbllmError: there is no CUDA compiler, or a kernel does not compile, or spills with every schedule.
    """
    compiler, folder = CudaCompiler.find(), cache_directory() / "cuda"
    compiler.check(archs)

    def part(kernels: Sequence[EmittedKernel], arch: str) -> list[Bound]:
        source = "\n".join([PREAMBLE, *(kernel.source.removeprefix(PREAMBLE) for kernel in kernels)])
        found = bounds(kernels, cached_binary(compiler, source, arch, folder), arch, compiler, source)
        print(f"{arch}: {len(found)} kernels", file=sys.stderr, flush=True)
        return found

    while True:
        parts = [kernels[at : at + TOGETHER] for at in range(0, len(kernels), TOGETHER)]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            jobs = [pool.submit(part, kernels, arch) for arch in archs for kernels in parts]
        try:
            return [bound for job in jobs for bound in job.result()]
        except SpillError as error:
            print(error, file=sys.stderr, flush=True)
            kernels = [following(kernel) if kernel.symbol in error.spilled else kernel for kernel in kernels]


def following(kernel: EmittedKernel) -> EmittedKernel:
    """A kernel with the schedule that comes after its own.

    Raises:
        KernelError: there is none.
    """
    candidates = schedules(kernel.spec, kernel.form)
    _, *rest = candidates[candidates.index(kernel.schedule) :]
    if not rest:
        raise KernelError(f"every schedule of {kernel.symbol} spills registers")
    return emit(kernel.spec, kernel.form, ARCHITECTURES[0], rest[0])


def dropped(found: Sequence[Bound]) -> str:
    """Which kernels have another schedule than the default, in a sentence."""
    others = {
        f"{row_name(bound.kernel.spec)} ({FORMS[bound.kernel.form].lower()})": None
        for bound in found
        if bound.kernel.schedule != schedules(bound.kernel.spec, bound.kernel.form)[0]
    }
    if not others:
        return "All have their default schedules."
    return f"The default schedule of {'; '.join(others)} spills on some architecture, and the next one took its place."


def cell(bound: Bound) -> str:
    """Registers, occupancy and, where there are multiply-adds, integer instructions each."""
    integers = bound.main.integers_per_product
    return f"{bound.registers}, {100 * bound.occupancy:.0f} %" + ("" if integers is None else f", {integers:.2f}")


def row_name(spec: LinearSpec | QuantizeSpec) -> str:
    """What a kernel computes, as the first cell of its row says it."""
    group = f"g{spec.group}" if spec.group else "per token"
    if isinstance(spec, QuantizeSpec):
        return f"{spec.in_features}, {group}, A{spec.bits}"
    kind = "W(1+1)" if spec.kind == "bit" else "int8"
    bias = ", bias" if spec.bias else ""
    return f"{spec.out_features}x{spec.in_features}, {kind}, {group}, A{spec.act_bits}{bias}"


def table(found: Sequence[Bound], form: Form) -> list[str]:
    """The rows of one form: what of it is the same everywhere, a column an architecture, and one main loop by pipe."""
    archs = [*dict.fromkeys(bound.arch for bound in found)]
    rows: dict[LinearSpec | QuantizeSpec, dict[str, Bound]] = {}
    for bound in found:
        if bound.kernel.form == form:
            rows.setdefault(bound.kernel.spec, {})[bound.arch] = bound
    shown = SHOWN if SHOWN in archs else archs[-1]
    columns = ["kernel", "bytes of a token", *archs, f"main loop on {shown}"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for spec, bounds_of in rows.items():
        pipes = ", ".join(f"{pipe} {count}" for pipe, count in sorted(bounds_of[shown].main.pipes.items()))
        cells = [row_name(spec), f"{bytes_moved(spec, 1)}", *(cell(bounds_of[arch]) for arch in archs), pipes]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def predictions() -> list[str]:
    """The table of predicted times."""
    lines = ["| model | " + " | ".join(gpu.name for gpu in GPUS) + " |", "|---" * (1 + len(GPUS)) + "|"]
    for name, shapes in MODELS.items():
        for group in GROUPS:
            linears = shapes.linears(group)
            size = sum(count * bytes_moved(spec, 1) for spec, count in linears.items())
            cells = [predicted_cell(p) for p in predict(linears, shapes.layers)]
            lines.append(f"| {name}, g{group} ({size / 1e6:.0f} MB) | " + " | ".join(cells) + " |")
    return lines


def predicted_cell(prediction: Prediction) -> str:
    """Milliseconds, how much of them are gaps, and what the linears wait for."""
    share = prediction.gaps_s / prediction.seconds
    return f"{1e3 * prediction.seconds:.2f} ms ({100 * share:.0f} % gaps; {prediction.limit})"


def page(found: Sequence[Bound]) -> str:
    """The whole page."""
    identity = CudaCompiler.find().identity
    compiler = next((line for line in identity.splitlines() if "release" in line), identity)
    read = "SASS, by nvdisasm" if nvdisasm() else "PTX, because there is no nvdisasm"
    decode = [b for b in found if b.kernel.form == "gemv" and getattr(b.kernel.spec, "kind", "") == "bit"]
    integers = sorted(b.main.integers_per_product or 0.0 for b in decode)
    middle, few = integers[len(integers) // 2], sum(count <= 0.9 for count in integers)
    tables = "\n".join("\n".join([f"## {title}", "", *table(found, form), ""]) for form, title in FORMS.items())
    kernels = len({bound.kernel.symbol for bound in found})
    archs = len({bound.arch for bound in found})
    opening = "\n".join(
        textwrap.wrap(
            f"The linears of {', '.join(MODELS)} (q, k, v and gate, up merged, as a compile merges them) and the"
            f" quantizers before them have {kernels} kernels. They were compiled for {archs} architectures,"
            f" {len(found)} times, each of which succeeded, and **none spills registers**. {dropped(found)} Compiler:"
            f" {compiler}. Instructions were counted in {read}.",
            120,
            break_on_hyphens=False,
        )
    )
    return f"""# What CUDA kernels take, without a GPU

Written by `python -m benchmarks.cuda_bounds`; nothing here was measured on a GPU.

{opening}

Attention, embedding, and the loops that a program's kernels take along are not among them.

A cell has the registers of a thread, the occupancy (the share of the warps that a multiprocessor can hold which it
holds of this kernel, from registers, shared memory and the limits in `codegen/cuda/limits.py`) and, for linears, the
integer instructions of the main loop for each multiply-add; with one token that is each weight. Where a loop is
unrolled, addresses and the last sum count, too (`codegen/cuda/disassembly.py`). Bytes are what is read and written at
least, for one token.

W(1+1) with one token: {integers[0]:.2f} to {integers[-1]:.2f} integer instructions a weight, {middle:.2f} in the
middle, at most 0.9 in {few} of {len(integers)}. Decoding and multiplying 16 weights takes 13 (0.81): two masks, three
shifts, four `prmt` and four `dp4a`. The rest is scales, sums and addresses, of which small groups and loops that are
not unrolled have most.

{tables}
## Predicted time of a token

**A prediction, no measurement**: a roofline over these facts, whose assumptions `codegen/cuda/predict.py` lists. A
linear takes as long as the slowest of its bytes at 90 % of the memory's rated bandwidth, its integer instructions and
its dot products at 64 lanes of a pipe a clock and multiprocessor; each launch of a step, five a layer and three more,
costs 1.3 us besides; what else a step does hides in those gaps. So no step of these kernels is faster than this, and a
real one is slower. In parentheses: how much of it are the gaps, and what most of the linears' time waits for.
`lbllm-compile plan MODEL --target cuda` and `lbllm-compile bench DIR --predict` say it of other models.

{chr(10).join(predictions())}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE")
    options = parser.parse_args()
    options.out.write_text(page(measured(kernels_of(specs(MODELS.values())))), encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    try:
        main()
    except LbllmError as error:
        sys.exit(str(error))
