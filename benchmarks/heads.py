"""What smaller output heads cost and save: what docs/recipes.md shows of the pass ``head``.

    python -m benchmarks.heads --text FILE [--model MODEL] [--calibration FILE] [--chunks 8]
    python -m benchmarks.heads --shape 49152x576 [--trials 16] [--threads 1]

With a text: the decoder layers stay float and only embedding and head are quantized, in simulation; perplexity, mean KL
divergence from the float model, the same most likely token, the bytes of the head, which a token reads, and those of
embedding and head in a file. With a shape: the kernels of such a head for one token, in turns in one process, from
memory (copies of 200 MB in all take turns, too). Run that on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lbllm_compile.codegen.errors import LbllmError

from lbllm_compile.bench.turns import alternate, environment, timed

from . import calibrated, harness

if TYPE_CHECKING:
    from lbllm_compile.passes.ir.program import Program
    from lbllm_compile.passes.ir.rewrite import Node

FORMS = (
    "head",
    "head{bits=4,group=32}",
    "head{bits=4}",
    "head{bits=4,sequences=0}",
    "head{bits=4,group=32,embedding=4}",
    "head{bits=4,embedding=4}",
    "head{bits=2,group=32}",
    "head{bits=2}",
    "head{bits=2,embedding=4}",
)
"""The pass with its options, a row each."""

COLD_BYTES = 200_000_000
"""Bytes of the copies of a packed head that take turns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to score")
    calibrated.add_options(parser)
    calibrated.add_text_options(parser)
    parser.add_argument("--only", nargs="+", default=FORMS, metavar="PASS", help="rows, e.g. 'head{bits=4,group=32}'")
    parser.add_argument("--shape", type=harness.shape, metavar="NxK", help="time the kernels of a head of this shape")
    parser.add_argument("--trials", type=int, default=16, help="schedules measured per kernel; 0 takes first guesses")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.text is None) == (options.shape is None):
        parser.error("give either --text or --shape")
    try:
        if options.text is not None:
            measure(options)
        elif options.child:
            time_kernels(*options.shape[:2], options.trials)
        else:
            command = [sys.executable, "-m", "benchmarks.heads", *sys.argv[1:], "--child"]
            sys.exit(subprocess.run(command, env=environment(options.threads)).returncode)
    except LbllmError as error:
        sys.exit(str(error))


def measure(options: argparse.Namespace) -> None:
    """Prints the table of what heads cost."""
    from lbllm_compile.passes import pipeline

    program, context, scorer = calibrated.scored(options)
    print("| | perplexity | KL mean | same top token | MB a token reads | MB in the file |\n|---|---|---|---|---|---|")
    for text in options.only:
        (item,) = pipeline.parse(text)
        quantized = item.apply(program, context).program
        figures = scorer.score(quantized)
        assert figures is not None, "a quantized head gives finite logits"
        cells = [f"{figures['ppl']:.2f}", f"{figures['kld_mean']:.4f}", f"{100 * figures['top1_agreement']:.1f} %"]
        cells += [f"{size / 1e6:.1f}" for size in sizes(quantized)]
        print(f"| `{text}` | {' | '.join(cells)} |", flush=True)


def sizes(program: Program) -> tuple[int, int]:
    """Bytes of a head that ``head`` quantized, which a token reads, and of head and embedding in a file."""
    from lbllm_compile.passes.ir.annotations import linears
    from lbllm_compile.passes.ir.rewrite import UNPACKED, calls, operands_of

    stored = {name: tensor.nbytes for name, tensor in program.parameters()}

    def of(matrices: Iterable[Node]) -> int:
        return sum(stored[path] for path in {str(part.target) for node in matrices for part in node.all_input_nodes})

    heads = [operands_of(node)[1] for node, info in linears(program) if info.role == "head"]
    return of(heads), of(calls(program.graph, *UNPACKED))


def time_kernels(rows: int, columns: int, trials: int) -> None:
    """Prints the table of kernels for one token."""
    import torch
    from lbllm_compile.codegen import prove
    from lbllm_compile.codegen.cpu.build import PACKED, KernelSet
    from lbllm_compile.codegen.spec import LinearSpec
    from lbllm_compile.codegen.targets import Target, host
    from lbllm_compile.codegen.threads import in_words, thread_count

    from lbllm_compile.report.terminal import make_progress

    forms = {
        "int8": ("int8", 64),
        "int4 g64": ("int4", 64),
        "int4 g32": ("int4", 32),
        "W(1+1) g64": ("bit", 64),
        "W(1+1) g32": ("bit", 32),
    }
    specs = {name: LinearSpec(kind, rows, columns, group, 8) for name, (kind, group) in forms.items()}
    kernels = KernelSet.build(
        specs.values(), [], Target.parse("cpu"), trials=trials, progress=make_progress(harness.CONSOLE)
    )
    runs, sizes = {}, {}
    for name, spec in specs.items():
        kernel, case = kernels.linear(spec), prove.linear_cases(spec)[0]
        packed = kernel.pack(case.weight)
        sizes[name] = packed[PACKED].nbytes
        copies = [packed, *({PACKED: packed[PACKED].clone()} for _ in range(COLD_BYTES // sizes[name]))]
        values, scale, out = case.values[:1].contiguous(), case.x_scale[:1].contiguous(), torch.empty(1, rows)
        runs[name] = timed([lambda k=kernel, c=copy, v=values, s=scale, o=out: k(v, s, c, o) for copy in copies])
    times: Mapping[str, list[float]] = alternate(runs)
    print(f"{rows}x{columns}, A8, one token; {host.cpu_name()}, {in_words(thread_count())}\n")
    print("| | us | of int8's time | MB | GB/s |\n|---|---|---|---|---|")
    usual = statistics.median(times["int8"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        figures = [f"{1e6 * middle:.0f}", f"{middle / usual:.2f}", f"{sizes[name] / 1e6:.1f}"]
        print(f"| {name} | {' | '.join(figures)} | {sizes[name] / middle / 1e9:.1f} |")


if __name__ == "__main__":
    main()
