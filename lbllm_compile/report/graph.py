"""A graph on a terminal: folded per decoder layer, what a pass changed marked against the graph before it.

    %embedding: f32[2, 16, 576] = aten.embedding(%weight, %input_ids)
    decoder layer 0
      + %quantize_activation = lbllm.quantize_activation(%mul_2, ...)
      - %fake_quantize = lbllm.fake_quantize(%mul_2, ...)
    decoder layers 1-29: as decoder layer 0

``+`` is a node that is new or reads other operands than before, ``-`` one that is gone. Decoder layers that are alike
up to node names and the layer number are shown once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.program import Program

_NODE = re.compile(r"%([A-Za-z_][\w.]*)")
_LAYER = re.compile(r"(?<=[A-Za-z])\.\d+\b")
_SHAPE = re.compile(r"^(%[\w.]+): [^=]*? = ")


@dataclass(frozen=True)
class Mark:
    """One shown node. ``sign`` is ``+`` (new or changed), ``-`` (gone) or a space (as before)."""

    sign: str
    text: str


@dataclass(frozen=True)
class Block:
    """A stretch of the graph: the nodes of one decoder layer, or of what lies outside them.

    ``layers`` holds every decoder layer that looks like this one; it is empty outside the decoder layers.
    """

    layers: tuple[int, ...]
    marks: tuple[Mark, ...]

    @property
    def changed(self) -> int:
        return sum(m.sign != " " for m in self.marks)


def blocks(after: Program, before: Program | None = None, *, layer: int | None = None) -> list[Block]:
    """The graph cut into blocks, like decoder layers folded into the first of them; or ``layer`` alone."""
    old = _lines(before) if before is not None else None
    gone = _removed(before, after) if before is not None else {}
    first: dict[str, int] = {}
    result: list[Block] = []
    shown: set[int | None] = set()
    for section in dump.sections(after):
        if layer is not None and section.layer != layer:
            continue
        marks = [Mark(_sign(line, old), line.text) for line in section.lines]
        if section.layer not in shown:
            shown.add(section.layer)
            marks += [Mark("-", text) for text in gone.get(section.layer, ())]
        block = Block(() if section.layer is None else (section.layer,), tuple(marks))
        key = _canonical(block)
        if section.layer is not None and key in first:
            index = first[key]
            result[index] = Block((*result[index].layers, section.layer), result[index].marks)
            continue
        if section.layer is not None:
            first[key] = len(result)
        result.append(block)
    return result


def view(after: Program, before: Program | None = None, *, title: str = "", layer: int | None = None) -> RenderableType:
    """The graph as a renderable.

    Args:
        before: the program to mark changes against; None marks nothing.
        title: printed first.
        layer: show this decoder layer alone.

    Raises:
        ValueError: there is no decoder layer of that number.
    """
    parts: list[Text] = [Text(title, style="bold")] if title else []
    found = blocks(after, before, layer=layer)
    if not found:
        raise ValueError(f"there is no decoder layer {layer}")
    for block in found:
        parts.append(_heading(block))
        parts += [_styled(mark, indent="  " if block.layers else "") for mark in block.marks]
    return Group(*parts)


def summary(after: Program, before: Program | None) -> str:
    """One line: node count and how many nodes are new, changed or gone."""
    count = len(after.graph.nodes)
    if before is None:
        return f"{count} nodes"
    old = _lines(before)
    new = sum(_sign(line, old) == "+" for section in dump.sections(after) for line in section.lines)
    gone = sum(len(lines) for lines in _removed(before, after).values())
    return f"{count} nodes, {new} new or changed, {gone} gone"


def _lines(program: Program) -> dict[str, str]:
    """Text of every node without its shape, by node name."""
    return {line.node: _shapeless(line.text) for section in dump.sections(program) for line in section.lines}


def _sign(line: dump.Line, old: Mapping[str, str] | None) -> str:
    return " " if old is None or old.get(line.node) == _shapeless(line.text) else "+"


def _removed(before: Program, after: Program) -> dict[int | None, list[str]]:
    """Lines of ``before`` whose node name ``after`` lacks, by decoder layer."""
    names = {node.name for node in after.graph.nodes}
    result: dict[int | None, list[str]] = {}
    for section in dump.sections(before):
        lost = [line.text for line in section.lines if line.node not in names]
        if lost:
            result.setdefault(section.layer, []).extend(lost)
    return result


def _shapeless(text: str) -> str:
    return _SHAPE.sub(r"\1 = ", text)


def _canonical(block: Block) -> str:
    """The text of a block with node names numbered by appearance and numbers in module paths left out."""
    numbers: dict[str, str] = {}

    def renumber(match: re.Match[str]) -> str:
        return numbers.setdefault(match.group(1), f"%{len(numbers)}")

    return "\n".join(m.sign + _LAYER.sub(".*", _NODE.sub(renumber, m.text)) for m in block.marks)


def _heading(block: Block) -> Text:
    if not block.layers:
        return Text("outside the decoder layers", style="bold cyan")
    text = Text(f"decoder layer {block.layers[0]}", style="bold cyan")
    if block.layers[1:]:
        text.append(f"  ({_ranges(block.layers[1:])} alike)", style="cyan")
    return text


def _ranges(numbers: Sequence[int]) -> str:
    """``1-4, 7`` for 1, 2, 3, 4, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _styled(mark: Mark, indent: str) -> Text:
    style = {"+": "green", "-": "red", " ": ""}[mark.sign]
    return Text(f"{indent}{mark.sign} {mark.text}", style=style, no_wrap=True, overflow="ellipsis")
