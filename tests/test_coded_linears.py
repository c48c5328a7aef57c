"""4-bit codes of decoder linears: fitted, left alone by training, merged, lowered and run natively."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from graphs import context as bare_context
from graphs import normal, rewrites
from lbllm_compile.codegen.operators import Arguments
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import linears
from lbllm_compile.passes.base import PassError
from lbllm_compile.passes.calibrate.int4 import quantize_int4
from lbllm_compile.passes.calibrate.layers import CODED, split
from lbllm_compile.passes.calibrate.simulate import lift
from lbllm_compile.passes.ir.program import Program, get_attribute
from lbllm_compile.passes.ir.rewrite import calls, operands_of
from lbllm_compile.passes.ir.scheme import Scheme
from lbllm_compile.passes.lower import check_weights, coded_linears, stored_int4, stored_weights
from lbllm_compile.passes.merge import Merge
from proven_kernels import kernels_of
from reference_kernels import ReferenceKernels
from stages import Memory, apply, batches, context, same_tensors
from zoo import VOCABULARY, captured

from lbllm_compile.evaluate import sizes
from lbllm_compile.html_report.contents import parts_of
from lbllm_compile.lowering.build import build_native
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.report.stages import verdicts
from lbllm_compile.runtime import CompiledModel

_lbllm = torch.ops.lbllm

SOME = "*.0.self_attn: bits=4 group=32; *.down_proj: bits=4 group=64 act=8; *.1.mlp: act-group=0; *.up_proj: bits=4"
"""Codes for the first layer's attention, all of ``down_proj``, and one of two linears behind one input."""


@functools.cache
def told(scheme: str) -> Program:
    return apply(captured("llama")[1], f'canonicalize,annotate{{scheme="{scheme}"}}').program


def held(scheme: str, **options):
    return dataclasses.replace(context(count=4, **options), teacher=told(scheme))


@functools.cache
def fitted(scheme: str):
    return apply(told(scheme), "observe,ptq{group=32}", held(scheme))


def tensors(program: Program, path: str) -> list[torch.Tensor]:
    return [get_attribute(program.module, f"{path}.weight.{name}") for name in CODED]


# Fitting


def test_linears_of_codes_are_fitted_beside_those_of_planes():
    found = fitted(SOME)
    unpacks = {info.path: operands_of(node)[1] for node, info in linears(found.program) if info.role == "decoder"}
    coded = {path: Arguments(n).group for path, n in unpacks.items() if n.target is _lbllm.unpack_int4.default}
    assert coded == {
        **{f"model.layers.0.self_attn.{name}_proj": 32 for name in "qkvo"},
        **{f"model.layers.{layer}.mlp.down_proj": 64 for layer in range(2)},
        **{f"model.layers.{layer}.mlp.up_proj": 32 for layer in range(2)},
    }
    names = {path.rpartition(".")[2] for path, _ in found.program.parameters() if "0.mlp.down_proj" in path}
    assert names == set(CODED)
    rows = {row["linear"].removeprefix("model.layers."): row for row in found.rows}
    assert rows["0.mlp.down_proj"]["scheme"] == "bits=4 group=64"
    plain = {row["linear"].removeprefix("model.layers."): row for row in fitted("").rows}
    for path in ("0.self_attn.q_proj", "0.self_attn.o_proj", "0.mlp.up_proj", "1.mlp.down_proj"):
        assert 0 < rows[path]["error"] < 0.2 * plain[path]["error"]


def test_linears_with_one_input_and_scheme_share_one_table():
    program = fitted(SOME).program
    q, k, v, o = (tensors(program, f"model.layers.0.self_attn.{name}_proj") for name in "qkvo")
    assert torch.equal(q[1], k[1]) and torch.equal(q[1], v[1]) and not torch.equal(q[1], o[1])
    assert not torch.equal(q[0][: len(k[0])], k[0])


def test_a_fit_without_compensation_rounds_to_the_nearest_level():
    text = "observe,ptq{group=32,compensate=false}"
    rounded = apply(told(SOME), text, held(SOME))
    path = "model.layers.0.mlp.down_proj"
    expected = quantize_int4(get_attribute(told(SOME).module, f"{path}.weight"), 64)
    assert all(map(torch.equal, tensors(rounded.program, path), (expected.packed, expected.table, expected.scale)))
    errors = [next(row["error"] for row in result.rows if row["linear"] == path) for result in (rounded, fitted(SOME))]
    assert 0 < errors[1] < errors[0]


def test_a_resumed_fit_gives_the_same_bytes_and_takes_no_layer_of_planes():
    memory = Memory(saves=1)
    with pytest.raises(Memory.KilledError):
        apply(told(SOME), "observe,ptq{group=32}", held(SOME, checkpoints=memory))
    memory.left = None
    resumed = apply(told(SOME), "observe,ptq{group=32}", held(SOME, checkpoints=memory))
    assert memory.loaded == 1 and same_tensors(resumed.program, fitted(SOME).program)
    with pytest.raises(PassError, match="was fitted with bits=4 group=32, not group=32; pass --fresh"):
        apply(told(""), "observe,ptq{group=32}", held("", checkpoints=memory))


def test_bits_are_those_of_the_codes_as_stored():
    program = lowered(SOME, "activate{group=32,steps=1}")
    weights, bits = 0, 0
    for path, weight in {**stored_weights(program), **stored_int4(program)}.items():
        weights += weight.out_features * weight.in_features
        parts = ("sign", "bitmap", "levels", "scale") if path in stored_weights(program) else CODED
        kept = [tensor for name, tensor in program.parameters() if name in {f"{path}.{part}" for part in parts}]
        bits += 8 * sum(tensor.numel() * tensor.element_size() for tensor in kept)
    figures = sizes(program, None)
    assert figures["bits_per_weight"] == bits / weights and figures["bytes_decoder"] == bits / 8
    assert 3.5 < figures["bits_per_weight"] < 4.6


def test_stacked_experts_have_no_codes():
    with pytest.raises(PassError, match=r"'.*experts.*' are stacked experts, which have no codes; leave bits=4 out"):
        apply(captured("mixtral")[1], 'canonicalize,annotate{scheme="*: bits=4"}')


def test_channels_of_8_bits_do_not_go_with_codes():
    with pytest.raises(PassError, match=r"'model\.layers\.0\.mlp\.up_proj' has 4-bit codes, beside which no"):
        apply(told("*.mlp.*: act-group=0; *.up_proj: bits=4"), "outliers", held(""))


# Training


def record(item, result) -> pipeline.PassRecord:
    """What a compile keeps of a pass that has run."""
    return pipeline.PassRecord(1, item.name, item.name, 1.0, 1.0, 9, 9, "", 0.0, result.rows, result.summary)


@pytest.mark.parametrize("scheme", [SOME, "*.layers.0.*: bits=4", "*: bits=4"])
def test_training_leaves_codes_as_they_were_fitted(scheme):
    """Layers of codes alone among them, whose clip factors train, and a model of nothing else."""
    text = "distill{epochs=1},finetune{steps=1},activate{group=32,epochs=1,steps=1},finetune{steps=2}"
    item, data = told(scheme), held(scheme)
    for each in pipeline.parse(f"observe,ptq{{group=32}},{text}"):
        result = each.apply(item, data)
        if each.name == "distill":
            trained = [row["layer"] for row in result.rows if "sign_flips" in row]
            assert trained == {SOME: [0, 1], "*.layers.0.*: bits=4": [1], "*: bits=4": []}[scheme]
            assert len(verdicts([record(each, result)])) == bool(trained)
        item, data = result.program, dataclasses.replace(data, channel_weights=result.channel_weights)
    before, after = (dict(program.parameters()) for program in (fitted(scheme).program, item))
    coded = {path for path in before if path.endswith(CODED)}
    assert coded and all(torch.equal(before[path], after[path]) for path in coded)


def test_codes_are_dequantized_once_for_a_training():
    layer = split(fitted(SOME).program).layers[0]
    lifted = lift(layer)
    assert len(lifted.coded) == 6 and len(lifted.weights) == 1
    assert not calls(lifted.module.graph, _lbllm.unpack_int4.default)
    path = "model.layers.0.mlp.down_proj.weight"
    expected = _lbllm.unpack_int4(*tensors(fitted(SOME).program, path.removesuffix(".weight")), 104, 64)
    assert torch.equal(lifted.constants()[path], expected)


# Merging


def coded_weights(**tables: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two matrices of 4-bit codes, [16, 40] and [8, 40], and the clip factors of their input."""
    found = {"q.input_clip": torch.tensor([0.95, 0.9])}
    for name, rows in (("q", 16), ("k", 8)):
        coded = quantize_int4(normal(rows, 40, seed=rows), 32)
        table = tables.get(name, quantize_int4(normal(16, 40, seed=16), 32).table)
        found |= dict(zip((f"{name}.weight.{part}" for part in CODED), (coded.packed, table, coded.scale), strict=True))
    return found


APART = """
    decoder layer 0:
    %x = input x
    %clip: f32[2] = weight q.input_clip
    %quantized = lbllm.fake_quantize(%x, %clip, 4, 32)
    %q_codes: u8[16, 20] = weight q.weight.codes
    %q_table: i8[16] = weight q.weight.table
    %q_scale: f16[16, 2] = weight q.weight.code_scale
    %q_weight = lbllm.unpack_int4(%q_codes, %q_table, %q_scale, 40, 32)
    %q = aten.linear(%quantized, %q_weight) {path="q", role="decoder"}
    %k_codes: u8[8, 20] = weight k.weight.codes
    %k_table: i8[16] = weight k.weight.table
    %k_scale: f16[8, 2] = weight k.weight.code_scale
    %k_weight = lbllm.unpack_int4(%k_codes, %k_table, %k_scale, 40, 32)
    %k = aten.linear(%quantized, %k_weight) {path="k", role="decoder"}
    return (%q, %k)
"""


def test_linears_of_codes_with_one_table_are_stacked():
    expected = """
        decoder layer 0:
        %x = input x
        %clip: f32[2] = weight q.input_clip
        %quantized = lbllm.fake_quantize(%x, %clip, 4, 32)
        %q_codes: u8[16, 20] = weight q.weight.codes
        %k_codes: u8[8, 20] = weight k.weight.codes
        %codes: u8[24, 20] = aten.cat([%q_codes, %k_codes])
        %table: i8[16] = weight q.weight.table
        %q_scale: f16[16, 2] = weight q.weight.code_scale
        %k_scale: f16[8, 2] = weight k.weight.code_scale
        %scale: f16[24, 2] = aten.cat([%q_scale, %k_scale])
        %weight = lbllm.unpack_int4(%codes, %table, %scale, 40, 32)
        %both: f32[3, 5, 24] = aten.linear(%quantized, %weight) {path="q+k", weight="q.weight", role="decoder",
            scheme="bits=4 group=32 act=4 act-group=32 codebook=none"}
        %split = aten.split_with_sizes(%both, [16, 8], -1)
        %q: f32[3, 5, 16] = getitem(%split, 0)
        %k: f32[3, 5, 8] = getitem(%split, 1)
        return (%q, %k)
    """
    rewrites(Merge(), APART, expected, bare_context({"x": normal(3, 5, 40, seed=4)}), coded_weights())


def test_linears_of_codes_with_two_tables_stay_apart():
    other = quantize_int4(normal(8, 40, seed=8), 32).table
    rewrites(Merge(), APART, APART, bare_context({"x": normal(3, 5, 40, seed=4)}), coded_weights(k=other))


# From text to native code, and what is told of it


@functools.cache
def lowered(scheme: str, activate: str, name: str = "llama") -> Program:
    text = (
        f'canonicalize,annotate{{scheme="{scheme}"}},smooth,observe,ptq{{group=32}},{activate},'
        "head,merge,lower,cache,cleanup"
    )
    data = context(count=4, probe=batches(1, length=9, seed=2)[0])
    data.teacher = None
    return pipeline.run(captured(name)[1], pipeline.parse(text), data)[0]


def test_a_lowered_program_says_which_linears_have_codes():
    program = lowered(SOME, "activate{group=32,steps=1}")
    found = {info.path.removeprefix("model.layers."): info.scheme for _, info in linears(program)}
    assert found["0.self_attn.q_proj+k_proj+v_proj"] == Scheme(32, "free", 4, 32, "none", bits=4)
    assert found["1.self_attn.q_proj+k_proj+v_proj"] == Scheme(32, "free", 4, 32, "none")
    assert found["0.mlp.down_proj"] == Scheme(64, "free", 8, 32, "none", bits=4)
    assert found["1.mlp.up_proj"] == Scheme(32, "free", 4, 0, "none", bits=4)
    assert found["lm_head"] == Scheme(None, "free", 8, 64, "none", bits=8)
    check_weights(program)
    weights = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}
    weights |= {f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in range(2) for name in ("up", "down")}
    assert coded_linears(program) == stored_int4(program).keys() == weights
    assert not weights & stored_weights(program).keys()


def test_the_report_counts_codes_as_those_of_the_layers():
    parts = parts_of(lowered(SOME, "activate{group=32,steps=1}"))
    path = "model.layers.0.self_attn.k_proj.weight"
    assert parts[f"{path}.codes"] == "4-bit codes" and parts[f"{path}.code_scale"] == "scales and levels of codes"
    assert {part for path, part in parts.items() if path.endswith(".rows")} == {"int8 embedding and head"}


@pytest.mark.parametrize(
    ("name", "scheme", "activate", "forms"),
    [
        ("llama", SOME, "activate{group=32,steps=1}", {(32, 4, False), (32, 4, True), (32, 8, False), (64, 8, True)}),
        ("llama", "*: bits=4 group=256", "activate{bits=16,group=256,kv=16,steps=0}", {(256, 16, False)}),
        ("qwen2", "*: bits=4 group=128", "activate{group=128,ranges=knees,steps=1}", {(128, 8, False)}),
    ],
)
def test_codes_give_the_references_bits_and_run_natively(name, scheme, activate, forms, tmp_path, monkeypatch):
    """Prompts of one sequence and of several, and one token after the other; in qwen2 with biases."""
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path))
    program = lowered(scheme, activate, name)
    inner = [spec for spec in requirements(program).linears if spec.out_features != VOCABULARY]
    coded = [spec for spec in inner if spec.kind == "int4"]
    assert {(spec.group, spec.act_bits, spec.per_token) for spec in coded} == forms
    assert any(spec.bias for spec in coded) == (name == "qwen2")
    kernels = kernels_of(program)
    executor = CompiledModel(program, kernels)
    native = build_native(program, kernels, tmp_path)
    assert native is not None and native.description.merged
    for batch, length in ((1, 40), (3, 9)):
        item = batches(1, rows=batch, length=length, seed=3)[0]
        ids, mask = item["input_ids"], item["attention_mask"]
        logits = executor.logits(ids, mask)
        assert torch.equal(logits, CompiledModel(program, ReferenceKernels()).logits(ids, mask))
        found = torch.from_numpy(np.asarray(native.session(batch).logits(ids.numpy())))
        assert float((found - logits).norm() / logits.norm()) < 3e-3, "norms and gates round otherwise"
        session = native.session(batch)
        steps = torch.from_numpy(np.stack([session.step(ids[:, i : i + 1].numpy()) for i in range(6)], 1))
        assert torch.equal(steps.argmax(-1), logits[:, :6].argmax(-1))
