"""Graphs as JSON: what an artifact stores, and the only way a graph comes back from disk.

A document is ``{"format": "lbllm-graph", "version": 1, "nodes": [...]}``. A node is ``{"name", "op", "target"}`` with
``args``, ``kwargs`` and a few facts under ``meta`` (shape text, decoder layer, module path, source line, linear and
state descriptions) where it has them. Argument values are JSON values; what JSON lacks is an object with one key:
``{"node": name}``, ``{"tuple": [...]}``, ``{"dtype": "float32"}``, ``{"float": "inf"}`` and the like.

Reading trusts nothing. Operators are looked up by name in an allow-list of side-effect free ``aten`` overloads,
``lbllm`` operators and a few functions on integers; nothing else can be named. Node names and weight paths, which FX
writes into generated source, must be plain identifiers. References point backwards only. Sizes, depths and integers are
bounded.
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...codegen import operators as operators
from ...codegen.errors import LbllmError, first_line
from ...codegen.operators import stored
from ...codegen.operators.arguments import parameters
from ...codegen.sizes import BATCH, LENGTH
from . import dump
from .annotations import LINEAR, ROLES, LinearInfo
from .program import FIXED, IN_FEATURES, LAYER, PER_TOKEN, STATE, StateSpec, get_attribute, set_attribute
from .rewrite import Node
from .scheme import Scheme, told

FORMAT = "lbllm-graph"
VERSION = 1

MAX_BYTES = 64 << 20
"""Largest graph document that is read."""

MAX_NODES = 1_000_000
MAX_DEPTH = 6
MAX_TEXT = 1000
MAX_DIMENSION = 1 << 24

_DTYPES = {str(d).removeprefix("torch."): d for d in dump._DTYPES}
_LAYOUTS = {"strided": torch.strided}
_MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
}
_WRITTEN = {
    torch.ops.aten.empty_like.default: torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_empty.default: torch.ops.aten.new_zeros.default,
}
"""What operators are read as that would give memory which nobody has written."""

_DEVICES = ("cpu", "cuda", "meta")

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")
_PATH_PART = re.compile(r"[A-Za-z0-9_]{1,200}")
_SOURCE = re.compile(r"[^\"\n]{1,500}:\d{1,9}")
_META = ("shape", "layer", "module", "source", "linear", "in_features", "state")
_MODULE_ATTRIBUTES = frozenset(dir(torch.nn.Module()))


class GraphFormatError(LbllmError):
    """A stored graph that is malformed or uses what a stored graph may not use."""


def encode(module: fx.GraphModule) -> dict[str, Any]:
    """A graph as a JSON-able document. Weights are named by path, not stored.

    Raises:
        GraphFormatError: an argument has no JSON form.
    """
    symbols = _symbols(module.graph)
    return {"format": FORMAT, "version": VERSION, "nodes": [_encode_node(n, symbols) for n in module.graph.nodes]}


def dumps(module: fx.GraphModule) -> str:
    """The document as text, one node a line."""
    document = encode(module)
    nodes = ",\n".join(json.dumps(n, allow_nan=False) for n in document.pop("nodes"))
    return json.dumps(document)[:-1] + ', "nodes": [\n' + nodes + "\n]}\n"


def loads(text: str | bytes, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """Reads a document; ``state`` has the tensors that its ``get_attr`` nodes name.

    Raises:
        GraphFormatError: the text is malformed, too large, or names an operator outside the allow-list.
    """
    if len(text) > MAX_BYTES:
        raise GraphFormatError(f"the graph has {len(text)} bytes, more than the {MAX_BYTES} a graph may have")
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise GraphFormatError(f"the graph is not JSON: {str(error)[:200]}") from error
    return decode(document, state)


def decode(document: Any, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """Builds the graph of a document. See :func:`loads`."""
    fields = _object(document, "the graph", required=("format", "version", "nodes"))
    if fields["format"] != FORMAT:
        raise GraphFormatError("the document is not a graph of this project")
    if fields["version"] != VERSION:
        raise GraphFormatError(f"the graph has version {fields['version']!r}, this build reads version {VERSION}")
    nodes = fields["nodes"]
    if not isinstance(nodes, list) or not nodes or len(nodes) > MAX_NODES:
        raise GraphFormatError("the graph's 'nodes' must be a list of nodes")
    return _Decoder(state).build(nodes)


def operator_name(target: Any) -> str:
    """The stored name of a call's target, e.g. ``aten.add.Tensor`` or ``operator.mul``.

    Raises:
        GraphFormatError: the target is neither an operator overload nor a known function.
    """
    name = stored.name_of(target)
    if name is None:
        raise GraphFormatError(f"a graph that calls '{getattr(target, '__name__', target)}' cannot be stored")
    return name


def resolve_operator(name: Any) -> Callable[..., Any]:
    """The function that a stored name means.

    Raises:
        GraphFormatError: the name is outside the allow-list.
    """
    target = stored.resolve(name) if isinstance(name, str) else None
    if target is None:
        raise GraphFormatError(
            f"the graph calls {str(name)[:100]!r}, which is outside the operators a stored graph may use"
        )
    return target


def check_storable(graph: fx.Graph) -> None:
    """Checks that a stored graph may call what this one calls.

    Raises:
        GraphFormatError: naming the first node for which it may not, and its source line.
    """
    for node in graph.nodes:
        if node.op == "call_function" and stored.resolve(stored.name_of(node.target) or "") is None:
            line = dump.source_line(node)
            raise GraphFormatError(
                f"'{node.name}' calls {dump.target_text(node)}{', from ' + line if line else ''}, which is outside the"
                " operators a stored graph may use"
            )


def _symbols(graph: fx.Graph) -> dict[str, str]:
    """Names of symbolic sizes: batch and length for the two dimensions of ``input_ids``."""
    ids = next((n for n in graph.nodes if n.op == "placeholder" and n.target == "input_ids"), None)
    value = ids.meta.get("val") if ids is not None else None
    if not isinstance(value, Tensor) or value.dim() != 2:
        return {}
    names = (BATCH, LENGTH)
    return {str(d): name for d, name in zip(value.shape, names, strict=True) if isinstance(d, torch.SymInt)}


def _encode_node(node: Node, symbols: Mapping[str, str]) -> dict[str, Any]:
    target = operator_name(node.target) if node.op == "call_function" else node.target
    if node.op not in ("placeholder", "get_attr", "call_function", "output"):
        raise GraphFormatError(f"the node '{node.name}' ({node.op}) cannot be stored")
    result: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
    if node.args:
        result["args"] = [_encode_value(a, node) for a in node.args]
    if node.kwargs:
        result["kwargs"] = {k: _encode_value(v, node) for k, v in node.kwargs.items()}
    meta = _encode_meta(node, symbols)
    if meta:
        result["meta"] = meta
    return result


def _encode_value(value: Any, node: Node) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode_value(v, node) for v in value]}
    if isinstance(value, list):
        return [_encode_value(v, node) for v in value]
    if isinstance(value, slice):
        return {"slice": [_encode_value(v, node) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    raise GraphFormatError(
        f"the node '{node.name}' has an argument of type {type(value).__name__}, which has no JSON form"
    )


def _encode_meta(node: Node, symbols: Mapping[str, str]) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    shape = _shape_text(node, symbols)
    if shape:
        meta["shape"] = shape
    if node.meta.get(LAYER) is not None:
        meta["layer"] = node.meta[LAYER]
    if dump.module_path(node):
        meta["module"] = dump.module_path(node)
    if source := dump.source_line(node):
        meta["source"] = source
    if LINEAR in node.meta:
        meta["linear"] = dataclasses.asdict(node.meta[LINEAR])
    if IN_FEATURES in node.meta:
        meta["in_features"] = node.meta[IN_FEATURES]
    if STATE in node.meta:
        spec: StateSpec = node.meta[STATE]
        meta["state"] = {
            "kind": spec.kind,
            "heads": spec.heads,
            "tail": list(spec.tail),
            "dtype": str(spec.dtype).removeprefix("torch."),
        }
    return meta


def _shape_text(node: Node, symbols: Mapping[str, str]) -> str:
    """Dtype and shape as last propagated; before that as capture knew them."""
    value = node.meta.get("val")
    if "shape" in node.meta or not isinstance(value, Tensor):
        return node.meta.get("shape", "")
    return re.sub(r"\bs\d+\b", lambda m: symbols.get(m.group(), m.group()), dump.shape_text(value))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _object(value: Any, what: str, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """``value`` as an object that has the required fields and no others than the optional ones."""
    if not isinstance(value, dict):
        raise GraphFormatError(f"{what} is not an object")
    for field in required:
        if field not in value:
            raise GraphFormatError(f"{what} has no field '{field}'")
    unknown = [k for k in value if k not in required and k not in optional]
    if unknown:
        raise GraphFormatError(f"{what} has the unknown field {unknown[0][:100]!r}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise GraphFormatError(f"{what} is not a short text")
    return value


def _integer(value: Any, what: str, low: int = -(1 << 63), high: int = (1 << 63) - 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise GraphFormatError(f"{what} is not an integer from {low} to {high}")
    return value


def _choice(value: Any, table: Mapping[str, Any], what: str) -> Any:
    if not isinstance(value, str) or value not in table:
        raise GraphFormatError(f"{what} {str(value)[:100]!r} is none of {', '.join(table)}")
    return table[value]


def check_arguments(node: Node, what: str) -> None:
    """Argument counts and names fit the operator's schema; other nodes have none (the output: one).

    Raises:
        GraphFormatError: they do not; the message begins with ``what``.
    """
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        known, given = {a.name for a in schema}, {a.name for a in schema[: len(node.args)]}
        if len(node.args) > len(schema) or not set(node.kwargs) <= known or given & set(node.kwargs):
            raise GraphFormatError(f"{what} has arguments that {node.target} does not take")
        for argument in schema[len(node.args) :]:
            if argument.name not in node.kwargs and not argument.has_default_value():
                raise GraphFormatError(f"{what} lacks the argument '{argument.name}' of {node.target}")
    elif node.kwargs or (node.op in ("placeholder", "get_attr") and node.args):
        raise GraphFormatError(f"{what} has arguments where none belong")
    elif node.op == "output" and len(node.args) != 1:
        raise GraphFormatError(f"{what} must return one value")
    elif node.op == "call_function" and len(node.args) != len(parameters(node.target)):
        raise GraphFormatError(f"{what} does not have the arguments of '{node.target.__name__}'")


class _Decoder:
    """Builds one graph, node by node, checking everything on the way."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = state
        self.graph = fx.Graph()
        self.nodes: dict[str, Node] = {}

    def build(self, nodes: list[Any]) -> fx.GraphModule:
        for index, item in enumerate(nodes):
            if (self._node(item, f"node {index}").op == "output") != (index == len(nodes) - 1):
                raise GraphFormatError("the graph must have one output, as its last node")
        root = torch.nn.Module()
        inputs = [str(n.target) for n in self.graph.nodes if n.op == "placeholder"]
        if twice := [name for name in inputs if inputs.count(name) > 1]:
            raise GraphFormatError(f"the graph has the input '{twice[0]}' twice")
        paths = sorted({n.target for n in self.graph.nodes if n.op == "get_attr"})
        for path in paths:
            set_attribute(root, path, self.state[path])
        for path in paths:
            if not isinstance(_attribute_or_none(root, path), Tensor):
                raise GraphFormatError(f"the weight '{path}' and another one cannot both have their paths")
        self.graph.lint()
        return fx.GraphModule(root, self.graph)

    def _node(self, item: Any, what: str) -> Node:
        fields = _object(item, what, required=("name", "op", "target"), optional=("args", "kwargs", "meta"))
        name, op = _text(fields["name"], f"{what}'s name"), fields["op"]
        if not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name) or name in self.nodes:
            raise GraphFormatError(f"{what} has the name {name[:100]!r}, which is not a free identifier")
        what = f"the node '{name}'"
        args, kwargs = fields.get("args", []), fields.get("kwargs", {})
        if not isinstance(kwargs, dict):
            raise GraphFormatError(f"{what}'s kwargs is not an object")
        if not isinstance(args, list) or any(not _IDENTIFIER.fullmatch(k) or keyword.iskeyword(k) for k in kwargs):
            raise GraphFormatError(f"{what} has malformed arguments")
        node = self.graph.create_node(
            op if op in ("placeholder", "get_attr", "call_function", "output") else self._refuse_op(op, what),
            self._target(op, fields["target"], what),
            tuple(self._value(a, what) for a in args),
            {k: self._value(v, what) for k, v in kwargs.items()},
            name=name,
        )
        if node.name != name:
            raise GraphFormatError(f"{what} has a name that generated code cannot use")
        check_arguments(node, what)
        self._meta(node, fields.get("meta", {}), what)
        _check_scheme(node, what)
        self.nodes[name] = node
        return node

    @staticmethod
    def _refuse_op(op: Any, what: str) -> str:
        raise GraphFormatError(
            f"{what} is a {str(op)[:100]!r}, which is none of placeholder, get_attr, call_function, output"
        )

    def _target(self, op: Any, target: Any, what: str) -> Any:
        if op == "call_function":
            known = resolve_operator(target)
            return _WRITTEN.get(known, known)
        text = _text(target, f"{what}'s target")
        if op == "get_attr":
            parts = text.split(".")
            if any(not _PATH_PART.fullmatch(p) or p in _MODULE_ATTRIBUTES or p.startswith("__") for p in parts):
                raise GraphFormatError(f"{what} names {text[:100]!r}, which cannot be the path of a weight")
            if text not in self.state:
                raise GraphFormatError(f"{what} needs the weight {text!r}, which is not stored")
        elif not _IDENTIFIER.fullmatch(text) or keyword.iskeyword(text):
            raise GraphFormatError(f"{what} has the target {text[:100]!r}, which is not an identifier")
        return text

    def _value(self, value: Any, what: str, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise GraphFormatError(f"{what} has arguments nested too deep")
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, int):
            return _integer(value, f"{what}'s argument")
        if isinstance(value, str):
            return _text(value, f"{what}'s argument")
        if isinstance(value, list):
            return [self._value(v, what, depth + 1) for v in value]
        if not isinstance(value, dict) or len(value) != 1:
            raise GraphFormatError(f"{what} has a malformed argument")
        ((kind, content),) = value.items()
        if kind == "node":
            if not isinstance(content, str) or content not in self.nodes:
                raise GraphFormatError(f"{what} refers to {str(content)[:100]!r}, which is not a node before it")
            return self.nodes[content]
        if kind == "float":
            return float(_choice(content, {"inf": "inf", "-inf": "-inf", "nan": "nan"}, "the number"))
        if kind in ("tuple", "slice"):
            if not isinstance(content, list) or (kind == "slice" and len(content) != 3):
                raise GraphFormatError(f"{what} has a malformed {kind}")
            items = [self._value(v, what, depth + 1) for v in content]
            return tuple(items) if kind == "tuple" else slice(*items)
        if kind == "dtype":
            return _choice(content, _DTYPES, "the dtype")
        if kind == "device":
            return torch.device(_choice(content, {d: d for d in _DEVICES}, "the device"))
        if kind == "layout":
            return _choice(content, _LAYOUTS, "the layout")
        if kind == "memory_format":
            return _choice(content, _MEMORY_FORMATS, "the memory format")
        raise GraphFormatError(f"{what} has an argument of the unknown kind {kind[:100]!r}")

    @staticmethod
    def _meta(node: Node, value: Any, what: str) -> None:
        meta = _object(value, f"{what}'s meta", optional=_META)
        if "shape" in meta:
            node.meta["shape"] = _text(meta["shape"], f"{what}'s shape")
        if "layer" in meta:
            node.meta[LAYER] = _integer(meta["layer"], f"{what}'s layer", 0, MAX_NODES)
        if "module" in meta:
            node.meta["nn_module_stack"] = {"": (_text(meta["module"], f"{what}'s module"), "")}
        if "source" in meta:
            source = meta["source"]
            if not isinstance(source, str) or not _SOURCE.fullmatch(source):
                raise GraphFormatError(f"{what} has a malformed source line")
            file, _, line = source.rpartition(":")
            node.meta["stack_trace"] = f'File "{file}", line {line}'
        if "linear" in meta:
            node.meta[LINEAR] = _linear(meta["linear"], what)
        if "in_features" in meta:
            node.meta[IN_FEATURES] = _integer(meta["in_features"], f"{what}'s in_features", 1, MAX_DIMENSION)
        if "state" in meta:
            node.meta[STATE] = _state(meta["state"], what)


def _attribute_or_none(root: torch.nn.Module, path: str) -> Any:
    try:
        return get_attribute(root, path)
    except AttributeError:
        return None


def _linear(value: Any, what: str) -> LinearInfo:
    names = tuple(f.name for f in dataclasses.fields(LinearInfo) if f.name != "scheme")
    fields = _object(value, f"{what}'s linear", required=names, optional=("scheme",))
    layer = fields["layer"]
    return LinearInfo(
        path=_text(fields["path"], f"{what}'s path"),
        weight=_text(fields["weight"], f"{what}'s weight"),
        layer=None if layer is None else _integer(layer, f"{what}'s layer", 0, MAX_NODES),
        role=_choice(fields["role"], {role: role for role in ROLES}, f"{what}'s role"),
        experts=_integer(fields["experts"], f"{what}'s experts", 0, MAX_NODES),
        reason=_text(fields["reason"], f"{what}'s reason"),
        scheme=_scheme(fields.get("scheme", {}), what),
    )


def _scheme(value: Any, what: str) -> Scheme:
    """A scheme; what its document leaves out is open."""
    names = tuple(f.name for f in dataclasses.fields(Scheme))
    fields = dict(_object(value, f"{what}'s scheme", optional=names))
    _integer(fields.get("outliers", 0), f"{what}'s outliers", 0, MAX_DIMENSION)
    for name in ("bits", "group", "act_bits", "act_group", "embedding"):
        if fields.get(name) is not None:
            _integer(fields[name], f"{what}'s {name}", 0, MAX_DIMENSION)
    for name in ("levels", "codebook"):
        if fields.get(name) is not None:
            _text(fields[name], f"{what}'s {name}")
    if not isinstance(fields.get("dense", False), bool):
        raise GraphFormatError(f"{what}'s dense is neither true nor false")
    try:
        return Scheme(**fields)
    except LbllmError as error:
        raise GraphFormatError(f"{what} has a scheme that cannot be: {first_line(error)}") from error


def _check_scheme(node: Node, what: str) -> None:
    """Checks that a linear's scheme says what its operators do."""
    if LINEAR not in node.meta or not isinstance(node.target, torch._ops.OpOverload):
        return
    info = node.meta[LINEAR]
    scheme = info.scheme
    for name, value in told(node, info.role == "head").items():
        if getattr(scheme, name) not in (None, value):
            raise GraphFormatError(
                f"{what} has {value} as {name}, and {getattr(scheme, name)} in its scheme; the artifact is damaged"
            )


def _state(value: Any, what: str) -> StateSpec:
    fields = _object(value, f"{what}'s state", required=("heads", "tail", "dtype"), optional=("kind",))
    tail = fields["tail"]
    if not isinstance(tail, list) or len(tail) > 4:
        raise GraphFormatError(f"{what} has a malformed state")
    return StateSpec(
        heads=_integer(fields["heads"], f"{what}'s heads", 1, MAX_DIMENSION),
        tail=tuple(_integer(d, f"{what}'s state size", 0, MAX_DIMENSION) for d in tail),
        dtype=_choice(fields["dtype"], _DTYPES, "the dtype"),
        kind=_choice(fields.get("kind", PER_TOKEN), {k: k for k in (PER_TOKEN, FIXED)}, f"{what}'s kind of state"),
    )
