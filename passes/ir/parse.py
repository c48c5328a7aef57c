"""Reads a program back from the text that :mod:`.dump` writes, so that tests of passes are text in, text out.

Nothing is computed and nothing imported: an operator must be one that torch has or that a stored graph may call.
"""

from __future__ import annotations

import json
import keyword
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...codegen import operators as operators
from ...codegen.errors import LbllmError
from ...codegen.operators import stored
from . import dump
from . import scheme as schemes
from .annotations import LINEAR, LinearInfo
from .graph_json import check_arguments
from .program import IN_FEATURES, LAYER, STAT, STATE, Program, StateSpec, get_attribute, set_attribute
from .rewrite import Node
from .scheme import Scheme

_UNFINISHED = re.compile(r'(?:[^"#]|"(?:[^"\\]|\\.)*")*[,({\[]')
_SECTION = re.compile(r"(?:decoder layer (\d+)|outside the decoder layers):")
_NODE = re.compile(r"%([A-Za-z_]\w*)(?:: ([^=]*\S))? = ")
_LEAF = re.compile(r"(input|state|weight) ([\w.]+)")
_OPERATOR = re.compile(r"([A-Za-z_][\w.]*)\(")
_COMMENT = re.compile(r"\s*(?:#\s*(.*?)\s*)?")
_TYPE = re.compile(r"([\w.]+)\[([\d, ]*)\]")
_TOKEN = re.compile(
    r'\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<node>%[A-Za-z_]\w*)'
    r"|(?P<number>-?(?:\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|inf\b))|(?P<word>[A-Za-z_][\w.]*)|(?P<sign>[\[\](){},=]))"
)
_WORDS = {"None": None, "True": True, "False": False, "inf": float("inf"), "nan": float("nan")}
_DTYPES = {text: dtype for dtype, text in dump._DTYPES.items()}
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_LINEAR_NOTES = {
    **dict.fromkeys(("path", "weight", "role", "reason", "scheme"), str),
    "layer": (int, type(None)),
    "experts": int,
}
_STATE_NOTES = {"kind": str, "heads": int, "tail": tuple, "dtype": torch.dtype}


class ParseError(LbllmError):
    """Text that is no dump of a program; the message names the line."""


def parse(text: str, weights: Mapping[str, Tensor] | None = None, kind: str = "causal-lm") -> Program:
    """The program that a dump shows; see :mod:`.dump` for the form.

    Args:
        text: the dump. Indentation, empty lines and comments mean nothing, but for a node's module path.
        weights: tensors by path. A weight that is not among them gets values that depend on its path, dtype and shape
            alone: normal ones, or integers from the dtype's range (below 4 for int32 and int64).
        kind: as :attr:`.program.Program.kind`.

    Raises:
        ParseError: a line is malformed, or the graph does not hold together; one sentence with the line's number.
    """
    reader = _Reader(weights or {})
    begun, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        begun, first = (f"{begun} {line.strip()}", first) if begun else (line.strip(), number)
        if _UNFINISHED.fullmatch(begun):
            continue
        try:
            reader.read(begun)
        except LbllmError as error:
            raise ParseError(f"line {first} of the program: {error}") from error
        begun = ""
    if not reader.complete:
        raise ParseError("the program has no line 'return ...' at its end")
    return Program(fx.GraphModule(reader.root, reader.graph), kind)


class _MalformedError(LbllmError):
    """What is wrong with the line that is being read."""


class _Reader:
    """Builds a graph line by line."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights = weights
        self.root = torch.nn.Module()
        self.graph = fx.Graph()
        self.nodes: dict[str, Node] = {}
        self.meta: dict[str, Any] = {}
        self.complete = False

    def read(self, line: str) -> None:
        if not line or line.startswith("#"):
            return
        if self.complete:
            raise _MalformedError("nothing may stand behind 'return'")
        section = _SECTION.fullmatch(line)
        if section:
            self.meta = {LAYER: int(section[1]) if section[1] else None}
        elif line.startswith("return "):
            tokens = _Tokens(line, len("return "), self.nodes)
            self._finish(self.graph.output(tokens.value()), tokens)
            self.complete = True
        else:
            self._node(line)

    def _node(self, line: str) -> None:
        head = _NODE.match(line)
        if not head:
            raise _MalformedError("expected '%name = operator(...)', a section such as 'decoder layer 0:', or 'return'")
        name, shape = head.groups()
        if name in self.nodes:
            raise _MalformedError(f"there is a node '%{name}' already")
        leaf, call = _LEAF.match(line, head.end()), _OPERATOR.match(line, head.end())
        if leaf:
            tokens = _Tokens(line, leaf.end(), self.nodes)
            node = self._leaf(name, shape, *leaf.groups())
        elif call:
            tokens = _Tokens(line, call.end(), self.nodes)
            args, kwargs = tokens.arguments(")")
            node = self.graph.create_node("call_function", _operator(call[1]), args, kwargs, name)
        else:
            raise _MalformedError("expected 'input', 'state' or 'weight' and a name, or an operator and its arguments")
        if node.name != name or keyword.iskeyword(name):
            raise _MalformedError(f"a node cannot be named '%{name}'; python or torch uses the name")
        if shape:
            node.meta["shape"] = shape
        self._finish(node, tokens)
        if leaf and (leaf[1] == "state") != (STATE in node.meta):
            raise _MalformedError("a state, and nothing else, has {kind=..., heads=..., tail=..., dtype=...} behind it")
        self.nodes[name] = node

    def _leaf(self, name: str, shape: str | None, word: str, target: str) -> Node:
        if word != "weight":
            if not target.isidentifier() or keyword.iskeyword(target):
                raise _MalformedError(f"'{target}' cannot be the name of an input")
            return self.graph.create_node("placeholder", target, name=name)
        value = self.weights[target] if target in self.weights else _made(target, shape)
        if shape and shape != dump.shape_text(value):
            raise _MalformedError(f"the weight '{target}' is {dump.shape_text(value)}, not {shape}")
        for node in self.graph.nodes:
            longer, shorter = sorted((str(node.target), target), key=len, reverse=True)
            if node.op == "get_attr" and longer.startswith(f"{shorter}."):
                raise _MalformedError(f"the weights '{node.target}' and '{target}' cannot both have their paths")
        try:
            set_attribute(self.root, target, value)
            get_attribute(self.root, target)
        except (AttributeError, KeyError) as error:
            raise _MalformedError(f"'{target}' cannot be the path of a weight") from error
        return self.graph.create_node("get_attr", target, name=name)

    def _finish(self, node: Node, tokens: _Tokens) -> None:
        """Reads what stands behind a node, and checks the node."""
        node.meta.update(self.meta)
        if tokens.take("{"):
            values, notes = tokens.arguments("}")
            if values:
                raise _MalformedError("everything in braces has a name: {name=value}")
            _annotate(node, notes)
        comment = tokens.comment()
        if comment and node.op == "call_function" and len(comment.split()) == 1:
            node.meta["nn_module_stack"] = {"": (comment, "")}
        check_arguments(node, f"the node '%{node.name}'")


class _Tokens:
    """The words of one line, from a column on."""

    def __init__(self, line: str, position: int, nodes: Mapping[str, Node]):
        self.line, self.position, self.nodes = line, position, nodes

    def take(self, sign: str) -> bool:
        """Whether ``sign`` comes next; then it is behind."""
        match = _TOKEN.match(self.line, self.position)
        if not match or match["sign"] != sign:
            return False
        self.position = match.end()
        return True

    def comment(self) -> str:
        """The comment that ends the line, maybe empty."""
        match = _COMMENT.fullmatch(self.line, self.position)
        if not match:
            raise self.wrong("the end of the line")
        return match[1] or ""

    def wrong(self, wanted: str) -> _MalformedError:
        found = self.line[self.position :].strip()
        instead = repr(found[:40]) if found else "the end of the line"
        return _MalformedError(f"expected {wanted} at column {self.position + 1}, not {instead}")

    def arguments(self, closing: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Values up to ``closing``, those behind ``name=`` apart."""
        values: list[Any] = []
        named: dict[str, Any] = {}
        while not self.take(closing):
            if (values or named) and not self.take(","):
                raise self.wrong(f"',' or '{closing}'")
            name = re.compile(r"\s*([A-Za-z_]\w*)=").match(self.line, self.position)
            if name:
                self.position = name.end()
                if name[1] in named:
                    raise _MalformedError(f"'{name[1]}' is given twice")
                named[name[1]] = self.value()
            elif named:
                raise self.wrong("an argument by name")
            else:
                values.append(self.value())
        return tuple(values), named

    def value(self) -> Any:
        match = _TOKEN.match(self.line, self.position)
        if not match or (match["sign"] and match["sign"] not in "[("):
            raise self.wrong("a value")
        start, self.position = self.position, match.end()
        if match["text"]:
            return self._text(match["text"], start)
        if match["node"]:
            if match["node"][1:] not in self.nodes:
                raise _MalformedError(f"no node '{match['node']}' stands before this line")
            return self.nodes[match["node"][1:]]
        if match["number"]:
            whole = re.fullmatch(r"-?\d+", match["number"])
            return int(match["number"]) if whole else float(match["number"])
        if match["sign"]:
            return self._sequence(match["sign"])
        return self._word(match["word"], start)

    def _text(self, text: str, start: int) -> str:
        try:
            return json.loads(text)
        except ValueError:
            self.position = start
            raise self.wrong("a text quoted as in JSON") from None

    def _sequence(self, opening: str) -> Any:
        items: list[Any] = []
        closing = _CLOSING[opening]
        while not self.take(closing):
            if items and not self.take(","):
                raise self.wrong(f"',' or '{closing}'")
            if items and self.take(closing):
                break
            items.append(self.value())
        return items if opening == "[" else tuple(items)

    def _word(self, word: str, start: int) -> Any:
        if word in _WORDS:
            return _WORDS[word]
        if word in ("slice", "device") and self.take("("):
            values, named = self.arguments(")")
            try:
                return (slice if word == "slice" else torch.device)(*values, **named)
            except (TypeError, RuntimeError):
                raise _MalformedError(f"{word}{values} is no {word}") from None
        found = getattr(torch, word.removeprefix("torch."), None) if word.startswith("torch.") else None
        if not isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            self.position = start
            raise self.wrong("a value")
        return found


def _operator(name: str) -> Callable[..., Any]:
    """The function that a dump means by ``name``: ``default`` and the package of python functions are left out."""
    full = (f"operator.{name}", f"torch.{name}") if "." not in name else (name, f"{name}.default")
    for candidate in full:
        found = stored.resolve(candidate)
        if found is not None:
            return found
    namespace, _, rest = name.partition(".")
    packet = getattr(getattr(torch.ops, namespace, None), rest.partition(".")[0], None) if rest else None
    overload = rest.partition(".")[2] or "default"
    if not isinstance(packet, torch._ops.OpOverloadPacket) or overload not in packet.overloads():
        raise _MalformedError(f"there is no operator '{name}'")
    return getattr(packet, overload)


def _annotate(node: Node, notes: dict[str, Any]) -> None:
    """Puts what stands in braces into a node's meta."""
    unknown = sorted(set(notes) - {*_LINEAR_NOTES, *_STATE_NOTES, "in_features", "stat"})
    if unknown:
        raise _MalformedError(f"nothing in braces is named '{unknown[0]}'")
    node.meta.update(
        {key: notes[name] for name, key in (("in_features", IN_FEATURES), ("stat", STAT)) if name in notes}
    )
    linear = {k: v for k, v in notes.items() if k in _LINEAR_NOTES}
    state = {k: v for k, v in notes.items() if k in _STATE_NOTES}
    if linear:
        node.meta[LINEAR] = _linear(linear, node.meta.get(LAYER))
    if state:
        _check_notes(state, _STATE_NOTES, ("kind", "heads", "tail", "dtype"))
        node.meta[STATE] = StateSpec(state["heads"], state["tail"], state["dtype"], state["kind"])


def _linear(notes: Mapping[str, Any], layer: int | None) -> LinearInfo:
    _check_notes(notes, _LINEAR_NOTES, ("path", "role"))
    defaults = {"weight": f"{notes['path']}.weight", "layer": layer, "experts": 0, "reason": ""}
    scheme = Scheme()
    for entry in schemes.parse(f"*: {notes['scheme']}") if "scheme" in notes else ():
        scheme = entry.on(scheme)
    return LinearInfo(**{**defaults, **notes, "scheme": scheme})


def _check_notes(notes: Mapping[str, Any], types: Mapping[str, Any], required: tuple[str, ...]) -> None:
    for name in required:
        if name not in notes:
            raise _MalformedError(f"'{name}' is missing in the braces")
    for name, value in notes.items():
        if not isinstance(value, types[name]):
            raise _MalformedError(f"'{name}' cannot be {value!r}")


def _made(path: str, shape: str | None) -> Tensor:
    """Values for a weight that was not given; the same for the same path, dtype and shape."""
    match = _TYPE.fullmatch(shape or "")
    dtype = _DTYPES.get(match[1], getattr(torch, match[1].removeprefix("torch."), None)) if match else None
    if not match or not isinstance(dtype, torch.dtype):
        raise _MalformedError(f"the weight '{path}' needs dtype and shape, as in '%w: f32[8, 40] = weight {path}'")
    sizes = [int(d) for d in match[2].replace(",", " ").split()]
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(sizes, generator=generator).to(dtype)
    if dtype in (torch.bool, torch.int32, torch.int64):
        return torch.randint(0, 2 if dtype == torch.bool else 4, sizes, generator=generator).to(dtype)
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, sizes, generator=generator).to(dtype)
