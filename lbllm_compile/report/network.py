"""Graphs for other programs: a networkx graph, its node-link JSON, and Graphviz."""

from __future__ import annotations

import json

import networkx

from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.program import LAYER, STATE, Program


def graph_of(program: Program, layer: int | None = None) -> networkx.DiGraph:
    """A program as a directed graph from operands to their users.

    A node has ``kind`` (``input``, ``state``, ``weight``, ``call`` or ``output``), ``operator`` (of a call, else what
    it names), ``shape`` (dtype and shape, empty where unknown), ``layer`` (or None), ``module`` (its path) and
    ``text`` (its line in a dump).

    Args:
        layer: of this decoder layer alone, and what it reads.
    """
    result = networkx.DiGraph(name=program.name)
    lines = {line.node: line.text for section in dump.sections(program) for line in section.lines}
    for node in program.graph.nodes:
        if layer is not None and node.meta.get(LAYER) != layer:
            continue
        for shown in (*node.all_input_nodes, node):
            kinds = {"placeholder": "state" if STATE in shown.meta else "input", "get_attr": "weight"}
            result.add_node(
                shown.name,
                kind=kinds.get(shown.op, "output" if shown.op == "output" else "call"),
                operator=dump.target_text(shown) if shown.op == "call_function" else str(shown.target),
                shape=shown.meta.get("shape", ""),
                layer=shown.meta.get(LAYER),
                module=dump.module_path(shown),
                text=lines.get(shown.name, ""),
            )
        result.add_edges_from((operand.name, node.name) for operand in node.all_input_nodes)
    return result


def to_json(graph: networkx.DiGraph) -> str:
    """Node-link JSON, which ``networkx.node_link_graph(document, edges="edges")`` reads."""
    return json.dumps(networkx.node_link_data(graph, edges="edges"), indent=1) + "\n"


def to_dot(graph: networkx.DiGraph) -> str:
    """Graphviz' language: a box a node, decoder layers as clusters; weights are left out, as they are many."""
    shown = {name: facts for name, facts in graph.nodes(data=True) if facts["kind"] != "weight"}
    lines = [f"digraph {_quoted(graph.name)} {{", "  node [shape=box, fontname=monospace];"]
    layers = {facts["layer"]: None for facts in shown.values()}
    for layer in layers:
        indent = "  "
        if layer is not None:
            lines += [f"  subgraph cluster_{layer} {{", f"    label={_quoted(f'decoder layer {layer}')};"]
            indent = "    "
        for name, facts in shown.items():
            if facts["layer"] == layer:
                label = "\n".join(text for text in (facts["operator"], facts["shape"]) if text)
                lines.append(f"{indent}{_quoted(name)} [label={_quoted(label)}, tooltip={_quoted(facts['text'])}];")
        lines += ["  }"] if layer is not None else []
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in graph.edges if a in shown and b in shown]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    """A text as Graphviz reads it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
