"""A fast round-to-nearest stand-in for the calibrated stages: the same simulated graph, without calibration."""

from __future__ import annotations

import torch
from lbllm_compile.codegen import format as w11
from lbllm_compile.codegen import operators as operators
from lbllm_compile.codegen.operators.lbllm.linears import WEIGHT
from lbllm_compile.passes.annotate import LINEAR
from lbllm_compile.passes.calibrate.layers import CODED
from lbllm_compile.passes.ir.program import Program, get_attribute, prune_attributes, set_attribute
from lbllm_compile.passes.ir.rewrite import LINEARS, calls, is_call, make_attribute, make_call
from torch import Tensor

_lbllm, _aten = torch.ops.lbllm, torch.ops.aten

CLIP = (0.95, 0.9)
"""Clip factors that every quantizer gets, so that ignoring them changes results."""

KNEES = (0.2, 0.35)
"""Knees that every quantizer gets where they are asked for."""

PLANE_SCALES = (1.1, 2.0, 4.3, 8.1)
"""Plane scales likewise."""


def quantize(weight: Tensor, group: int) -> w11.QuantizedWeight:
    """Nearest of four levels per group, at fixed multiples of the group's mean magnitude; experts are stacked."""
    k = weight.shape[-1]
    grouped = torch.nn.functional.pad(weight, (0, -k % group)).unflatten(-1, (-1, group))
    spread = grouped.abs().mean(-1, keepdim=True)
    levels = spread * torch.tensor([-1.9, -0.5, 0.6, 2.0])
    codes = (grouped.unsqueeze(-1) - levels.unsqueeze(-2)).abs().argmin(-1).flatten(-2)[..., :k]
    return w11.QuantizedWeight.from_codes(codes, levels, group)


def planes(path: str, weight: Tensor, group: int) -> dict[str, Tensor]:
    """The tensors of a quantized weight by their paths, as ``ptq`` stores them under the weight's own."""
    quantized = quantize(weight, group)
    return {f"{path}.{field}": getattr(quantized, field) for field in WEIGHT}


TABLE = torch.arange(-120, 128, 16, dtype=torch.int8)
"""Levels of all 4-bit weights, so that linears with one input can be merged."""


def code(weight: Tensor, group: int) -> w11.Int4Weight:
    """The nearest of 16 even levels, with the scale that lets a group's largest magnitude be one of them."""
    k = weight.shape[-1]
    grouped = torch.nn.functional.pad(weight, (0, -k % group)).unflatten(-1, (-1, group))
    scale = (grouped.abs().amax(-1) / int(TABLE[-1])).half()
    codes = ((grouped / scale.float().unsqueeze(-1) + 120) / 16).round().clamp(0, 15).to(torch.uint8)
    return w11.Int4Weight(w11.pack_codes(codes.flatten(-2)[..., :k]), TABLE, scale, k, group)


def simulate(
    program: Program,
    group: int = 32,
    bits: int = 4,
    kv: int = 4,
    per_token: bool = False,
    knees: bool = False,
    coded: tuple[str, ...] = (),
    planes: bool = False,
) -> Program:
    """What ``ptq`` and ``activate`` leave behind, with round-to-nearest weights. ``kv=0`` leaves attention alone;
    linears whose paths end like one of ``coded`` have 4-bit codes."""
    program = program.copy()
    graph, module = program.graph, program.module
    quantizers = {}
    for node in calls(graph, *LINEARS):
        info = node.meta.get(LINEAR)
        if info is None or info.role != "decoder":
            continue
        x, path = node.args[0], node.args[1].target
        of_codes = info.path.endswith(coded)
        weight = (code if of_codes else quantize)(get_attribute(module, path), group)
        names = dict(zip(CODED, ("packed", "table", "scale"), strict=True)) if of_codes else {n: n for n in WEIGHT}
        unpack = _lbllm.unpack_int4.default if of_codes else _lbllm.unpack_weight.default
        with graph.inserting_before(node):
            fields = []
            for field, attribute in names.items():
                fields.append(make_attribute(graph, f"{path}.{field}", node))
                set_attribute(module, f"{path}.{field}", getattr(weight, attribute))
            unpacked = make_call(graph, unpack, (*fields, weight.in_features, group), node)
            if x not in quantizers:
                factors = {}
                for name, value in {
                    "clip": CLIP,
                    "knees": KNEES * knees,
                    "plane_scales": PLANE_SCALES * planes,
                }.items():
                    if value:
                        set_attribute(module, f"{info.path}.input_{name}", torch.tensor(value))
                        factors[name] = make_attribute(graph, f"{info.path}.input_{name}", node)
                shape = [factors["knees"]] if knees else [None, factors["plane_scales"]] if planes else []
                arguments = (x, factors["clip"], bits, 0 if per_token else group, *shape)
                quantizers[x] = make_call(graph, _lbllm.fake_quantize.default, arguments, node)
        node.update_arg(0, quantizers[x])
        node.update_arg(1, unpacked)
    for node in calls(graph, _aten.scaled_dot_product_attention.default) if kv else ():
        for operand in node.args[1:3]:
            user, source = node, operand
            while is_call(source, _aten.reshape.default, _aten.expand.default, _aten.unsqueeze.default):
                user, source = source, source.args[0]
            with graph.inserting_before(user):
                quantized = make_call(graph, _lbllm.fake_quantize_kv.default, (source, kv), node)
            user.replace_input_with(source, quantized)
    graph.eliminate_dead_code()
    prune_attributes(module)
    graph.lint()
    module.recompile()
    return program
