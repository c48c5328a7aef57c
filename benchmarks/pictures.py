"""The pictures of the documentation, made from the code and from an artifact.

    python -m benchmarks.pictures                                        # the drawing of the format
    python -m benchmarks.pictures --artifact demo-out --linear 3.mlp.down_proj

Written are, below ``docs/pictures/`` or ``--out``: ``format.svg``, one group of weights fitted by stage 1's own code;
and of an artifact ``report.png`` and ``report-dark.png``, the page that every compile writes, in headless Chromium;
``inspect.svg``, ``dump.svg`` and ``explain.svg``, what these commands show on a terminal. Of the terminal's pages only
the first lines are drawn.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.levels import FREE
from lbllm_compile.passes.calibrate.fit import expectation_maximization
from rich.console import CONSOLE_SVG_FORMAT, Console, Group, RenderableType
from rich.segment import Segment, Segments
from torch import Tensor

from lbllm_compile import explain, inspect
from lbllm_compile.html_report.page import PAGE

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"

GROUP = 64
"""Weights in the drawing of the format."""

COLUMNS = 118
"""Of a drawn terminal."""

LINES = 46
"""Of a page that are drawn."""

WINDOW = 1400, 1000
"""Pixels of the browser's window."""

INNER, OUTER, INK, SOFT, LINE = "#2f5fd0", "#c2571a", "#1b2330", "#5b6675", "#dfe3ea"
"""Colours of the drawing: of the inner and the outer pair of levels, of text, of what is less important, of frames."""

# Browsers do not load fonts from elsewhere into a picture, and nothing here asks a network for anything.
_SVG = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def fitted_group(seed: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A group of normally distributed weights as stage 1 would store it, all columns alike.

    Returns:
        Weights ``[64]``, level codes ``[64]``, int8 levels ``[4]``, and their fp16 scale.
    """
    weights = torch.randn((1, GROUP), generator=torch.Generator().manual_seed(seed)) * 0.02
    levels, scale = FREE.quantize(expectation_maximization(weights, torch.ones(GROUP)))
    distance = (weights[0, :, None] - levels[0].float() * scale[0].float()).abs()
    return weights[0], distance.argmin(-1), levels[0], scale[0]


class Drawing:
    """An SVG picture on a white card.

    Args:
        width, height: in its own units.
        title: what it shows.
    """

    def __init__(self, width: int, height: int, title: str):
        box = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}", "role": "img"}
        self._root = ElementTree.Element("svg", box, **{"font-family": "system-ui, sans-serif"})
        ElementTree.SubElement(self._root, "title").text = title
        self.add("rect", x=0.5, y=0.5, width=width - 1, height=height - 1, rx=8, fill="#ffffff", stroke=LINE)

    def add(self, shape: str, words: str | None = None, **attributes: str | float) -> None:
        """A shape; underscores in the names of attributes stand for hyphens."""
        given = {
            name.replace("_", "-"): value if isinstance(value, str) else f"{value:g}"
            for name, value in attributes.items()
        }
        ElementTree.SubElement(self._root, shape, given).text = words

    def text(self, x: float, y: float, words: str, color: str = INK, anchor: str = "start", size: int = 13) -> None:
        self.add("text", words, x=x, y=y, fill=color, text_anchor=anchor, font_size=size)

    def svg(self) -> str:
        ElementTree.indent(self._root, "")
        return ElementTree.tostring(self._root, encoding="unicode") + "\n"


def format_drawing() -> str:
    """One group of W(1+1) weights: what they were, the levels that took their place, and the bits that say so."""
    weights, codes, levels, scale = fitted_group()
    left, cell, top, height = 90, 12, 70, 250
    right, bottom = left + cell * GROUP, top + height
    most = float(weights.abs().max()) * 1.1
    colors = [OUTER, INNER, INNER, OUTER]

    def y(value: float) -> float:
        return round(top + height * (0.5 - value / most / 2), 1)

    drawing = Drawing(960, bottom + 160, "A group of weights in the W(1+1) format")
    drawing.text(20, 30, f"One group: {GROUP} weights of one output row", size=17)
    drawing.text(20, 52, "dots: the float weights; bars: the levels that take their places", SOFT)
    for code, level in enumerate(levels.tolist()):
        at = y(level * float(scale))
        drawing.add("line", x1=left, x2=right, y1=at, y2=at, stroke=colors[code], stroke_dasharray="2 4")
        drawing.text(left - 10, at + 4, f"level {code}", colors[code], "end")
        drawing.text(right + 10, at + 4, f"{level} · s", colors[code])
    for column, (weight, code) in enumerate(zip(weights.tolist(), codes.tolist(), strict=True)):
        x, level = left + cell * (column + 0.5), y(float(levels[code] * scale))
        drawing.add("line", x1=x, x2=x, y1=y(weight), y2=level, stroke=SOFT, stroke_width=0.7)
        drawing.add("line", x1=x - 5, x2=x + 5, y1=level, y2=level, stroke=colors[code], stroke_width=3)
        drawing.add("circle", cx=x, cy=y(weight), r=2.2, fill=INK)
    planes = {"sign": codes >= 2, "bitmap": (codes == 1) | (codes == 2)}
    for row, (name, bits) in enumerate(planes.items()):
        at = bottom + 24 + 28 * row
        drawing.text(left - 10, at + 12, name, anchor="end")
        drawing.text(right + 10, at + 12, f"{GROUP} bits")
        for column, bit in enumerate(bits.tolist()):
            x, fill = left + cell * column + 1, INK if bit else "#ffffff"
            drawing.add("rect", x=x, y=at, width=10, height=16, fill=fill, stroke=SOFT, stroke_width=0.6)
    stored, total = ", ".join(str(level) for level in levels.tolist()), 2 * GROUP + 4 * 8 + 16
    for row, line in enumerate(
        (
            "dark is 1; sign: the upper level of a pair; bitmap: the inner pair (levels 1, 2), not the outer (0, 3)",
            f"levels {stored} in int8, times s = {float(scale):.3g} in fp16: 48 bits a group",
            f"{GROUP} + {GROUP} + 48 = {total} bits for {GROUP} weights: {total / GROUP:.2f} bits a weight",
        )
    ):
        drawing.text(left, bottom + 100 + 22 * row, line, INK if row else SOFT)
    return drawing.svg()


def terminal_page(parts: Sequence[RenderableType], command: str, lines: int = LINES) -> str:
    """The first lines of what a command shows, as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    rendered = console.render_lines(Group(*parts), console.options, pad=False)
    shown = [segment for line in rendered[:lines] for segment in (*line, Segment.line())]
    console.print(Segments(shown), end="")
    if len(rendered) > lines:
        console.print("…", end="")
    return console.export_svg(title=command, code_format=_SVG, unique_id="page")


def terminal_pages(artifact: Path, linear: str, pass_name: str, layer: int) -> dict[str, str]:
    """What ``inspect`` and ``explain`` show of an artifact, as SVG by name."""
    page, _ = inspect.look(artifact)
    dump, _ = inspect.look(artifact, pass_name, layer)
    explained = explain.render(explain.explain(artifact, linear))
    name = artifact.name
    return {
        "inspect": terminal_page(page, f"lbllm-compile inspect {name}"),
        "dump": terminal_page(dump, f"lbllm-compile inspect {name} --pass {pass_name} --layer {layer}"),
        "explain": terminal_page(explained, f"lbllm-compile explain {name} {linear}"),
    }


def photograph(page: Path, out: Path) -> list[Path]:
    """The top of a report in a browser, light and dark.

    Raises:
        LbllmError: there is no Chromium.
    """
    from .browser import CHROMIUM, Page

    if CHROMIUM is None:
        raise LbllmError("a picture of the report needs Chromium (Debian, Ubuntu: apt install chromium)")
    pictures = []
    for name, dark in (("report", False), ("report-dark", True)):
        with Page(*WINDOW, dark=dark) as browser:
            browser.open(page)
            pictures.append(out / f"{name}.png")
            browser.screenshot(pictures[-1])
    return pictures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="what a compile wrote; without one, only the format is drawn")
    parser.add_argument("--linear", default="0.mlp.down_proj", help="what explain shows (default: %(default)s)")
    parser.add_argument("--pass", dest="pass_name", default="lower", help="whose dump is shown (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=0, help="decoder layer of the dump (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=PICTURES)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    drawn = {"format": format_drawing()}
    try:
        if given.artifact is not None:
            drawn |= terminal_pages(given.artifact, given.linear, given.pass_name, given.layer)
            for picture in photograph(given.artifact / PAGE, given.out):
                print(picture)
    except LbllmError as error:
        sys.exit(str(error))
    for name, svg in drawn.items():
        (given.out / f"{name}.svg").write_text(svg, encoding="utf-8")
        print(given.out / f"{name}.svg")


if __name__ == "__main__":
    main()
