"""The catalogue of passes (what each does to a graph, its options and contract, from its own source) and recipes."""

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

from lbllm_compile import recipe
from lbllm_compile.passes import pipeline, registry
from lbllm_compile.passes.base import Pass
from lbllm_compile.report import terminal


@dataclass(frozen=True)
class Option:
    """One option of a pass: its type in words, its default as pipeline text, and what it means."""

    name: str
    type: str
    default: str
    meaning: str


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
    text = _plain(inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""))
    return Entry(
        name=cls.name,
        contract=str(cls.contract),
        options=tuple(_options(cls)),
        summary=re.sub(rf"^`{re.escape(cls.name)}`(, |: )", "", " ".join(text.split("\n\n")[0].split())),
        snippet=_snippet(text),
        description=text,
        source=cls.__module__,
    )


def render(found: Sequence[Entry]) -> list[RenderableType]:
    """The catalogue for people; a single pass is shown with its whole description."""
    if len(found) == 1:
        entry = found[0]
        parts = [_heading(entry), Padding(Text(entry.description), (0, 0, 0, 2))]
        if entry.options:
            rows = [[o.name, o.default, o.type, o.meaning] for o in entry.options]
            parts += [Text(), terminal.table("Options", ["option", "default", "type", "meaning"], rows)]
        return parts
    parts: list[RenderableType] = []
    for entry in found:
        parts += [_heading(entry), Padding(Text(entry.summary), (0, 0, 0, 2))]
        if entry.snippet:
            parts.append(Padding(Text(entry.snippet, style="dim", no_wrap=True, overflow="ignore"), (0, 0, 1, 2)))
    return parts


@dataclass(frozen=True)
class RecipeEntry:
    """One recipe: what it is, and its pipeline with the default preset, as text."""

    name: str
    description: str
    pipeline: str


def recipes() -> list[RecipeEntry]:
    """Describes every recipe."""
    texts = {name: pipeline.render(recipe.passes(recipe.Choices(recipe=name), "cpu")) for name in recipe.RECIPES}
    return [RecipeEntry(name, recipe.RECIPES[name].description, text) for name, text in texts.items()]


def render_recipes(found: Sequence[RecipeEntry]) -> list[RenderableType]:
    """The recipes for people, one below the other."""
    parts: list[RenderableType] = []
    for entry in found:
        parts += [Text(f"--recipe {entry.name}", style="bold"), Padding(Text(entry.description), (0, 0, 0, 2))]
        parts.append(Padding(Text(entry.pipeline, style="dim", overflow="fold"), (0, 0, 1, 2)))
    return parts


def _heading(entry: Entry) -> Text:
    text = Text(entry.name, style="bold")
    options = ",".join(f"{o.name}={o.default}" for o in entry.options)
    text.append(f"{{{options}}}" if options else "", style="cyan")
    text.append(f"  {entry.contract}", style="green")
    return text


def _options(cls: type[Pass]) -> list[Option]:
    hints, meanings = typing.get_type_hints(cls), _meanings(cls)
    result = []
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if isinstance(default, tuple):
            default = "|".join(str(v) for v in default)
        result.append(Option(field.name, _type_text(hints[field.name]), str(default), meanings.get(field.name, "")))
    return result


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(str(v) for v in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")


def _plain(text: str) -> str:
    """reStructuredText as text: roles and literals in single backquotes, no double colons at ends of lines."""
    text = re.sub(r":\w+:`~?\.*([^`]+)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


_ATTRIBUTE = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n     +.*)*)", re.MULTILINE)
"""An entry under ``Attributes:`` of a docstring, with the lines that go on with it."""


def _meanings(cls: type[Pass]) -> dict[str, str]:
    """What the class's docstring says of each option."""
    _, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    return {
        name: " ".join(_plain(text).split())
        for names, text in _ATTRIBUTE.findall(attributes)
        for name in names.split(", ")
    }


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
    return inspect.cleandoc("\n".join(lines[start:end])).strip()
