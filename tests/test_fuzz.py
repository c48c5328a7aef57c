"""Kernels of random shapes with random schedules: every family that this machine runs agrees with the reference."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen import prove, reference
from lbllm_compile.codegen.cpu import space as cpu
from lbllm_compile.codegen.cpu.space import Implementation
from lbllm_compile.codegen.format import GROUPS, QuantizedWeight, codes_to_planes
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target, runnable_targets
from lbllm_compile.codegen.tvm_api import compile_functions
from torch import Tensor

KERNELS, QUICK_KERNELS = 40, 2
DRAWS, QUICK_DRAWS = 50, 8
"""Draws of data for each kernel."""

MOST_TOKENS = 40

indices = [pytest.param(i, marks=[] if i < QUICK_KERNELS else pytest.mark.slow) for i in range(KERNELS)]


def random_spec(chance: random.Random) -> LinearSpec:
    return LinearSpec(
        "bit",
        out_features=chance.randint(1, 160),
        in_features=chance.randint(1, 600),
        group=chance.choice(GROUPS),
        act_bits=chance.choice((4, 8)),
        per_token=chance.random() < 0.3,
        bias=chance.random() < 0.5,
    )


def compiled(spec: LinearSpec, chance: random.Random) -> Iterator[tuple[str, Implementation, int, Callable[..., None]]]:
    """Name, implementation, most tokens and function of kernels with random schedules, two for every implementation."""
    for text in runnable_targets():
        target = Target.parse(text)
        for implementation in cpu.implementations(spec, target):
            for bucket in (cpu.BUCKETS[0], chance.choice(cpu.BUCKETS[1:])):
                schedule = chance.choice(implementation.schedules(bucket))
                library = compile_functions({"kernel": implementation.function(schedule)}, target.llvm)
                yield f"{text} {schedule}", implementation, min(bucket.highest, MOST_TOKENS), library["kernel"]


def _pick(choices: tuple[float, ...], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.tensor(choices)[torch.randint(len(choices), shape, generator=generator)]


def draw_values(spec: LinearSpec, tokens: int, style: str, generator: torch.Generator) -> Tensor:
    """Quantized activations as a quantizer gives them: those of 4 bits lie in a window of 16 per token and group."""
    shape = (tokens, spec.in_features)
    lowest, highest = (0, reference.INT4_MAX) if spec.act_bits == 4 else (-reference.INT8_MAX, reference.INT8_MAX)
    if style == "random":
        values = torch.randint(lowest, highest + 1, shape, generator=generator)
    elif style == "ends":
        values = _pick((lowest, highest), shape, generator).long()
    else:
        values = torch.full(shape, int(_pick((lowest, highest), (1,), generator)))
    if spec.act_bits == 4:
        zero = torch.randint(reference.INT4_MAX + 1, (tokens, spec.x_scales), generator=generator)
        values = (
            values
            - zero.repeat_interleave(spec.in_features if spec.x_scales == 1 else spec.group, 1)[:, : spec.in_features]
        )
    return values.to(torch.int8)


def draw_weight(spec: LinearSpec, style: str, generator: torch.Generator) -> QuantizedWeight:
    n, k, groups = spec.out_features, spec.in_features, spec.groups
    codes = torch.randint(4, (n, k), generator=generator, dtype=torch.uint8)
    if style == "random":
        levels = torch.randint(-128, 128, (n, groups, 4), generator=generator)
        scale = torch.rand(n, groups, generator=generator) * 0.01
    else:
        levels = _pick((-128, -1, 0, 127) if style == "ends" else (0, 1), (n, groups, 4), generator)
        scale = _pick((0.0, 2.0**-24, 1.0, 65504.0), (n, groups), generator)
    return QuantizedWeight(*codes_to_planes(codes), levels.sort(-1).values.to(torch.int8), scale.half(), k, spec.group)


styles = st.sampled_from(("random", "ends", "flat"))


@pytest.mark.parametrize("index", indices)
def test_families_agree_on_random_kernels(index, request):
    chance = random.Random(index)
    spec = random_spec(chance)
    kernels = list(compiled(spec, chance))

    @settings(max_examples=DRAWS if request.config.getoption("--runslow") else QUICK_DRAWS, deadline=None)
    @given(st.integers(1, MOST_TOKENS), styles, styles, st.integers(0, 2**32))
    def check(tokens: int, value_style: str, weight_style: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        values = draw_values(spec, tokens, value_style, generator)
        x_scale = torch.rand(tokens, spec.x_scales, generator=generator) * 10.0 ** (seed % 7 - 3)
        weight = draw_weight(spec, weight_style, generator)
        bias = torch.randn(spec.out_features, generator=generator) if spec.bias else None
        expected = reference.bit_linear(values, x_scale, weight, bias)
        for name, implementation, most, function in kernels:
            out = torch.full_like(expected[:most], float("nan"))
            function(values[:most], x_scale[:most], implementation.pack(weight, bias), out)
            assert prove.agree(out, expected[:most]), (spec, name)

    check()
