"""Level rules: which four levels a group of weights may have.

The format stores four sorted int8 levels and a scale per group, and kernels multiply whatever is stored. A *rule* says
which sets of four are allowed, by what free parameters stand behind them, and so decides what stage 1 fits, what
training moves and what a stored weight is held to. Three ship:

* :data:`FREE` allows any four;
* :data:`ADDITIVE` has the sums of two binary planes' scales about an offset, ``m, m + a1, m + a2, m + a1 + a2``;
* :data:`DUAL` has those without an offset, as in DB-LLM (arXiv 2402.11960).

Levels of the last two are *additive*: ``level_0 + level_3 == level_1 + level_2``. A rule that is linear in its
parameters, with whole coefficients, is a :class:`LinearRule` and takes nothing but its coefficients; any other derives
from :class:`LevelRule`.

:func:`register` makes a rule known to this process. A package whose rules every process should know, the command line's
included, names them as entry points of the group :data:`ENTRY_POINT_GROUP`.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points

import torch
from torch import Tensor

from .errors import FormatError, LbllmError
from .format import LEVEL_MAX, LEVELS, SCALE_MIN, quantize_levels

ENTRY_POINT_GROUP = "lbllm_compile.level_rules"
"""Third-party packages register rules here: ``my-rule = "my_package.my_module:MY_RULE"``."""

_SAME = 1e-12
"""Squared error, relative to the largest level, up to which levels are stored already."""

_SORTED_SAMPLES = 256
"""Random groups on which a rule must survive sorting."""


class LevelRuleError(LbllmError):
    """A level rule that does not exist, is not well formed, or takes the name of another."""


@dataclass(frozen=True)
class LevelRule(ABC):
    """What four levels of a group follow from. Tensors may have any leading dimensions.

    The levels of a group are sorted when they are stored, so a rule must survive sorting: sorted, the levels of any
    parameters are levels of some parameters.

    Attributes:
        name: in pipeline text and artifacts.
    """

    name: str

    @property
    def additive(self) -> bool:
        """Whether sorted levels of any parameters have ``level_0 + level_3 == level_1 + level_2``."""
        return False

    @abstractmethod
    def parameters(self, levels: Tensor) -> Tensor:
        """The parameters ``fp32 [..., P]`` whose levels come closest to ``levels [..., 4]``, in least squares.

        They train with rates in units of levels, so they should be of the size of levels.
        """

    @abstractmethod
    def levels(self, parameters: Tensor) -> Tensor:
        """The levels ``[..., 4]`` of parameters ``[..., P]``; differentiable, and inverse to :meth:`parameters`."""

    @abstractmethod
    def refit(self, normal: Tensor, right: Tensor, levels: Tensor) -> Tensor:
        """The levels of the rule that minimize ``d^T normal d - 2 right^T d``, with ``d`` what they exceed ``levels``.

        Args:
            normal: ``[U, 4, 4]``, symmetric and positive definite.
            right: ``[U, 4]``.
            levels: ``[U, 4]``, levels of the rule.

        Returns:
            ``[U, 4]``; in any order, where no other is better.
        """

    @abstractmethod
    def quantize(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted levels as stored: sorted int8 ``[..., 4]`` that follow the rule, and the scale ``fp16 [...]``.

        The levels may be any; stored are close ones that follow the rule. What is stored already stays as it is: times
        their scale, the stored levels give themselves again.

        Raises:
            FormatError: a level is not finite, or too large for an fp16 scale.
        """

    @abstractmethod
    def holds(self, quantized: Tensor) -> Tensor:
        """Whether stored levels ``int8 [..., 4]`` follow the rule, ``bool [...]``."""

    def stored(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`quantize` of levels in any order, which training may have changed."""
        ordered, order = levels.sort(dim=-1, stable=True)
        quantized, scale = self.quantize(ordered)
        return quantized.gather(-1, order.argsort(dim=-1)), scale

    def check(self, quantized: Tensor, name: str) -> None:
        """Checks the stored levels of a weight.

        Raises:
            FormatError: naming the weight ``name`` and the rule.
        """
        if not bool(self.holds(quantized).all()):
            raise FormatError(f"{name}: the levels of a group do not follow the level rule '{self.name}'")


@dataclass(frozen=True)
class FreeRule(LevelRule):
    """Any four levels: they are their own parameters."""

    name: str = "free"

    def parameters(self, levels: Tensor) -> Tensor:
        return levels

    def levels(self, parameters: Tensor) -> Tensor:
        return parameters

    def refit(self, normal: Tensor, right: Tensor, levels: Tensor) -> Tensor:
        return levels + torch.linalg.solve(normal, right)

    def quantize(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_levels(levels)

    def stored(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_levels(levels)  # level by level, whatever their order

    def holds(self, quantized: Tensor) -> Tensor:
        return torch.ones(quantized.shape[:-1], dtype=torch.bool, device=quantized.device)


@dataclass(frozen=True)
class WholeRule(LevelRule):
    """A rule of which whole parameters make whole levels, so that levels are stored by rounding parameters."""

    @abstractmethod
    def solve(self, levels: Tensor) -> Tensor:
        """:meth:`parameters`, in double."""

    @property
    @abstractmethod
    def slack(self) -> float:
        """How much further out a level can come to lie when all parameters are rounded."""

    def parameters(self, levels: Tensor) -> Tensor:
        return self.solve(levels).to(levels.dtype)

    def quantize(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Takes of a few scales the one whose whole parameters come closest: what is stored already stays as it is."""
        parameters = self.solve(levels)
        exact = self.levels(parameters)
        peak = exact.abs().amax(-1)
        best = torch.zeros_like(exact), torch.full_like(peak, torch.inf, dtype=torch.float16)
        least = torch.full_like(peak, torch.inf)
        for scale, spare in self._scales(peak):
            safe = torch.where(scale == 0, torch.ones_like(scale), scale).double().unsqueeze(-1)
            whole = self.levels((parameters / safe).round())
            error = (whole * safe - exact).square().sum(-1)
            better = (whole.abs().amax(-1) <= LEVEL_MAX) & (error < least)
            if spare:
                better &= torch.isinf(least) | (error <= _SAME * peak.square())
            least = torch.where(better, error, least)
            best = torch.where(better.unsqueeze(-1), whole, best[0]), torch.where(better, scale, best[1])
        if not bool(torch.isfinite(best[1]).all()):
            raise FormatError(
                "a weight level is NaN, infinite or larger than an fp16 group scale can hold; check the model's weights"
            )
        return best[0].sort(dim=-1).values.to(torch.int8), best[1]

    def _scales(self, peak: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Scales to try where the largest level is ``peak``, and whether one is spare: for levels that are stored with
        it already, or that no other scale can hold.

        Rounding parameters moves the largest stored level by up to the slack. Where fp16 numbers lie closer than that,
        limits below the largest int8 level cover it; where they lie further apart, the next numbers do.
        """
        slack = math.ceil(self.slack)
        for below in range(2 * slack + 6):
            yield _nearest(peak / (LEVEL_MAX - below)), below > slack + 1
        yield from ((_raised(_nearest(peak / LEVEL_MAX), steps), True) for steps in range(1, slack + 2))

    def holds(self, quantized: Tensor) -> Tensor:
        nearest = self.levels(self.solve(quantized))
        return ((nearest - quantized.double()).abs() < 1e-6).all(-1)


@dataclass(frozen=True)
class LinearRule(WholeRule):
    """Levels that are sums of parameters with whole coefficients.

    Attributes:
        coefficients: one row per level, one column per parameter: ``((1, 0, -1), (1, -1, 0), (1, 1, 0), (1, 0, 1))``
            are two pairs about a shared offset.

    Raises:
        LevelRuleError: there are not four rows alike, columns depend on each other, or sorting loses the rule.
    """

    coefficients: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.coefficients}
        if len(self.coefficients) != LEVELS or len(widths) != 1 or not 1 <= min(widths) <= LEVELS:
            raise LevelRuleError(
                f"the level rule '{self.name}' needs {LEVELS} rows of coefficients, each for the same 1 to {LEVELS}"
                " parameters"
            )
        if any(not isinstance(value, int) for row in self.coefficients for value in row):
            raise LevelRuleError(f"the level rule '{self.name}' has a coefficient that is no whole number")
        # Whoever imports this may have another default device, even one without values, as transformers has.
        with torch.device("cpu"):
            self._check_form(min(widths))

    def _check_form(self, width: int) -> None:
        if torch.linalg.matrix_rank(self._matrix) < width:
            raise LevelRuleError(f"the level rule '{self.name}' has a parameter that the others make superfluous")
        drawn = torch.randn((_SORTED_SAMPLES, width), generator=torch.Generator().manual_seed(0), dtype=torch.double)
        levels = self.levels(drawn).sort(-1).values
        if not torch.allclose(self.levels(self.solve(levels)), levels):
            raise LevelRuleError(
                f"the level rule '{self.name}' loses its form when its levels are sorted; give it an offset, or"
                " coefficients whose order does not matter"
            )

    @cached_property
    def _matrix(self) -> Tensor:
        return torch.tensor(self.coefficients, dtype=torch.double, device="cpu")

    @cached_property
    def _inverse(self) -> Sequence[Sequence[float]]:
        """The pseudo-inverse ``[P, 4]``."""
        return torch.linalg.pinv(self._matrix).tolist()

    @property
    def additive(self) -> bool:
        # Two pairs with the same sum lie about the same middle, one within the other.
        first, *others = self._matrix
        return any(bool((first + other == self._matrix.sum(0) / 2).all()) for other in others)

    @property
    def slack(self) -> float:
        return 0.5 * float(self._matrix.abs().sum(1).max())

    def solve(self, levels: Tensor) -> Tensor:
        """Least squares. Sums are in one order, so a group's do not depend on its neighbours."""
        return _combine(levels.double(), self._inverse)

    def levels(self, parameters: Tensor) -> Tensor:
        return _combine(parameters, self.coefficients)

    def refit(self, normal: Tensor, right: Tensor, levels: Tensor) -> Tensor:
        matrix = self._matrix.to(normal)
        reduced = matrix.t() @ normal @ matrix
        return levels + torch.linalg.solve(reduced, right @ matrix) @ matrix.t()


_ORDERS = (
    ((0, 0), (1, 0), (0, 1), (1, 1)),
    ((1, 0), (0, 0), (1, 1), (0, 1)),
    ((1, 0), (1, 1), (0, 0), (0, 1)),
    ((1, 1), (1, 0), (0, 1), (0, 0)),
)
"""Ascending levels of :class:`DualRule` as sums of its scales, by the place that 0 takes among them."""


@dataclass(frozen=True)
class DualRule(WholeRule):
    """Two binary planes, each with a scale: the levels are ``0, a1, a2`` and ``a1 + a2``, in ascending order.

    Scales of different signs are DB-LLM's flexible dual binarization (arXiv 2402.11960), whose levels start as ``-s, 0,
    s, 2s``. Which scale is the larger one is a group's *orientation*: ``-2s, -s, 0, s`` is the other. With scales of
    one sign all levels are on one side of 0.
    """

    name: str = "dual"

    @property
    def additive(self) -> bool:
        return True

    @property
    def slack(self) -> float:
        return 1.0

    def solve(self, levels: Tensor) -> Tensor:
        wanted = levels.double()
        best = torch.zeros_like(wanted[..., :2])
        least = torch.full_like(wanted[..., 0], torch.inf)
        for inverse in _dual_inverses():
            found = _combine(wanted, inverse)
            error = (self.levels(found) - wanted).square().sum(-1)
            # Errors of levels that follow the rule are rounding alone; of several orders the first then stays.
            better = error < least
            best, least = torch.where(better.unsqueeze(-1), found, best), torch.where(better, error, least)
        return torch.where(torch.isinf(least).unsqueeze(-1), torch.nan, best)

    def levels(self, parameters: Tensor) -> Tensor:
        first, second = parameters.unbind(-1)
        lowest = first.clamp(max=0) + second.clamp(max=0)
        highest = first.clamp(min=0) + second.clamp(min=0)
        inner = torch.minimum(first.abs(), second.abs()), torch.maximum(first.abs(), second.abs())
        return torch.stack([lowest, *(lowest + width for width in inner), highest], -1)

    def refit(self, normal: Tensor, right: Tensor, levels: Tensor) -> Tensor:
        """Takes of the orders of 0 and the sums the best one whose levels ascend; ``levels`` where there is none."""
        normal, base = normal.double(), levels.double()
        target = right.double() + (normal @ base.unsqueeze(-1)).squeeze(-1)
        best, least = base, torch.zeros_like(base[:, 0])
        for order in _ORDERS:
            matrix = torch.tensor(order, dtype=torch.double, device=normal.device)
            reduced = matrix.t() @ normal @ matrix
            found = torch.linalg.solve(reduced, target @ matrix) @ matrix.t()
            moved = found - base
            cost = ((normal @ moved.unsqueeze(-1)).squeeze(-1) * moved - 2 * right * moved).sum(-1)
            better = (cost < least) & (found.diff(dim=-1) >= 0).all(-1)
            best, least = torch.where(better.unsqueeze(-1), found, best), torch.where(better, cost, least)
        return best.to(levels.dtype)


@functools.cache
def _dual_inverses() -> Sequence[Sequence[Sequence[float]]]:
    """The pseudo-inverse ``[2, 4]`` of each of the orders."""
    return [torch.linalg.pinv(torch.tensor(order, dtype=torch.double, device="cpu")).tolist() for order in _ORDERS]


def _combine(values: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    """``[..., len(rows)]``: sums of ``values [..., n]`` with each row's ``n`` coefficients, in their order."""
    parts = values.unbind(-1)
    sums = []
    for row in rows:
        total = parts[0] * row[0]
        for part, coefficient in zip(parts[1:], row[1:], strict=True):
            total = total + part * coefficient
        sums.append(total)
    return torch.stack(sums, -1)


def _nearest(values: Tensor) -> Tensor:
    """The nearest fp16 numbers; none is 0 where the value is not."""
    rounded = values.to(torch.float16)
    return torch.where((rounded == 0) & (values > 0), torch.full_like(rounded, SCALE_MIN), rounded)


def _raised(scale: Tensor, steps: int) -> Tensor:
    """The fp16 numbers so many steps above positive ones, which are ordered as the integers that have their bits."""
    return (scale.view(torch.int16) + steps).view(torch.float16)


FREE = FreeRule()
"""Four levels, each for itself: the rule where no other is named."""

ADDITIVE = LinearRule("additive", ((1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)))
"""``m, m + a1, m + a2, m + a1 + a2``: two binary planes with a scale each, about an offset."""

DUAL = DualRule()
"""``0, a1, a2, a1 + a2``: the same without an offset."""

_REGISTERED: dict[str, LevelRule] = {rule.name: rule for rule in (FREE, ADDITIVE, DUAL)}


def register(rule: LevelRule) -> LevelRule:
    """Makes a rule known to this process; registering an equal one again changes nothing.

    Raises:
        LevelRuleError: another rule has its name.
    """
    if _REGISTERED.setdefault(rule.name, rule) != rule:
        raise LevelRuleError(f"there is another level rule '{rule.name}' already; choose another name")
    return rule


def names() -> list[str]:
    """Every rule that a scheme may name, the built-in ones first."""
    points = (point.name for point in entry_points(group=ENTRY_POINT_GROUP))
    return list(dict.fromkeys(itertools.chain(_REGISTERED, sorted(points))))


def get(name: str) -> LevelRule:
    """The rule of a name.

    Raises:
        LevelRuleError: there is none, or a third-party one is broken.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        try:
            found = point.load()
        except Exception as error:
            raise LevelRuleError(f"the level rule '{name}' ({point.value}) cannot be imported: {error}") from error
        if not isinstance(found, LevelRule) or found.name != name:
            raise LevelRuleError(f"the entry point '{name}' ({point.value}) is not a LevelRule named '{name}'")
        return register(found)
    raise LevelRuleError(
        f"there is no level rule '{name}'; known are {', '.join(names())}, and those that an installed package"
        " registers"
    )
