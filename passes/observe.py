"""``observe``: marks the inputs whose statistics the first stage wants.

A node ``lbllm.observe`` is put in front of the decoder linears, one per distinct input: query, key and value share one,
gate and up share one. It computes nothing; ``ptq`` runs the graph up to it, collects the statistics there, and removes
it.

Given::

    %q = aten.linear(%x, %q_weight)
    %k = aten.linear(%x, %k_weight)

Result::

    %observe = lbllm.observe(%x, "model.layers.0.self_attn.q_proj") {stat="hessian"}
    %q = aten.linear(%observe, %q_weight)
    %k = aten.linear(%observe, %k_weight)

Needs ``annotate``. Where it kept every linear float there is nothing to observe, and the program stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..codegen import operators as operators
from .annotate import decoder_linears
from .base import EXACT, Contract, Pass, PassContext, PassError, PassResult
from .ir.annotations import LINEAR, linears
from .ir.program import STAT, Program
from .ir.rewrite import make_call

_OBSERVE = torch.ops.lbllm.observe.default


@dataclass(frozen=True)
class Observe(Pass):
    """Inserts observers in front of the decoder linears.

    Attributes:
        stat: ``hessian`` (the mean outer product of the inputs, for error compensation) or ``absmax`` (the largest
            magnitude per channel; cheaper, without compensation).
    """

    stat: Literal["hessian", "absmax"] = "hessian"

    name: ClassVar[str] = "observe"
    contract: ClassVar[Contract] = EXACT

    def apply(self, program: Program, context: PassContext) -> PassResult:
        if nothing_to_quantize(self.name, program, context):
            return PassResult(program, summary={"observers": 0})
        program = program.copy()
        graph = program.graph
        if any(n.target is _OBSERVE for n in graph.nodes):
            raise PassError("the program is observed already; use 'observe' once, before 'ptq'")
        rows: list[dict[str, Any]] = []
        for source, readers in decoder_linears(graph).items():
            site = readers[0].meta[LINEAR].path
            with graph.inserting_before(readers[0]):
                observer = make_call(graph, _OBSERVE, (source, site), readers[0], {STAT: self.stat})
            for linear in readers:
                linear.replace_input_with(source, observer)
            rows.append({"site": site, "linears": [n.meta[LINEAR].path for n in readers], "stat": self.stat})
        program.module.recompile()
        return PassResult(program, rows, {"observers": len(rows)})


def nothing_to_quantize(name: str, program: Program, context: PassContext) -> bool:
    """Whether ``annotate`` kept every linear float, which the pass ``name`` then says.

    Raises:
        PassError: the linears are not annotated.
    """
    if decoder_linears(program.graph):
        return False
    if not linears(program):
        raise PassError(f"{name} finds no annotated linear; run 'annotate' before it")
    context.progress.note(f"every linear stays float, so '{name}' leaves the weights as they are")
    return True
