"""Pipelines as text, and running them.

``annotate,ptq{group=128,damp=0.01},lower{target=cpu}`` is a list of passes with options. Text and passes convert into
each other without loss: :func:`parse` and :func:`render`. Values that hold other than letters, digits and ``_.+-*:/``
are written in double quotes; several values of one option are joined by ``|``.

:func:`run` applies passes in order and checks each one's result: graph lint, shape propagation with fake tensors, and a
numeric probe against the pass's declared contract.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..codegen.errors import LbllmError, suggestion
from . import contracts, registry
from .base import Pass, PassCheckpoints, PassContext
from .ir.program import Program
from .ir.spool import apart, reclaim

_NAME = re.compile(r"\s*([a-z][a-z0-9-]*)\s*")
_KEY = re.compile(r"\s*([a-zA-Z_][a-zA-Z0-9_-]*)\s*=\s*")
_PLAIN = re.compile(r"[\w.+\-*:/|]+")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


class PipelineError(LbllmError):
    """Pipeline text that cannot be read, or an option that a pass does not have or cannot take."""


def parse(text: str) -> list[Pass]:
    """Reads pipeline text into passes.

    Raises:
        PipelineError: the text is malformed, or an option is unknown or of the wrong type.
        PassNameError: a pass does not exist.
    """
    passes: list[Pass] = []
    text = text.rstrip()
    position = 0
    while True:
        match = _NAME.match(text, position)
        if match is None:
            raise _malformed(text, position, "a pass name")
        position = match.end()
        options: dict[str, str] = {}
        if text[position : position + 1] == "{":
            options, position = _parse_options(text, position + 1)
        passes.append(make(match.group(1), options))
        if position == len(text):
            return passes
        if text[position] != ",":
            raise _malformed(text, position, "',' between passes")
        position += 1


def _parse_options(text: str, position: int) -> tuple[dict[str, str], int]:
    """Reads ``key=value,...}`` and the space behind it; returns the options and the next position."""
    options: dict[str, str] = {}
    while True:
        if not options and (end := re.compile(r"\s*}\s*").match(text, position)):
            return options, end.end()
        match = _KEY.match(text, position)
        if match is None:
            raise _malformed(text, position, "an option as key=value")
        key, position = match.group(1), match.end()
        value = _QUOTED.match(text, position) or _PLAIN.match(text, position)
        if value is None:
            raise _malformed(text, position, f"a value for '{key}'")
        if key in options:
            raise PipelineError(f"the option '{key}' is given twice in '{text}'; keep one")
        options[key] = _unquote(text, value) if value.group().startswith('"') else value.group()
        end = re.compile(r"\s*([,}])\s*").match(text, value.end())
        if end is None:
            raise _malformed(text, value.end(), "',' or '}'")
        position = end.end()
        if end.group(1) == "}":
            return options, position


def _unquote(text: str, value: re.Match[str]) -> str:
    """The string that a quoted value stands for."""
    try:
        return json.loads(value.group())
    except json.JSONDecodeError as error:
        wanted = "a string quoted as in JSON, with each backslash written twice,"
        raise _malformed(text, value.start() + error.pos, wanted) from error


def _malformed(text: str, position: int, wanted: str) -> PipelineError:
    return PipelineError(f"pipeline text: expected {wanted} at column {position + 1} of '{text}'")


def make(name: str, options: Mapping[str, Any]) -> Pass:
    """A pass from its name and options (text or already typed values).

    Raises:
        PipelineError: an option is unknown (the message suggests the nearest) or its value has the wrong type.
        PassNameError: the pass does not exist.
    """
    cls = registry.get(name)
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            hint = suggestion(key, known) or (f"; it has {', '.join(known)}" if known else "; it has none")
            raise PipelineError(f"the pass '{name}' has no option '{key}'{hint}")
        if typing.get_origin(hints[key]) is tuple and isinstance(value, str):
            value = tuple(value.split("|")) if value else ()
        if typing.get_origin(hints[key]) is typing.Literal:
            # pydantic reads text as an integer, but not as one of some integers
            value = next((choice for choice in typing.get_args(hints[key]) if str(choice) == value), value)
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            raise PipelineError(f"the option '{key}' of the pass '{name}' cannot be '{value}': {reason}") from error
    return cls(**values)


def render(passes: Sequence[Pass], *, full: bool = False) -> str:
    """Passes as pipeline text; with ``full`` options at their defaults are written too."""
    return ",".join(render_pass(p, full=full) for p in passes)


def render_pass(item: Pass, *, full: bool = False) -> str:
    """One pass as text, e.g. ``ptq{group=128}``."""
    options = []
    for option in dataclasses.fields(item):
        value = getattr(item, option.name)
        default = option.default_factory() if option.default_factory is not dataclasses.MISSING else option.default
        if full or value != default:
            options.append(f"{option.name}={_render_value(value)}")
    return item.name + ("{" + ",".join(options) + "}" if options else "")


def _render_value(value: Any) -> str:
    if isinstance(value, tuple):
        text = "|".join(str(v) for v in value)
    elif isinstance(value, bool):
        text = "true" if value else "false"
    else:
        text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        index: position in the pipeline, from 1.
        text: the pass as pipeline text.
        seconds: time of ``apply`` alone.
        check_seconds: time of the checks after it.
        nodes_before, nodes_after: graph sizes.
        contract: as declared, in words.
        error: measured relative error on the probe (0 for bit-equal).
        rows, summary: the pass's own figures.
    """

    index: int
    name: str
    text: str
    seconds: float
    check_seconds: float
    nodes_before: int
    nodes_after: int
    contract: str
    error: float
    rows: Sequence[Mapping[str, Any]] = field(default_factory=list)
    summary: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[PassRecord, Program, Program], None]
"""Called after every pass with its record, the program before and the program after."""


def run(
    program: Program, passes: Sequence[Pass], context: PassContext, listener: Listener | None = None
) -> tuple[Program, list[PassRecord]]:
    """Applies passes in order, checking each.

    A pass that ``sets_teacher`` (``annotate``, ``smooth``) makes its result ``context.teacher`` where there is none
    yet, or where the program it was given is it.

    Raises:
        ContractError: a pass broke what it promised, or left a graph that does not lint or propagate.
        LbllmError: a pass refused the program.
    """
    apart()
    records: list[PassRecord] = []
    channel_weights = context.channel_weights
    outputs = contracts.probe_outputs(program, context.probe)
    for index, item in enumerate(passes, start=1):
        reclaim(program.module)
        start = time.perf_counter()
        checkpoints = PassCheckpoints(context.checkpoints, f"{index:02d}-")
        own = dataclasses.replace(context, checkpoints=checkpoints, channel_weights=channel_weights)
        result = item.apply(program, own)
        channel_weights = result.channel_weights or channel_weights
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        after = result.program
        contracts.check_structure(item, after, context.probe)
        new_outputs = contracts.probe_outputs(after, context.probe)
        error = contracts.check_outputs(item, program, after, outputs, new_outputs, context.probe)
        record = PassRecord(
            index=index,
            name=item.name,
            text=render_pass(item),
            seconds=seconds,
            check_seconds=time.perf_counter() - start,
            nodes_before=len(program.graph.nodes),
            nodes_after=len(after.graph.nodes),
            contract=str(item.contract),
            error=error,
            rows=list(result.rows),
            summary=dict(result.summary),
        )
        records.append(record)
        if listener is not None:
            listener(record, program, after)
        if item.sets_teacher and (context.teacher is None or context.teacher is program):
            context.teacher = after
        program, outputs = after, new_outputs
    reclaim(program.module)
    return program, records
