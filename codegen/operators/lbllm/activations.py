"""Observed, simulated and quantized activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...sizes import group_count
from ..arguments import Arguments
from ..checks import has_values, require, require_bits, require_group, require_tensor
from ..registry import define
from ..translator import Translator


def _same(x: Tensor, site: str) -> Tensor:
    return x.view_as(x)


observe = define("observe(Tensor(a) x, str site) -> Tensor(a)", reference=_same, shape=_same, simulates=True)


def _verify(a: Arguments) -> None:
    require_bits(a)
    require_group(a, whole_token=True)
    require(a.x.is_floating_point(), a, f"x is {a.x.dtype}, not a float")
    for name in ("clip", *(["knees"] if a.knees is not None else [])):
        shares = require_tensor(a, name, torch.float32, 2)
        require(shares.dim() == 1, a, f"{name} is not one pair")
        if has_values(shares):
            good = bool(((shares > 0) & (shares <= 1)).all())
            require(good, a, f"{name} has values that are not above 0 and at most 1")
    require(a.knees is None or a.bits == 4, a, f"{a.bits}-bit activations have no knees")
    if a.plane_scales is not None:
        _verify_plane_scales(a)


def _verify_plane_scales(a: Arguments) -> None:
    require(a.bits == 4, a, f"{a.bits}-bit activations have no plane scales")
    require(a.knees is None, a, "activations have knees and plane scales")
    scales = require_tensor(a, "plane_scales", torch.float32, reference.PLANES)
    require(scales.dim() == 1, a, f"plane_scales are not {reference.PLANES} numbers")
    if has_values(scales):
        within = bool(((scales > 0) & (scales <= reference.PLANE_SCALE_MAX)).all())
        require(within, a, f"plane_scales are not above 0 and at most {reference.PLANE_SCALE_MAX:g}")
        ascending = bool((reference.plane_places(scales).diff() >= 0).all())
        require(ascending, a, "plane_scales are below the sum of those before")


def _fake_quantize(
    x: Tensor, clip: Tensor, bits: int, group: int, knees: Tensor | None = None, plane_scales: Tensor | None = None
) -> Tensor:
    values, scale = reference.quantize_activation(x, clip, bits, group, knees, plane_scales)
    return reference.dequantize_activation(values, scale, group).to(x.dtype)


fake_quantize = define(
    "fake_quantize(Tensor x, Tensor clip, int bits, int group, Tensor? knees=None,"
    " Tensor? plane_scales=None) -> Tensor",
    reference=_fake_quantize,
    shape=lambda x, clip, bits, group, knees=None, plane_scales=None: torch.empty_like(x),
    verify=_verify,
    simulates=True,
)


def _shapes(
    x: Tensor, clip: Tensor, bits: int, group: int, knees: Tensor | None = None, plane_scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    groups = group_count(x.shape[-1], group) if group else 1
    return (
        x.new_empty(x.shape, dtype=reference.value_dtype(bits)),
        x.new_empty((*x.shape[:-1], groups), dtype=torch.float32),
    )


def _translate(t: Translator, a: Arguments) -> Any:
    return t.quantize(a.node)


quantize_activation = define(
    "quantize_activation(Tensor x, Tensor clip, int bits, int group, Tensor? knees=None,"
    " Tensor? plane_scales=None) -> (Tensor, Tensor)",
    reference=reference.quantize_activation,
    shape=_shapes,
    verify=_verify,
    translate=_translate,
    integer=True,
    kernel=True,
)
