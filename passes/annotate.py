"""Finds the linears, decides how each is treated, and tells every node which decoder layer it belongs to.

``node.meta["lbllm_linear"]`` is a :class:`LinearInfo` on every ``aten.linear`` and ``lbllm.grouped_linear`` whose
weight is a parameter; ``node.meta["lbllm_layer"]`` is a layer's index, or None, on every node. Later passes read these
two and never module names.

Given::

    %y = aten.linear(%x, %up_weight)  # model.layers.0.mlp.up_proj
    %z = aten.linear(%y, %head_weight)  # lm_head

Result::

    decoder layer 0:
    %y = aten.linear(%x, %up_weight) {path="model.layers.0.mlp.up_proj", role="decoder", reason="in decoder layer 0"}
    outside the decoder layers:
    %z = aten.linear(%y, %head_weight) {path="lm_head", role="head", reason="computes the output"}

Layers come from module paths (``model.layers.3.mlp``): the numbered family of modules that holds most linears, of
alike ones except in a language model, whose layers may be of several classes. Where paths do not tell, the graph does:
the nodes every path from the first to the last linear runs through cut it into regions, and the longest run of
isomorphic regions is the stack of layers. A module without repetition is one layer, 0. The head of a language model,
the linear that computes its output, is in no layer. Precondition: ``canonicalize`` has run. The graph itself does not
change.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import networkx as nx
import torch
from torch import fx

from ..codegen import operators as operators
from .base import EXACT, Contract, Pass, PassContext, PassError, PassResult
from .ir import scheme as schemes
from .ir.annotations import LINEAR, LinearInfo, linears
from .ir.attention import ATTENTIONS
from .ir.dump import module_path
from .ir.program import LAYER, Program
from .ir.rewrite import LINEARS, operands_of
from .ir.scheme import Entry, Scheme, SchemeError

aten = torch.ops.aten
lbllm = torch.ops.lbllm

_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(frozen=True)
class Annotate(Pass):
    """See the module's description.

    Attributes:
        keep_dense: linears that stay float, as shell patterns over module paths (``model.layers.0.*``); a pattern that
            matches a module covers what is inside it.
        scheme: how single linears are quantized, e.g. ``*.down_proj: group=32 act=8; *.layers.0.*: dense``
            (:mod:`.ir.scheme`); what it does not set is as the options of ``ptq``, ``activate`` and ``head`` say.
            ``keep_dense`` wins over it.
        slower: paths of linears that stay float because their kernels were measured to be slower
            (``--fallback dense``).
    """

    name: ClassVar[str] = "annotate"
    contract: ClassVar[Contract] = EXACT
    sets_teacher: ClassVar[bool] = True

    keep_dense: tuple[str, ...] = ()
    scheme: str = ""
    slower: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        schemes.parse(self.scheme)

    def apply(self, program: Program, context: PassContext) -> PassResult:
        result = program.copy()
        found = [n for n in result.graph.nodes if is_linear(n)]
        if not found:
            raise PassError(
                f"the model '{program.name}' has no linear layer with a weight; there is nothing to quantize"
            )
        layers = find_layers(result, found)
        for node in result.graph.nodes:
            node.meta[LAYER] = layers.get(node)
        _place_weights(result)
        infos = [_describe(result, node) for node in found]
        infos = choose(infos, schemes.parse(self.scheme), self.keep_dense, self.slower)
        for node, info in zip(found, infos, strict=True):
            node.meta[LINEAR] = info
        for behind in decoder_linears(result.graph).values():
            shared_scheme(behind)
        return PassResult(result, rows=_rows(result), summary=_summary(result))


def decoder_linears(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The linears to quantize, in graph order, by the node they read."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        info = node.meta.get(LINEAR)
        if info is not None and info.role == "decoder":
            found.setdefault(operands_of(node)[0], []).append(node)
    return found


def shared_scheme(behind: Sequence[fx.Node]) -> Scheme:
    """The scheme of the quantizer in front of linears that read the same input, with the smallest of their groups.

    Raises:
        PassError: their schemes want different ones; the message names two of them.
    """
    first, *others = infos = [node.meta[LINEAR] for node in behind]
    shared = first.scheme.activation
    for other in others:
        if other.scheme.activation != shared:
            raise PassError(
                f"'{first.path}' ({_asked(first)}) and '{other.path}' ({_asked(other)}) read the same input, which is"
                " quantized once; give them the same act, act-group and codebook in the scheme"
            )
    return replace(shared, group=min((info.scheme.group for info in infos if info.scheme.group), default=None))


def completed(linear: fx.Node) -> Scheme:
    """The scheme of a quantized linear with what the options of passes decided, as the operators of its graph tell."""
    info = linear.meta.get(LINEAR)
    if info is None:
        return replace(Scheme(), **schemes.told(linear, head=False))
    return replace(info.scheme, **schemes.told(linear, info.role == "head"))


def _asked(info: LinearInfo) -> str:
    return str(info.scheme) or "without a scheme"


def matrix_count(program: Program, role: str = "decoder") -> int:
    """Weight matrices of one role: one for each 2-D weight, one for each expert of a stacked weight."""
    return sum({i.weight: i.matrices for _, i in linears(program) if i.role == role}.values())


def layer_count(program: Program) -> int:
    """Number of decoder layers."""
    return len({n.meta[LAYER] for n in program.graph.nodes if n.meta.get(LAYER) is not None})


def is_linear(node: fx.Node) -> bool:
    """Whether a node is a linear whose weight is a parameter."""
    return node.op == "call_function" and node.target in LINEARS and operands_of(node)[1].op == "get_attr"


# Layers


def find_layers(program: Program, found: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """The layer of every node that is in one, by module paths or else by the shape of the graph.

    A language model's head, and what is behind it, is in none.
    """
    head = _head(found) if program.kind == "causal-lm" and len(found) > 1 else None
    inner = [node for node in found if node is not head]
    layers = _layers_by_path(program, inner)
    if not layers:
        known = any(node.meta.get("nn_module_stack") for node in found)
        layers = {} if known and program.kind != "causal-lm" else _layers_by_shape(program, inner)
    layers = layers or {node: 0 for node in program.graph.nodes if node.op == "call_function"}
    beyond = set() if head is None else {head, *_all_downstream(head)}
    return {node: layer for node, layer in layers.items() if node not in beyond}


def _head(found: Sequence[fx.Node]) -> fx.Node | None:
    """The linear that alone computes the output; None where several have a part in it."""
    last = [node for node in found if any(user.op == "output" for user in _downstream(node))]
    return last[0] if len(last) == 1 else None


def _all_downstream(node: fx.Node) -> set[fx.Node]:
    pending, seen = [*node.users], set()
    while pending:
        user = pending.pop()
        if user not in seen:
            seen.add(user)
            pending.extend(user.users)
    return seen


def _families(node: fx.Node) -> Iterable[tuple[str, int, str, str]]:
    """``(family, index, module path, class)`` of every numbered module a node is in, outermost first.

    ``model.layers.3`` is number 3 of the family ``model.layers.``, ``block2`` number 2 of ``block``.
    """
    for path, kind in node.meta.get("nn_module_stack", {}).values():
        parent, _, leaf = path.rpartition(".")
        match = _NUMBERED.fullmatch(leaf)
        if match:
            yield f"{parent}.{match.group(1)}", int(match.group(2)), path, kind


def _layers_by_path(program: Program, found: Sequence[fx.Node]) -> dict[fx.Node, int]:
    members: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    covered: Counter[str] = Counter()
    for node in found:
        own = linear_path(node)
        for family, index, path, kind in _families(node):
            if path != own:  # a linear in a list of linears is no layer
                members[family][index].add(kind)
                covered[family] += 1
    # A language model is a stack of layers, of one class or of several (attention and convolution, say). In another
    # module numbers may well count things that are no layers.
    language = program.kind == "causal-lm"
    families = [
        family
        for family, indices in members.items()
        if language or (len(indices) > 1 and len(set().union(*indices.values())) == 1)
    ]
    if not families:
        return {}
    # Where a single member holds the whole of another family, as in a list of parts, it is that one that is the stack.
    best = max(families, key=lambda family: (covered[family], len(members[family]), -family.count(".")))
    order = {index: position for position, index in enumerate(sorted(members[best]))}
    layers: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        for family, index, _, _ in _families(node):
            if family == best and index in order:
                layers[node] = order[index]
    return layers


def _layers_by_shape(program: Program, found: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Layers as the longest run of isomorphic regions along the trunk of the graph."""
    regions = _regions(program, found)
    labels = [_label(nodes) for nodes in regions]
    weights = [sum(is_linear(n) for n in nodes) for nodes in regions]
    best = (0, 0, 0, 0)  # linears covered, -period, start, repetitions
    for period in range(1, len(labels) // 2 + 1):
        for start in range(len(labels) - 2 * period + 1):
            unit = labels[start : start + period]
            repetitions = 1
            while labels[start + repetitions * period : start + (repetitions + 1) * period] == unit:
                repetitions += 1
            covered = sum(weights[start : start + repetitions * period])
            if repetitions >= 2 and sum(weights[start : start + period]):
                best = max(best, (covered, -period, -start, repetitions))
    covered, period, start, repetitions = best[0], -best[1], -best[2], best[3]
    if not covered:
        return {}
    return {
        node: layer
        for layer in range(repetitions)
        for nodes in regions[start + layer * period : start + (layer + 1) * period]
        for node in nodes
    }


def _regions(program: Program, found: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Cuts the graph at its trunk: the nodes that every path from the trunk's root to the output goes through.

    Only what depends on the trunk's root counts, so that masks and rotary tables, which every layer reads, do not
    bypass the trunk.
    """
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    output = next(n for n in program.graph.nodes if n.op == "output")
    graph = nx.DiGraph()
    for node in program.graph.nodes:
        graph.add_edges_from((source, node) for source in node.all_input_nodes if source.op != "get_attr")
    root = _root(graph, found, order)
    if root is None or output not in graph:
        return []
    inside = (nx.descendants(graph, root) | {root}) & (nx.ancestors(graph, output) | {output})
    dominators = nx.immediate_dominators(graph.subgraph(inside), root)
    trunk = [output]
    while trunk[-1] is not root:
        trunk.append(dominators[trunk[-1]])
    trunk.reverse()
    regions: list[list[fx.Node]] = [[] for _ in trunk[1:]]
    ends = [order[node] for node in trunk[1:]]
    for node in sorted(inside - {root, output}, key=order.__getitem__):
        regions[next(i for i, end in enumerate(ends) if order[node] <= end)].append(node)
    return [region for region in regions if region]


def _root(graph: nx.DiGraph, found: Sequence[fx.Node], order: dict[fx.Node, int]) -> fx.Node | None:
    """The first value that all linears depend on: the embedded tokens, or a float input."""
    common = set.intersection(*(nx.ancestors(graph, node) for node in found))
    values = [node for node in common if _is_float(node)]
    return min(values, key=order.__getitem__) if values else None


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _label(region: Sequence[fx.Node]) -> int:
    """A hash that isomorphic regions share: operators, weight shapes, and how they are wired."""
    labels: dict[fx.Node, int] = {}
    for node in region:
        sources = [labels.get(source, _static_shape(source)) for source in node.all_input_nodes]
        labels[node] = hash((str(node.target), tuple(sources)))
    return hash(tuple(sorted(labels.values())))


def _static_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a weight; what comes from elsewhere does not tell regions apart."""
    return tuple(node.meta["val"].shape) if node.op == "get_attr" else ()


def _place_weights(program: Program) -> None:
    """Gives a weight the layer of its readers, where they agree."""
    for node in program.graph.nodes:
        if node.op == "get_attr":
            layers = {user.meta.get(LAYER) for user in node.users}
            node.meta[LAYER] = layers.pop() if len(layers) == 1 else None


# Roles


def linear_path(node: fx.Node) -> str:
    """The module a linear stands for: the one that called it, or the parameter where one module holds several."""
    weight = str(operands_of(node)[1].target)
    owner, _, leaf = weight.rpartition(".")
    if leaf not in ("weight", "weight_transposed"):
        return weight
    called_by = module_path(node)
    # Tied weights lie under one path, so the head's own path is only in its provenance.
    return owner if not called_by or owner.startswith(called_by) else called_by


def _describe(program: Program, node: fx.Node) -> LinearInfo:
    _, weight = operands_of(node)
    layer = node.meta[LAYER]
    experts = int(weight.meta["val"].shape[0]) if node.target is lbllm.grouped_linear.default else 0
    if layer is not None and _routes(node):
        role, reason = "dense", "routes tokens to experts"
    elif layer is not None:
        role, reason = "decoder", f"in decoder layer {layer}" if program.kind == "causal-lm" else f"in layer {layer}"
    elif computes_output(node):
        role, reason = "head", "computes the output"
    else:
        role, reason = "dense", "outside the decoder layers"
    scheme = Scheme(dense=role == "dense")
    return LinearInfo(linear_path(node), str(weight.target), layer, role, experts, reason, scheme)


_CHOICES = (aten.topk.default, aten.argmax.default, aten.sort.default)


def _routes(node: fx.Node) -> bool:
    """Whether the output decides, by a choice of the best few, what a later linear computes: an expert router."""
    return any(
        user.target in _CHOICES and any(later.target in LINEARS for later in _downstream(user))
        for user in _downstream(node)
    )


def computes_output(node: fx.Node) -> bool:
    """Whether a linear's output reaches the graph's by way of no other linear and no layer."""
    return any(user.op == "output" for user in _downstream(node, outside_layers=True))


def _downstream(node: fx.Node, outside_layers: bool = False) -> Iterator[fx.Node]:
    """What depends on a node, up to and including the next linears and attentions."""
    pending, seen = [*node.users], set()
    while pending:
        user = pending.pop()
        if user in seen or (outside_layers and user.meta.get(LAYER) is not None):
            continue
        seen.add(user)
        yield user
        if user.target not in (*LINEARS, *ATTENTIONS):
            pending.extend(user.users)


SLOWER = "its kernel is slower than a float one"
"""Why a linear of ``slower`` stays float."""

HEAD_KEYS = ("act-group",)
"""Settings that an output head has beside its form; its input has 8 bits."""

HEAD_FORM = ("bits", "group", "embedding")
"""Settings of the form itself, in an entry that has ``bits``; without one the pass ``head`` says it."""

CODED = ("bits", "group", "act", "act-group", "codebook")
"""Settings of a decoder linear of 4-bit codes."""


def choose(
    infos: Sequence[LinearInfo], entries: Sequence[Entry], keep_dense: Sequence[str], slower: Sequence[str] = ()
) -> list[LinearInfo]:
    """Linears as a scheme, the patterns of ``keep_dense`` and the paths of ``slower`` want them.

    Raises:
        PassError: a pattern matches nothing (the message suggests the nearest path) or nothing that its settings
            concern, or the settings of a linear contradict each other.
    """
    modules = modules_of(infos)
    chosen = {info.path: info.scheme for info in infos}
    reasons: dict[str, str] = {}

    def keep(paths: Iterable[str], reason: str) -> None:
        for path in paths:
            chosen[path] = Scheme(dense=True)
            reasons[path] = reason

    for entry in entries:
        matched = matched_paths(modules, entry.pattern, "scheme")
        if "outliers" in dict(entry.settings):
            raise PassError(
                f"scheme: '{entry}' cannot set outliers; use the pass 'outliers', which finds and moves them"
            )
        _check_form(entry)
        if entry.dense:
            keep(matched, f"kept by the pattern '{entry.pattern}'")
            continue
        concerned = [info for info in infos if info.path in matched and _keys(info, entry)]
        _check_concerned(entry, concerned)
        for info in concerned:
            try:
                chosen[info.path] = entry.on(chosen[info.path], _keys(info, entry))
            except SchemeError as error:
                raise PassError(f"scheme: '{info.path}' cannot have '{entry}': {error}") from error
    for pattern in keep_dense:
        keep(matched_paths(modules, pattern, "keep_dense"), f"kept by the pattern '{pattern}'")
    for path in slower:
        keep(matched_paths(modules, path, "slower"), SLOWER)
    result = []
    for info in infos:
        scheme = chosen[info.path]
        kept = {"role": "dense", "reason": reasons.get(info.path, info.reason)} if scheme.dense else {}
        result.append(replace(info, scheme=scheme, **kept))
    _check_schemes(result)
    return result


def modules_of(infos: Iterable[LinearInfo]) -> Mapping[str, set[str]]:
    """Paths of the linears in every module, by its path; a linear is in itself, too."""
    modules: dict[str, set[str]] = defaultdict(set)
    for info in infos:
        parts = info.path.split(".")
        for length in range(1, len(parts) + 1):
            modules[".".join(parts[:length])].add(info.path)
    return modules


def matched_paths(modules: Mapping[str, set[str]], pattern: str, option: str) -> set[str]:
    """Paths of the linears that a shell pattern matches, or that are inside the modules that it matches.

    Args:
        modules: see :func:`modules_of`.
        pattern: the pattern.
        option: where it stands, for the message.

    Raises:
        PassError: there is none.
    """
    matched = {path for name, paths in modules.items() if fnmatch.fnmatchcase(name, pattern) for path in paths}
    if not matched:
        known = [*modules, *dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in modules)]
        near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise PassError(f"{option}: the pattern '{pattern}' matches no linear{hint}")
    return matched


def _keys(info: LinearInfo, entry: Entry) -> tuple[str, ...]:
    """The settings of an entry that concern a linear."""
    if entry.of_head:
        allowed = {"head": (*HEAD_FORM, *HEAD_KEYS)}
    elif entry.gives_form:
        allowed = {"decoder": CODED, "head": (*HEAD_FORM, *HEAD_KEYS)}
    else:
        allowed = {"decoder": tuple(schemes.KEYS), "head": HEAD_KEYS}
    return tuple(key for key, _ in entry.settings if key in allowed.get(info.role, ()))


def _check_form(entry: Entry) -> None:
    """Refuses settings that do not go together, because no linear has them all."""
    keys = [key for key, _ in entry.settings]
    if not entry.gives_form and "embedding" in keys:
        raise PassError(
            f"scheme: '{entry}' sets embedding, which goes with bits=4 or bits=2 of an output head; give bits"
        )
    foreign = [key for key in keys if key not in (*HEAD_FORM, *HEAD_KEYS)]
    if entry.of_head and foreign:
        raise PassError(
            f"scheme: '{entry}' cannot set {foreign[0]}: bits=8, bits=2 and embedding are of output heads, which have"
            " group and act-group beside them; give other linears an entry of their own"
        )
    foreign = [key for key in keys if key not in CODED]
    if entry.gives_form and not entry.of_head and foreign:
        raise PassError(f"scheme: '{entry}' cannot set {foreign[0]}, which is of W(1+1); leave it out, or bits=4")


def _check_concerned(entry: Entry, concerned: Sequence[LinearInfo]) -> None:
    """Refuses an entry of which a setting concerns none of the linears that its pattern matches."""
    if not concerned:
        hint = (
            ": bits=8, bits=2 and embedding are of output heads; a linear of a decoder layer has W(1+1) without bits,"
            " and codes with bits=4 alone"
            if entry.of_head
            else ""
        )
        raise PassError(
            f"scheme: none of the linears that '{entry.pattern}' matches has the settings of '{entry}'{hint}"
        )
    kept = {key for info in concerned for key in _keys(info, entry)}
    foreign = [key for key, _ in entry.settings if key not in kept]
    if entry.gives_form and foreign:
        raise PassError(
            f"scheme: '{entry}' cannot set {foreign[0]}: an output head has group, embedding and act-group beside bits"
        )


def _check_schemes(infos: Sequence[LinearInfo]) -> None:
    """Checks what only a decoder linear's whole scheme shows, and that one weight has one scheme."""
    by_weight: dict[str, LinearInfo] = {}
    for info in infos:
        if info.experts and info.scheme.bits:
            raise PassError(
                f"scheme: '{info.path}' are stacked experts, which have no codes; leave bits={info.scheme.bits} out for"
                " them"
            )
        if info.role == "decoder" and info.scheme.act_group and info.scheme.group is None:
            raise PassError(
                f"scheme: '{info.path}' has act-group={info.scheme.act_group} and no group; set group to it or to a"
                " multiple, or act-group=0"
            )
        other = by_weight.setdefault(info.weight, info)
        if {other.role, info.role} == {"decoder", "dense"}:
            kept, quantized = (other, info) if other.role == "dense" else (info, other)
            raise PassError(
                f"'{kept.path}', which stays float ({kept.reason}), and '{quantized.path}' share one weight, which"
                " cannot be both; keep both float with --keep-dense, or quantize both"
            )
        if other.role == info.role and _of_weight(other) != _of_weight(info):
            raise PassError(
                f"scheme: '{other.path}' ({_asked(other)}) and '{info.path}' ({_asked(info)}) share one weight; give"
                " both the same"
            )


def _of_weight(info: LinearInfo) -> Scheme:
    """The part of a linear's scheme that all linears over its weight share: of a head all but its input's groups."""
    return replace(info.scheme, act_group=None) if info.role == "head" else info.scheme


def _rows(program: Program) -> list[dict[str, object]]:
    return [
        {
            "path": info.path,
            "layer": info.layer,
            "role": info.role,
            "shape": list(operands_of(node)[1].meta["val"].shape),
            "reason": info.reason,
            "scheme": str(info.scheme),
        }
        for node, info in linears(program)
    ]


def _summary(program: Program) -> dict[str, int]:
    return {
        "layers": layer_count(program),
        "decoder": matrix_count(program),
        "head": matrix_count(program, "head"),
        "dense": matrix_count(program, "dense"),
    }
