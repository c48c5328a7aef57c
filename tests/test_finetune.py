"""Levels and clip factors of all layers tuned together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lbllm_compile.codegen.format import QuantizedWeight, unpack_plane
from lbllm_compile.codegen.operators import Arguments
from lbllm_compile.codegen.operators.lbllm.linears import WEIGHT
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext, PassError, PassResult
from lbllm_compile.passes.calibrate.alignment import Together, kl_loss
from lbllm_compile.passes.calibrate.chains import Chains
from lbllm_compile.passes.ir.program import Program, get_attribute
from stages import Memory, Notes, annotated, apply, batches, context, improved, quantized, same_tensors

_TEXT = "finetune{steps=12,every=4,precision=float32}"
_ACTIVATE = "activate{group=32,steps=0}"


def weights_of(program: Program) -> list[QuantizedWeight]:
    """The quantized matrices of a simulated program."""
    found = {}
    for node in program.graph.nodes:
        if node.target is torch.ops.lbllm.unpack_weight.default:
            given = Arguments(node)
            tensors = [get_attribute(program.module, part.target) for part in given.pick(*WEIGHT)]
            found[given.sign.target] = QuantizedWeight(*tensors, in_features=given.in_features, group=given.group)
    return list(found.values())


@pytest.fixture(scope="module")
def data() -> PassContext:
    return context(count=32)


@pytest.fixture(scope="module")
def tuned(data: PassContext) -> PassResult:
    return apply(quantized(), _TEXT, data)


def test_tuning_lowers_the_divergence_that_the_program_has(tuned, data):
    assert improved(tuned.summary)
    pairs = [(annotated().run(b), tuned.program.run(b)) for b in data.validation]
    measured = sum(float(kl_loss(*pair)) for pair in pairs) / len(pairs)
    assert tuned.summary["kl_after"] == pytest.approx(measured, rel=1e-4)


def changed_parameters(before: Program, after: Program) -> set[str]:
    old, new = dict(before.parameters()), dict(after.parameters())
    return {path for path in old if not torch.equal(old[path], new[path])}


def test_only_levels_and_norms_change_without_quantized_activations(tuned):
    changed = changed_parameters(quantized(), tuned.program)
    norms = {path for path, _ in quantized().parameters() if path.endswith("layernorm.weight")}
    assert norms and norms <= changed
    assert {path.rpartition(".")[2] for path in changed - norms} == {"levels", "scale"}


def test_norms_without_a_learning_rate_stay(data):
    result = apply(quantized(), f"{_TEXT[:-1]},lr_norms=0}}", data)
    assert improved(result.summary)
    assert {p.rpartition(".")[2] for p in changed_parameters(quantized(), result.program)} == {"levels", "scale"}


def test_biases_train_too():
    """Qwen2's query, key and value have biases; every one of them and every norm inside a layer changes."""
    before = quantized("qwen2")
    result = apply(before, "finetune{steps=8,lr_levels=0,lr_norms=0.002,every=2,precision=float32}", context("qwen2"))
    vectors = {p for p, t in before.parameters() if ".layers." in p and t.dim() == 1 and p.endswith(("weight", "bias"))}
    assert {p.rpartition(".")[2] for p in vectors} == {"weight", "bias"}
    assert changed_parameters(before, result.program) == vectors and improved(result.summary)


def test_clip_factors_change_with_quantized_activations(data):
    before = apply(quantized(), _ACTIVATE, data).program
    result = apply(before, "finetune{steps=12,lr_clip=0.2,lr_norms=0,every=4}", data)
    assert improved(result.summary)
    clips = [t for path, t in result.program.parameters() if path.endswith("input_clip")]
    assert clips and all(float(t.max()) <= 1 for t in clips) and min(float(t.min()) for t in clips) < 0.999


@pytest.mark.parametrize("options", ["steps=0", "steps=4,lr_levels=0,lr_clip=0,lr_norms=0"])
def test_without_learning_rate_nothing_changes(options, data):
    before = apply(quantized(), _ACTIVATE, data).program
    result = apply(before, f"finetune{{{options}}}", data)
    assert not improved(result.summary) and same_tensors(result.program, before)


def test_uncertain_tokens_can_weigh_more(data):
    plain, weighted = (apply(quantized(), f"finetune{{steps=4,deviation={d}}}", data) for d in (0, 1))
    assert improved(weighted.summary) and not same_tensors(plain.program, weighted.program)
    teacher = torch.tensor([[9.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    student = torch.zeros(2, 3)
    each = [float(kl_loss(teacher[i : i + 1], student[i : i + 1])) for i in range(2)]
    assert float(kl_loss(teacher, student)) == pytest.approx(sum(each) / 2)
    assert each[1] < float(kl_loss(teacher, student, 1.0)) < sum(each) / 2


@pytest.mark.parametrize("lr_weight", [0.0, 0.002])
def test_planes_can_follow_the_levels_and_a_latent(lr_weight, data):
    """Given the quantized program, the result is one of other planes and levels, closer to the float model."""
    before = quantized()
    text = f"finetune{{steps=12,every=4,precision=float32,planes=nearest,lr_levels=0.004,lr_weight={lr_weight}}}"
    result = apply(before, text, data)
    assert improved(result.summary)
    changed = {path.rpartition(".")[2] for path in changed_parameters(before, result.program)}
    assert changed == {"sign", "bitmap", "levels", "scale", "weight"}
    old, new = dict(before.parameters()), dict(result.program.parameters())
    bits = {name: [old[p] ^ new[p] for p in old if p.endswith(f".{name}")] for name in ("sign", "bitmap")}
    for name, planes in bits.items():
        flipped = sum(int(unpack_plane(plane, 8 * plane.shape[-1]).sum()) for plane in planes)
        elements = sum(weight.codes().numel() for weight in weights_of(result.program))
        assert result.summary[f"{name}_flips"] == pytest.approx(flipped / elements) and flipped > 0
    pairs = [(annotated().run(b), result.program.run(b)) for b in data.validation]
    measured = sum(float(kl_loss(*pair)) for pair in pairs) / len(pairs)
    assert result.summary["kl_after"] == pytest.approx(measured, rel=1e-4)  # what was trained is what was packed


def test_a_latent_needs_planes_that_change(data):
    with pytest.raises(PassError, match="add planes=nearest"):
        apply(quantized(), "finetune{lr_weight=0.1}", data)


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_a_resumed_run_gives_the_same_bytes(saves, tuned, data):
    memory = Memory(saves=saves)
    with pytest.raises(Memory.KilledError):
        apply(quantized(), _TEXT, dataclasses.replace(data, checkpoints=memory))
    memory.left = None
    resumed = apply(quantized(), _TEXT, dataclasses.replace(data, checkpoints=memory))
    assert memory.loaded == 1
    assert same_tensors(resumed.program, tuned.program) and resumed.summary == tuned.summary


def test_a_pass_named_twice_works_twice(data):
    memory = Memory()

    def run(text: str, checkpoints: Memory) -> Program:
        surroundings = dataclasses.replace(data, checkpoints=checkpoints, probe=batches(1)[0])
        return pipeline.run(quantized(), pipeline.parse(text), surroundings)[0]

    once, twice = run(_TEXT, Memory()), run(f"{_TEXT},{_TEXT}", memory)
    assert not same_tensors(once, twice)
    resumed = run(f"{_TEXT},{_TEXT}", memory)
    assert same_tensors(resumed, twice) and memory.loaded == 2


def test_a_finished_tuning_streams_nothing(data, monkeypatch):
    memory = Memory()
    apply(quantized(), _TEXT, dataclasses.replace(data, checkpoints=memory))
    monkeypatch.setattr(Chains, "start", None)
    apply(quantized(), _TEXT, dataclasses.replace(data, checkpoints=memory))


def test_behind_the_head_it_is_refused(data):
    with pytest.raises(PassError, match="move it before 'head'"):
        apply(apply(quantized(), "head", data).program, "finetune{steps=2}", data)


def test_a_diverging_training_says_what_to_do(data):
    with pytest.raises(PassError, match="diverged after 1 steps; lower its learning rates"):
        apply(quantized(), "finetune{steps=4,lr_levels=1e12}", data)


@pytest.mark.parametrize(("steps", "factor"), [(48, 1.0), (192, 0.5), (1, 2.0)])
def test_the_more_steps_the_lower_the_rates(data, monkeypatch, steps, factor):
    used = []

    def run(together, *_):
        used.append((together.lr_levels, together.lr_clip, together.lr_knees, together.lr_norms))
        return {}, {}

    monkeypatch.setattr(Together, "run", run)
    apply(
        quantized(), f"finetune{{steps={steps},repeats=99,lr_levels=0.25,lr_clip=0.5,lr_knees=1,lr_norms=0.125}}", data
    )
    assert used == [(0.25 * factor, 0.5 * factor, factor, 0.125 * factor)]


def test_few_sequences_are_not_seen_too_often(data, monkeypatch):
    used: list[int] = []
    monkeypatch.setattr(Together, "run", lambda together, *_: used.append(together.steps) or ({}, {}))
    notes = Notes()
    few = dataclasses.replace(data, calibration=batches(4), progress=notes)
    for text in ("finetune{steps=5}", "finetune{steps=9}", "finetune{steps=9,repeats=1}"):
        apply(quantized(), text, few)
    assert used == [5, 6, 2]  # of two batches of four sequences
    assert [note.split(",")[0] for note in notes.said] == ["finetune: 6 steps", "finetune: 2 steps"]


@pytest.mark.parametrize("name", ["distill", "activate", "finetune"])
def test_a_rehearsal_is_short(name):
    item = pipeline.make(name, {"epochs": 9} if name == "distill" else {"steps": 900}).rehearsal()
    assert getattr(item, "epochs", 0) <= 1 and getattr(item, "steps", 0) <= 1


@pytest.mark.parametrize(
    "text", ["finetune{every=0}", "finetune{batch=0}", "distill{epochs=-1}", "activate{lr_clip=nan}"]
)
def test_options_out_of_range_are_refused(text):
    with pytest.raises(pipeline.PipelineError, match="cannot be"):
        pipeline.parse(text)


def test_it_needs_quantized_weights(data):
    with pytest.raises(PassError, match="ptq"):
        apply(annotated(), "finetune", data)
