"""Writes docs/cuda-bounds.md: what CUDA kernels are known to take on each architecture, without a GPU.

    python -m benchmarks.cuda_bounds [--out docs/cuda-bounds.md]

Every kernel of the linears of four models, and of what chooses their next token, is compiled for every architecture,
disassembled and counted. What was compiled is kept in the cache directory, so a second run takes seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lbllm_compile.codegen.backend import Prediction
from lbllm_compile.codegen.cache import cache_directory
from lbllm_compile.codegen.cuda.bounds import Bound, bounds, bytes_moved
from lbllm_compile.codegen.cuda.compiler import CudaCompiler, SpillError
from lbllm_compile.codegen.cuda.disassembly import nvdisasm
from lbllm_compile.codegen.cuda.dp4a import gemm_schedules
from lbllm_compile.codegen.cuda.emit import cached_binary, emit, schedules
from lbllm_compile.codegen.cuda.kernel import EmittedKernel, Form
from lbllm_compile.codegen.cuda.mma import mma_schedules
from lbllm_compile.codegen.cuda.predict import GPUS, predict
from lbllm_compile.codegen.cuda.program.choice import next_token, threads
from lbllm_compile.codegen.cuda.text import PREAMBLE, signature
from lbllm_compile.codegen.errors import KernelError, LbllmError
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets.cuda import ARCHITECTURES
from lbllm_compile.codegen.tvm_api import cuda_source

PAGE = Path(__file__).parents[1] / "docs" / "cuda-bounds.md"
GROUPS = (64, 128)
SHOWN = "sm_90"
"""The architecture whose instructions are shown by pipe."""

TOGETHER = 16
"""Kernels of one compilation: starting the compiler takes longer than most of them."""

LOGIT_BYTES = 4

CHOICE = "\n".join(
    textwrap.wrap(
        "One thread block chooses, so a single multiprocessor reads the bytes: each logit once, for the most likely"
        " token. A draw reads the logits several times more, and writes a share of eight bytes for each, which it reads"
        " as often. Instructions are those of all innermost loops.",
        120,
    )
)
"""What is to be said of the kernels that choose."""

FORMS: Mapping[Form, str] = {
    "gemv": "Linears, one token",
    "gemm": "Linears, many tokens",
    "quantize": "Quantizers",
}


COMPARED = (
    (576, 576),
    (960, 576),
    (3072, 576),
    (576, 1536),
    (4096, 4096),
    (11008, 4096),
)
"""Rows and columns of the linears of which both kinds of kernels for many tokens are compared: of SmolLM2-135M and of
LLaMA-2-7B."""

UNROLLED = "†"
"""Marks what was counted in a whole kernel."""

COMPARED_ARCHITECTURES = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_120")


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


@dataclass(frozen=True)
class ChoiceKernel:
    """The kernel that chooses the next token.

    Attributes:
        vocabulary: of so many.
        source: the CUDA text.
        symbol: its name in it.
        block: threads along x, y, z.
    """

    vocabulary: int
    source: str
    symbol: str
    block: tuple[int, int, int]


def choices_of(models: Iterable[Shapes]) -> list[ChoiceKernel]:
    """What chooses models' next tokens, one for each vocabulary."""
    found = []
    for vocabulary in sorted({model.vocabulary for model in models}):
        source = cuda_source(next_token(vocabulary), f"next_token_{vocabulary}", ARCHITECTURES[0])
        found.append(ChoiceKernel(vocabulary, source, signature(source).symbol, (threads(vocabulary), 1, 1)))
    return found


def compared_kernels() -> dict[str, list[EmittedKernel]]:
    """Kernels for many tokens, by what multiplies: of each of :data:`COMPARED`, and each group, the default of both."""
    specs = [LinearSpec("bit", rows, columns, group) for group in GROUPS for rows, columns in COMPARED]
    found: dict[str, list[EmittedKernel]] = {}
    for name, first in (("mma.sync", mma_schedules), ("dp4a", gemm_schedules)):
        found[name] = [emit(spec, "gemm", ARCHITECTURES[0], first(spec)[0]) for spec in specs]
    return found


def thread_products(kernel: EmittedKernel) -> int:
    """Multiply-adds of a thread in a group of a kernel for many tokens."""
    x, y, z = kernel.block
    assert isinstance(kernel.spec, LinearSpec)
    return kernel.rows_per_block * kernel.tokens_per_block * kernel.spec.group // (x * y * z)


def compared(archs: Sequence[str] = COMPARED_ARCHITECTURES) -> list[str]:
    """The table that holds them against each other."""
    lines = [f"| linear | multiplied by | {' | '.join(archs)} |", "|---" * (2 + len(archs)) + "|"]
    found = {}
    for name, kernels in compared_kernels().items():
        for bound in counted(kernels, archs):
            spec, products = bound.kernel.spec, thread_products(bound.kernel)
            each = bound.main.instructions(products) / products
            mark = UNROLLED if bound.main.unrolled else ""
            cell = f"{bound.registers}, {100 * bound.occupancy:.0f} %, {each:.3f}{mark}"
            found.setdefault((spec, name), []).append(cell)
    for spec, name in sorted(found, key=lambda key: (key[0].group, key[0].in_features * key[0].out_features)):
        shape = f"{spec.out_features}x{spec.in_features}, g{spec.group}"
        lines.append(f"| {shape} | `{name}` | {' | '.join(found[spec, name])} |")
    return lines


Counted = TypeVar("Counted", EmittedKernel, ChoiceKernel)


def counted(kernels: Sequence[Counted], archs: Sequence[str]) -> list[Bound[Counted]]:
    """What is known of each kernel on each architecture.

    Raises:
        SpillError: the registers of some spill.
        LbllmError: there is no CUDA compiler, or a kernel does not compile.
    """
    compiler, folder = CudaCompiler.find(), cache_directory() / "cuda"
    compiler.check(archs)

    def part(arch: str, kernels: Sequence[Counted]) -> list[Bound[Counted]]:
        source = "\n".join([PREAMBLE, *(kernel.source.removeprefix(PREAMBLE) for kernel in kernels)])
        found = bounds(kernels, cached_binary(compiler, source, arch, folder), arch, compiler, source)
        print(f"{arch}: {len(found)} kernels", file=sys.stderr, flush=True)
        return found

    parts = [kernels[at : at + TOGETHER] for at in range(0, len(kernels), TOGETHER)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = [pool.submit(partial(part, arch, kernels)) for arch in archs for kernels in parts]
    return [bound for job in jobs for bound in job.result()]


def measured(kernels: Sequence[EmittedKernel], archs: Sequence[str] = ARCHITECTURES) -> list[Bound[EmittedKernel]]:
    """As :func:`counted`; a schedule that spills on an architecture is dropped for the next.

    Raises:
        LbllmError: there is no CUDA compiler, or a kernel does not compile, or spills with every schedule.
    """
    while True:
        try:
            return counted(kernels, archs)
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


def dropped(found: Sequence[Bound[EmittedKernel]]) -> str:
    """Which kernels have another schedule than the default, in a sentence."""
    others = {
        f"{row_name(bound.kernel.spec)} ({FORMS[bound.kernel.form].lower()})": None
        for bound in found
        if bound.kernel.schedule != schedules(bound.kernel.spec, bound.kernel.form)[0]
    }
    if not others:
        return "All have their default schedules."
    return f"The default schedule of {'; '.join(others)} spills on some architecture, and the next one took its place."


def cell(bound: Bound[Any]) -> str:
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


def choice_name(kernel: ChoiceKernel) -> str:
    """The first cell of a choice's row."""
    return f"one of {kernel.vocabulary} tokens"


def tables(found: Sequence[Bound[EmittedKernel]], choices: Sequence[Bound[ChoiceKernel]]) -> str:
    """A section for each form of kernels."""
    sections = []
    for form, title in FORMS.items():
        rows: dict[tuple[str, int], list[Bound[EmittedKernel]]] = {}
        for bound in found:
            if bound.kernel.form == form:
                spec = bound.kernel.spec
                rows.setdefault((row_name(spec), bytes_moved(spec, 1)), []).append(bound)
        sections += [f"## {title}", "", *table(rows), ""]
    of_choices: dict[tuple[str, int], list[Bound[ChoiceKernel]]] = {}
    for bound in choices:
        kernel = bound.kernel
        of_choices.setdefault((choice_name(kernel), LOGIT_BYTES * kernel.vocabulary), []).append(bound)
    return "\n".join([*sections, "## The choice of the next token", "", CHOICE, "", *table(of_choices), ""])


def table(rows: Mapping[tuple[str, int], Sequence[Bound[Any]]]) -> list[str]:
    """The rows of one form: what of it is the same everywhere, a column an architecture, and one main loop by pipe.

    Args:
        rows: by name and bytes of a token, what is known on each architecture.
    """
    archs = [*dict.fromkeys(bound.arch for bounds_of in rows.values() for bound in bounds_of)]
    shown = SHOWN if SHOWN in archs else archs[-1]
    columns = ["kernel", "bytes of a token", *archs, f"main loop on {shown}"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (name, size), bounds_of in rows.items():
        by_arch = {bound.arch: bound for bound in bounds_of}
        pipes = ", ".join(f"{pipe} {count}" for pipe, count in sorted(by_arch[shown].main.pipes.items()))
        lines.append(f"| {' | '.join([name, f'{size}', *(cell(by_arch[arch]) for arch in archs), pipes])} |")
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


def page(found: Sequence[Bound[EmittedKernel]], choices: Sequence[Bound[ChoiceKernel]], against: Sequence[str]) -> str:
    """The whole page; ``against`` is :func:`compared`."""
    identity = CudaCompiler.find().identity
    compiler = next((line for line in identity.splitlines() if "release" in line), identity)
    read = "SASS, by nvdisasm" if nvdisasm() else "PTX, because there is no nvdisasm"
    decode = [b for b in found if b.kernel.form == "gemv" and getattr(b.kernel.spec, "kind", "") == "bit"]
    integers = sorted(b.main.integers_per_product or 0.0 for b in decode)
    middle, few = integers[len(integers) // 2], sum(count <= 0.9 for count in integers)
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
Activations are those of clipped ranges, of 4 bits but for the head. Behind knees, as the recipe `lbllm` has them, the
same instructions multiply 8-bit values; their quantizers, and linears of 4-bit codes, are not in the tables. From sm_90
on a program's kernels may take other registers than here, because their pointers are not `__restrict__` (`OVERLAPPING`
in `codegen/cuda/text.py`).

A cell has the registers of a thread, the occupancy (the share of the warps that a multiprocessor can hold which it
holds of this kernel, from registers, shared memory and the limits in `codegen/cuda/limits.py`) and, for linears, the
integer instructions of the main loop for each multiply-add; with one token that is each weight. Where a loop is
unrolled, addresses and the last sum count, too, and what branches and barriers divide from the products does not
(`codegen/cuda/disassembly.py`). Bytes are what is read and written at least, for one token.

W(1+1) with one token: {integers[0]:.2f} to {integers[-1]:.2f} integer instructions a weight, {middle:.2f} in the
middle, at most 0.9 in {few} of {len(integers)}. Decoding and multiplying 16 weights takes 13 (0.81): two masks, three
shifts, four `prmt` and four `dp4a`. The rest is scales, sums and addresses, of which small groups and loops that are
not unrolled have most.

{tables(found, choices)}
## Many tokens: tensor cores against dp4a

W(1+1) linears have two kinds of kernels for many tokens (`codegen/cuda/gemm.py`); the tables above have the one that is
taken. A cell has the registers of a thread, the occupancy, and **all** instructions of a thread for each multiply-add,
which is each weight and token: of a whole group, so copies to shared memory, decoding and the fp32 sums are among them.
{UNROLLED}: the compiler unrolled the whole loop over groups, and these are all instructions of the kernel, what is in
front of the loop and behind it among them, divided by all its multiply-adds. Each kernel has the default schedule of
its kind, whose tile has 64 tokens. How long instructions take, and how far they overlap, this does not say.

{chr(10).join(against)}

## Predicted time of a token

**A prediction, no measurement**: a roofline over these facts, whose assumptions `codegen/cuda/predict.py` lists. A
linear takes as long as the slowest of its bytes at 90 % of the memory's rated bandwidth, its integer instructions and
its dot products at 64 lanes of a pipe a clock and multiprocessor; each launch of a step, five a layer and three more,
costs 1.3 us besides; what else a step does hides in those gaps. So no step of these kernels is faster than this where
launches do not overlap, as they may from sm_90 on. In parentheses: how much of it are the gaps, and what most of the
linears' time waits for.
`lbllm-compile plan MODEL --target cuda` and `lbllm-compile bench DIR --predict` say it of other models.

{chr(10).join(predictions())}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE")
    options = parser.parse_args()
    found = measured(kernels_of(specs(MODELS.values())))
    choices = counted(choices_of(MODELS.values()), ARCHITECTURES)
    options.out.write_text(page(found, choices, compared()), encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    try:
        main()
    except LbllmError as error:
        sys.exit(str(error))
