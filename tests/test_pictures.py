"""The pictures of the documentation are drawn from the code, and load nothing."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from rich.text import Text

from benchmarks import pictures


def shapes(svg: str, name: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f".//{{http://www.w3.org/2000/svg}}{name}")


def test_the_drawing_shows_the_levels_and_bits_of_a_fitted_group() -> None:
    weights, codes, levels, scale = pictures.fitted_group()
    near = (weights[:, None] - levels.float() * scale.float()).abs()
    assert near.gather(1, codes[:, None]).squeeze(1).equal(near.min(1).values)
    svg = pictures.format_drawing()
    assert (pictures.PICTURES / "format.svg").read_text(encoding="utf-8") == svg
    assert len(shapes(svg, "circle")) == len(weights)
    cells = [r.get("fill") == pictures.INK for r in shapes(svg, "rect") if r.get("width") == "10"]
    assert cells == [*(codes >= 2).tolist(), *((codes == 1) | (codes == 2)).tolist()]
    words = [t.text for t in shapes(svg, "text")]
    assert [f"{level} · s" for level in levels.tolist()] == [w for w in words if w and w.endswith("· s")]
    assert "64 + 64 + 48 = 176 bits for 64 weights: 2.75 bits a weight" in words


def test_a_terminals_page_is_cut_and_loads_nothing() -> None:
    svg = pictures.terminal_page([Text(f"line {i}") for i in range(9)], "lbllm-compile inspect x", lines=4)
    words = "".join(t.text or "" for t in shapes(svg, "text")).replace("\xa0", " ")
    assert "line 3" in words and "line 4" not in words and words.endswith("…")
    assert "lbllm-compile inspect x" in words
    addresses = [a for a in re.findall(r"https?://[^\"' <)]+", svg) if "w3.org" not in a and "textualize" not in a]
    assert addresses == []
