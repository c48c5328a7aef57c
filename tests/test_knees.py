"""Activations in three regions: the table, its kernels, its gradients, its place in the graph and the whole way."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from graphs import context as no_probe
from graphs import normal, rewrites
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen import operators as operators
from lbllm_compile.codegen import prove, reference
from lbllm_compile.codegen.cpu import space as cpu
from lbllm_compile.codegen.errors import FormatError, KernelError
from lbllm_compile.codegen.spec import QuantizeSpec
from lbllm_compile.codegen.targets import Target, runnable_targets
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.activate import Activate, insert_quantizers
from lbllm_compile.passes.base import PassContext, PassError
from lbllm_compile.passes.calibrate import simulate
from lbllm_compile.passes.calibrate.knees import UNPLACED, best_knees
from lbllm_compile.passes.ir import exact, graph_json
from lbllm_compile.passes.ir.program import Program, get_attribute
from lbllm_compile.passes.ir.rewrite import calls
from lbllm_compile.passes.lower import Lower
from oracle import Oracle
from rtn import KNEES, planes
from rtn import simulate as quantized_linears
from stages import Memory, annotated, apply, batches, context, improved, quantized, same_tensors
from test_kernels import FAMILIES, build
from test_lower import two_linears
from test_zoo import agree, decodes_as_the_executor, inputs
from zoo import ZOO, captured

from lbllm_compile import artifact, recipe, runtime
from lbllm_compile.lowering.executor import requirements

lbllm = torch.ops.lbllm


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


# The table


def table(high: float, low: float, knees: tuple[float, float]) -> reference.CodeTable:
    return reference.knee_table(torch.tensor(high), torch.tensor(low), torch.tensor(knees))


def test_a_table_has_three_uniform_regions():
    """In units of the scale, with knees at -24 and 32: a core with steps of 8, and a tail from each of its ends."""
    found = table(254.0, -254.0, (24 / 127, 32 / 127))
    assert found.scale.item() == 2.0
    assert found.values[:4].tolist() == [-127, -101, -76, -50]
    assert found.values[4:12].tolist() == [-24, -16, -8, 0, 8, 16, 24, 32]
    assert found.values[12:].tolist() == [56, 80, 103, 127]


@settings(max_examples=300, deadline=None)
@given(
    st.floats(0, 2.0**126, width=32),
    st.floats(-(2.0**126), 0, width=32),
    st.floats(0.001, 0.999),
    st.floats(0.001, 0.999),
)
def test_tables_ascend_within_8_bits_and_hold_zero_and_the_ends(high, low, lower, upper):
    values = table(high, low, (lower, upper)).values
    assert torch.equal(values, values.round()) and float(values.abs().max()) <= 127
    assert bool((values.diff() >= 0).all()) and 0.0 in values.tolist()
    scale = max(high, -low, reference.RANGE_MIN) / 127
    assert values[-1].item() == pytest.approx(high / scale, abs=0.501)
    assert values[0].item() == pytest.approx(low / scale, abs=0.501)


def test_one_sided_and_empty_ranges():
    assert table(0.0, 0.0, (0.3, 0.3)).values.tolist() == [0] * 16
    positive = table(127.0, 0.0, (0.3, 7 * 4 / 127)).values.tolist()
    assert positive == [0] * 5 + [4, 8, 12, 16, 20, 24, 28, 53, 78, 102, 127]
    assert table(0.0, -127.0, (7 * 4 / 127, 0.3)).values.tolist() == [-v for v in reversed(positive)]


@pytest.mark.parametrize("group", [0, 32])
def test_a_value_is_the_entry_next_to_the_input_and_zero_stays_zero(group):
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    x[:, ::7], x[1, 3], x[2] = 0.0, 40.0, 0.0
    clip, knees = torch.ones(2), torch.tensor(KNEES)
    values, scale = reference.quantize_activation(x, clip, 4, group, knees)
    assert values.dtype == torch.int8 and not values[x == 0].any()
    for row in range(5):
        for g, part in enumerate(x[row].split(group or 70)):
            entries = reference.knee_table(part.max().clamp_min(0), part.min().clamp_max(0), knees)
            assert scale[row, g] == entries.scale
            nearest = (part[:, None] / entries.scale - entries.values).abs().min(-1).values
            got = values[row, g * group :][: len(part)]
            torch.testing.assert_close((part / entries.scale - got).abs(), nearest, rtol=1e-5, atol=1e-5)


def test_an_input_half_way_between_two_entries_takes_the_lower_one():
    x = torch.tensor([[127.0, -127.0, 4.0, -4.0, 4.0001, -4.0001]])
    values, _ = reference.quantize_activation(x, torch.ones(2), 4, 0, torch.tensor([24 / 127, 32 / 127]))
    assert values.tolist() == [[127, -127, 0, -8, 8, -8]]


def test_other_bits_have_no_knees():
    with pytest.raises(FormatError, match="8-bit activations have no knees"):
        lbllm.fake_quantize(torch.ones(1, 4), torch.ones(2), 8, 0, torch.tensor(KNEES))
    with pytest.raises(KernelError, match="16-bit activations have no knees"):
        QuantizeSpec(64, 0, 16, knees=True)
    with pytest.raises(PassError, match="8-bit activations have no knees; use bits=4"):
        Activate(bits=8, group=32, ranges="knees").apply(quantized(), context())


# Kernels


@pytest.mark.parametrize("target", FAMILIES)
def test_quantizers_are_exact(target, tmp_path):
    specs = [
        QuantizeSpec(k, group, 4, knees=True)
        for k, group in ((1, 32), (259, 64), (77, 0), (300, 128), (512, 32), (1199, 32))
    ]
    kernels = build([], specs, target, tmp_path)
    for spec in specs:
        for given_ in prove.quantizer_inputs(spec, seed=3):
            for got, wanted in zip(kernels.quantizer(spec)(*given_), prove.quantized(spec, *given_), strict=True):
                assert torch.equal(got, wanted)


def test_inputs_on_the_thresholds_are_exact(tmp_path):
    """Every threshold itself, and the numbers right above and below."""
    spec, knees = QuantizeSpec(64, 0, 4, knees=True), torch.tensor([0.21, 0.33])
    edges = table(3.0, -5.0, tuple(knees.tolist())).thresholds
    x = torch.cat([torch.tensor([3.0, -5.0]), *(torch.nextafter(edges, torch.tensor(to)) for to in (-9.0, 9.0)), edges])
    x = torch.nn.functional.pad(x, (0, 64 - len(x)))[None]
    for got, wanted in zip(
        build([], [spec], "cpu", tmp_path).quantizer(spec)(x, torch.ones(2), knees),
        prove.quantized(spec, x, torch.ones(2), knees),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_wrong_tensors_are_named(tmp_path):
    specs = [QuantizeSpec(64, 0, 4, knees=True), QuantizeSpec(64, 0)]
    kernels = build([], specs, "cpu:generic", tmp_path)
    x, pair = torch.ones(2, 64), torch.ones(2)
    for spec, factors, message in (
        (specs[0], (pair,), "takes one tensor of knees"),
        (specs[0], (pair, torch.ones(3)), "knees is"),
        (specs[1], (pair, pair), "takes no knees"),
    ):
        with pytest.raises(KernelError, match=message):
            kernels.quantizer(spec)(x, *factors)


def test_the_proof_catches_a_wrong_table(monkeypatch, tmp_path):
    from lbllm_compile.codegen.kernels import code_table

    monkeypatch.setattr(code_table, "RANGE_MIN", 1.0)
    with pytest.raises(KernelError, match="quantized values differ"):
        build([], [QuantizeSpec(64, 32, 4, knees=True)], "cpu:generic", tmp_path)


@pytest.mark.parametrize("target", runnable_targets())
def test_linears_behind_knees_multiply_8_bit_values(target):
    lowered = Lower().apply(quantized_linears(two_linears(), group=64, knees=True), no_probe()).program
    needed = requirements(lowered)
    assert [q.knees for q in needed.quantizers] == [True]
    for spec in needed.linears:
        assert spec.act_bits == 8
        assert "popcount" not in {i.layout for i in cpu.implementations(spec, Target.parse(target))}


# Gradients


@pytest.mark.parametrize("group", [0, 32])
def test_the_simulation_gives_the_operators_values(group):
    x = torch.randn(3, 5, 75, generator=torch.Generator().manual_seed(group)) * 3
    clip, knees = torch.tensor([0.9, 0.7]), torch.tensor(KNEES)
    wanted = lbllm.fake_quantize(x, clip, 4, group, knees)
    assert torch.equal(simulate.fake_quantize(x, clip, 4, group, knees), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(simulate.fake_quantize(x, clip, 4, group, knees), wanted)


def positions(x, clip, knees, codes, zero):
    """Where the codes of ``x [M, K]`` lie, before anything is rounded; smooth in ``clip`` and ``knees``."""
    high, low = x.amax(-1) * clip[0], x.amin(-1) * clip[1]
    step = (knees[1] * high - knees[0] * low) / 7
    core = [(i - zero) * step for i in range(8)]
    below = [(core[0] * (4 - j) + low * j) / 4 for j in (4, 3, 2, 1)]
    above = [(core[7] * (4 - j) + high * j) / 4 for j in (1, 2, 3, 4)]
    return torch.stack([*below, *core, *above], -1).gather(-1, codes)


def test_gradients_are_those_of_the_positions():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 96, generator=generator), torch.randn(4, 96, generator=generator)
    clip, knees = torch.tensor([0.8, 0.7], requires_grad=True), torch.tensor([0.3, 0.4], requires_grad=True)
    (simulate.fake_quantize(x, clip, 4, 0, knees) * weight).sum().backward()
    high, low = reference.clipped_range(x[:, None], clip.detach())
    entries = reference.knee_table(high, low, knees.detach())
    codes, zero = reference.table_codes(x[:, None], entries)[:, 0], entries.zero[:, 0]

    def smooth(clip_, knees_):
        return (positions(x.double(), clip_, knees_, codes, zero) * weight).sum()

    for tensor, at in ((clip, 0), (knees, 1)):
        for end in (0, 1):
            step = torch.zeros(2, dtype=torch.float64)
            step[end] = 1e-4
            ends = []
            for sign in (1, -1):
                pair = [clip.detach().double(), knees.detach().double()]
                pair[at] = pair[at] + sign * step
                ends.append(smooth(*pair))
            assert tensor.grad[end].item() == pytest.approx(float(ends[0] - ends[1]) / 2e-4, rel=1e-4)


@pytest.mark.parametrize("end", [0, 1])
def test_the_gradient_of_a_knee_is_the_slope_of_the_error(end):
    """On many samples the rounding of positions averages out, so a finite difference shows the true slope."""
    x = torch.randn((8192, 64), generator=torch.Generator().manual_seed(0))
    x[:, 0] += 4.0

    def error(knees: torch.Tensor) -> torch.Tensor:
        return (simulate.fake_quantize(x, torch.tensor([0.8, 0.7]), 4, 32, knees) - x).square().mean()

    knees = torch.tensor([0.7, 0.7], requires_grad=True)
    error(knees).backward()
    step = torch.zeros(2)
    step[end] = 0.02
    slope = float(error(knees.detach() + step) - error(knees.detach() - step)) / 0.04
    assert float(knees.grad[end]) == pytest.approx(slope, rel=0.15)


def test_the_gradient_of_the_input_passes_inside_the_range():
    x = torch.tensor([[-4.0, -1.0, 0.0, 1.0, 2.0, 8.0]], requires_grad=True)
    simulate.fake_quantize(x, torch.tensor([0.5, 1.0]), 4, 0, torch.tensor(KNEES)).sum().backward()
    assert x.grad.tolist() == [[1, 1, 1, 1, 1, 0]]


# The passes


def test_the_lowered_graph_names_the_knees_behind_the_group():
    before = """
        decoder layer 0:
        %x = input x
        %clip: f32[2] = weight a.input_clip
        %knees: f32[2] = weight a.input_knees
        %quantized = lbllm.fake_quantize(%x, %clip, 4, 0, %knees)
        %sign: u8[24, 13] = weight a.weight.sign
        %bitmap: u8[24, 13] = weight a.weight.bitmap
        %levels: i8[24, 4, 4] = weight a.weight.levels
        %scale: f16[24, 4] = weight a.weight.scale
        %w = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 100, 32)
        %bias: f32[24] = weight a.bias
        %y = aten.linear(%quantized, %w, %bias) {path="a", role="decoder"}
        return %y
    """
    expected = """
        decoder layer 0:
        %x = input x
        %clip: f32[2] = weight a.input_clip
        %knees: f32[2] = weight a.input_knees
        %quantized = lbllm.quantize_activation(%x, %clip, 4, 0, %knees) {in_features=100}
        %values: i8[3, 100] = getitem(%quantized, 0)
        %x_scale: f32[3, 1] = getitem(%quantized, 1)
        %sign: u8[24, 13] = weight a.weight.sign
        %bitmap: u8[24, 13] = weight a.weight.bitmap
        %levels: i8[24, 4, 4] = weight a.weight.levels
        %scale: f16[24, 4] = weight a.weight.scale
        %bias: f32[24] = weight a.bias
        %y = lbllm.bit_linear(%values, %x_scale, %sign, %bitmap, %levels, %scale, %bias, 32) {
            path="a", role="decoder", scheme="group=32 act=4 act-group=0 codebook=knees", in_features=100}
        return %y
    """
    weights = planes("a.weight", normal(24, 100), 32)
    weights |= {"a.input_clip": torch.tensor([0.95, 0.9]), "a.input_knees": torch.tensor(KNEES)}
    x = normal(3, 100, seed=5)
    after = rewrites(Lower(), before, expected, no_probe({"x": x}), weights).program
    stored = graph_json.loads(graph_json.dumps(after.module), dict(after.parameters()))
    assert torch.equal(stored(x), after.module(x))


def test_outliers_move_the_knees_inward():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    upper = best_knees(x, torch.ones(2), 0)[1]
    x[:, :3] = x[:, :3].abs() * 30
    one_sided = best_knees(x, torch.ones(2), 0)
    assert one_sided[1] < upper / 2

    def error(knees):
        return float((lbllm.fake_quantize(x, torch.ones(2), 4, 0, knees) - x).square().mean())

    assert error(one_sided) < error(torch.full((2,), UNPLACED)) / 2


def quantizers(program: Program) -> list[torch.fx.Node]:
    return calls(program.graph, lbllm.fake_quantize.default)


def test_knees_are_placed_on_the_inputs_that_quantizers_see():
    data = context()
    program = apply(quantized(), "activate{group=0,steps=0,ranges=knees}", data).program
    inserted = insert_quantizers(quantized(), 4, 0, 4, "knees")
    assert [str(n.args) for n in quantizers(program)] == [str(n.args) for n in quantizers(inserted)]
    first = quantizers(program)[0]
    assert first.args[2:4] == (4, 0) and first.args[4].target == "model.layers.0.self_attn.q_proj.input_knees"
    seen = {}

    class Inputs(torch.fx.Interpreter):
        def run_node(self, n):
            if n in quantizers(program):
                seen[n] = self.fetch_args_kwargs_from_env(n)[0]
            return super().run_node(n)

    # A batch of the calibration holds fewer sequences than are looked at, so all of it counts.
    Inputs(program.module).run(*program.arguments(data.calibration[0]))
    assert len(seen) == 8
    for x, clip, _, group, knees in seen.values():
        assert torch.equal(knees, best_knees(x, clip, group))


TRAINING = "activate{group=0,ranges=knees,epochs=1,steps=4}"


@pytest.fixture(scope="module")
def data() -> PassContext:
    return context(count=32)


@pytest.fixture(scope="module")
def trained(data):
    return apply(quantized(), TRAINING, data)


def test_training_moves_the_knees_and_lowers_the_divergence(trained, data):
    assert improved(trained.summary)
    assert all(row["after"] < row["before"] for row in trained.rows)
    untrained = apply(quantized(), "activate{group=0,ranges=knees,steps=0}", data).program
    before, after = dict(untrained.parameters()), dict(trained.program.parameters())
    paths = [p for p in after if p.endswith("input_knees")]
    assert len(paths) == 8 and all(0 < k < 1 for p in paths for k in after[p].tolist())
    # The rows have what each layer's training came to; which of the starts the model keeps is a choice of its own.
    moved = {path: knees for row in trained.rows for path, knees in row["knees"].items()}
    assert moved.keys() == set(paths)
    assert any(moved[p] != pytest.approx(before[p].tolist(), abs=1e-4) for p in paths)


def test_without_learning_rate_the_knees_stay(data):
    program = apply(quantized(), "activate{group=0,ranges=knees,epochs=1,steps=1,lr_knees=0}", data).program
    placed = apply(quantized(), "activate{group=0,ranges=knees,steps=0}", data).program
    for path, tensor in placed.parameters():
        if path.endswith("input_knees"):
            assert torch.equal(get_attribute(program.module, path), tensor)


def test_a_resumed_run_gives_the_same_bytes(trained, data):
    memory = Memory(saves=2)  # the channels' weights and one layer
    with pytest.raises(Memory.KilledError):
        apply(quantized(), TRAINING, dataclasses.replace(data, checkpoints=memory))
    memory.left = None
    resumed = apply(quantized(), TRAINING, dataclasses.replace(data, checkpoints=memory))
    assert memory.loaded == 2 and same_tensors(resumed.program, trained.program)


# The recipe


def paper(**options) -> list:
    return recipe.passes(recipe.Choices(recipe="lbllm-paper", **options), "cpu")


def test_the_papers_recipe_round_trips_as_text():
    text = pipeline.render(paper())
    assert "ptq{group=128}" in text and "finetune" not in text
    assert "activate{group=0,epochs=1,steps=0,ranges=knees}" in text
    assert pipeline.parse(text) == paper() and pipeline.parse(pipeline.render(paper(), full=True)) == paper()
    assert next(p for p in paper(group=64) if isinstance(p, Activate)).group == 0


def test_knees_are_those_of_4_bits():
    def ranges(**options) -> str:
        return next(p.ranges for p in recipe.passes(recipe.Choices(**options), "cpu") if isinstance(p, Activate))

    (default,) = [p for p in recipe.passes(recipe.Choices(), "cpu,cuda:sm_90") if isinstance(p, Activate)]
    assert (default.ranges, default.group) == ("knees", 64)
    assert ranges(act_bits=8) == ranges(recipe="db-llm", act_bits=4) == "clip"
    assert [ranges(recipe=name) for name in ("lbllm-paper", "bwa")] == ["knees", "planes"]


def test_the_papers_recipe_has_4_bit_activations():
    with pytest.raises(recipe.OptionError, match="--act-bits cannot be 8 in the recipe 'lbllm-paper'"):
        paper(act_bits=8)


# The whole way


@functools.cache
def whole(group: int = 0) -> tuple[Program, Program]:
    """A language model with knees, simulated and lowered."""
    program = apply(captured("llama")[1], "canonicalize,annotate").program
    simulated = quantized_linears(program, per_token=group == 0, knees=True)
    simulated = apply(simulated, "head", PassContext(probe=inputs(2, 9))).program
    return simulated, apply(simulated, "merge,lower,cache,cleanup", PassContext(probe=inputs(2, 9))).program


@pytest.mark.parametrize("group", [0, 32])
def test_the_lowered_model_is_the_simulated_and_the_eager_one(group):
    simulated, lowered = whole(group)
    item = inputs(3, 33)
    seen, logits = item["attention_mask"].bool(), lowered.run(item)
    agree(logits, exact.run(simulated, item), seen)
    agree(logits, Oracle(ZOO["llama"].build(), lowered, group=group, knees=torch.tensor(KNEES))(item), seen)


def test_lowering_changes_no_bit():
    simulated, _ = whole()
    item = inputs(3, 33)
    lowered = apply(simulated, "lower,cache,cleanup", PassContext(probe=inputs(2, 9))).program
    seen = item["attention_mask"].bool()
    assert torch.equal(exact.run(simulated, item)[seen], lowered.run(item)[seen])


def test_a_stored_model_runs_natively_as_on_the_executor(tmp_path):
    """A prompt and a batch by kernels of many tokens; single tokens in few launches."""
    lowered = whole()[1]
    artifact.save(lowered, tmp_path / "out", lock={})
    model = runtime.load(tmp_path / "out")
    assert model.native is not None and model.native.description.merged
    for batch, length, prompt in ((1, 9, 3), (3, 25, 20)):
        decodes_as_the_executor(model, lowered, inputs(batch, length), prompt)


@pytest.mark.slow
def test_the_papers_recipe_compiles_a_whole_model():
    """From the captured model on, as the command would: every pass with its checks, then the exact simulation."""
    text = pipeline.render(paper(group=32))
    before, _, after = text.partition(",head")
    data = context(count=16, probe=batches(1, seed=2)[0])
    simulated, _ = pipeline.run(annotated(), pipeline.parse(before.partition("annotate,")[2]), data)
    lowered, records = pipeline.run(simulated, pipeline.parse("head" + after), data)
    assert [r.name for r in records] == ["head", "merge", "lower", "cache", "cleanup"]
    item = batches(1, rows=3, seed=5)[0]
    headed = apply(simulated, "head").program
    agree(lowered.run(item), exact.run(headed, item), item["attention_mask"].bool())
