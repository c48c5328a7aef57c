"""How close the levels of each rule come to a model's weights under the inputs that they meet.

    python -m benchmarks.levels [--model MODEL] [--calibration FILE] [--layers 1 14 29] [--rows 96]

Weights are fitted as ``ptq`` fits them, to the float model's inputs. The error is that of ``ptq``'s rows: the squared
error of a linear's output relative to its square, the mean over the linears of some layers, of which some rows are
fitted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbllm_compile.codegen import levels
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.sizes import GROUPS, matrix_bytes
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import decoder_linears
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.calibrate.fit import factor, fit
from lbllm_compile.passes.calibrate.layers import Activations, Values, calibration_batches, segments, split
from lbllm_compile.passes.calibrate.sensitivity import first_tokens
from lbllm_compile.passes.ir.annotations import LINEAR, linears
from lbllm_compile.passes.ir.program import Program, get_attribute
from lbllm_compile.passes.ptq import BATCH, Ptq, Statistic
from torch import Tensor

from . import calibrated


@dataclass(frozen=True)
class Matrix:
    """A linear's weight, and what its inputs are like.

    Attributes:
        path: of the weight.
        weight: some rows of it, ``[N, K]``.
        hessian: mean outer product of the inputs, ``[K, K]``.
    """

    path: str
    weight: Tensor
    hessian: Tensor

    def error(self, group: int, rule: str) -> float:
        """Of the fitted weight under a level rule."""
        factored = factor(self.hessian, group, Ptq().damp)
        return fit(self.weight, factored, group, rule=levels.get(rule)).relative_error

    def bits(self, group: int) -> float:
        """Per weight, as stored."""
        rows, columns = self.weight.shape
        return 8 * matrix_bytes(rows, columns, group) / (rows * columns)


def matrices(
    program: Program, calibration: Sequence[Mapping[str, Any]], wanted: Sequence[int], rows: int
) -> Iterator[Matrix]:
    """The linears of some decoder layers, with the inputs of the float model.

    Args:
        program: annotated and observed; its linears are no stacked experts.
        wanted: numbers of layers.
        rows: of a matrix, evenly spread; all of those that have no more.
    """
    layers = split(program)
    chain = Activations(tuple(first_tokens(calibration_batches(program, calibration, BATCH))))
    chain.advance(layers.prologue)
    for index, layer in enumerate(layers.layers[: max(wanted, default=-1) + 1]):
        if index in wanted:
            readers = decoder_linears(layer.module.graph)
            inputs = chain.fork()
            for part in segments(layer, list(readers)):
                seen = [Statistic.of(o, found) for o, found in readers.items() if o.name in part.outputs]

                def visit(values: Values, here: Sequence[Statistic] = seen) -> None:
                    for statistic in here:
                        statistic.add(values)

                inputs.advance(part, visit)
                for statistic in seen:
                    for node in statistic.linears:
                        weight = get_attribute(layer.module, node.meta[LINEAR].weight).float()
                        few = weight[:: -(-len(weight) // rows)]
                        yield Matrix(node.meta[LINEAR].weight, few.clone(), statistic.hessian(0))
        chain.advance(layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calibrated.add_options(parser)
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 14, 29])
    parser.add_argument("--groups", nargs="+", type=int, choices=GROUPS, default=[64, 128])
    parser.add_argument("--rules", nargs="+", default=["free", "additive", "dual"])
    parser.add_argument("--rows", type=int, default=96, help="rows of a matrix, at most")
    options = parser.parse_args()
    try:
        measure(options)
    except LbllmError as error:
        sys.exit(str(error))


def check_options(options: argparse.Namespace) -> None:
    """Refuses options with which nothing could be measured.

    Raises:
        LbllmError: saying which.
    """
    if options.rows < 1:
        raise LbllmError(f"--rows {options.rows} leaves nothing of a matrix to fit; use 1 or more")
    for rule in options.rules:
        levels.get(rule)


def check_layers(program: Program, wanted: Sequence[int]) -> None:
    """Refuses layers of an annotated program whose linears :func:`matrices` cannot give.

    Raises:
        LbllmError: there are none, or stacked experts.
    """
    found = [info for _, info in linears(program) if info.role == "decoder" and info.layer in wanted]
    if not found:
        raise LbllmError(f"none of the model's linears is in the layers {', '.join(map(str, wanted))}; name others")
    stacked = next((info.path for info in found if info.experts), None)
    if stacked is not None:
        raise LbllmError(f"'{stacked}' has stacked experts, which are not measured here; name --layers without any")


def measure(options: argparse.Namespace) -> None:
    """Prints the table.

    Raises:
        LbllmError: an option or the model cannot be; before anything is calibrated.
    """
    check_options(options)

    def check(program: Program) -> None:
        for item in pipeline.parse("canonicalize,annotate"):
            program = item.apply(program, PassContext()).program
        check_layers(program, options.layers)

    program, context, source = calibrated.prepared(options, "canonicalize,annotate,observe", check)
    found = list(matrices(program, context.calibration, options.layers, options.rows))
    print(f"{len(found)} linears of the layers {options.layers}; calibrated on {source}\n")
    print(f"| levels per | bits | {' | '.join(options.rules)} |\n|---|---|{'---|' * len(options.rules)}")
    for group in options.groups:
        bits = sum(matrix.bits(group) for matrix in found) / len(found)
        cells = [f"{sum(m.error(group, rule) for m in found) / len(found):.4f}" for rule in options.rules]
        print(f"| {group} columns | {bits:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
