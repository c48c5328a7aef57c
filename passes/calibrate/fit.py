"""Fitting a W(1+1) matrix: planes and levels that keep ``W x`` for the inputs a calibration saw.

The error of a matrix is ``tr(E H E^T)`` with ``E = W - Q`` and the Hessian ``H = mean(x x^T)``. Columns are quantized a
group at a time. Within the remaining columns, ``H = R R^T`` with ``R`` upper triangular makes that error the sum of
``||E R||^2``, one term per column, and ``U = R^-1`` says how later columns best make up for a column's error (GPTQ,
arXiv 2210.17323). Levels of a group come from Hessian-weighted expectation maximization on four levels (BWA, arXiv
2504.05352), then from a least-squares refit under the group's full Hessian.

Everything is vectorized over the rows: a row's fit depends on no other row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from ...codegen.errors import LbllmError
from ...codegen.format import LEVELS, quantize_rows
from ...codegen.levels import FREE, LevelRule
from ...codegen.sizes import group_count

Init = Literal["em", "rtn"]
"""How a group's levels start: by expectation maximization, or as an even grid between its least and largest weight."""

SCOUT_ITERATIONS = 3
"""Rounds of expectation maximization from every starting point, before the best one goes on alone."""

EM_ITERATIONS = 10
"""Most rounds after that; it usually settles in fewer."""

PANEL = 16
"""Columns compensated one by one before their errors are applied to the rest of the group in one product."""

STEEP = 3e38
"""Slope of the clamped line that stands in for a step function."""

RIDGE = 1e-4
"""Ridge of the level refit, relative to the group's mean diagonal: keeps a level that no element uses."""

SPARE = 1e-6
"""What holds a level in place that nothing is next to, as a share of a group's importance."""

DAMP_LIMIT = 1.0
"""Damping above which a Hessian counts as unusable."""


class FitError(LbllmError):
    """The calibration statistics cannot be used (not finite, or not positive definite under any damping)."""


@dataclass(frozen=True)
class Fit:
    """A fitted matrix.

    Attributes:
        codes: uint8 ``[N, K - kept]``, level codes 0..3.
        levels: float32 ``[N, G, 4]``, sorted, each group's exactly representable as int8 times fp16 scale.
        error, norm: float32 ``[N]``: mean of ``((w - q) x)^2`` and ``(w x)^2`` over the calibration inputs, damping
            included.
        kept: int8 ``[N, kept]``, the last columns.
        kept_scale: float32 ``[N]``: what they are multiples of.
    """

    codes: Tensor
    levels: Tensor
    error: Tensor
    norm: Tensor
    kept: Tensor
    kept_scale: Tensor

    def rows(self, start: int, end: int) -> Fit:
        """The fit of some rows."""
        return Fit(*(getattr(self, part.name)[start:end] for part in fields(self)))

    @property
    def relative_error(self) -> float:
        """``||(W - Q) x||^2 / ||W x||^2``."""
        norm = float(self.norm.double().sum())
        return float(self.error.double().sum()) / norm if norm > 0 else 0.0


@dataclass(frozen=True)
class Factor:
    """A factored Hessian, its columns reordered so that important groups come first, and kept columns last.

    Attributes:
        order: int64 ``[K]``: column of the matrix at each position; a group's columns stay together, and the kept ones
            are as they were.
        groups: index of the weight group at each group position.
        sizes: number of columns of each group position.
        root: ``R``, upper triangular ``[K, K]``, ``H = R R^T`` in the new order.
        inverse: ``U = R^-1``.
        dead: bool ``[K]``, in the matrix's order: columns whose input is always zero.
        damp: relative damping that made the Hessian positive definite.
    """

    order: Tensor
    groups: tuple[int, ...]
    sizes: tuple[int, ...]
    root: Tensor
    inverse: Tensor
    dead: Tensor
    damp: float


def factor(hessian: Tensor, group: int, damp: float, kept: int = 0) -> Factor:
    """Factors a Hessian ``[K, K]`` for :func:`fit`, whose last ``kept`` columns have no levels.

    Dead columns get a unit diagonal. ``damp`` times the mean diagonal is added to the diagonal; where the Cholesky
    factorization fails all the same, ten times as much, and so on.

    Raises:
        FitError: the Hessian is not finite, or no damping up to 1 makes it positive definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise FitError("the calibration activations are not finite; check the model's weights and its inputs")
    k = hessian.shape[0]
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.new_ones(())
    diagonal[dead] = mean
    order, groups, sizes = _column_order(hessian.diagonal(), group, kept)
    hessian = hessian[order][:, order]
    while damp <= DAMP_LIMIT:
        # R R^T with an upper R is the Cholesky factorization of the matrix read backwards.
        backwards = hessian.flip(0, 1)
        backwards.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(backwards)
        del backwards
        if not bool(failed):
            root = lower.flip(0, 1).contiguous()
            del lower
            inverse = torch.linalg.solve_triangular(
                root, torch.eye(k, dtype=root.dtype, device=root.device), upper=True
            )
            if bool(torch.isfinite(inverse).all()):
                return Factor(order, groups, sizes, root, inverse, dead, damp)
        damp = max(10 * damp, 1e-4)
    raise FitError("the calibration Hessian cannot be factored; use more calibration text or a larger damp")


def _column_order(diagonal: Tensor, group: int, kept: int) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Groups by falling mean importance, and columns by falling importance within each; kept columns behind them.

    What is quantized first still has all other columns to make up for its error.
    """
    k = diagonal.shape[0] - kept
    columns = [torch.arange(start, min(start + group, k), device=diagonal.device) for start in range(0, k, group)]
    importance = torch.stack([diagonal[c].mean() for c in columns])
    groups = importance.argsort(descending=True, stable=True).tolist()
    ordered = [columns[g][diagonal[columns[g]].argsort(descending=True, stable=True)] for g in groups]
    last = torch.arange(k, k + kept, device=diagonal.device)
    return torch.cat([*ordered, last]), tuple(groups), tuple(len(c) for c in ordered)


def fit(
    weight: Tensor,
    factored: Factor,
    group: int,
    *,
    init: Init = "em",
    compensate: bool = True,
    rounds: int = 1,
    rule: LevelRule = FREE,
) -> Fit:
    """Fits planes and levels to a matrix. Its kept columns make up for the errors of all others, and become int8 rows.

    Args:
        weight: ``[N, K]``, finite.
        factored: of the inputs' Hessian, for the same ``group``.
        group: input columns per group.
        init: how levels are found; ``rtn`` without ``compensate`` is plain rounding to nearest, whatever the inputs.
        compensate: let later columns make up for the errors of earlier ones.
        rounds: rounds of compensation and level refit per group; the best of them is kept per row.
        rule: which levels a group may have.

    Raises:
        FormatError: the weight is not finite, or too large for the format.
    """
    n, k = weight.shape
    main = sum(factored.sizes)
    weight = weight.float().masked_fill(factored.dead, 0.0)
    # Columns are rows here: the loop over columns reads and writes contiguous memory.
    work = weight.t()[factored.order].contiguous()
    codes = work.new_empty((main, n), dtype=torch.uint8)
    levels = work.new_empty((n, group_count(main, group), LEVELS))
    del weight
    original = work.clone()
    quantized = torch.empty_like(work)
    start = 0
    for index, size in zip(factored.groups, factored.sizes, strict=True):
        end = start + size
        block = work[start:end]
        root = factored.root[start:end, start:end]
        inverse = factored.inverse[start:end, start:end]
        # What an error costs once later columns have made up for it; without compensation, what it costs as it is.
        importance = (
            inverse.diagonal().square().reciprocal() if compensate else factored.root[start:end].square().sum(1)
        )
        found = even_grid(block.t()) if init == "rtn" else expectation_maximization(block.t(), importance, rule)
        found = _representable(found, rule)
        if compensate:
            found, steps, errors = _fit_group(block, root, inverse, found, rounds, rule)
            if end < k:
                work[end:].addmm_(factored.inverse[start:end, end:].t(), errors, alpha=-1.0)
        else:
            steps = _steps(block, found)
        codes[start:end] = steps.sum(0).to(torch.uint8)
        levels[:, index] = found
        quantized[start:end] = _pick(found, steps)
        start = end
    kept, kept_scale = _int8_rows(work[main:].t())
    quantized[main:] = kept.t() * kept_scale
    restored = codes.new_empty((n, main))
    restored[:, factored.order[:main]] = codes.t()
    root = factored.root.t()
    error = (root @ (original - quantized)).square().sum(0)
    return Fit(restored, levels, error, (root @ original).square().sum(0), kept, kept_scale)


def _int8_rows(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Kept columns ``[N, kept]``, which may be none, as :func:`..codegen.format.quantize_rows` gives them."""
    if columns.shape[1]:
        return quantize_rows(columns)
    return columns.to(torch.int8), columns.new_zeros(columns.shape[0])


def _fit_group(
    block: Tensor, root: Tensor, inverse: Tensor, levels: Tensor, rounds: int, rule: LevelRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Fits one group ``[g, N]`` from starting levels ``[N, 4]``.

    Returns:
        Levels ``[N, 4]``, steps ``[3, g, N]`` and scaled errors ``E R`` ``[g, N]``.
    """
    hessian = root @ root.t()
    best: tuple[Tensor, Tensor, Tensor] | None = None
    best_loss = block.new_empty(0)
    for _ in range(rounds):
        steps = _compensated_steps(block, inverse, levels)
        # Levels are refitted to the codes, so the refit, not the levels the codes were picked with, is judged.
        levels = _refit(block, hessian, steps, levels, rule)
        errors = root.t() @ (block - _pick(levels, steps))
        loss = errors.square().sum(0)
        if best is None:
            best, best_loss = (levels, steps, errors), loss
            continue
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = (
            torch.where(better[:, None], levels, best[0]),
            torch.where(better, steps, best[1]),
            torch.where(better, errors, best[2]),
        )
        levels = best[0]
    assert best is not None
    return best


def expectation_maximization(weight: Tensor, importance: Tensor, rule: LevelRule = FREE) -> Tensor:
    """Four sorted levels per row that minimize ``sum_i importance_i (w_i - nearest level)^2`` under a rule.

    Weighted k-means in one dimension: on sorted values a cluster is a range, and its sums are differences of prefix
    sums, so a round costs a few numbers per row. Four starting points per row; the best end is kept.

    Args:
        weight: ``[N, g]``.
        importance: ``[g]``, positive.
        rule: which levels there may be, not yet as they are stored.

    Returns:
        float32 ``[N, 4]``.
    """
    values, order = weight.contiguous().sort(-1)
    share = (importance / importance.sum())[order]
    prefix = [torch.nn.functional.pad((share * values**p).double().cumsum(-1), (1, 0)) for p in range(2)]
    found = _starts(values, share)
    if rule != FREE:
        found = rule.levels(rule.parameters(found.sort(-1).values)).sort(-1).values
    found, gain = _lloyd(values, prefix, found, SCOUT_ITERATIONS, rule)
    best = gain.argmax(1)[:, None, None].expand(-1, 1, LEVELS)
    found, _ = _lloyd(values, prefix, found.gather(1, best), EM_ITERATIONS, rule)
    return found.squeeze(1).sort(-1).values


def even_grid(weight: Tensor) -> Tensor:
    """Four evenly spaced levels ``[N, 4]`` per row of ``[N, g]``, from its least to its largest value."""
    ends = weight.aminmax(dim=-1, keepdim=True)
    return torch.lerp(*ends, torch.linspace(0.0, 1.0, LEVELS, device=weight.device))


def _lloyd(values: Tensor, prefix: list[Tensor], found: Tensor, rounds: int, rule: LevelRule) -> tuple[Tensor, Tensor]:
    """Rounds of one-dimensional k-means from levels ``[N, I, 4]`` of a rule on sorted values ``[N, g]``.

    Returns:
        The levels, and what they explain ``[N, I]``: the weighted square sum less the weighted squared error.
    """
    n, g = values.shape
    inits = found.shape[1]
    bounds = torch.tensor([0, g], device=values.device).expand(n, inits, 2)
    cuts = gain = values.new_empty(0)
    for _ in range(rounds):
        middles = ((found[..., 1:] + found[..., :-1]) / 2).flatten(1)
        previous, cuts = cuts, torch.searchsorted(values, middles.contiguous())
        if previous.shape == cuts.shape and torch.equal(previous, cuts):
            break
        edges = torch.cat([bounds[..., :1], cuts.view(n, inits, LEVELS - 1), bounds[..., 1:]], -1).flatten(1)
        mass, first = (p.gather(1, edges).view(n, inits, LEVELS + 1).diff(dim=-1) for p in prefix)
        if rule == FREE:
            means = first / mass.clamp_min(1e-30)
            gain = (means * first).sum(-1)
            found = torch.where(mass > 0, means.float(), found)
        else:
            found = _centers(mass, first, found, rule)
            gain = ((2 * first - mass * found) * found).sum(-1)
    return found, gain


def _centers(mass: Tensor, first: Tensor, found: Tensor, rule: LevelRule) -> Tensor:
    """The levels of a rule that are best for clusters of these weights and weighted sums, all ``[N, I, 4]``.

    A level that nothing is next to follows from the others, or stays. Levels that would change places stay, too.
    """
    normal = torch.diag_embed(mass + SPARE).flatten(0, 1)
    levels = found.double().flatten(0, 1)
    right = first.flatten(0, 1) - mass.flatten(0, 1) * levels
    moved = rule.refit(normal, right, levels)
    ascending = (moved.diff(dim=-1) >= 0).all(-1, keepdim=True)
    return torch.where(ascending, moved, levels).float().view_as(found)


def _starts(values: Tensor, share: Tensor) -> Tensor:
    """Starting levels ``[N, 4, 4]`` from sorted values and their importance, ``[N, g]`` each.

    Weighted quantiles; the best levels of a normal distribution (Lloyd, Max); an even grid over the range; and the
    ends of the range with the two values that are farthest from what is there already.
    """
    n, g = values.shape
    quantiles = torch.tensor([0.08, 0.33, 0.67, 0.92], device=values.device).expand(n, LEVELS).contiguous()
    at = torch.searchsorted(share.cumsum(-1), quantiles).clamp_max(g - 1)
    mean, deviation = values.mean(-1, keepdim=True), values.std(-1, keepdim=True, unbiased=False)
    low, high = values[:, :1], values[:, -1:]
    normal = mean + deviation * torch.tensor([-1.51, -0.453, 0.453, 1.51], device=values.device)
    even = low + (high - low) * torch.tensor([0.125, 0.375, 0.625, 0.875], device=values.device)
    distance = torch.minimum(values - low, high - values)
    third = values.gather(1, (distance.square() * share).argmax(-1, keepdim=True))
    distance = torch.minimum(distance, (values - third).abs_())
    fourth = values.gather(1, (distance.square() * share).argmax(-1, keepdim=True))
    spread = torch.cat([low, third, fourth, high], 1).sort(-1).values
    return torch.stack([values.gather(1, at), normal, even, spread], 1)


def _representable(levels: Tensor, rule: LevelRule) -> Tensor:
    """Levels as they are stored under a rule: int8 times one fp16 scale per group."""
    quantized, scale = rule.quantize(levels)
    return quantized.float() * scale.float().unsqueeze(-1)


def _steps(block: Tensor, levels: Tensor) -> Tensor:
    """Nearest levels of a block ``[g, N]`` as steps ``[3, g, N]``: 1.0 where a value is above the j-th middle.

    Steps add up to the code. A clamped steep line, and sums of products, are several times faster on a CPU than
    comparing, selecting and converting.
    """
    middles = (levels[:, 1:] + levels[:, :-1]).t() / 2
    return (block - middles.unsqueeze(1)).mul_(STEEP).clamp_(0.0, 1.0)


def _pick(levels: Tensor, steps: Tensor) -> Tensor:
    """Values ``[g, N]`` of levels ``[N, 4]`` picked by steps ``[3, g, N]``."""
    rises = levels.diff(dim=1).t().unsqueeze(1)
    return torch.addcmul(torch.addcmul(levels[:, 0] + rises[0] * steps[0], rises[1], steps[1]), rises[2], steps[2])


def _compensated_steps(block: Tensor, inverse: Tensor, levels: Tensor) -> Tensor:
    """Greedy choice of a group's levels, column by column, each error passed on to the columns behind it (GPTQ)."""
    size, n = block.shape
    base, rises = levels[:, 0].contiguous(), levels.diff(dim=1).t().contiguous()
    middles = ((levels[:, 1:] + levels[:, :-1]).t() / 2).contiguous()
    seen = block.clone()
    scale = inverse.diagonal().reciprocal().tolist()
    steps = block.new_empty((size, LEVELS - 1, n))
    for start in range(0, size, PANEL):
        end = min(start + PANEL, size)
        panel = seen[start:end]
        errors = torch.empty_like(panel)
        for i in range(end - start):
            step = torch.sub(panel[i], middles, out=steps[start + i]).mul_(STEEP).clamp_(0.0, 1.0)
            chosen = (step * rises).sum(0).add_(base)
            torch.sub(panel[i], chosen, out=errors[i]).mul_(scale[start + i])
            if i + 1 < end - start:
                panel[i + 1 :].addcmul_(inverse[start + i, start + i + 1 : end, None], errors[i], value=-1.0)
        if end < size:
            seen[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1.0)
    return steps.transpose(0, 1).contiguous()


def _refit(block: Tensor, hessian: Tensor, steps: Tensor, levels: Tensor, rule: LevelRule) -> Tensor:
    """Least-squares levels for a given choice under the group's Hessian; a row keeps the old ones where better.

    Solves ``min_L (w - A L)^T H (w - A L)`` per row under the rule, ``A`` the one-hot choice; a ridge towards the old
    levels keeps those that no element uses. Levels that would change places are not taken.
    """
    n = block.shape[1]
    residual = block - _pick(levels, steps)
    pulled = hessian @ residual
    member = [1.0 - steps[0], steps[0] - steps[1], steps[1] - steps[2], steps[2]]
    normal = block.new_empty((LEVELS, LEVELS, n))
    right = block.new_empty((LEVELS, n))
    for a in range(LEVELS):
        weighted = hessian @ member[a]
        right[a] = (member[a] * pulled).sum(0)
        for b in range(a + 1):
            normal[a, b] = normal[b, a] = (weighted * member[b]).sum(0)
    normal = normal.permute(2, 0, 1).contiguous()
    normal.diagonal(dim1=1, dim2=2).add_(RIDGE * hessian.diagonal().mean())
    refitted = rule.refit(normal, right.t().contiguous(), levels)
    sorted_rows = (refitted.diff(dim=1) >= 0).all(1, keepdim=True)
    refitted = torch.where(sorted_rows, _representable(refitted, rule), levels)
    before = (residual * pulled).sum(0)
    residual = block - _pick(refitted, steps)
    better = (residual * (hessian @ residual)).sum(0) < before
    return torch.where(better[:, None], refitted, levels)
