"""The catalogue of passes: what each does to a graph, its options and its numeric contract, from its own source."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from lbllm_compile.passes import registry
from lbllm_compile.passes.base import Pass


@dataclass(frozen=True)
class Option:
    """One option of a pass: its type in words and its default as pipeline text."""

    name: str
    type: str
    default: str


@dataclass(frozen=True)
class Entry:
    """One pass.

    Attributes:
        summary: first paragraph of its module's description.
        snippet: the Given/Result graphs, empty where the description has none.
        description: the whole description.
        source: the module it lives in.
    """

    name: str
    contract: str
    options: tuple[Option, ...]
    summary: str
    snippet: str
    description: str
    source: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def entries(names: Sequence[str] | None = None) -> list[Entry]:
    """Describes the passes of these names, or every pass there is.

    Raises:
        PassNameError: there is no pass of a name.
    """
    return [describe(registry.get(name)) for name in (registry.names() if names is None else names)]


def describe(cls: type[Pass]) -> Entry:
    """Reads a pass's description, options and contract."""
    text = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or "")
    return Entry(
        name=cls.name,
        contract=str(cls.contract),
        options=tuple(_options(cls)),
        summary=re.sub(rf"^``{re.escape(cls.name)}``(, |: )", "", " ".join(text.split("\n\n")[0].split())),
        snippet=_snippet(text),
        description=text,
        source=cls.__module__,
    )


def render(found: Sequence[Entry]) -> list[RenderableType]:
    """The catalogue for people; a single pass is shown with its whole description."""
    if len(found) == 1:
        return [_heading(found[0]), Padding(Text(found[0].description), (0, 0, 0, 2))]
    parts: list[RenderableType] = []
    for entry in found:
        parts += [_heading(entry), Padding(Text(entry.summary), (0, 0, 0, 2))]
        if entry.snippet:
            parts.append(Padding(Text(entry.snippet, style="dim", no_wrap=True, overflow="ignore"), (0, 0, 1, 2)))
    return parts


def _heading(entry: Entry) -> Text:
    text = Text(entry.name, style="bold")
    options = ",".join(f"{o.name}={o.default}" for o in entry.options)
    text.append(f"{{{options}}}" if options else "", style="cyan")
    text.append(f"  {entry.contract}", style="green")
    return text


def _options(cls: type[Pass]) -> list[Option]:
    hints = typing.get_type_hints(cls)
    result = []
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if isinstance(default, tuple):
            default = "|".join(str(v) for v in default)
        result.append(Option(field.name, _type_text(hints[field.name]), str(default)))
    return result


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(str(v) for v in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")


def _snippet(text: str) -> str:
    """The lines from ``Given`` to the end of what is indented under ``Result``."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.lstrip().startswith("Given:")), None)
    if start is None:
        return ""
    indent = len(lines[start]) - len(lines[start].lstrip())
    end = start + 1
    while end < len(lines):
        line = lines[end]
        own = len(line) - len(line.lstrip())
        if line.strip() and own <= indent and not line.lstrip().startswith("Result:"):
            break
        end += 1
    return inspect.cleandoc("\n".join(line.replace("::", ":") for line in lines[start:end])).strip()
