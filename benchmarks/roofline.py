"""Draws benchmark results under the machine's rooflines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.threads import in_words

MARKERS = "osDv^<>PX*hpd"


def draw(documents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a thread count: multiply-adds per second over multiply-adds per byte of weights, cold ones hollow.

    Args:
        documents: what a benchmark wrote.
        path: the picture.

    Raises:
        LbllmError: matplotlib is not there.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise LbllmError("a roofline needs matplotlib; install the extra 'bench'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(1, len(documents), figsize=(7 * len(documents), 6), sharey=True, squeeze=False)
    colors = matplotlib.colormaps["tab20"]
    for axes, document in zip(panels[0], documents, strict=True):
        facts, results = document["machine"], document["results"]
        intensities = [_intensity(row) for row in results]
        low, high = min(intensities) / 2, max(intensities) * 2
        for name, style in (("cached", "--"), ("memory", "-")):
            rate = facts.get(f"{name}_gigabytes_per_second")
            if rate and (peak := facts.get("peak_gigamacs_per_second")):
                corner = min(max(peak / rate, low), high)
                ys = [min(peak, rate * x) for x in (low, corner, high)]
                axes.plot([low, corner, high], ys, style, color="black", label=f"{name}: {rate:.0f} GB/s")
        for i, name in enumerate(dict.fromkeys(row["contender"] for row in results)):
            for cold, fill in ((False, colors(i % colors.N)), (True, "none")):
                rows = [r for r in results if r["contender"] == name and (r.get("cache") == "cold") == cold]
                xs, ys = [_intensity(row) for row in rows], [row["gigamacs_per_second"] for row in rows]
                style = {"color": colors(i % colors.N), "markerfacecolor": fill, "label": None if cold else name}
                axes.plot(xs, ys, MARKERS[i % len(MARKERS)], **style)
        axes.set(xscale="log", yscale="log", xlabel="multiply-adds per byte of weights", ylabel="GMAC/s")
        axes.xaxis.set_major_locator(ticker.LogLocator(base=2))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.set_minor_formatter(ticker.NullFormatter())
        axes.set_title(f"{facts['cpu']}, {in_words(facts['threads'])}; hollow: cold weights")
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _intensity(row: Mapping[str, Any]) -> float:
    return row["gigamacs_per_second"] / row["gigabytes_per_second"]
