"""Fitting 4-bit codes, and an output head's codes or planes, to the inputs that a calibration saw.

Weights alone tell little of what an error costs: a few channels of a head's input are a hundred times as loud as most.
As in :mod:`.fit`, later columns make up for the errors of earlier ones under the Hessian ``H = mean(x x^T)`` (GPTQ,
arXiv 2210.17323), and a group's scale is the best one for what is left of its columns by then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...codegen.format import Int4Weight, QuantizedWeight, pack_codes
from ...codegen.levels import FREE
from ..base import PassContext
from ..ir.program import Program
from .fit import Factor, fit
from .int4 import fit_scales, fit_table, nearest_codes, quantize_int4
from .layers import Activations, Values, calibration_batches, segments, split
from .moments import BATCH

_ROWS_AT_ONCE = 8192
"""Rows that are fitted together; none depends on another one."""


@dataclass(frozen=True)
class CodedFit:
    """A matrix of 4-bit codes, fitted.

    Attributes:
        weight: the codes.
        error, norm: float32 ``[N]``: mean of ``((w - q) x)^2`` and ``(w x)^2`` over the calibration inputs, damping
            included.
    """

    weight: Int4Weight
    error: Tensor
    norm: Tensor

    def rows(self, start: int, end: int) -> CodedFit:
        """The fit of some rows; all have one table."""
        rows = slice(start, end)
        return CodedFit(self.weight.rows(rows), self.error[rows], self.norm[rows])

    @property
    def relative_error(self) -> float:
        """``||(W - Q) x||^2 / ||W x||^2``."""
        return float(self.error.double().sum()) / max(float(self.norm.double().sum()), 1e-30)


def fit_int4(weight: Tensor, factored: Factor, group: int, *, compensate: bool = True) -> CodedFit:
    """Fits 4-bit codes to a matrix ``[N, K]``.

    Args:
        weight: the matrix.
        factored: of the inputs' Hessian, for the same ``group``.
        group: input columns per scale.
        compensate: let later columns make up for the errors of earlier ones; else each weight takes the level next to
            it, whatever the inputs.

    Raises:
        FormatError: a weight is not finite, or too large for an fp16 scale.
    """
    if not compensate:
        coded, root = quantize_int4(weight, group), factored.root.t()
        original = weight.float().masked_fill(factored.dead, 0.0)
        error, norm = (_squares(root, part.t()[factored.order]) for part in (original - coded.dequantize(), original))
        return CodedFit(coded, error, norm)
    table = fit_table(weight, group)
    parts = [_fit_rows(rows, factored, table) for rows in weight.split(_ROWS_AT_ONCE)]
    codes, scales, error, norm = (torch.cat(part) for part in zip(*parts, strict=True))
    return CodedFit(Int4Weight(codes, table, scales, weight.shape[1], group), error, norm)


def _fit_rows(weight: Tensor, factored: Factor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed codes and scales of some rows, and the squares of error and output."""
    # Columns are rows here: the loop over columns reads and writes contiguous memory.
    work = weight.float().masked_fill(factored.dead, 0.0).t()[factored.order].contiguous()
    original, quantized = work.clone(), torch.empty_like(work)
    codes = work.new_empty(work.shape, dtype=torch.uint8)
    scales = work.new_empty((work.shape[1], len(factored.groups)), dtype=torch.float16)
    inverse, levels = factored.inverse, table.float()
    start = 0
    for index, size in zip(factored.groups, factored.sizes, strict=True):
        end = start + size
        # What an error costs once later columns have made up for it.
        importance = inverse.diagonal()[start:end].square().reciprocal()
        scale = fit_scales(work[start:end].t().contiguous(), importance, table).squeeze(-1)
        errors = work.new_empty((size, work.shape[1]))
        for column in range(start, end):
            code = nearest_codes(work[column], scale, table)
            codes[column], quantized[column] = code, levels[code.int()] * scale
            error = (work[column] - quantized[column]) / inverse[column, column]
            work[column + 1 : end].addr_(inverse[column, column + 1 : end], error, alpha=-1.0)
            errors[column - start] = error
        work[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1.0)
        scales[:, index] = scale.half()
        start = end
    restored = codes.new_empty((work.shape[1], work.shape[0]))
    restored[:, factored.order] = codes.t()
    root = factored.root.t()
    return pack_codes(restored), scales, _squares(root, original - quantized), _squares(root, original)


def _squares(root: Tensor, columns: Tensor) -> Tensor:
    """Squares ``[N]`` of what rows, given as columns ``[K, N]``, make of inputs with this factor of their Hessian."""
    return (root @ columns).square().sum(0)


def fit_planes(weight: Tensor, factored: Factor, group: int) -> tuple[QuantizedWeight, float]:
    """Fits W(1+1) to a matrix ``[N, K]``, see :func:`.fit.fit`.

    Returns:
        The weight, and ``||(W - Q) x||^2 / ||W x||^2`` over the calibration inputs, damping included.
    """
    parts = [fit(rows, factored, group) for rows in weight.split(_ROWS_AT_ONCE)]
    codes, levels = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "levels"))
    error, norm = (sum(float(getattr(part, name).double().sum()) for part in parts) for name in ("error", "norm"))
    return QuantizedWeight.from_codes(codes, levels, group, FREE.quantize), error / max(norm, 1e-30)


@torch.no_grad()
def head_hessians(program: Program, context: PassContext, names: set[str], sequences: int) -> dict[str, Tensor]:
    """``mean(x x^T)`` over calibration tokens, float32 ``[K, K]``, of what output heads read, by name of the node.

    Args:
        program: an annotated one; it computes the values.
        context: has the calibration set.
        names: of the nodes.
        sequences: of the calibration set that are measured on, at most.
    """
    batches = calibration_batches(program, context.calibration, BATCH, sequences)
    layers = split(program)
    chain = Activations(batches, context.device)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def take(found: Iterable[Values]) -> None:
        for name, value in (item for values in found for item in values.items()):
            x = value.flatten(0, -2).float()
            sums[name] = sums[name].addmm_(x.t(), x) if name in sums else x.t() @ x
            counts[name] += len(x)

    with context.progress.task("measuring the head's input", 2 + len(layers.layers)) as task:
        take(chain.read(sorted(names & {str(node.name) for node in program.placeholders()})))
        for stage in (layers.prologue, *layers.layers, layers.epilogue):
            cuts = [n for n in stage.module.graph.nodes if n.name in names and n.op == "call_function"]
            for part in segments(stage, cuts):
                # What is behind the last of the values, the head itself, need not run.
                if missing := names - sums.keys():
                    chain.advance(part)
                    take(chain.read([name for name in part.outputs if name in missing]))
            task.advance()
    return {name: total.cpu() / counts[name] for name, total in sums.items()}
