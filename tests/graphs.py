"""Small hand-written graphs, and what passes make of them as text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from lbllm_compile.codegen import operators as operators
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import LAYER, LINEAR, LinearInfo
from lbllm_compile.passes.base import Pass, PassContext, PassResult
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import LINEARS, calls
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode


class Weights(nn.Module):
    """Tensors under dotted paths, as buffers."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for path, tensor in tensors.items():
            *parents, leaf = path.split(".")
            owner: nn.Module = self
            for part in parents:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.register_buffer(leaf, tensor)


def program(
    weights: Mapping[str, Tensor], forward: Callable[..., object], kind: str = "causal-lm", head: str = "head"
) -> Program:
    """Traces ``forward(root, *inputs)``, in which operators are called as ``torch.ops``; annotates its linears.

    A weight path that starts with ``head`` is the output head's; all others are decoder layer 0's.
    """

    class Root(Weights):
        pass

    Root.forward = forward
    graph_module = fx.symbolic_trace(Root(weights))
    for node in calls(graph_module.graph, *LINEARS):
        if node.args[1].op == "get_attr":
            path = node.args[1].target.removesuffix(".weight")
            role = "head" if path.startswith(head) else "decoder"
            layer = None if role == "head" else 0
            node.meta[LINEAR] = LinearInfo(path, node.args[1].target, layer, role, 0, "test")
            node.meta[LAYER] = layer
    return Program(graph_module, kind)


def rewrites(
    item: Pass,
    before: str | Program,
    expected: str,
    context: PassContext | None = None,
    weights: Mapping[str, Tensor] | None = None,
    kind: str = "module",
) -> PassResult:
    """Holds the program that a pass makes of ``before`` against the one that ``expected`` shows.

    Both texts are dumps (:mod:`lbllm_compile.passes.ir.dump`), and so is what a failure shows. How ``expected`` calls
    its nodes is free. Of a computed value, dtype and shape, what passes know of it (in braces) and its module's path
    are compared where it has them.

    Args:
        item: the pass.
        before: the program it gets, which must stay as it was.
        expected: the program it should make.
        context: what the pass gets. With a probe in it, the program before has the fake values that capture leaves in
            it, and the pass is held to its contract as in a pipeline.
        weights: of ``before``, by path; others are made up.
        kind: of ``before``, where that is a text.

    Returns:
        What the pass returned.
    """
    __tracebackhide__ = True
    given = parse(before, weights, kind) if isinstance(before, str) else before
    context = context or PassContext()
    if context.probe:
        given = with_values(given, context.probe)
    text = dump.render(given)
    if context.probe:
        after, (record,) = pipeline.run(given, [item], context)
        result = PassResult(after, record.rows, record.summary)
    else:
        result = item.apply(given, context)
    assert dump.render(given) == text, f"'{item.name}' changed the program it got"
    wanted, found = _lines(dump.render(parse(expected))), _lines(dump.render(result.program))
    found = _named_as(wanted, found)
    if found != wanted:
        difference = difflib.unified_diff(wanted, found, "expected", f"after {item.name}", lineterm="")
        pytest.fail("\n".join(difference), pytrace=False)
    return result


_NODE = re.compile(r"%(\w+)(?:: ([^=]*\S))? = ((\w+ [\w.]+)|[\w.]+)")
_EXTRAS = {
    "dtype and shape": re.compile(r"^(%\w+): [^=]*\S(?= = )"),
    "notes": re.compile(r"() \{.*\}(?=$|  #)"),
    "module": re.compile(r"()  # [^\"]*$"),
}
"""What a line of a dump may have besides an operator and its arguments."""


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _named_as(wanted: Sequence[str], found: Sequence[str]) -> list[str]:
    """The lines ``found`` with the names of nodes that ``wanted`` has, and without extras that it does not have."""
    theirs, ours = ({m[1]: (m[3], m.string) for x in lines if (m := _NODE.match(x))} for lines in (wanted, found))
    sequences = ([operator for operator, _ in nodes.values()] for nodes in (theirs, ours))
    alike = difflib.SequenceMatcher(None, *sequences, autojunk=False)
    names: dict[str, str] = {}
    for block in alike.get_matching_blocks():
        pairs = zip(list(theirs)[block.a :][: block.size], list(ours)[block.b :][: block.size], strict=True)
        names |= {mine: their for their, mine in pairs}
    shown = {mine: theirs[their][1] for mine, their in names.items()}
    for mine in ours:
        names.setdefault(mine, f"{mine}_found" if mine in theirs else mine)

    def like(line: str) -> str:
        match = _NODE.match(line)
        for extra in _EXTRAS.values() if match and match[1] in shown else ():
            if not extra.search(shown[match[1]]):
                line = extra.sub(r"\1", line)
        return re.sub(r"%(\w+)", lambda name: f"%{names[name[1]]}", line)

    return [like(line) for line in found]


class _Values(fx.Interpreter):
    def run_node(self, n: fx.Node) -> object:
        n.meta["val"] = value = super().run_node(n)
        return value


def with_values(item: Program, inputs: Mapping[str, Tensor]) -> Program:
    """A copy in which every node has the fake value that capture leaves there, of the shapes for these inputs."""
    item = item.copy()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _Values(item.module).run(*[mode.from_tensor(t) for t in item.arguments(inputs)])
    return item


def token_inputs(batch: int = 2, length: int = 9, padding: int = 3, vocabulary: int = 11) -> dict[str, Tensor]:
    """A language model's inputs; the first sequence has left padding."""
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def context(inputs: Mapping[str, Tensor] | None = None) -> PassContext:
    """A context with ``inputs`` as its probe; without, passes check nothing by running the program."""
    return PassContext(probe=inputs or {})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
