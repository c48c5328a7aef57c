"""``lbllm-compile report``: the page of an artifact made again, or one about several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lbllm_compile.codegen.progress import Progress
from lbllm_compile.html_report import contents, page, tradeoff
from lbllm_compile.html_report.page import ReportError


def write(directories: Sequence[Path], out: Path | None, progress: Progress) -> Path:
    """Writes the page about one artifact, or the trade-off of several; returns where.

    Args:
        directories: artifacts.
        out: the file to write; None puts the page of one artifact beside it.

    Raises:
        ArtifactError: one is no whole artifact.
        TradeoffError: several cannot be compared.
        ReportError: several need ``out``, or a file of the user's is in the way.
    """
    if len(directories) > 1 and out is None:
        raise ReportError("the trade-off of several artifacts needs a file to go to; pass --out FILE.html")
    path = out or directories[0] / page.PAGE
    if not page.is_free(path):
        raise ReportError(f"'{path}' is not a page as lbllm-compile wrote it; move it away or pass another --out")
    if len(directories) == 1:
        text = page.render(contents.gather(directories[0], progress))
    else:
        text = tradeoff.render(tradeoff.compare(directories))
    page.put(path, text, directories[0])
    return path
