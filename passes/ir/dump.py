"""A program as readable text: one line a node, grouped by decoder layer, with shapes and module paths.

:mod:`.parse` reads what :func:`render` writes::

    # a remark
    decoder layer 0:
    %x: f32[2, 40] = input x
    %w: f32[8, 40] = weight q.weight
    %y: f32[2, 8] = aten.linear(%x, %w) {path="q", role="decoder", reason="in a layer"}  # model.q
    return %y

A node has a name, dtype and shape where they are known, an operator under its stored name (without ``.default``, and
``getitem`` for ``operator.getitem``), and arguments: nodes, numbers, texts in double quotes, ``None``, ``True``,
``torch.float32``, ``device("cpu")``, ``slice(0, 4, None)``, lists and tuples. In braces stands what passes know of the
node. The one word behind ``#`` is the path of the module it came from. A line that ends with a comma or an
opening bracket goes on in the next one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, fx

from .annotations import LINEAR, LinearInfo
from .program import IN_FEATURES, LAYER, STAT, STATE, Program, StateSpec, get_attribute

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}


_LIBRARY = re.compile(r"(^|/)torch/|/transformers/(?!models/)")
"""Files that models are made with but not written in."""


@dataclass(frozen=True)
class Line:
    """One node as text: ``text`` for people, ``whole`` with everything that :mod:`.parse` reads back."""

    node: str
    text: str
    whole: str


@dataclass(frozen=True)
class Section:
    """Consecutive nodes of one decoder layer, or of what lies before, between or behind (``layer`` None)."""

    layer: int | None
    lines: Sequence[Line]

    @property
    def title(self) -> str:
        return "outside the decoder layers" if self.layer is None else f"decoder layer {self.layer}"


def shape_text(value: Tensor) -> str:
    """Dtype and shape, e.g. ``f32[2, 16, 576]``."""
    return sizes_text(value.dtype, value.shape)


def sizes_text(dtype: torch.dtype, sizes: Sequence[Any]) -> str:
    """A dtype and sizes, numbers or names, e.g. ``f32[batch, length, 576]``."""
    return f"{_DTYPES.get(dtype, str(dtype))}[{', '.join(str(size) for size in sizes)}]"


_SHAPE = re.compile(r"([\w.]+)\[((?:\w+(?:, \w+)*)?)\]")


def read_shape(text: str) -> tuple[torch.dtype, list[int | str]] | None:
    """The dtype and the sizes that :func:`shape_text` wrote, symbols as text; None where they cannot be told."""
    match = _SHAPE.fullmatch(text)
    dtype = next((d for d, name in _DTYPES.items() if match and match[1] == name), None)
    if match is None or dtype is None:
        return None
    return dtype, [int(size) if size.isdecimal() else size for size in match[2].split(", ") if size]


def target_text(node: fx.Node) -> str:
    """The operator of a node without ``torch.ops`` and a default overload: ``aten.linear``, ``lbllm.bit_linear``."""
    if node.op != "call_function":
        return f"{node.op} {node.target}"
    text = str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return text.removesuffix(".default")
    return getattr(node.target, "__name__", text)


def module_path(node: fx.Node) -> str:
    """The path of the module a node came from, empty where unknown."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def source_line(node: fx.Node) -> str:
    """``file:line`` of the innermost frame of the model's source that the node came from.

    That is the user's file or transformers' modeling file; what those call in torch and in the rest of transformers,
    such as an activation function, is passed by. The file is named as :func:`short_path` does, the same on every
    machine.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    model = [f for f in frames if not _LIBRARY.search(f[0])]
    return f"{short_path(model[-1][0])}:{model[-1][1]}" if model else ""


def short_path(file: str) -> str:
    """A file of an installed package from the packages' folder on; of any other file with an absolute path its name."""
    path = PurePath(file)
    if "site-packages" in path.parts:
        return "/".join(path.parts[path.parts.index("site-packages") + 1 :])
    return path.name if path.is_absolute() else file


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple):
        return "(" + ", ".join(_argument(v) for v in value) + (",)" if len(value) == 1 else ")")
    if isinstance(value, list):
        return "[" + ", ".join(_argument(v) for v in value) + "]"
    if isinstance(value, slice):
        return "slice" + _argument((value.start, value.stop, value.step))
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.device):
        return f"device({json.dumps(str(value))})"
    return str(value)


def _type(node: fx.Node) -> str:
    """Dtype and shape of a node with a colon before them, empty where unknown; a weight's are those of its tensor."""
    text = node.meta.get("shape", "")
    module = node.graph.owning_module
    if node.op == "get_attr" and module is not None:
        value = get_attribute(module, str(node.target))
        text = shape_text(value) if isinstance(value, Tensor) else text
    return f": {text}" if text else ""


def _notes(node: fx.Node) -> str:
    """What passes know of a node, in braces; empty where that is nothing."""
    notes: dict[str, Any] = {}
    if LINEAR in node.meta:
        info: LinearInfo = node.meta[LINEAR]
        notes["path"] = info.path
        if info.weight != f"{info.path}.weight":
            notes["weight"] = info.weight
        if info.layer != node.meta.get(LAYER):
            notes["layer"] = info.layer
        notes["role"] = info.role
        if info.experts:
            notes["experts"] = info.experts
        if info.reason:
            notes["reason"] = info.reason
        if str(info.scheme):
            notes["scheme"] = str(info.scheme)
    if STATE in node.meta:
        spec: StateSpec = node.meta[STATE]
        notes |= {"kind": spec.kind, "heads": spec.heads, "tail": spec.tail, "dtype": spec.dtype}
    notes |= {name: node.meta[key] for name, key in (("in_features", IN_FEATURES), ("stat", STAT)) if key in node.meta}
    return " {" + ", ".join(f"{k}={_argument(v)}" for k, v in notes.items()) + "}" if notes else ""


def node_text(node: fx.Node, notes: bool = False) -> str:
    """One line, e.g. ``%linear: f32[2, 16, 576] = aten.linear(%x, %w)  # model.layers.0.self_attn.q_proj``.

    With ``notes``, what passes know of the node stands in braces behind it.
    """
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    shape = _type(node)
    known = _notes(node) if notes else ""
    if node.op == "placeholder":
        return f"%{node.name}{shape} = {'state' if STATE in node.meta else 'input'} {node.target}{known}"
    if node.op == "get_attr":
        return f"%{node.name}{shape} = weight {node.target}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    path = module_path(node)
    return f"%{node.name}{shape} = {target_text(node)}({', '.join(arguments)}){known}" + (f"  # {path}" if path else "")


def _line(node: fx.Node) -> Line:
    return Line(node.name, node_text(node), node_text(node, notes=True))


def sections(program: Program) -> list[Section]:
    """The graph as text, cut where the decoder layer changes. A weight stands right before its first use."""
    result: list[Section] = []
    lines: list[Line] = []
    current: int | None = None
    pending: dict[fx.Node, None] = {n: None for n in program.graph.nodes if n.op == "get_attr"}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            continue
        layer = node.meta.get(LAYER)
        if layer != current and lines:
            result.append(Section(current, tuple(lines)))
            lines = []
        current = layer
        for operand in node.all_input_nodes:
            if operand in pending:
                del pending[operand]
                lines.append(_line(operand))
        lines.append(_line(node))
    result.append(Section(current, tuple(lines)))
    return result


def render(program: Program, header: str = "", *, layer: int | None = None) -> str:
    """The whole graph as plain text, ``header`` first as a comment; :func:`.parse.parse` reads it.

    Args:
        layer: the nodes of this decoder layer alone, which is no whole graph any more.
    """
    parts = [f"# {header}"] if header else []
    for section in sections(program):
        if layer is not None and section.layer != layer:
            continue
        parts.append(f"\n{section.title}:")
        parts.extend(line.whole for line in section.lines)
    return "\n".join(parts) + "\n"


def excerpt(program: Program, node: fx.Node, around: int = 3) -> str:
    """The lines around a node, the node itself marked with ``>``."""
    lines = [line for section in sections(program) for line in section.lines]
    index = next((i for i, line in enumerate(lines) if line.node == node.name), 0)
    window = lines[max(0, index - around) : index + around + 1]
    return "\n".join(("> " if line.node == node.name else "  ") + line.text for line in window)
