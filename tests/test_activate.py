"""Stage 3: quantizers in the graph, their gradients, and training under quantized activations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lbllm_compile.passes.activate import insert_quantizers
from lbllm_compile.passes.annotate import LAYER, LINEAR
from lbllm_compile.passes.base import PassContext, PassError, PassResult, batches_of
from lbllm_compile.passes.calibrate import simulate
from lbllm_compile.passes.calibrate.alignment import kl_loss
from lbllm_compile.passes.calibrate.chains import with_tensors
from lbllm_compile.passes.calibrate.ranges import SEQUENCES, input_ranges
from lbllm_compile.passes.ir.program import Program, get_attribute
from stages import Memory, annotated, apply, batches, context, improved, quantized, same_tensors
from torch import fx

_aten, _lbllm = torch.ops.aten, torch.ops.lbllm
_TEXT = "activate{epochs=2,group=32,precision=float32}"


def _calls(program: Program, target) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.target is target]


def test_linears_that_share_an_input_share_a_quantizer():
    before = quantized()
    after = insert_quantizers(before, 4, 32, 4)
    quantizers = _calls(after, _lbllm.fake_quantize.default)
    assert [len(n.users) for n in quantizers] == [3, 1, 2, 1] * 2
    first = quantizers[0]
    assert first.args[1].target == "model.layers.0.self_attn.q_proj.input_clip" and first.args[2:] == (4, 32)
    assert torch.equal(get_attribute(after.module, first.args[1].target), torch.ones(2))
    assert first.meta[LAYER] == 0 and all(LINEAR in user.meta for user in first.users)
    assert not _calls(before, _lbllm.fake_quantize.default)


@pytest.mark.parametrize("name, heads", [("llama", 2), ("gpt2", 4), ("phi3", 2)])
def test_keys_and_values_are_quantized_before_they_are_repeated(name, heads):
    program = insert_quantizers(quantized(name), 16, 0, 4)
    attentions = _calls(program, _aten.scaled_dot_product_attention.default)
    quantizers = _calls(program, _lbllm.fake_quantize_kv.default)
    assert len(quantizers) == 2 * len(attentions) == 4
    interpreter = _Shapes(program.module)
    interpreter.run(*program.arguments(batches(1)[0]))
    for node in quantizers:
        batch, seen, length, _ = interpreter.shapes[node.name]
        assert (batch, seen, length) == (2, heads, 24)
    for attention in attentions:
        for operand in attention.args[1:3]:
            assert set(_behind(operand)) & set(quantizers)


class _Shapes(fx.Interpreter):
    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.shapes: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node):
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n.name] = value.shape
        return value


def _behind(node: fx.Node) -> list[fx.Node]:
    found = [node]
    while found[-1].target is not _lbllm.fake_quantize_kv.default and found[-1].all_input_nodes:
        found.append(found[-1].all_input_nodes[0])
    return found


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 0), (8, 32), (16, 0)])
def test_the_differentiable_quantizer_has_the_operators_values(bits, group):
    x = torch.randn((5, 7, 72), generator=torch.Generator().manual_seed(0))
    clip = torch.tensor([0.9, 0.8])
    expected = _lbllm.fake_quantize(x, clip, bits, group)
    assert torch.equal(simulate.fake_quantize(x, clip, bits, group), expected)
    assert torch.equal(simulate.fake_quantize_kv(x, 4), _lbllm.fake_quantize_kv(x, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(simulate.fake_quantize(x, clip, bits, group), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("end", [0, 1])
def test_the_gradient_of_a_clip_factor_is_the_slope_of_the_error(bits, end):
    """On many samples the rounding averages out, so a finite difference shows the true slope."""
    x = torch.randn((8192, 64), generator=torch.Generator().manual_seed(0))
    x[:, 0] += 4.0

    def error(clip: torch.Tensor) -> torch.Tensor:
        return (simulate.fake_quantize(x, clip, bits, 32) - x).square().mean()

    clip = torch.tensor([0.8, 0.7], requires_grad=True)
    error(clip).backward()
    step = torch.zeros(2)
    step[end] = 0.01
    slope = float(error(clip.detach() + step) - error(clip.detach() - step)) / 0.02
    assert float(clip.grad[end]) == pytest.approx(slope, rel=0.15)


def test_the_gradient_of_the_input_passes_inside_the_range():
    x = torch.tensor([[-4.0, -1.0, 0.0, 1.0, 2.0, 8.0]], requires_grad=True)
    simulate.fake_quantize(x, torch.tensor([0.5, 1.0]), 4, 0).sum().backward()
    assert x.grad.tolist() == [[1, 1, 1, 1, 1, 0]]
    x.grad = None
    simulate.fake_quantize_kv(x, 4).sum().backward()
    assert bool((x.grad == 1).all())


def test_divergence_of_equal_logits_is_zero_and_grows():
    logits = torch.randn((2, 300, 11), generator=torch.Generator().manual_seed(0))
    assert float(kl_loss(logits, logits)) == pytest.approx(0, abs=1e-6)
    expected = (logits.softmax(-1) * (logits.log_softmax(-1) - (2 * logits).log_softmax(-1))).sum(-1).mean()
    assert float(kl_loss(logits, 2 * logits)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("deviation", [0.0, 0.7])
def test_the_divergence_has_the_gradient_of_its_formula(deviation):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn((2, 35, 11), generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    divergence = kl_loss(teacher, student, deviation)
    (3 * divergence).backward()
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    weights = ((log_p.exp() * log_p).sum(-1) * (log_q.exp() * log_q).sum(-1)).detach() ** deviation
    expected = (weights * (log_p.exp() * (log_p - log_q)).sum(-1)).sum() / weights.sum()
    (grad,) = torch.autograd.grad(3 * expected, student)
    assert divergence.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(student.grad, grad, rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def data() -> PassContext:
    return context(count=32)


@pytest.fixture(scope="module")
def trained(data: PassContext) -> PassResult:
    return apply(quantized(), _TEXT, data)


def test_training_lowers_the_divergence_from_the_float_model(trained):
    assert improved(trained.summary)
    assert all(row["after"] < row["before"] for row in trained.rows)
    clips = [c for row in trained.rows for pair in row["clips"].values() for c in pair]
    assert len(clips) == 16 and all(0.3 < c <= 1 for c in clips) and min(clips) < 0.999


def test_training_on_the_whole_output_alone_lowers_the_divergence(data):
    result = apply(quantized(), "activate{group=32}", data)
    assert improved(result.summary) and not result.rows and result.summary["layers"] == 2


def test_ranges_are_those_of_the_inputs_before_the_clip(data):
    result = apply(quantized(), "activate{group=0,steps=0}", data)
    inputs = result.summary["input_ranges"]
    assert len(inputs) == 2 * 4 and [found["layer"] for found in inputs.values()] == [0] * 4 + [1] * 4
    seen: list[torch.Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            if n.target is _lbllm.fake_quantize.default:
                seen.append(self.env[n.args[0]])
            return super().run_node(n)

    batch = next(batches_of(data.calibration[0], SEQUENCES))
    Watch(result.program.module).run(*result.program.arguments(batch))
    for x, found in zip(seen, inputs.values(), strict=True):
        assert found["low"] == pytest.approx(float(x.amin(-1).mean()), rel=1e-4)
        assert found["high"] == pytest.approx(float(x.amax(-1).mean()), rel=1e-4)
        assert found["peak"] == pytest.approx(float(x.abs().max()), rel=1e-4)


def test_ranges_need_nothing_behind_the_last_quantizer(data):
    result = apply(quantized(), "activate{group=0,steps=0}", data)
    cut = with_tensors(result.program, {"wrong": torch.empty(0, 0)})
    head = _calls(cut, _aten.linear.default)[-1]
    with cut.graph.inserting_before(head):
        head.update_arg(1, cut.graph.get_attr("wrong"))
    assert input_ranges(cut, data.calibration[0]) == result.summary["input_ranges"]


def test_the_reported_divergence_is_that_of_the_program(trained, data):
    pairs = [(annotated().run(b), trained.program.run(b)) for b in data.validation]
    measured = sum(float(kl_loss(*pair)) for pair in pairs) / len(pairs)
    assert trained.summary["kl_after"] == pytest.approx(measured, rel=1e-4)


def test_planes_are_frozen(trained):
    before, after = dict(quantized().parameters()), dict(trained.program.parameters())
    for path, tensor in before.items():
        if path.endswith((".sign", ".bitmap")):
            assert torch.equal(tensor, after[path])
    assert any(not torch.equal(t, after[p]) for p, t in before.items() if p.endswith(".levels"))


@pytest.mark.parametrize("options", ["epochs=1,lr_clip=0,lr_levels=0", "steps=0"])
def test_without_learning_rate_nothing_improves(options, data):
    result = apply(quantized(), f"activate{{group=32,{options}}}", data)
    assert not improved(result.summary)
    assert result.summary["kl_after"] == result.summary["kl_before"] > 0
    assert same_tensors(result.program, insert_quantizers(quantized(), 4, 32, 4))


@pytest.mark.parametrize("bits", [8, 16])
def test_more_bits_cost_less(bits, trained, data):
    result = apply(quantized(), f"activate{{bits={bits},kv={bits},group=0,steps=0}}", data)
    assert result.summary["kl_before"] < trained.summary["kl_before"]


def test_a_resumed_run_gives_the_same_bytes(trained, data):
    memory = Memory(saves=2)  # the channels' weights and one layer
    with pytest.raises(Memory.KilledError):
        apply(quantized(), _TEXT, dataclasses.replace(data, checkpoints=memory))
    memory.left = None
    resumed = apply(quantized(), _TEXT, dataclasses.replace(data, checkpoints=memory))
    assert memory.loaded == 2
    assert same_tensors(resumed.program, trained.program)
    assert resumed.summary == trained.summary


def test_preconditions_are_named(trained, data):
    with pytest.raises(PassError, match="ptq"):
        apply(annotated(), "activate", data)
    with pytest.raises(PassError, match="quantized already"):
        apply(trained.program, "activate{group=32}", data)
    with pytest.raises(PassError, match="choose 32, as the weights have groups of 32, or 0"):
        apply(quantized(), "activate{group=64}", data)
    with pytest.raises(PassError, match="kv cannot be 5"):
        apply(quantized(), "activate{group=32,kv=5}", data)


def test_a_plain_module_reports_its_error_and_has_no_cache(data):
    program = dataclasses.replace(quantized(), kind="module")
    teacher = dataclasses.replace(annotated(), kind="module")
    result = apply(program, "activate{group=32,steps=0}", dataclasses.replace(data, teacher=teacher))
    assert not _calls(result.program, _lbllm.fake_quantize_kv.default)
    assert 0 < result.summary["error_after"] < 1
