"""Proof that a kernel computes what the reference defines, on this very machine, bit for bit.

Every case is computed once by the reference for :data:`TOKENS` tokens; as tokens are independent, its first rows are
the expected output of a call with fewer. Rows are independent, too, so a large matrix repeats a prime number of
distinct rows, which keeps a proof cheap and still tells misplaced rows. Weights alternate between random draws and the
format's extremes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .errors import DisprovedError
from .format import TABLE_LEVELS, Int4Weight, QuantizedWeight, Weight, codes_to_planes, pack_codes
from .spec import LinearSpec, QuantizeSpec

TOKENS = 37
"""Tokens of a proof: odd, so that every tile meets its remainder, and more than any tile of a CPU. Where a thread block
of a GPU has more, it gets them several times."""

DISTINCT_ROWS = 509
"""Most different rows of a proof's weight: a prime, so that no tile size divides the distance of equal rows."""


def agree(actual: Tensor, expected: Tensor) -> bool:
    """Bitwise equality, where any NaN equals any other and the sign of zero does not count."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    same = actual == expected
    if actual.is_floating_point():
        same = same | (actual.isnan() & expected.isnan())
    return bool(same.all())


@dataclass(frozen=True)
class LinearCase:
    """Inputs of a linear and the output the reference defines for them.

    Attributes:
        name: for messages.
        values: ``[TOKENS, K]``.
        x_scale: ``[TOKENS, G or 1]``.
        weight: what :meth:`pack` takes.
        bias: fp32 ``[N]`` or None.
        expected: fp32 ``[TOKENS, N]``.
    """

    name: str
    values: Tensor
    x_scale: Tensor
    weight: Weight
    bias: Tensor | None
    expected: Tensor


def _mixture(shape: tuple[int, ...], choices: tuple[float, ...], generator: torch.Generator) -> Tensor:
    index = torch.randint(len(choices), shape, generator=generator)
    return torch.tensor(choices)[index]


def _values(spec: LinearSpec, extreme: bool, generator: torch.Generator) -> Tensor:
    limit = {4: reference.INT4_MAX, 8: reference.INT8_MAX, 16: reference.INT16_MAX}[spec.act_bits]
    shape = (TOKENS, spec.in_features)
    if spec.act_bits == 4:
        zeros = torch.randint(limit + 1, (TOKENS, spec.groups), generator=generator)
        if extreme:
            zeros = zeros % 2 * limit
        zeros = zeros.repeat_interleave(spec.group or spec.in_features, 1)[:, : spec.in_features]
        values = torch.randint(limit + 1, shape, generator=generator) - zeros
    else:
        values = torch.randint(-limit, limit + 1, shape, generator=generator)
    if extreme:
        values[0::3] = limit
        values[1::3] = -limit
        values[2] = 0
    return values.to(reference.value_dtype(spec.act_bits))


def _bit_weight(spec: LinearSpec, extreme: bool, generator: torch.Generator) -> QuantizedWeight:
    n, k, groups = min(spec.out_features, DISTINCT_ROWS), spec.in_features, spec.groups
    codes = torch.randint(4, (n, k), generator=generator, dtype=torch.uint8)
    levels = torch.randint(-127, 128, (n, groups, 4), generator=generator).sort(-1).values.to(torch.int8)
    scale = torch.rand(n, groups, generator=generator).half() * 0.01
    if extreme:
        codes[0::3], codes[1::3] = 0, 3
        levels[..., 0], levels[..., 3] = -128, 127
        scale = _mixture((n, groups), (0.0, 2.0**-24, 1.0, 65504.0), generator).half()
    if spec.additive:
        levels[..., 1:3] = torch.stack(_additive_pair(*levels.int().unbind(-1)), -1).to(torch.int8)
    return QuantizedWeight(*codes_to_planes(codes), levels, scale, k, spec.group)


def _additive_pair(low: Tensor, first: Tensor, _: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Inner levels, lower and upper, that make sorted levels additive; one of the four stays."""
    other = low + high - first
    return torch.minimum(first, other), torch.maximum(first, other)


def _int4_weight(spec: LinearSpec, extreme: bool, generator: torch.Generator) -> Int4Weight:
    n, k, groups = min(spec.out_features, DISTINCT_ROWS), spec.in_features, spec.groups
    codes = torch.randint(TABLE_LEVELS, (n, k), generator=generator, dtype=torch.uint8)
    table = torch.randint(-127, 128, (TABLE_LEVELS,), generator=generator).sort().values.to(torch.int8)
    scale = (torch.rand(n, groups, generator=generator) - 0.5).half() * 0.01
    if extreme:
        codes[0::3], codes[1::3] = 0, TABLE_LEVELS - 1
        table[0], table[-1] = -128, 127
        scale = _mixture((n, groups), (0.0, 2.0**-24, -1.0, 65504.0), generator).half()
    return Int4Weight(pack_codes(codes), table, scale, k, spec.group)


def _int8_weight(spec: LinearSpec, extreme: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (min(spec.out_features, DISTINCT_ROWS), spec.in_features)
    rows = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(shape[0], generator=generator) * 0.01
    if extreme:
        rows[0::3], rows[1::3] = -128, 127
        scale = _mixture(shape[:1], (0.0, 1e-38, 1.0, 1e5), generator)
    return rows, scale


def _take_rows(weight: Weight, rows: Tensor) -> Weight:
    if isinstance(weight, QuantizedWeight):
        sign, bitmap = weight.sign[rows], weight.bitmap[rows]
        return QuantizedWeight(sign, bitmap, weight.levels[rows], weight.scale[rows], weight.in_features, weight.group)
    if isinstance(weight, Int4Weight):
        return weight.rows(rows)
    return weight[0][rows], weight[1][rows]


_WEIGHTS = {"bit": _bit_weight, "int4": _int4_weight, "int8": _int8_weight}


def linear_cases(spec: LinearSpec, seed: int = 0) -> list[LinearCase]:
    """The cases a kernel of ``spec`` must pass: random draws and extremes."""
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for extreme in (False, True):
        values = _values(spec, extreme, generator)
        x_scale = torch.rand(TOKENS, spec.x_scales, generator=generator) + 1e-3
        if extreme:
            x_scale = _mixture((TOKENS, spec.x_scales), (0.0, 1e-30 / 15, 1.0, 1e30), generator)
        distinct: Weight = _WEIGHTS[spec.kind](spec, extreme, generator)
        rows = torch.arange(spec.out_features) % DISTINCT_ROWS
        expected = reference.linear(values, x_scale, distinct, None, spec.group)[:, rows]
        bias = torch.randn(spec.out_features, generator=generator) if spec.bias else None
        if bias is not None:
            expected = expected + bias
        weight = _take_rows(distinct, rows)
        name = "extreme values" if extreme else "random values"
        cases.append(LinearCase(name, values, x_scale, weight, bias, expected))
    return cases


def token_counts(lowest: int, highest: int) -> list[int]:
    """Token counts at which a kernel for ``lowest .. highest`` tokens is proven: the ends and odd ones between."""
    top = min(highest, TOKENS)
    return sorted({m for m in (lowest, lowest + 1, 5, 7, top) if lowest <= m <= top})


def linear_failure(call: Callable[..., object], packed: Tensor, case: LinearCase, counts: list[int]) -> str | None:
    """What a kernel gets wrong in a case, or None. ``call(values, x_scale, packed, out)`` runs it."""
    for m in counts:
        expected = case.expected[:m]
        out = torch.full_like(expected, float("nan"))
        call(case.values[:m], case.x_scale[:m], packed, out)
        if not agree(out, expected):
            wrong = int((~((out == expected) | (out.isnan() & expected.isnan()))).sum())
            return f"{wrong} of {out.numel()} outputs differ for {case.name} with {m} tokens"
    return None


def quantizer_inputs(spec: QuantizeSpec, seed: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Inputs ``(x [TOKENS, K], clip [2])`` a quantizer must agree on: ordinary, huge, tiny, constant and one-sided.

    With knees the third is ``knees [2]``, with planes ``plane_scales [4]``.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, spec.in_features, generator=generator)
    x[1], x[2], x[3], x[4] = 0.0, x[2].abs(), -x[3].abs(), 1.0
    x[5] = x[5].round()
    x[6, ::29] *= 100.0
    for factor, clip, knees, plane_scales in (
        (1.0, (1.0, 1.0), (0.3, 0.3), reference.UNIFORM_PLANES),
        (1.0, (0.9, 0.3), (0.05, 0.9), (0.9, 1.7, 3.1, 7.3)),
        (1e37, (1.0, 1.0), (0.999, 0.01), (1.3, 2.1, 4.7, 16.0)),
        (1e-32, (0.7, 1.0), (0.5, 0.25), (0.1, 0.1, 0.2, 0.4)),
        (1e-40, (1.0, 1.0), (0.2, 0.2), reference.UNIFORM_PLANES),
    ):
        inputs = x * factor, torch.tensor(clip)
        yield (*inputs, torch.tensor(knees if spec.knees else plane_scales)) if spec.tabled else inputs


def quantized(spec: QuantizeSpec, x: Tensor, clip: Tensor, *shape: Tensor) -> tuple[Tensor, Tensor]:
    """What a quantizer must give for one of its inputs; ``shape`` is what shapes its table, if it has one."""
    if spec.planes:
        return reference.quantize_activation(x, clip, spec.bits, spec.group, None, *shape)
    return reference.quantize_activation(x, clip, spec.bits, spec.group, *shape)


def quantizer_failure(call: Callable[..., None], spec: QuantizeSpec, counts: list[int]) -> str | None:
    """What a quantizer gets wrong, or None. ``call(x, clip, values, scale)`` runs it, with what shapes a table behind
    ``clip``."""
    for x, *factors in quantizer_inputs(spec):
        values, scale = quantized(spec, x, *factors)
        for m in counts:
            got_values, got_scale = torch.empty_like(values[:m]), torch.empty_like(scale[:m])
            call(x[:m], *factors, got_values, got_scale)
            if not (agree(got_values, values[:m]) and agree(got_scale, scale[:m])):
                return f"quantized values differ with {m} tokens"
    return None


def disproved(what: str, failure: str) -> DisprovedError:
    """The error for a kernel that disagrees with the reference."""
    return DisprovedError(
        f"the generated kernel of {what} is wrong on this machine ({failure}); please report this CPU"
    )
