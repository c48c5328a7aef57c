"""The code tables of activation quantizers, fitted to real inputs: knees are placed, plane scales fitted.

Every site is fitted on the program as it runs, quantizers that were fitted before it included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...codegen import operators as operators
from ...codegen.progress import Progress
from ..base import batches_of
from ..ir.program import Program, Runner
from ..ir.rewrite import computed, is_call, table_shape
from .knees import best_knees
from .plane_scales import best_plane_scales

SEQUENCES = 4
"""Calibration sequences whose activations are looked at."""


def fit_code_tables(program: Program, batch: Mapping[str, Any], progress: Progress) -> None:
    """Moves the knees and plane scales of all quantizers to their best place; the tensors themselves change.

    Args:
        batch: inputs by placeholder.
    """
    if program.kind == "causal-lm":
        batch = next(batches_of(batch, SEQUENCES))
    sites = sum(1 for n in program.graph.nodes if _has_table(n))
    with torch.no_grad(), progress.task("stage 3: fitting tables of codes", sites) as task:
        _Search(program.module, sites, task).run(*program.arguments(batch))


def _has_table(node: fx.Node) -> bool:
    return is_call(node, torch.ops.lbllm.fake_quantize.default) and bool(table_shape(node))


class _Search(Runner):
    """Runs a program up to its last quantizer with a table, and fits each on its way."""

    def __init__(self, module: fx.GraphModule, sites: int, task: Any):
        super().__init__(module)
        self._left, self._task = sites, task

    def evaluate(self, n: fx.Node) -> Any:
        if not self._left:
            return None
        if _has_table(n):
            given = computed(n, self.env)
            x, clip, group = given.pick("x", "clip", "group")
            if given.knees is not None:
                given.knees.copy_(best_knees(x, clip, group))
            else:
                given.plane_scales.copy_(best_plane_scales(x, clip, group))
            self._left -= 1
            self._task.advance()
        return super().evaluate(n)
