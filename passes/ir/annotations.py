"""What the pass ``annotate`` notes on linears, for later passes to read."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from .program import Program
from .scheme import Scheme

LINEAR = "lbllm_linear"
"""Key of a linear's :class:`LinearInfo` in ``node.meta``."""

ROLES = ("decoder", "outliers", "head", "dense")
"""What a linear can be."""


@dataclass(frozen=True)
class LinearInfo:
    """One linear and what becomes of it.

    Attributes:
        path: module path, e.g. ``model.layers.3.mlp.up_proj``.
        weight: target of the weight's ``get_attr``, e.g. ``model.layers.3.mlp.up_proj.weight``.
        layer: decoder layer, or None outside the layers.
        role: ``"decoder"`` (W(1+1) or 4-bit codes), ``"outliers"`` (a decoder linear's columns of 8 bits), ``"head"``
            (8, 4 or 2 bits) or ``"dense"`` (stays float).
        experts: matrices in a stacked weight; 0 for an ordinary one.
        reason: why it has this role, for people.
        scheme: how it is quantized, as far as ``annotate`` was told; complete once ``lower`` has run.
    """

    path: str
    weight: str
    layer: int | None
    role: str
    experts: int
    reason: str
    scheme: Scheme = field(default_factory=Scheme)

    @property
    def matrices(self) -> int:
        return max(self.experts, 1)


def linears(program: Program) -> list[tuple[fx.Node, LinearInfo]]:
    """Every annotated linear of a program, in graph order."""
    return [(n, n.meta[LINEAR]) for n in program.graph.nodes if LINEAR in n.meta]
