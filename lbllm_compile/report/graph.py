"""A graph on a terminal: folded per decoder layer, what a pass changed marked against the graph before it.

    %embedding: f32[batch, length, 576] = aten.embedding(%weight, %input_ids)
    decoder layer 0
      - %fake_quantize = lbllm.fake_quantize(%mul_2, ...)
      + %quantize_activation = lbllm.quantize_activation(%mul_2, ...)
    decoder layers 1-29: as decoder layer 0

``+`` is a node that is new or reads other operands than before, ``-`` one that is gone. Decoder layers that are alike
up to node names and the layer number are shown once, and of one that is nearly so what differs.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.program import Program

NEARLY = 0.75
"""Share of its nodes that a decoder layer has in common with another whose differences are shown."""

CONTEXT = 1
"""Unchanged nodes that are shown on either side of changed ones where only these are wanted."""

_NODE = re.compile(r"%([A-Za-z_][\w.]*)")
_LAYER = re.compile(r"(?<=[A-Za-z])\.\d+\b")
_SHAPE = re.compile(r"^(%[\w.]+): [^=]*? = ")
_STYLES = {"+": "green", "-": "red", " ": "", "…": "dim"}
_PARTS = {r"%[A-Za-z_]\w*": "cyan", r"(?<= = )[\w.]+": "bold", r"  # [^\"]*$": "dim"}
"""Styles of names, operators and module paths in nodes that are as before."""


@dataclass(frozen=True)
class Mark:
    """One shown node. ``sign`` is ``+`` (new or changed), ``-`` (gone) or a space (as before).

    With the sign ``…`` the text says what is left out.
    """

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
        return sum(m.sign in "+-" for m in self.marks)


def blocks(after: Program, before: Program | None = None, *, layer: int | None = None) -> list[Block]:
    """The graph cut into blocks, like decoder layers folded into the first of them; or ``layer`` alone.

    With ``before``, a node that is gone stands where it stood.

    Raises:
        ValueError: there is no decoder layer of that number.
    """
    first: dict[str, int] = {}
    result: list[Block] = []
    for number, marks in _stretches(_marked(after, before)):
        if layer is not None and number != layer:
            continue
        block = Block(() if number is None else (number,), tuple(marks))
        key = _canonical(block)
        if number is not None and key in first:
            index = first[key]
            result[index] = Block((*result[index].layers, number), result[index].marks)
            continue
        if number is not None:
            first[key] = len(result)
        result.append(block)
    if layer is not None and not result:
        raise ValueError(f"there is no decoder layer {layer}")
    return result


def changes(found: Sequence[Block]) -> list[Block]:
    """The blocks in which something changed, unchanged nodes left out but for those next to changed ones."""
    return [Block(b.layers, tuple(_around(b.marks))) for b in found if b.changed]


def matching(found: Sequence[Block], pattern: re.Pattern[str]) -> list[Block]:
    """The blocks that have nodes whose text matches, and these nodes alone."""
    picked = [Block(b.layers, tuple(m for m in b.marks if pattern.search(m.text))) for b in found]
    return [b for b in picked if b.marks]


def render(found: Sequence[Block], title: str = "", *, whole: bool = True) -> RenderableType:
    """Blocks as a renderable.

    Args:
        found: as :func:`blocks`, :func:`changes` or :func:`matching` give them.
        title: printed first.
        whole: the blocks have all their nodes, so that of those that are nearly alike the differences say enough.
    """
    parts: list[RenderableType] = [Text(title, style="bold")] if title else []
    parts += [] if found else [Text("nothing to show")]
    shown: list[Block] = []
    for block in found:
        like = next((b for b in shown if whole and b.layers and block.layers and _nearly(b, block)), None)
        parts.append(_heading(block, like))
        indent = "  " if block.layers else ""
        parts += [_Line(mark, indent) for mark in (_differences(like, block) if like else block.marks)]
        shown.append(block)
    return Group(*parts)


def view(after: Program, before: Program | None = None, *, title: str = "", layer: int | None = None) -> RenderableType:
    """The graph as a renderable.

    Args:
        before: the program to mark changes against; None marks nothing.
        title: printed first.
        layer: show this decoder layer alone.

    Raises:
        ValueError: there is no decoder layer of that number.
    """
    return render(blocks(after, before, layer=layer), title)


def summary(after: Program, before: Program | None) -> str:
    """One line: node count and how many nodes are new, changed or gone."""
    count = len(after.graph.nodes)
    if before is None:
        return f"{count} nodes"
    old = {line.node: _shapeless(line.text) for line in _lines(before)}
    new = {line.node: _shapeless(line.text) for line in _lines(after)}
    changed = sum(old.get(node) != text for node, text in new.items())
    return f"{count} nodes, {changed} new or changed, {len(old.keys() - new.keys())} gone"


def ranges(numbers: Sequence[int]) -> str:
    """``1-4, 7`` for 1, 2, 3, 4, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _lines(program: Program) -> list[dump.Line]:
    return [line for section in dump.sections(program) for line in section.lines]


def _marked(after: Program, before: Program | None) -> Iterator[tuple[int | None, Mark]]:
    """Every node of both graphs in order, with its decoder layer."""
    new = [(section.layer, line.text) for section in dump.sections(after) for line in section.lines]
    if before is None:
        yield from ((layer, Mark(" ", text)) for layer, text in new)
        return
    old = [(section.layer, line.text) for section in dump.sections(before) for line in section.lines]
    texts = ([_shapeless(text) for _, text in nodes] for nodes in (old, new))
    matcher = difflib.SequenceMatcher(None, *texts, autojunk=False)
    for kind, old_from, old_to, new_from, new_to in matcher.get_opcodes():
        if kind != "equal":
            yield from ((layer, Mark("-", text)) for layer, text in old[old_from:old_to])
        sign = " " if kind == "equal" else "+"
        yield from ((layer, Mark(sign, text)) for layer, text in new[new_from:new_to])


def _stretches(marked: Iterator[tuple[int | None, Mark]]) -> list[tuple[int | None, list[Mark]]]:
    """The marks cut where the decoder layer changes, each decoder layer in one piece."""
    result: list[tuple[int | None, list[Mark]]] = []
    of_layer: dict[int, list[Mark]] = {}
    for layer, mark in marked:
        if layer is not None and layer in of_layer:
            of_layer[layer].append(mark)
        elif layer is None and result and result[-1][0] is None:
            result[-1][1].append(mark)
        else:
            result.append((layer, [mark]))
            if layer is not None:
                of_layer[layer] = result[-1][1]
    return result


def _shapeless(text: str) -> str:
    return _SHAPE.sub(r"\1 = ", text)


def _canonical(block: Block) -> str:
    """The text of a block with node names numbered by appearance and numbers in module paths left out."""
    numbers: dict[str, str] = {}

    def renumber(match: re.Match[str]) -> str:
        return numbers.setdefault(match.group(1), f"%{len(numbers)}")

    return "\n".join(m.sign + _LAYER.sub(".*", _NODE.sub(renumber, m.text)) for m in block.marks)


def _nameless(block: Block) -> list[str]:
    """The nodes of a block without their names and numbers in module paths."""
    return [m.sign + _LAYER.sub(".*", _NODE.sub("%", m.text)) for m in block.marks]


def _nearly(first: Block, other: Block) -> bool:
    return difflib.SequenceMatcher(None, _nameless(first), _nameless(other), autojunk=False).ratio() >= NEARLY


def _differences(first: Block, other: Block) -> list[Mark]:
    """What ``other`` has in place of nodes of ``first``, and how many nodes are as there."""
    marks: list[Mark] = []
    matcher = difflib.SequenceMatcher(None, _nameless(first), _nameless(other), autojunk=False)
    for kind, _, _, start, end in matcher.get_opcodes():
        if kind == "equal":
            marks.append(_left_out(end - start, f"as in decoder layer {first.layers[0]}"))
        else:
            marks += other.marks[start:end]
    return marks


def _around(marks: Sequence[Mark]) -> Iterator[Mark]:
    """Changed nodes and those beside them."""
    near = {
        i for at, mark in enumerate(marks) if mark.sign != " " for i in range(at - CONTEXT, at + CONTEXT + 1)
    } & set(range(len(marks)))
    left = 0
    for i, mark in enumerate(marks):
        if i not in near:
            left += 1
            continue
        if left:
            yield _left_out(left, "as before")
        left = 0
        yield mark
    if left:
        yield _left_out(left, "as before")


def _left_out(count: int, how: str) -> Mark:
    return Mark("…", f"{count} node{'' if count == 1 else 's'} {how}")


def _heading(block: Block, like: Block | None) -> Text:
    if not block.layers:
        return Text("outside the decoder layers", style="bold magenta")
    text = Text(f"decoder layer {block.layers[0]}", style="bold magenta")
    if block.layers[1:]:
        text.append(f"  ({ranges(block.layers[1:])} alike)", style="magenta")
    if like is not None:
        text.append(f"  as decoder layer {like.layers[0]}, but:", style="magenta")
    return text


@dataclass(frozen=True)
class _Line:
    """A node as a line, which a terminal folds where it is too long; elsewhere it stays one line."""

    mark: Mark
    indent: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = f"{self.indent}{self.mark.sign} {self.mark.text}"
        lines = [line]
        if console.is_terminal:
            lines = textwrap.wrap(
                line, options.max_width, subsequent_indent=f"{self.indent}      ", break_on_hyphens=False
            )
        for part in lines:
            text = Text(part, style=_STYLES[self.mark.sign], no_wrap=True, overflow="ignore")
            if self.mark.sign == " ":
                for pattern, style in _PARTS.items():
                    text.highlight_regex(pattern, style)
            yield text
