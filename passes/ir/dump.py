"""A program as readable text: one line a node, grouped by decoder layer, with shapes and module paths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, fx

from .program import STATE, Program

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

LAYER_KEY = "lbllm_layer"
"""Node meta key with the decoder-layer index (set by the pass ``annotate``)."""


_LIBRARY = re.compile(r"(^|/)torch/|/transformers/(?!models/)")
"""Files that models are made with but not written in."""


@dataclass(frozen=True)
class Line:
    """One node as text."""

    node: str
    text: str


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
    return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(str(d) for d in value.shape)}]"


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
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def node_text(node: fx.Node) -> str:
    """One line, e.g. ``%linear: f32[2, 16, 576] = aten.linear(%x, %w)  # model.layers.0.self_attn.q_proj``."""
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    shape = f": {node.meta['shape']}" if "shape" in node.meta else ""
    if node.op == "placeholder":
        return f"%{node.name}{shape} = {'state' if STATE in node.meta else 'input'} {node.target}"
    if node.op == "get_attr":
        return f"%{node.name}{shape} = weight {node.target}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    path = module_path(node)
    return f"%{node.name}{shape} = {target_text(node)}({', '.join(arguments)})" + (f"  # {path}" if path else "")


def sections(program: Program) -> list[Section]:
    """The graph as text, cut where the decoder layer changes. A weight stands right before its first use."""
    result: list[Section] = []
    lines: list[Line] = []
    current: int | None = None
    pending: dict[fx.Node, None] = {n: None for n in program.graph.nodes if n.op == "get_attr"}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            continue
        layer = node.meta.get(LAYER_KEY)
        if layer != current and lines:
            result.append(Section(current, tuple(lines)))
            lines = []
        current = layer
        for operand in node.all_input_nodes:
            if operand in pending:
                del pending[operand]
                lines.append(Line(operand.name, node_text(operand)))
        lines.append(Line(node.name, node_text(node)))
    result.append(Section(current, tuple(lines)))
    return result


def render(program: Program, header: str = "") -> str:
    """The whole graph as plain text, ``header`` first as a comment."""
    parts = [f"# {header}"] if header else []
    for section in sections(program):
        parts.append(f"\n# {section.title}")
        parts.extend(line.text for line in section.lines)
    return "\n".join(parts) + "\n"


def excerpt(program: Program, node: fx.Node, around: int = 3) -> str:
    """The lines around a node, the node itself marked with ``>``."""
    lines = [line for section in sections(program) for line in section.lines]
    index = next((i for i, line in enumerate(lines) if line.node == node.name), 0)
    window = lines[max(0, index - around) : index + around + 1]
    return "\n".join(("> " if line.node == node.name else "  ") + line.text for line in window)
