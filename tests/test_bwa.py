"""BWA's recipe: codes whose binary planes have fitted scales, their kernels and place in the graph, the whole way."""

from __future__ import annotations

import functools

import pytest
import torch
from graphs import context as no_probe
from graphs import normal, rewrites
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen import operators as operators
from lbllm_compile.codegen import prove, reference
from lbllm_compile.codegen.errors import FormatError, KernelError
from lbllm_compile.codegen.reference import PLANE_SCALE_MAX, UNIFORM_PLANES
from lbllm_compile.codegen.spec import QuantizeSpec
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.activate import Activate, insert_quantizers
from lbllm_compile.passes.base import PassContext, PassError
from lbllm_compile.passes.calibrate import simulate
from lbllm_compile.passes.calibrate.plane_scales import best_plane_scales
from lbllm_compile.passes.ir import exact, graph_json
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import calls
from lbllm_compile.passes.lower import Lower
from rtn import planes
from stages import annotated, apply, batches, context, quantized
from test_kernels import FAMILIES, build
from test_zoo import agree, decodes_as_the_executor

from lbllm_compile import artifact, recipe, runtime

lbllm = torch.ops.lbllm

FITTED = (0.9, 1.7, 3.1, 7.3)
"""Plane scales that are not evenly spaced."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


# The table


def table(high: float, low: float, scales: tuple[float, ...] = UNIFORM_PLANES) -> reference.CodeTable:
    return reference.plane_table(torch.tensor(high), torch.tensor(low), torch.tensor(scales))


def test_even_scales_give_evenly_spaced_codes():
    """In units of the scale the range is from -56 to 127, so a step is 12.2, and the code of zero the fifth."""
    found = table(254.0, -112.0)
    assert found.scale.item() == 2.0 and found.zero.item() == 5
    assert found.values.tolist() == [-61, -49, -37, -24, -12, 0, 12, 24, 37, 49, 61, 73, 85, 98, 110, 122]


def test_a_plane_moves_the_codes_that_have_a_one_in_it():
    even, fitted = table(150.0, 0.0).values, table(150.0, 0.0, (1.0, 2.0, 4.0, 6.0 + 1)).values
    assert torch.equal(even[:8], fitted[:8])
    assert (even[8:] - fitted[8:]).tolist() == pytest.approx([127 / 15] * 8, abs=1.0)


def shapes(rises: tuple[float, ...]) -> torch.Tensor:
    """Plane scales that ascend: each is the sum of those before it and a rise."""
    found = torch.zeros(4)
    below = torch.tensor(0.0)
    for plane, rise in enumerate(rises):
        found[plane] = below + torch.tensor(rise)
        below = below + found[plane]
    return found


@settings(max_examples=300, deadline=None)
@given(
    st.floats(0, 2.0**126, width=32),
    st.floats(-(2.0**126), 0, width=32),
    st.tuples(*[st.floats(2.0**-6, 1.0, width=32)] * 4),
)
def test_tables_ascend_within_8_bits_and_hold_zero(high, low, rises):
    values = table(high, low, tuple(shapes(rises).tolist())).values
    assert torch.equal(values, values.round()) and float(values.abs().max()) <= 127
    assert bool((values.diff() >= 0).all()) and 0.0 in values.tolist()


@pytest.mark.parametrize("group", [0, 32])
def test_a_value_is_a_sum_of_scaled_planes_and_zero_stays_zero(group):
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    x[:, ::7], x[1, 3], x[2] = 0.0, 40.0, 0.0
    scales = torch.tensor(FITTED)
    values, scale = reference.quantize_activation(x, torch.ones(2), 4, group, None, scales)
    assert values.dtype == torch.int8 and not values[x == 0].any()
    for row in range(5):
        for g, part in enumerate(x[row].split(group or 70)):
            high, low = part.max().clamp_min(0), part.min().clamp_max(0)
            found = reference.plane_table(high, low, scales)
            codes = reference.table_codes(part, found)
            ones, zero = codes[:, None] >> torch.arange(4) & 1, int(found.zero) >> torch.arange(4) & 1
            step = (high - low) / 15 / scale[row, g].clamp_min(1e-30)
            got = values[row, g * (group or 70) :][: len(part)].float()
            torch.testing.assert_close(got, ((ones - zero) * scales).sum(-1) * step, rtol=0, atol=0.501)
            nearest = (part[:, None] / found.scale - found.values).abs().min(-1).values
            torch.testing.assert_close((part / found.scale - got).abs(), nearest, rtol=1e-5, atol=1e-5)


def test_other_bits_have_no_plane_scales():
    scales = torch.tensor(FITTED)
    with pytest.raises(FormatError, match="8-bit activations have no plane scales"):
        reference.quantize_activation(torch.ones(1, 4), torch.ones(2), 8, 0, None, scales)
    with pytest.raises(FormatError, match="knees or plane scales, not both"):
        reference.quantize_activation(torch.ones(1, 4), torch.ones(2), 4, 0, torch.ones(2) / 2, scales)
    for wrong in ({"bits": 8}, {"knees": True}):
        with pytest.raises(KernelError, match="only 4-bit activations without knees have plane scales"):
            QuantizeSpec(64, 0, **wrong, planes=True)
    with pytest.raises(PassError, match="8-bit activations have no planes; use bits=4"):
        Activate(bits=8, group=32, ranges="planes").apply(quantized(), context())


# Kernels


@pytest.mark.parametrize("target", FAMILIES)
def test_quantizers_are_exact(target, tmp_path):
    specs = [
        QuantizeSpec(k, group, 4, planes=True) for k, group in ((1, 32), (259, 64), (77, 0), (300, 128), (1199, 32))
    ]
    kernels = build([], specs, target, tmp_path)
    for spec in specs:
        for given_ in prove.quantizer_inputs(spec, seed=3):
            for got, wanted in zip(kernels.quantizer(spec)(*given_), prove.quantized(spec, *given_), strict=True):
                assert torch.equal(got, wanted)


def test_inputs_on_the_thresholds_are_exact(tmp_path):
    """Every threshold itself, and the numbers right above and below."""
    spec, scales = QuantizeSpec(64, 0, 4, planes=True), torch.tensor(FITTED)
    edges = table(3.0, -5.0, FITTED).thresholds
    x = torch.cat([torch.tensor([3.0, -5.0]), *(torch.nextafter(edges, torch.tensor(to)) for to in (-9.0, 9.0)), edges])
    x = torch.nn.functional.pad(x, (0, 64 - len(x)))[None]
    got = build([], [spec], "cpu", tmp_path).quantizer(spec)(x, torch.ones(2), scales)
    assert all(map(torch.equal, got, prove.quantized(spec, x, torch.ones(2), scales)))


def test_wrong_tensors_are_named(tmp_path):
    spec = QuantizeSpec(64, 0, 4, planes=True)
    kernel = build([], [spec], "cpu:generic", tmp_path).quantizer(spec)
    for shape, message in (((), "takes one tensor of plane_scales"), ((torch.ones(2),), "plane_scales is")):
        with pytest.raises(KernelError, match=message):
            kernel(torch.ones(2, 64), torch.ones(2), *shape)


# Training


@pytest.mark.parametrize("group", [0, 32])
def test_the_simulation_gives_the_operators_values(group):
    x = torch.randn(3, 5, 75, generator=torch.Generator().manual_seed(group)) * 3
    clip, scales = torch.tensor([0.9, 0.7]), torch.tensor(FITTED)
    wanted = lbllm.fake_quantize(x, clip, 4, group, None, scales)
    assert torch.equal(simulate.fake_quantize(x, clip, 4, group, None, scales), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(simulate.fake_quantize(x, clip, 4, group, None, scales), wanted)


@pytest.mark.parametrize("end", [0, 1])
def test_the_gradient_of_a_clip_factor_is_the_slope_of_the_positions(end):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 96, generator=generator), torch.randn(4, 96, generator=generator)
    clip, scales = torch.tensor([0.8, 0.7], requires_grad=True), torch.tensor(FITTED)
    (simulate.fake_quantize(x, clip, 4, 0, None, scales) * weight).sum().backward()
    found = reference.plane_table(*reference.clipped_range(x[:, None], clip.detach()), scales)
    codes, zero = reference.table_codes(x[:, None], found)[:, 0], found.zero[:, 0].long()
    places = reference.plane_places(scales)

    def smooth(factors):
        step = (x.amax(-1) * factors[0] - x.amin(-1) * factors[1]) / 15
        return float(((places[codes] - places[zero][:, None]) * step[:, None] * weight).double().sum())

    step = torch.zeros(2)
    step[end] = 0.25
    slope = (smooth(clip.detach() + step) - smooth(clip.detach() - step)) / 0.5
    assert float(clip.grad[end]) == pytest.approx(slope, rel=1e-4)


def test_the_gradient_of_the_input_passes_inside_the_range():
    x = torch.tensor([[-4.0, -1.0, 0.0, 1.0, 2.0, 8.0]], requires_grad=True)
    simulate.fake_quantize(x, torch.tensor([0.5, 1.0]), 4, 0, None, torch.tensor(FITTED)).sum().backward()
    assert x.grad.tolist() == [[1, 1, 1, 1, 1, 0]]


# The fit


def error(x: torch.Tensor, scales: torch.Tensor, group: int = 0) -> float:
    return float((lbllm.fake_quantize(x, torch.ones(2), 4, group, None, scales) - x).square().mean())


def test_planted_scales_are_found():
    """Inputs that are sums of planes with these scales; what the range divides by makes the scales add up to 15."""
    planted = torch.tensor((1.2, 2.0, 4.5, 9.0))
    codes = torch.randint(0, 16, (64, 256), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 15
    places = reference.plane_places(planted)
    found = best_plane_scales(places[codes] - places[4], torch.ones(2), 0)
    assert found.tolist() == pytest.approx((planted * 15 / planted.sum()).tolist(), rel=0.02)


@pytest.mark.parametrize("group", [0, 64])
def test_fitted_scales_are_never_worse_than_even_ones_and_better_on_skewed_inputs(group):
    generator = torch.Generator().manual_seed(1)
    even = torch.tensor(UNIFORM_PLANES)
    for power in (1, 3):
        x = torch.randn(96, 256, generator=generator) ** power
        found = best_plane_scales(x, torch.ones(2), group)
        assert error(x, found, group) <= error(x, even, group) * 1.001
    x = torch.randn(96, 256, generator=generator).abs() ** 3
    assert error(x, best_plane_scales(x, torch.ones(2), group), group) < 0.95 * error(x, even, group)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 1e-30, 1.0, 1e30]), st.sampled_from([0, 32]))
def test_what_is_fitted_is_what_the_operator_takes(seed, size, group):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 40, generator=generator).relu() * size
    found = best_plane_scales(x, torch.ones(2), group)
    assert bool((found > 0).all()) and float(found.max()) <= PLANE_SCALE_MAX
    assert bool((reference.plane_places(found).diff() >= 0).all())


# The passes


def test_the_lowered_graph_names_the_plane_scales_behind_the_group():
    before = """
        decoder layer 0:
        %x = input x
        %clip: f32[2] = weight a.input_clip
        %plane_scales: f32[4] = weight a.input_plane_scales
        %quantized = lbllm.fake_quantize(%x, %clip, 4, 0, None, %plane_scales)
        %sign: u8[24, 13] = weight a.weight.sign
        %bitmap: u8[24, 13] = weight a.weight.bitmap
        %levels: i8[24, 4, 4] = weight a.weight.levels
        %scale: f16[24, 4] = weight a.weight.scale
        %w = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 100, 32)
        %y = aten.linear(%quantized, %w) {path="a", role="decoder"}
        return %y
    """
    expected = """
        decoder layer 0:
        %x = input x
        %clip: f32[2] = weight a.input_clip
        %plane_scales: f32[4] = weight a.input_plane_scales
        %quantized = lbllm.quantize_activation(%x, %clip, 4, 0, None, %plane_scales) {in_features=100}
        %values: i8[3, 100] = getitem(%quantized, 0)
        %x_scale: f32[3, 1] = getitem(%quantized, 1)
        %sign: u8[24, 13] = weight a.weight.sign
        %bitmap: u8[24, 13] = weight a.weight.bitmap
        %levels: i8[24, 4, 4] = weight a.weight.levels
        %scale: f16[24, 4] = weight a.weight.scale
        %y = lbllm.bit_linear(%values, %x_scale, %sign, %bitmap, %levels, %scale, None, 32) {
            path="a", role="decoder", scheme="group=32 act=4 act-group=0 codebook=planes", in_features=100}
        return %y
    """
    weights = planes("a.weight", normal(24, 100), 32)
    weights |= {"a.input_clip": torch.tensor([0.95, 0.9]), "a.input_plane_scales": torch.tensor(FITTED)}
    x = normal(3, 100, seed=5)
    after = rewrites(Lower(), before, expected, no_probe({"x": x}), weights).program
    stored = graph_json.loads(graph_json.dumps(after.module), dict(after.parameters()))
    assert torch.equal(stored(x), after.module(x))


def test_plane_scales_are_fitted_to_the_inputs_that_quantizers_see():
    data = context()
    program = apply(quantized(), "activate{group=0,steps=0,ranges=planes}", data).program
    sites = calls(program.graph, lbllm.fake_quantize.default)
    inserted = calls(insert_quantizers(quantized(), 4, 0, 4, "planes").graph, lbllm.fake_quantize.default)
    assert [str(n.args) for n in sites] == [str(n.args) for n in inserted]
    assert sites[0].args[2:5] == (4, 0, None)
    assert sites[0].args[5].target == "model.layers.0.self_attn.q_proj.input_plane_scales"
    seen = {}

    class Inputs(torch.fx.Interpreter):
        def run_node(self, n):
            if n in sites:
                seen[n] = self.fetch_args_kwargs_from_env(n)[0]
            return super().run_node(n)

    # A batch of the calibration holds fewer sequences than are looked at, so all of it counts.
    Inputs(program.module).run(*program.arguments(data.calibration[0]))
    assert len(seen) == 8
    for x, clip, _, group, _, scales in seen.values():
        assert torch.equal(scales, best_plane_scales(x, clip, group))
    assert any(args[5].tolist() != list(UNIFORM_PLANES) for args in seen.values())


def test_levels_train_behind_plane_scales_which_stay():
    data = context()
    fitted = apply(quantized(), "activate{group=0,steps=0,ranges=planes}", data).program
    trained = apply(quantized(), "activate{group=0,steps=6,ranges=planes}", data)
    before, after = dict(fitted.parameters()), dict(trained.program.parameters())
    assert before.keys() == after.keys()
    scales = [path for path in before if path.endswith("input_plane_scales")]
    assert len(scales) == 8 and all(torch.equal(before[p], after[p]) for p in scales)
    assert trained.summary["kl_after"] <= trained.summary["kl_before"]


# The recipe


def bwa(**options) -> list:
    return recipe.passes(recipe.Choices(recipe="bwa", **options), "cpu")


def test_the_recipe_trains_nothing_and_round_trips_as_text():
    text = pipeline.render(bwa())
    assert "ptq{group=128},activate{group=0,steps=0,ranges=planes}" in text
    assert not {"distill", "finetune", "smooth"} & {item.name for item in bwa(preset="best")}
    assert pipeline.parse(text) == bwa() and pipeline.parse(pipeline.render(bwa(), full=True)) == bwa()


def test_the_recipe_has_4_bit_activations():
    with pytest.raises(recipe.OptionError, match="--act-bits cannot be 8 in the recipe 'bwa', whose activations have"):
        bwa(act_bits=8)


@functools.cache
def whole() -> tuple[Program, Program]:
    """A language model through the recipe's passes with all their checks, before lowering and after."""
    text = pipeline.render(bwa(group=32))
    before, _, after = text.partition(",head")
    data = context(count=16, probe=batches(1, seed=2)[0])
    simulated, _ = pipeline.run(annotated(), pipeline.parse(before.partition("annotate,")[2]), data)
    headed = apply(simulated, "head", PassContext(probe=batches(1, seed=2)[0])).program
    lowered, records = pipeline.run(headed, pipeline.parse(after.removeprefix(",")), data)
    assert [r.name for r in records] == ["merge", "lower", "cache", "cleanup"]
    return headed, lowered


def test_the_lowered_model_is_the_simulated_one():
    headed, lowered = whole()
    item = batches(1, rows=3, seed=5)[0]
    agree(lowered.run(item), exact.run(headed, item), item["attention_mask"].bool())


def test_a_stored_model_runs_natively_as_on_the_executor(tmp_path):
    lowered = whole()[1]
    artifact.save(lowered, tmp_path / "out", lock={})
    model = runtime.load(tmp_path / "out")
    assert model.native is not None
    decodes_as_the_executor(model, lowered, batches(1, rows=2, length=25, seed=6)[0], prompt=20)
