"""The recipe db-llm: dual binarization, planes that follow their scales, tokens weighed by entropy."""

from __future__ import annotations

import math

import pytest
import stages
import torch
from lbllm_compile.codegen.levels import DUAL
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.calibrate.alignment import kl_loss
from lbllm_compile.passes.ir.annotations import linears
from lbllm_compile.passes.lower import check_weights, stored_weights
from proven_kernels import kernels_of
from reference_kernels import ReferenceKernels
from zoo import user_model

from lbllm_compile import frontend, plan, recipe
from lbllm_compile.options import CompileOptions
from lbllm_compile.runtime import CompiledModel


def text(**choices) -> str:
    return pipeline.render(recipe.passes(recipe.Choices(recipe="db-llm", **choices), "cpu"))


def test_weights_alone_are_quantized_and_trained():
    assert text(preset="quick") == (
        'canonicalize,annotate{scheme="*: levels=dual"},observe,ptq,'
        "finetune{steps=32,lr_norms=0.0,planes=nearest,deviation=0.5},activate{bits=16,kv=16,steps=0},"
        "head,merge,lower{target=cpu},cache,cleanup"
    )


@pytest.mark.parametrize(("preset", "steps"), [("quick", 32), ("default", 128), ("best", 4096)])
def test_the_preset_says_how_long_weights_train(preset, steps):
    (training,) = (item for item in pipeline.parse(text(preset=preset)) if item.name == "finetune")
    assert training.steps == steps
    size = recipe.preset(preset)
    assert steps * training.batch == size.distill_epochs * min(size.sequences, size.layer_sequences)


def test_activations_of_fewer_bits_are_appended():
    passes = pipeline.parse(text(preset="default", act_bits=4))
    names = [item.name for item in passes]
    assert names[3:7] == ["ptq", "finetune", "activate", "finetune"]
    weights, activate, tuning = passes[4:7]
    assert (activate.bits, activate.kv, activate.group) == (4, 4, 64)
    assert weights.planes == "nearest" and tuning.planes == "frozen" and weights.deviation == tuning.deviation == 0.5
    assert "activate{kv=16" in text(act_bits=4, kv_bits=16).replace("bits=4,", "")


def test_entries_of_a_scheme_win_over_the_recipes():
    (annotate,) = (item for item in pipeline.parse(text(scheme=("*.up_proj: levels=free",))) if item.name == "annotate")
    assert annotate.scheme == "*: levels=dual; *.up_proj: levels=free"


@pytest.mark.parametrize("act_bits", [16, 4])
def test_a_model_goes_through_to_kernels(act_bits):
    context = stages.context(count=16, probe=stages.batches(1, length=9, seed=2)[0])
    passes = recipe.passes(recipe.Choices(recipe="db-llm", preset="quick", group=32, act_bits=act_bits), "cpu")
    program = frontend.capture(user_model("llama"))
    context.teacher, summary = None, {}
    for item in passes:
        result = item.apply(program, context)
        program, summary[item.name] = result.program, result.summary
        if item.name == "annotate":
            context.teacher = program
    assert summary["finetune"]["kl_after"] < summary["finetune"]["kl_before"]
    assert summary["finetune"]["sign_flips"] > 0 and summary["finetune"]["bitmap_flips"] > 0
    check_weights(program)
    decoder = [info for _, info in linears(program) if info.role == "decoder"]
    assert {(info.scheme.levels, info.scheme.act_bits) for info in decoder} == {("dual", act_bits)}
    for weight in stored_weights(program).values():
        zero, ends, inner = weight.levels == 0, weight.levels[..., [0, 3]].int(), weight.levels[..., [1, 2]].int()
        assert bool(zero.any(-1).all()) and torch.equal(ends.sum(-1), inner.sum(-1))
        assert bool(DUAL.holds(weight.levels).all())
    kernels = kernels_of(program)
    ids, mask = (context.probe[name] for name in ("input_ids", "attention_mask"))
    logits = CompiledModel(program, kernels).logits(ids, mask)
    assert torch.equal(logits, CompiledModel(program, ReferenceKernels()).logits(ids, mask))


def test_the_plan_counts_both_trainings_and_the_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "matmul_speed", lambda *_, **__: 1e11)
    user_model("llama").module.save_pretrained(tmp_path / "model")

    def planned(pipeline_text: str) -> plan.Plan:
        return plan.make_plan(CompileOptions(str(tmp_path / "model"), pipeline=pipeline_text, preset="quick"))

    text = (
        "canonicalize,annotate,observe,ptq,finetune{{steps=8{0}}},activate{{steps=0}}{1},head,merge,lower,cache,cleanup"
    )
    once, twice = planned(text.format("", "")), planned(text.format("", ",finetune{steps=8}"))
    assert twice.seconds["finetune"] > 1.2 * once.seconds["finetune"]
    shapes = [linear.shape for linear in once.linears if linear.treatment.startswith("W(1+1)")]
    weights = sum(math.prod(shape) for shape in shapes)
    name = "training all layers together"
    for options, numbers in ((",planes=nearest", 1), (",planes=nearest,lr_weight=0.01", 3)):
        other = planned(text.format(options, ""))
        assert other.memory[name] - once.memory[name] == 4 * numbers * weights


@pytest.mark.parametrize("deviation", [0.5, 1.3])
def test_a_token_weighs_by_the_entropies_of_both_models(deviation):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn((2, 20, 11), generator=generator) for _ in range(2))
    total = weights = 0.0
    for row in range(40):
        p, q = (each.flatten(0, 1)[row].double().softmax(-1).tolist() for each in (teacher, student))
        entropies = [-sum(value * math.log(value) for value in each) for each in (p, q)]
        weight = (entropies[0] * entropies[1]) ** deviation
        total += weight * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        weights += weight
    assert float(kl_loss(teacher, student, deviation)) == pytest.approx(total / weights, rel=1e-5)
