"""Makes and writes pages: templates filled with what an artifact tells, and the plotting library inlined.

A page names no other file and no address. Whatever comes from a model or a user is escaped: by Jinja2 in HTML, and as
JSON without ``<``, ``>`` and ``&`` in the one data element that the script reads.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from lbllm_compile.codegen.cache import write_atomically, write_failure
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.progress import Progress
from lbllm_compile.html_report import contents as gathering
from lbllm_compile.html_report import figures, story
from lbllm_compile.html_report.contents import Contents
from lbllm_compile.manifest import MANIFEST
from lbllm_compile.plain import plain
from lbllm_compile.report import terminal
from lbllm_compile.version import __version__

PAGE = "report.html"
"""The page's name in an artifact."""


class ReportError(LbllmError):
    """A page cannot be written where it was asked for."""


_MARK = re.compile(rb"<!doctype html>\n<!-- lbllm-report sha256=([0-9a-f]{64}) -->\n")
"""How a page begins that was written here; the hash is of all that follows."""


def render(contents: Contents) -> str:
    """The page about one artifact."""
    return fill(
        "report.html.j2",
        figures.of(contents),
        contents=contents,
        report=contents.report,
        sheet=contents.report.sheet if contents.report else {},
        tiles=story.tiles(contents),
        answers=story.answers(contents),
        reasons=story.reasons(contents),
    )


def fill(template: str, data: Mapping[str, Any], **values: Any) -> str:
    """A page from a template.

    Args:
        template: its name.
        data: what the page's script draws, as ``figures`` in the template.
        values: what else the template shows.
    """
    body = _environment().get_template(template).render(figures=plain(data), **values, **_frame())
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"<!doctype html>\n<!-- lbllm-report sha256={digest} -->\n{body}"


def write(directory: Path, progress: Progress | None = None) -> bool:
    """Puts an artifact's page beside it; False, and nothing is done, where a file of the user's is.

    A page that was written here and altered since is the user's.

    Args:
        directory: the artifact.
        progress: told about each graph.

    Raises:
        ArtifactError: the directory is no whole, unaltered artifact of this version.
        ReportError: the page cannot be written.
    """
    path = directory / PAGE
    if not is_free(path):
        return False
    put(path, render(gathering.gather(directory, progress)), directory)
    return True


def put(path: Path, text: str, directory: Path) -> None:
    """Writes a page that may be written there, for whoever may read the artifact in ``directory``.

    Raises:
        ReportError: it cannot be written.
    """
    try:
        write_atomically(path, text.encode())
        path.chmod((directory / MANIFEST).stat().st_mode & 0o777)
    except OSError as error:
        raise ReportError(f"cannot write '{path}': {write_failure(error)}") from error


def discard(directory: Path) -> None:
    """Removes an artifact's page, as it was written here, before a newer artifact takes that one's place.

    So no page of other weights stands beside the newer one where its own is never written.
    """
    path = directory / PAGE
    if _is_page(path):
        with contextlib.suppress(OSError):  # the newer page replaces it all the same
            path.unlink()


def is_free(path: Path) -> bool:
    """Whether a page may be written to a path: nothing is there, or a page as it was written here."""
    return not os.path.lexists(path) or _is_page(path)


def _is_page(path: Path) -> bool:
    """Whether a file is a page that was written here, and as it was written."""
    try:
        if path.is_symlink() or not path.is_file():
            return False
        content = path.read_bytes()
    except OSError:
        return False  # who may not read it did not write it
    match = _MARK.match(content)
    return match is not None and hashlib.sha256(content[match.end() :]).hexdigest().encode() == match.group(1)


def _frame() -> dict[str, Any]:
    """What every page consists of besides its contents."""
    texts = resources.files("lbllm_compile.html_report") / "templates"
    return {
        "style": (texts / "style.css").read_text(encoding="utf-8"),
        "script": (texts / "page.js").read_text(encoding="utf-8"),
        "plotly": _script_text(get_plotlyjs()),
        "version": __version__,
    }


def _script_text(code: str) -> str:
    """A script as it may stand in a page: nothing in it ends the element."""
    return code.replace("</script", "<\\/script")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lbllm_compile.html_report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": terminal.figure,
        "size": terminal.size,
        "duration": terminal.duration,
        "short": gathering.short_name,
        "rows": _rows,
    }
    return environment


def _rows(value: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """A mapping as rows of text for people, mappings in it taken apart."""
    rows = []
    for name, part in value.items():
        if isinstance(part, Mapping):
            rows += [(f"{name}: {inner}", terminal.figure(v)) for inner, v in part.items()]
        else:
            rows.append((str(name), terminal.figure(part)))
    return rows
