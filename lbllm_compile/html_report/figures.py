"""The data of a report's plots and of its graph view, JSON-able."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbllm_compile.html_report import story, weights
from lbllm_compile.html_report.contents import Contents, StoredGraph, short_name
from lbllm_compile.records import MeasuredPass


def of(contents: Contents) -> dict[str, Any]:
    """Everything that the page's script draws."""
    return {
        "layerErrors": _layer_errors(contents.measured),
        "linearErrors": _linear_errors(contents.measured),
        "training": _training(contents.measured),
        "alignment": _alignment(contents.measured),
        "levels": _levels(contents),
        "density": _density(contents),
        "codes": _codes(contents),
        "ranges": _ranges(contents),
        "bytes": _bytes(contents),
        "seconds": _seconds(contents),
        "graphs": _graphs(contents.graphs),
    }


def _grid(values: Mapping[tuple[int, str], float]) -> dict[str, Any]:
    """Values by layer and name as a matrix: a row a name, in order of appearance, and a column a layer."""
    layers, names = sorted({layer for layer, _ in values}), list(dict.fromkeys(name for _, name in values))
    rows = [[values.get((layer, name)) for layer in layers] for name in names]
    return {"layers": layers, "names": names, "values": rows}


def _layer_errors(measured: Sequence[MeasuredPass]) -> dict[str, Any]:
    points = story.layer_errors(measured)
    return _grid({(layer, point.name): error for point in points for layer, error in point.errors.items()})


def _linear_errors(measured: Sequence[MeasuredPass]) -> dict[str, Any]:
    rows = [row for item in measured if item.name == "ptq" for row in item.rows]
    return _grid({(row["layer"], short_name(row["linear"])): row["error"] for row in rows})


def _training(measured: Sequence[MeasuredPass]) -> list[dict[str, Any]]:
    """Curves of trainings, layer by layer: ``[step, held-out error]`` and ``[step, training error]``."""
    return [
        {"name": title, "layer": row["layer"], **row["curve"], "kept": row.get("step")}
        for item, title in zip(measured, story.titles(measured), strict=True)
        for row in item.rows
        if isinstance(row.get("curve"), Mapping) and row.get("layer") is not None
    ]


def _alignment(measured: Sequence[MeasuredPass]) -> list[dict[str, Any]]:
    """What trainings of the whole model did to its divergence from the float one, with their curves as above."""
    found = []
    for item, title in zip(measured, story.titles(measured), strict=True):
        for measure, name in (("kl", "KL divergence"), ("error", "relative error")):
            if f"{measure}_before" in item.summary and f"{measure}_after" in item.summary:
                ends = {"before": item.summary[f"{measure}_before"], "after": item.summary[f"{measure}_after"]}
                curve = item.summary.get("curve") or {"validation": [], "training": []}
                found.append({"name": title, "measure": name, **ends, **curve})
    return found


def _levels(contents: Contents) -> list[dict[str, Any]]:
    """Histograms of the four levels, by decoder layer."""
    return [{"layer": layer, "counts": counts.tolist()} for layer, counts in weights.by_layer(contents.weights).items()]


def _density(contents: Contents) -> dict[str, Any]:
    return _grid({(item.layer, short_name(item.linear)): round(item.density, 4) for item in contents.weights})


def _codes(contents: Contents) -> list[dict[str, Any]]:
    """Shares of the four codes, by kind of linear."""
    groups: dict[str, list[tuple[float, ...]]] = {}
    for item in contents.weights:
        groups.setdefault(short_name(item.linear), []).append(item.codes)
    return [
        {"name": name, "shares": [sum(codes) / len(group) for codes in zip(*group, strict=True)]}
        for name, group in groups.items()
    ]


def _ranges(contents: Contents) -> list[dict[str, Any]]:
    """Ranges of the linears' inputs as calibration met them, and what their final clips leave of them."""
    rows = []
    for item in contents.measured:
        for path, seen in (item.summary.get("input_ranges") or {}).items():
            high, low = contents.clips.get(path, (1.0, 1.0))
            clipped = {"clipped_low": low * seen["low"], "clipped_high": high * seen["high"]}
            rows.append({"linear": path, **seen, **clipped})
    return sorted(rows, key=lambda row: (row["layer"] is not None, row["layer"]))


FLOAT = "float: norms, biases, dense linears"


def _bytes(contents: Contents) -> list[dict[str, Any]]:
    """What the stored weights consist of."""
    sizes = dict.fromkeys([*contents.parts.values(), FLOAT], 0)
    for path, size in contents.tensors.items():
        sizes[contents.parts.get(path, FLOAT)] += size
    return [{"name": name, "bytes": size} for name, size in sizes.items() if size]


def _seconds(contents: Contents) -> list[dict[str, Any]]:
    """Where the compile's time went: its phases, with the passes one by one."""
    if contents.report is None:
        return []
    phases = dict(contents.report.seconds)
    phases.pop("passes", None)
    rows = [
        {"name": f"pass {record.index} {record.name}", "seconds": record.seconds + record.check_seconds}
        for record in contents.report.records
    ]
    return rows + [{"name": name, "seconds": seconds} for name, seconds in phases.items()]


def _graphs(graphs: Sequence[StoredGraph]) -> dict[str, Any]:
    """Every graph with its lines as places in one list of texts, because most lines stay from pass to pass."""
    places: dict[str, int] = {}
    passes = [
        {
            "name": graph.name,
            "nodes": graph.nodes,
            "blocks": [
                {
                    "layers": list(block.layers),
                    "lines": [[mark.sign, places.setdefault(mark.text, len(places))] for mark in block.marks],
                }
                for block in graph.blocks
            ],
        }
        for graph in graphs
    ]
    return {"passes": passes, "texts": list(places)}
