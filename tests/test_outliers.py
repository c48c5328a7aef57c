"""Outlier channels: which they are, where their order goes, how stage 1 leaves them 8 bits, and the whole way."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from graphs import normal, rewrites
from lbllm_compile.codegen import operators as operators
from lbllm_compile.codegen.format import planes_to_codes
from lbllm_compile.passes import activate, pipeline
from lbllm_compile.passes.annotate import LINEAR, Annotate, matrix_count
from lbllm_compile.passes.base import PassContext, PassError
from lbllm_compile.passes.calibrate.fit import factor, fit
from lbllm_compile.passes.calibrate.layers import calibration_batches
from lbllm_compile.passes.calibrate.training import step_scale
from lbllm_compile.passes.ir import exact, graph_json
from lbllm_compile.passes.ir.annotations import linears
from lbllm_compile.passes.ir.program import Program, get_attribute
from lbllm_compile.passes.ir.rewrite import calls, operands_of
from lbllm_compile.passes.outliers import Outliers, order_of
from lbllm_compile.passes.ptq import Ptq
from stages import annotated, apply, batches, context
from test_zoo import agree, decodes_as_the_executor
from zoo import ZOO

from lbllm_compile import ablate, artifact, evaluate, explain, recipe, runtime
from lbllm_compile.ablate import Parts
from lbllm_compile.html_report.weights import code_shares

lbllm, aten = torch.ops.lbllm, torch.ops.aten


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


# Which channels


def test_the_loudest_are_last_and_order_is_kept_otherwise():
    square = torch.tensor([1.0, 9.0, 2.0, 2.0, 8.0, 0.0])
    assert order_of(square, 2).tolist() == [0, 2, 3, 5, 1, 4]
    assert order_of(square, 0).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("channels", "count"), [(31, 0), (64, 2), (576, 18), (4096, 128), (11008, 128)])
def test_narrow_inputs_have_fewer(channels, count):
    assert Outliers().count(channels) == count
    assert Outliers(columns=0).count(channels) == 0
    assert Outliers(columns=40, share=1.0).count(channels) == min(40, channels)


# Where the order goes

GATED = """
    %x = input x
    decoder layer 0:
    %gate_weight: f32[96, 32] = weight gate.weight
    %up_weight: f32[96, 32] = weight up.weight
    %up_bias: f32[96] = weight up.bias
    %down_weight: f32[8, 96] = weight down.weight
    %gate = aten.linear(%x, %gate_weight) {path="gate", role="dense"}
    %act = aten.silu(%gate)
    %up = aten.linear(%x, %up_weight, %up_bias) {path="up", role="dense"}
    %h = aten.mul.Tensor(%act, %up)
    %y = aten.linear(%h, %down_weight) {path="down", role="decoder"}
"""


def loud(weight: torch.Tensor, rows: list[int]) -> torch.Tensor:
    weight = weight.clone()
    weight[rows] *= 20
    return weight


def calibrated(*shape: int) -> PassContext:
    x = {"x": normal(*shape, seed=1)}
    return PassContext(calibration=[x], probe=x)


def test_a_gated_mlp_takes_the_order_in_its_rows():
    weights = {"up.weight": loud(normal(96, 32), [5, 70]), "down.weight": normal(8, 96, seed=3)}
    expected = GATED.replace('role="decoder"', 'role="decoder", scheme="outliers=2"')
    item = Outliers(columns=2)
    result = rewrites(item, GATED + "    return %y\n", expected + "    return %y\n", calibrated(4, 32), weights)
    assert result.rows[0]["into"] == "up.weight, up.bias, gate.weight" and result.rows[0]["outliers"] == 2
    kept = [c for c in range(96) if c not in (5, 70)]
    for path, dim in (("up.weight", 0), ("down.weight", 1)):
        wanted = weights[path].index_select(dim, torch.tensor([*kept, 5, 70]))
        assert torch.equal(get_attribute(result.program.module, path), wanted)


def test_an_input_that_something_else_reads_is_gathered():
    before = GATED + "    %z = aten.sum(%h)\n    return (%y, %z)\n"
    expected = GATED.replace(
        "%y = aten.linear(%h, %down_weight)",
        "%order: i64[96] = weight down.input_order\n    %gathered = aten.index_select(%h, -1, %order)\n"
        "    %y = aten.linear(%gathered, %down_weight)",
    ).replace('role="decoder"', 'role="decoder", scheme="outliers=3"')
    result = rewrites(Outliers(), before, expected + "    %z = aten.sum(%h)\n    return (%y, %z)\n", calibrated(4, 32))
    assert result.rows[0]["gathered"] == "something else reads what computes it"


def test_a_gate_for_all_channels_stays_as_it_is():
    """As in front of a shared expert: one number a token, by which all channels are multiplied."""
    gate = """
    %one_weight: f32[1, 32] = weight one.weight
    %one = aten.linear(%x, %one_weight) {path="one", role="dense"}
    %share = aten.sigmoid(%one)
    %part = aten.mul.Tensor(%h, %share)
"""
    before = (GATED + "    return %y\n").replace("    %y =", f"{gate}    %y =").replace("linear(%h,", "linear(%part,")
    expected = before.replace('role="decoder"', 'role="decoder", scheme="outliers=3"')
    result = rewrites(Outliers(), before, expected, calibrated(4, 32))
    assert "one.weight" not in result.rows[0]["into"] and "gate.weight" in result.rows[0]["into"]


def test_what_cannot_move_stays_and_the_rows_say_why():
    program = apply(annotated("mixtral"), "outliers{share=0.25}", context("mixtral"))
    left = {row["left"] for row in program.rows if "left" in row}
    assert left == {"stacked experts read it"}
    none = apply(annotated(), "outliers{columns=0}", PassContext())
    assert none.summary == {"inputs": 8, "moved": 0, "absorbed": 0}
    assert all(not info.scheme.outliers for _, info in linears(none.program))


def test_a_language_model_stays_the_same_and_its_mlps_absorb():
    data = context(probe=batches(1, seed=2)[0])
    moved, _ = pipeline.run(annotated(), [Outliers(share=0.1)], data)
    gathered = calls(moved.graph, aten.index_select.default)
    assert len(gathered) == 6  # queries' and gates' norms, and attention, of two layers
    downs = [node for node, info in linears(moved) if info.path.endswith("down_proj")]
    assert all(operands_of(node)[0] not in gathered for node in downs)
    found = {info.path: info.scheme.outliers for _, info in linears(moved) if info.role == "decoder"}
    widths = {info.path: get_attribute(moved.module, info.weight).shape[-1] for _, info in linears(moved)}
    assert found == {path: int(0.1 * widths[path]) for path in found} and min(found.values()) > 0


def test_order_and_wishes_that_make_no_sense_are_one_sentence():
    with pytest.raises(PassError, match="outliers needs calibration batches"):
        apply(annotated(), "outliers")
    observed = apply(annotated(), "observe").program
    with pytest.raises(PassError, match="move 'outliers' in front of 'observe'"):
        Outliers().apply(observed, context())
    with pytest.raises(PassError, match="cannot set outliers; use the pass 'outliers'"):
        Annotate(scheme="*: outliers=4").apply(annotated(), PassContext())


# Stage 1


def test_kept_columns_make_up_for_the_errors_of_the_others():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 80, generator=generator) + 2 * torch.randn(512, 1, generator=generator)
    x[:, 70:] *= 10
    weight = torch.randn(12, 80, generator=generator)
    hessian = x.t() @ x / len(x)
    found = fit(weight, factor(hessian, 32, 0.01, 10), 32)
    assert found.codes.shape == (12, 70) and found.levels.shape == (12, 3, 4) and found.kept.shape == (12, 10)
    values = torch.cat(
        [
            found.levels.repeat_interleave(32, 1)[:, :70].gather(-1, found.codes.long()[..., None])[..., 0],
            found.kept * found.kept_scale[:, None],
        ],
        1,
    )
    error = ((weight - values) @ x.t()).square().mean()
    alone = torch.cat([values[:, :70], weight[:, 70:]], 1)
    assert error < ((weight - alone) @ x.t()).square().mean()
    assert found.kept.dtype == torch.int8 and found.rows(2, 5).kept.shape == (3, 10)


def test_stage_1_takes_a_linear_apart():
    before = """
        decoder layer 0:
        %x = input x
        %seen = lbllm.observe(%x, "a") {stat="hessian"}
        %w: f32[24, 100] = weight a.weight
        %bias: f32[24] = weight a.bias
        %y = aten.linear(%seen, %w, %bias) {path="a", role="decoder", scheme="outliers=6"}
        return %y
    """
    expected = """
        decoder layer 0:
        %x = input x
        %main = aten.slice.Tensor(%x, -1, 0, 94)
        %loud = aten.slice.Tensor(%x, -1, 94, 100)
        %sign: u8[24, 12] = weight a.weight.sign
        %bitmap: u8[24, 12] = weight a.weight.bitmap
        %levels: i8[24, 3, 4] = weight a.weight.levels
        %scale: f16[24, 3] = weight a.weight.scale
        %unpacked = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 94, 32)
        %bias: f32[24] = weight a.bias
        %y = aten.linear(%main, %unpacked, %bias) {path="a", role="decoder", scheme="outliers=6"}
        %rows: i8[24, 6] = weight a.weight.outliers.rows
        %row_scale: f32[24] = weight a.weight.outliers.row_scale
        %columns = lbllm.unpack_rows(%rows, %row_scale)
        %product = aten.linear(%loud, %columns) {
            path="a.outliers", weight="a.weight.outliers", role="outliers", reason="the loudest channels"}
        %total = aten.add.Tensor(%y, %product)
        return %total
    """
    data = PassContext(calibration=[{"x": normal(300, 100, seed=4)}])
    rewrites(Ptq(group=32), before, expected, data)


def test_rows_of_stage_1_have_the_shape_of_the_planes():
    result = apply(annotated(), "outliers{share=0.1},observe,ptq{group=32}", context())
    outliers = {info.path: info.scheme.outliers for _, info in linears(result.program) if info.role == "decoder"}
    assert len(result.rows) == 14
    for row in result.rows:
        weight = get_attribute(annotated().module, f"{row['linear']}.weight")
        assert row["shape"] == [weight.shape[0], weight.shape[1] - outliers[row["linear"]]]
        sign, bitmap = (get_attribute(result.program.module, f"{row['linear']}.weight.{x}") for x in ("sign", "bitmap"))
        codes = planes_to_codes(sign, bitmap, row["shape"][-1])
        shares = code_shares(sign.numpy(), bitmap.numpy(), math.prod(row["shape"]))
        assert shares == tuple(int((codes == code).sum()) / codes.numel() for code in range(4))


def test_stage_1_can_leave_outliers_their_order_alone():
    data = context()
    moved = apply(annotated(), "outliers{share=0.1},observe", data).program
    program = apply(moved, "ptq{group=32,outliers=false}", data).program
    assert not [info for _, info in linears(program) if info.role == "outliers" or info.scheme.outliers]
    assert calls(program.graph, lbllm.unpack_weight.default) and not calls(program.graph, lbllm.unpack_rows.default)


def test_levels_train_at_the_rate_of_their_own_columns(monkeypatch):
    """Outliers have no levels, so how far they spread does not say how far a level may go."""

    class SeenError(Exception):
        pass

    def seen(groups, *_):
        raise SeenError(groups)

    moved = apply(annotated(), "outliers{share=0.1}", context()).program
    get_attribute(moved.module, "model.layers.0.mlp.down_proj.weight")[:, -10:] *= 100
    data = dataclasses.replace(context(), teacher=moved)
    fitted = apply(moved, "observe,ptq{group=32}", data).program
    monkeypatch.setattr(activate, "train_epochs", seen)
    with pytest.raises(SeenError) as raised:
        apply(fitted, "activate{epochs=1,group=32}", data)
    (groups,) = raised.value.args
    infos = [info for _, info in linears(moved) if info.layer == 0]
    weights = [(get_attribute(moved.module, info.weight), info.scheme.outliers) for info in infos]
    deviations = [float(weight[:, : weight.shape[1] - count].std()) for weight, count in weights]
    scale = activate.Activate().lr_levels * step_scale(len(calibration_batches(moved, data.calibration, 4)))
    assert sorted(group.rate for group in groups[1:]) == pytest.approx(sorted(scale * d for d in deviations))


def test_the_ablation_compares_them_where_a_recipe_has_them():
    found = {
        name: ablate.comparisons(Parts.of(recipe.passes(recipe.Choices(name), "cpu"))) for name in ("bwa", "lbllm")
    }
    assert "outliers" not in {comparison.name for comparison in found["lbllm"]}
    (comparison,) = (c for c in found["bwa"] if c.name == "outliers")
    assert {name: variant[0].outliers for name, variant in comparison.variants.items()} == {
        "as all others, A16": False,
        "as all others, A4": False,
        "8 bits, A16": True,
        "8 bits, A4": True,
    }


# The whole way


@functools.cache
def whole() -> tuple[Program, Program]:
    """A language model through the recipe's passes with all their checks, before lowering and after."""
    text = pipeline.render(recipe.passes(recipe.Choices(recipe="bwa", group=32), "cpu"))
    assert ",outliers,observe," in text
    before, _, after = text.replace(",outliers,", ",outliers{share=0.1},").partition(",head")
    data = context(count=16, probe=batches(1, seed=2)[0])
    simulated, _ = pipeline.run(annotated(), pipeline.parse(before.partition("annotate,")[2]), data)
    headed = apply(simulated, "head", PassContext(probe=batches(1, seed=2)[0])).program
    lowered, _ = pipeline.run(headed, pipeline.parse(after.removeprefix(",")), data)
    return headed, lowered


def test_the_lowered_model_is_the_simulated_one():
    headed, lowered = whole()
    item = batches(1, rows=3, seed=5)[0]
    agree(lowered.run(item), exact.run(headed, item), item["attention_mask"].bool())


def test_outliers_run_on_8_bits_beside_every_linear():
    lowered = whole()[1]
    assert matrix_count(lowered) == 8  # some of them merged
    kept = [node for node, info in linears(lowered) if info.role == "outliers"]
    assert len(kept) == 14 and all(node.target is lbllm.int8_linear.default for node in kept)
    assert all(str(node.meta[LINEAR].scheme) == "act=8 act-group=0 codebook=none" for node in kept)
    quantizers = {operands.args[0] for node in kept for operands in [node.args[0]]}
    assert len(quantizers) == 8  # those that read the same input share one
    stored = graph_json.loads(graph_json.dumps(lowered.module), dict(lowered.parameters()))
    again = {n.name: n.meta[LINEAR] for n in stored.graph.nodes if LINEAR in n.meta}
    assert again == {n.name: info for n, info in linears(lowered)}


def test_bits_count_the_outliers():
    lowered = whole()[1]
    rows = [t for path, t in lowered.parameters() if path.endswith(".outliers.rows")]
    assert len(rows) == 14
    figures = evaluate.bits_per_weight(lowered)
    plain = evaluate.bits_per_weight(
        apply(
            annotated(), "observe,ptq{group=32},activate{group=32,steps=0},lower", context(probe=batches(1, seed=2)[0])
        ).program
    )
    assert figures["bits_per_weight"] > plain["bits_per_weight"]


def test_a_stored_model_runs_natively_as_on_the_executor(tmp_path):
    lowered = whole()[1]
    artifact.save(lowered, tmp_path / "out", lock={})
    model = runtime.load(tmp_path / "out")
    assert model.native is not None
    decodes_as_the_executor(model, lowered, batches(1, rows=2, length=25, seed=6)[0], prompt=20)


def test_outlier_columns_are_explained_in_their_shape(tmp_path):
    artifact.save(whole()[1], tmp_path / "out", lock={})
    (main, own) = (explain.explain(tmp_path / "out", f"layers.1.mlp.down_proj{end}") for end in ("", ".outliers"))
    assert (main.facts["shape"], own.facts["shape"]) == ([72, 104 - 10], [72, 10])


def test_all_stages_train_beside_outliers():
    data = context(count=16)
    text = "outliers{share=0.1},observe,ptq{group=32}"
    moved = apply(annotated(), "outliers{share=0.1}", data).program
    data = PassContext(teacher=moved, calibration=data.calibration, validation=data.validation)
    quantized = apply(moved, text.partition(",")[2], data).program
    trained = apply(quantized, "distill{epochs=1},activate{group=32,steps=2}", data)
    assert trained.summary["kl_after"] <= trained.summary["kl_before"] * 1.0001
    tuned = apply(trained.program, "finetune{steps=4,every=2,planes=nearest,lr_weight=0.01}", data)
    assert tuned.summary["kl_after"] <= tuned.summary["kl_before"] * 1.0001
    assert 0 < tuned.summary["sign_flips"] + tuned.summary["bitmap_flips"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_keeps_its_outliers(name):
    """The order changes nothing in the float model, and what is lowered is what was simulated."""
    data = context(name, count=8, probe=batches(1, seed=2)[0])
    moved, (record,) = pipeline.run(annotated(name), [Outliers(share=0.1)], data)
    assert record.summary["moved"] > 0
    data = PassContext(teacher=moved, calibration=data.calibration, validation=data.validation, probe=data.probe)
    text = "observe,ptq{group=32},activate{group=0,steps=0,ranges=planes},head"
    simulated, _ = pipeline.run(moved, pipeline.parse(text), data)
    lowered, _ = pipeline.run(simulated, pipeline.parse("lower,cache,cleanup"), data)
    item = batches(1, rows=3, seed=5)[0]
    agree(lowered.run(item), exact.run(simulated, item), item["attention_mask"].bool())
