"""The native program agrees with the eager model, runs without torch, and is proven before it is kept."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import runtime_only
import tokenizers
import torch
import transformers
from lbllm_compile.codegen import cache as cache_files
from lbllm_compile.codegen import operators, progress
from lbllm_compile.codegen.cache import sha256
from lbllm_compile.codegen.cpu import space as cpu
from lbllm_compile.codegen.cpu.backend import CpuBackend
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.errors import KernelError, UntranslatableError
from lbllm_compile.codegen.kernels.dense import dense
from lbllm_compile.codegen.operators import Arguments, registry
from lbllm_compile.codegen.operators.aten.shapes import infer
from lbllm_compile.codegen.operators.translator import refusal
from lbllm_compile.codegen.program import compile as compile_module
from lbllm_compile.codegen.program.builder import Layout, TensorSpec
from lbllm_compile.codegen.program.compile import operators_to_loops
from lbllm_compile.codegen.program.fuse import fuse_rows
from lbllm_compile.codegen.program.queries import quotient, same_sizes
from lbllm_compile.codegen.sizes import MIN_CAPACITY
from lbllm_compile.codegen.targets import Target, host
from lbllm_compile.codegen.threads import one_torch_thread
from lbllm_compile.codegen.tvm_api import compile_functions, symbolic_dimension
from lbllm_compile.passes.ir import graph_json
from lbllm_compile.passes.ir.program import get_attribute, set_attribute
from lbllm_compile.passes.ir.rewrite import calls
from proven_kernels import kernels_of
from reference_kernels import ReferenceKernels
from rtn import simulate
from stages import Notes
from test_fuse import called
from test_keep_dense import TINY
from test_runtime import CONTEXT, language_model
from test_runtime import VOCABULARY as TOY_VOCABULARY
from test_zoo import DECODE_STEPS, agree, apply, inputs, oracle, stages
from zoo import ZOO, captured

from benchmarks import decoders
from lbllm_compile import artifact, driver, frontend, recipe
from lbllm_compile.bench.decoders import LOADERS, NATIVE, Loading
from lbllm_compile.lowering import build as prepare
from lbllm_compile.lowering import translate
from lbllm_compile.lowering.compare import DisagreementError
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.native import description as described
from lbllm_compile.native import program as native
from lbllm_compile.native import text
from lbllm_compile.native.program import NativeModel, NativeProgram
from lbllm_compile.options import CompileOptions
from lbllm_compile.runtime import CompiledModel, GenerationError, Sampling, load
from lbllm_compile.tune import TuneOptions, tune

ROOT = Path(__file__).parent.parent
TRANSLATED = [name if name in ("llama", "mixtral") else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]


NO_KERNELS = KernelSet(Target.parse("cpu"), {}, {}, [], {}, 0)


def build(program, folder, progress=None) -> NativeProgram | None:
    return prepare.build_native(program, kernels_of(program), folder, progress)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@functools.cache
def program(name: str) -> NativeProgram:
    found = build(stages(name)[1], Path(tempfile.mkdtemp(dir=native.cache_directory())))
    assert found is not None
    return found


@functools.cache
def toy() -> NativeProgram:
    found = build(language_model(), Path(tempfile.mkdtemp(dir=native.cache_directory())))
    assert found is not None
    return found


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_prompt_gives_the_eager_models_logits(name):
    for batch, length in ((1, 1), (1, 7), (3, 33)):
        item = inputs(batch, length)
        session = program(name).session(batch)
        session.start(item["attention_mask"].numpy())
        logits = torch.from_numpy(session.logits(item["input_ids"].numpy()))
        agree(logits, oracle(name)(item), item["attention_mask"].bool())


@pytest.mark.parametrize("name", TRANSLATED)
def test_decoding_gives_the_eager_models_logits(name):
    """One sequence decodes in few launches, a padded batch kernel by kernel."""
    for batch, prefill in ((1, 7), (3, 12)):
        item = inputs(batch, prefill + DECODE_STEPS)
        ids, mask = item["input_ids"].numpy(), item["attention_mask"]
        session = program(name).session(batch)
        session.start(mask[:, :prefill].numpy())
        steps = [session.step(ids[:, :prefill])]
        steps += [session.step(ids[:, i : i + 1]) for i in range(prefill, prefill + DECODE_STEPS)]
        expected = oracle(name)(item)[:, prefill - 1 :]
        agree(torch.from_numpy(np.stack(steps, 1)), expected, torch.ones(batch, DECODE_STEPS + 1, dtype=torch.bool))


def test_experts_give_natively_what_the_executor_gives():
    """A few tokens, prompts of a batch, and one token after the other; norms and gates round otherwise."""
    lowered = stages("mixtral")[1]
    assert len(calls(lowered.graph, torch.ops.lbllm.grouped_bit_linear.default)) == 4
    kernels = kernels_of(lowered)
    executor = CompiledModel(lowered, kernels)
    for batch, length in ((1, 9), (3, 4), (3, 33)):
        ids = inputs(batch, length)["input_ids"]
        expected = executor.logits(ids, torch.ones_like(ids))
        found = torch.from_numpy(program("mixtral").session(batch).logits(ids.numpy()))
        session = program("mixtral").session(batch)
        steps = torch.from_numpy(np.stack([session.step(ids[:, i : i + 1].numpy()) for i in range(4)], 1))
        for ours, theirs in ((found, expected), (steps, expected[:, :4])):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


def test_linears_that_stay_float_are_part_of_the_program(tmp_path):
    text = 'canonicalize,annotate{keep_dense="model.layers.0.mlp.*|model.layers.1.self_attn.o_proj|lm_head"}'
    lowered = apply(simulate(apply(captured("llama")[1], text)), "head,merge,lower,cache,cleanup")
    assert len(calls(lowered.graph, torch.ops.aten.linear.default)) == 5
    found = build(lowered, tmp_path)
    assert found is not None and found.description.merged
    item = inputs(1, 9)
    ids, mask, expected = item["input_ids"].numpy(), item["attention_mask"], lowered.run(item)
    session = found.session(1)
    agree(torch.from_numpy(session.logits(ids)), expected, mask.bool())
    session = found.session(1)
    steps = torch.from_numpy(np.stack([session.step(ids[:, i : i + 1]) for i in range(9)], 1))
    agree(steps, expected, mask.bool())


@pytest.mark.parametrize("kept", [True, False], ids=["all is float", "embedding and head are float"])
def test_an_embedding_that_stays_float_may_have_a_padding_index(kept, tmp_path):
    """As in a pipeline without ``head`` of any model whose configuration names a token for padding."""
    model, given = captured("llama")
    assert model.get_input_embeddings().padding_idx == 0
    annotated = apply(given, "canonicalize,annotate{keep_dense=*}" if kept else "canonicalize,annotate")
    lowered = apply(annotated if kept else simulate(annotated), "merge,lower,cache,cleanup")
    (look_up,) = calls(lowered.graph, torch.ops.aten.embedding.default)
    assert Arguments(look_up).padding_idx == 0
    found = build(lowered, tmp_path)
    assert found is not None
    item = inputs(3, 19)
    item["input_ids"][:, ::5] = 0  # tokens for padding, also where the mask shows them
    ids, mask = item["input_ids"].numpy(), item["attention_mask"]
    with torch.no_grad():
        expected = model(**item, use_cache=False).logits if kept else lowered.run(item)
    session = found.session(3)
    session.start(mask[:, :16].numpy())
    steps = [session.step(ids[:, :16]), *(session.step(ids[:, i : i + 1]) for i in range(16, 19))]
    agree(torch.from_numpy(np.stack(steps, 1)), expected[:, 15:], torch.ones(3, 4, dtype=torch.bool))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 16), (5, 7), (33, 100)])
def test_the_float_linear_agrees_with_torch(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    for one_token, counts in ((True, [1]), (False, [1, 4, 6])):
        kernel = dense(rows, columns, 16, one_token)
        function = compile_functions({"kernel": kernel}, Target.parse("cpu").llvm)["kernel"]
        for count in counts:
            x, out = torch.randn(count, columns, generator=generator), torch.full((count, rows), float("nan"))
            function(x, weight, out)
            torch.testing.assert_close(out, x @ weight.t(), rtol=1e-4, atol=1e-5)


def test_norms_gates_and_residuals_are_parts_of_other_kernels():
    lowered = stages("llama")[1]
    kernels = kernels_of(lowered)
    entries = [entry for entry in CpuBackend.entry_points if entry.name == "tokens"]
    module = translate.translate(lowered, kernels, entries).functions()
    module = fuse_rows(operators_to_loops(module, kernels.lanes))
    names = called(module, "tokens")
    layers = len(calls(lowered.graph, torch.ops.lbllm.cached_attention.default))
    assert sum(name.endswith("_residual") for name in names) == 2 * layers
    norms, gates = ([name for name in names if part in name] for part in ("rsqrt", "fast_exp"))
    assert len(norms) == 2 * layers + 1 and len(gates) == layers
    # The last norm is taken of all tokens, and the head's quantizer reads the last ones.
    assert all("_quantize" in name for name in [*norms[:-1], *gates])


def test_few_launches_round_as_their_kernels_do(tmp_path):
    """A token's embedding is a product, and the next kernel adds the embedding of its position: LLVM sees both."""
    found = build(language_model(), tmp_path)
    assert found is not None and found.description.merged


def test_linears_take_over_only_additions_of_their_shape(tmp_path):
    """The operands turned round, the same linear twice, and a row that is added to all tokens."""
    lowered = stages("llama")[1].copy()
    linears = set(calls(lowered.graph, torch.ops.lbllm.bit_linear.default))
    additions = [node for node in calls(lowered.graph, torch.ops.aten.add.Tensor) if linears & set(node.args)]
    turned, twice, row, _ = additions
    turned.args = turned.args[::-1]
    (linear,) = linears & set(twice.args)
    twice.args = (linear, linear)
    (linear,) = linears & set(row.args)
    rows = get_attribute(lowered.module, linear.args[2].target).shape[0]
    set_attribute(lowered.module, "row", torch.linspace(-1, 1, rows))
    with lowered.graph.inserting_before(row):
        row.args = (lowered.graph.get_attr("row"), linear)
    lowered.module.recompile()
    found = build(lowered, tmp_path)
    assert found is not None and found.description.merged
    item = inputs(1, 9)
    ids, expected = item["input_ids"].numpy(), lowered.run(item)
    agree(torch.from_numpy(found.session(1).logits(ids)), expected, item["attention_mask"].bool())
    session = found.session(1)
    steps = torch.from_numpy(np.stack([session.step(ids[:, i : i + 1]) for i in range(9)], 1))
    agree(steps, expected, item["attention_mask"].bool())


def test_what_cannot_be_translated_runs_in_torch_and_says_so(tmp_path, monkeypatch):
    attention = operators.find(torch.ops.lbllm.cached_attention.default)
    monkeypatch.setitem(registry._registered, attention.target, dataclasses.replace(attention, translate=None))
    notes = Notes()
    assert prepare.build_native(stages("llama")[1], NO_KERNELS, tmp_path, notes) is None
    assert len(notes.said) == 1 and "operator by operator in torch" in notes.said[0] and "zoo" not in notes.said[0]


@pytest.mark.parametrize("by", ["the translation", "TVM"])
def test_a_form_that_cannot_be_translated_runs_in_torch_and_says_so(by, tmp_path, monkeypatch):
    """The operator is known; that this use of it is not shows when it is translated."""

    def refuse(_, arguments):
        message = "this form of the operator has no translation"
        raise refusal(arguments, message) if by == "the translation" else ValueError(message)

    add = operators.find(torch.ops.aten.add.Tensor)
    monkeypatch.setitem(registry._registered, add.target, dataclasses.replace(add, translate=refuse))
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "empty"))
    notes = Notes()
    with prepare.workshop() as folder:
        assert build(language_model(), folder, notes) is None
    assert len(notes.said) == 1 and "this form of the operator has no translation" in notes.said[0]


def test_who_does_not_listen_is_warned_that_a_model_runs_in_torch(tmp_path, monkeypatch):
    attention = operators.find(torch.ops.lbllm.cached_attention.default)
    monkeypatch.setitem(registry._registered, attention.target, dataclasses.replace(attention, translate=None))
    monkeypatch.setattr(progress, "_warned", set())
    with pytest.warns(progress.LbllmWarning, match="operator by operator in torch, which is slower"):
        assert prepare.build_native(stages("llama")[1], NO_KERNELS, tmp_path) is None


def test_a_program_that_tvm_rejects_runs_in_torch_and_says_so(tmp_path, monkeypatch):
    def reject(*_):
        raise RuntimeError("no code for this loop\nat some line")

    monkeypatch.setattr(compile_module, "build_loops", reject)
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "empty"))
    notes = Notes()
    with prepare.workshop() as folder:
        assert build(language_model(), folder, notes) is None
    assert len(notes.said) == 1 and "TVM cannot compile the program (no code for this loop)" in notes.said[0]


@pytest.mark.parametrize("wrong", ["prompt", "steps"])
def test_a_program_that_does_not_compute_its_graph_is_refused_with_figures(wrong, monkeypatch, tmp_path):
    feed = native.NativeSession._feed

    def other(self, ids, last, merged=True):
        logits = feed(self, ids, last, merged)
        return [part[..., ::-1].copy() for part in logits] if (ids.shape[1] > 1) == (wrong == "prompt") else logits

    monkeypatch.setattr(native.NativeSession, "_feed", other)
    with pytest.raises(KernelError, match=r"its logits differ from the graph's by [0-9.]+ .* explains [0-9.]+"):
        build(language_model(), tmp_path)
    assert not (tmp_path / native.SEAL).exists()


def test_a_model_whose_logits_are_not_finite_is_refused_as_such(tmp_path):
    program = language_model().copy()
    (head,) = calls(program.graph, torch.ops.lbllm.int8_linear.default)
    path = Arguments(head).w_scale.target
    set_attribute(program.module, path, torch.full_like(get_attribute(program.module, path), 3e38))
    with pytest.raises(KernelError, match="logits of probe tokens are infinite or NaN: its weights are too large"):
        build(program, tmp_path)
    assert not (tmp_path / native.SEAL).exists()


@pytest.fixture
def sums_are_differences(monkeypatch):
    """Natively, residuals are subtracted instead of added."""
    add, sub = (operators.find(target) for target in (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor))
    monkeypatch.setitem(registry._registered, add.target, dataclasses.replace(add, translate=sub.translate))


def test_a_wrong_program_stops_a_load(sums_are_differences, tmp_path, monkeypatch):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    artifact.save(language_model(), tmp_path / "out", lock={})
    with pytest.raises(DisagreementError, match="the native program does not compute the model"):
        load(tmp_path / "out")
    assert native.find(tmp_path / "out") is None
    assert [path.name for path in native.programs_directory().iterdir() if path.is_dir()] == []


def test_a_wrong_program_stops_a_compile(sums_are_differences, tmp_path, monkeypatch):
    """And nothing is written."""
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(recipe.PRESETS, "quick", TINY)
    text = 'canonicalize,annotate{keep_dense="*"},lower,cache,cleanup'
    options = CompileOptions(captured("llama")[0], pipeline=text, preset="quick", out=tmp_path / "out")
    with pytest.raises(DisagreementError, match="the native program does not compute the model"):
        driver.compile(options)
    assert not (tmp_path / "out").exists()


def test_a_reshape_is_solved_with_symbols():
    translator = types.SimpleNamespace(quotient=quotient)
    batch, length = symbolic_dimension("batch"), symbolic_dimension("length")
    for old, new, expected in (
        ([batch, length, 72], [batch, length, -1, 18], [batch, length, 4, 18]),
        ([batch, 6, 4], [batch, -1], [batch, 24]),
        ([batch, length, 8], [batch, 8, -1], [batch, 8, length]),
        ([length * batch * 4, 72], [4, -1, 72], [4, batch * length, 72]),
    ):
        assert same_sizes(infer(translator, old, new), expected)
    for old, new in (([batch, 7], [-1, 2]), ([batch, 4], [length, -1])):
        with pytest.raises(UntranslatableError, match="cannot be solved"):
            infer(translator, old, new)


def test_a_layout_aligns_its_tensors():
    layout = Layout.of([TensorSpec("a", (3,), "float32"), TensorSpec("b", (5, 2), "int8")], alignment=64)
    assert layout.offsets == {"a": 0, "b": 64} and layout.bytes == 128


@pytest.mark.parametrize("broken", ["logits", "state"])
@pytest.mark.parametrize(
    ("name", "used"), [("token", ["token_by_kernel", "token_of_few"]), ("token_of_few", ["token", "few_tokens"])]
)
def test_a_function_that_differs_from_its_kernels_is_not_used(name, used, broken, monkeypatch, tmp_path):
    call, called = NativeProgram.call, []

    def other(self, function, inputs, state, part=None):
        called.append(function)
        logits = call(self, function, inputs, state, part)
        if function == name and broken == "state":
            state.arrays[0][0, 0, 1] ^= 1
        return logits + 1 if function == name and broken == "logits" else logits

    monkeypatch.setattr(NativeProgram, "call", other)
    monkeypatch.setattr(progress, "_warned", set())
    which = "one sequence" if name == "token" else "a few sequences together"
    with pytest.warns(progress.LbllmWarning, match=f"tokens of {which} are decoded with a launch for every kernel"):
        found = build(stages("llama")[1], tmp_path)
    assert found is not None and found.description.merged == tuple({"token", "token_of_few"} - {name})
    called.clear()
    for batch in (1, 3):
        found.session(batch).step(np.full((batch, 1), 3))
    assert called == used
    assert NativeProgram(tmp_path).description == found.description


def test_a_few_sequences_need_no_function_of_few_launches(monkeypatch, tmp_path):
    merge = compile_module.merge_launches

    def refuse(module, name, begins_segment, most):
        if most:
            raise KernelError("something grows")
        return merge(module, name, begins_segment, most)

    monkeypatch.setattr(compile_module, "merge_launches", refuse)
    monkeypatch.setattr(progress, "_warned", set())
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path))
    with pytest.warns(
        progress.LbllmWarning, match="a few sequences are decoded together with a launch for every kernel"
    ):
        found = build(stages("llama")[1], tmp_path)
    assert found is not None and found.description.merged == ("token",)
    functions = [found.description.function(batch, 1, last=True).name for batch in (1, 2, 16)]
    assert functions == ["token", "few_tokens", "few_tokens"]
    two, one = (found.session(batch).step(np.full((batch, 1), 3)) for batch in (2, 1))
    assert np.array_equal(two, np.concatenate([one, one]))


def test_the_state_grows_and_keeps_what_it_holds(monkeypatch):
    ids = np.random.default_rng(3).integers(1, TOY_VOCABULARY, (2, 90))
    small, roomy = toy().session(2), toy().session(2, 90)
    assert small.state.capacity == MIN_CAPACITY
    steps = [(small.step(ids[:, i : i + 8]), roomy.step(ids[:, i : i + 8])) for i in range(0, 88, 8)]
    assert all(np.array_equal(a, b) for a, b in steps)
    assert small.past == 88 <= small.state.capacity


def test_state_of_fixed_size_stays_when_room_for_tokens_grows():
    fixed = (native.Member("a", ("batch", 5, 2), "float32", 0), native.Member("b", ("batch", 3), "float32", 64))
    description = dataclasses.replace(toy().description, fixed=fixed, fixed_bytes=128)
    program = types.SimpleNamespace(description=description, machine=toy().machine)
    state = native.State(program, 3, 1)  # type: ignore[arg-type]
    assert [a.shape for a in state.arrays[-2:]] == [(3, 5, 2), (3, 3)]
    for number, array in enumerate(state.arrays):
        array[:] = number + 1
    larger = state.grown(state.capacity + 1, 4)
    assert larger.capacity >= 2 * state.capacity and len(larger.blocks) == len(larger.part(slice(0, 3))) == 2
    for number, array in enumerate(larger.arrays):
        kept = array if number >= len(description.state) else array[:, :, :4]
        assert bool((kept == number + 1).all())


def test_a_long_prompt_is_fed_in_parts(monkeypatch):
    ids = np.random.default_rng(4).integers(1, TOY_VOCABULARY, (1, 50))
    whole = toy().session(1).logits(ids)
    monkeypatch.setattr(native, "PART_TOKENS", 16)
    np.testing.assert_allclose(toy().session(1).logits(ids), whole, atol=0.05)
    assert toy().session(1).logits(ids).shape == whole.shape


def watched(found: NativeProgram, monkeypatch, **changes) -> tuple[NativeProgram, list[str]]:
    """A program whose description has other fields, and the names of the functions it calls from now on."""
    other, names = NativeProgram(found.directory), []
    other.description = dataclasses.replace(found.description, **changes)
    call = other.call
    monkeypatch.setattr(other, "call", lambda name, *a: (names.append(name), call(name, *a))[1])
    return other, names


@pytest.mark.parametrize(
    ("batch", "length", "name"),
    [
        *((*size, "token_of_few") for size in ((2, 1), (16, 1))),
        *((*size, "few_tokens") for size in ((1, 2), (3, 5), (1, 16))),
        *((*size, "tokens") for size in ((1, 17), (17, 1), (4, 5))),
    ],
)
def test_few_tokens_are_computed_by_the_kernels_for_few_tokens(batch, length, name, monkeypatch):
    """To the bit as by those for many."""
    ids = np.random.default_rng(batch).integers(1, TOY_VOCABULARY, (batch, length + 2))
    mask = np.ones((batch, length), np.int64)
    mask[-1, : length // 3] = 0
    functions = tuple(f for f in toy().description.functions if f.name not in ("token_of_few", "few_tokens"))
    chosen, names = watched(toy(), monkeypatch)
    sessions = [chosen.session(batch), watched(toy(), monkeypatch, functions=functions)[0].session(batch)]
    for session in sessions:
        session.start(mask)
    for part in (ids[:, :length], ids[:, length:]):
        ours, theirs = (session.step(part) for session in sessions)
        assert np.array_equal(ours, theirs)
    assert all(np.array_equal(a, b) for a, b in zip(*(s.state.arrays for s in sessions), strict=True))
    assert names == [name, "few_tokens" if 2 * batch <= 16 else "tokens"]


def test_the_benchmark_can_do_without_the_function_for_few_tokens():
    ids = np.array([3, 1, 4, 1])
    source = str(toy().directory)
    kinds = {NATIVE: LOADERS[NATIVE], decoders.WITHOUT_FEW: decoders.without_few}
    few, many = (load(Loading(kind, source, capacity=64, threads=1)) for kind, load in kinds.items())
    functions = [d._model.program.description.function(1, 4, last=True).name for d in (few, many)]
    assert functions == ["few_tokens", "tokens"]
    np.testing.assert_allclose(few.feed(ids), many.feed(ids), atol=0.05)


def test_the_program_for_few_tokens_calls_kernels_of_that_bucket():
    lowered = stages("llama")[1]
    needed, kernels = requirements(lowered), kernels_of(lowered)
    entries = [entry for entry in CpuBackend.entry_points if entry.batch is None]
    module = translate.translate(lowered, kernels, entries).functions()
    found = {}
    for entry in entries:
        linears = {kernels.linear(spec).tir(bucket.name).name for spec in needed.linears for bucket in cpu.BUCKETS}
        names = {name.removesuffix("_residual") for name in called(module, entry.name)}
        found[entry.name] = names & linears
        assert found[entry.name] == {kernels.linear(spec).tir(entry.bucket).name for spec in needed.linears}
    assert found["few_tokens"].isdisjoint(found["tokens"]) and found["token_of_few"] == found["few_tokens"]


def test_indices_of_kernels_stay_within_their_32_bits(monkeypatch):
    """What is too large for one call, of the logits or of anything else, is computed for some sequences at a time."""
    ids = np.random.default_rng(5).integers(1, TOY_VOCABULARY, (5, 9))
    mask = np.ones((5, 6), np.int64)
    mask[1, :4] = 0
    logits = next(f for f in toy().description.functions if f.name == "logits")
    assert dict(logits.tensors)["batch", "length"] >= TOY_VOCABULARY

    def run(program) -> list[np.ndarray]:
        session = program.session(5)
        session.start(mask)
        outputs = [session.logits(ids[:, :6]), session.step(ids[:, 6:8]), session.step(ids[:, 8:])]
        return outputs + session.state.arrays

    whole = run(toy())
    program, names = watched(toy(), monkeypatch)
    sizes = {"length": 6, "total": 6, "capacity": MIN_CAPACITY}
    monkeypatch.setattr(described, "MOST_ELEMENTS", 2 * (described.MOST_ELEMENTS // logits.sequences(sizes)))
    assert all(np.array_equal(a, b) for a, b in zip(run(program), whole, strict=True))
    assert names.count("logits") == 3
    monkeypatch.setattr(described, "MOST_ELEMENTS", 64)
    with pytest.raises(GenerationError, match="too many for one call"):
        program.session(1).logits(ids[:1])


def test_a_state_of_more_elements_than_32_bits_count():
    """Memory that nothing is written to costs nothing, so it can really be so large."""
    ids = np.random.default_rng(6).integers(1, TOY_VOCABULARY, (3, 7))
    widest = max(math.prod(array.shape[1:]) // MIN_CAPACITY for array in toy().session(1).state.arrays)
    sessions = toy().session(3), toy().session(3, 2**31 // (2 * widest) + 1)
    assert max(array.size for array in sessions[1].state.arrays) > 2**31
    for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
        small, large = (session.step(part) for session in sessions)
        assert np.array_equal(small, large)
    for small, large in zip(*(s.state.arrays for s in sessions), strict=True):
        assert np.array_equal(small[:, :, :7], large[:, :, :7])


@pytest.mark.parametrize("token", [-1, TOY_VOCABULARY])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(GenerationError, match="outside the vocabulary"):
        toy().session(1).step(np.array([[token]]))


def test_greedy_text_is_the_executors(tmp_path):
    """The same tokens as the executor in torch, prompts of different lengths together."""
    prompts, sampling = [[5, 3, 8], [9], [4, 4, 4, 4, 7, 2]], Sampling(max_new_tokens=12)
    torch_tokens = list(CompiledModel(language_model(), ReferenceKernels()).generate_ids(prompts, sampling, ()))
    assert list(NativeModel(toy(), None).generate_ids(prompts, sampling, ())) == torch_tokens


def test_the_number_of_tokens_may_be_an_operand(tmp_path):
    """Nothing that the division reads or writes has that size, be it a launch of its own or part of a larger one."""
    toy_program = language_model()
    module = copy.deepcopy(toy_program.module)
    embedded = calls(module.graph, torch.ops.aten.add.Tensor)[0]
    mask = next(n for n in module.graph.nodes if n.target == "attention_mask")
    with module.graph.inserting_before(embedded.next):
        count = module.graph.call_function(torch.ops.aten.sym_size.int, (mask, 1))
        divided = module.graph.call_function(torch.ops.aten.div.Tensor, (embedded, count))
    embedded.replace_all_uses_with(divided, delete_user_cb=lambda user: user is not divided)
    module.recompile()
    program = toy_program.with_module(module)
    found = build(program, tmp_path)
    assert found is not None and found.description.merged
    for batch in (1, 3):
        ids = np.random.default_rng(batch).integers(0, TOY_VOCABULARY, (batch, 11))
        ours, theirs = found.session(batch), CompiledModel(program, ReferenceKernels()).session(batch)
        for step in (ids[:, :5], *np.split(ids[:, 5:], 6, axis=1)):
            np.testing.assert_allclose(ours.step(step), theirs.step(step), rtol=1e-4, atol=1e-5)


# Stored programs


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """An artifact with a tokenizer, loaded once."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(TOY_VOCABULARY)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")
    out = tmp_path_factory.mktemp("stored") / "out"
    item = language_model()
    artifact.save(type(item)(item.module, item.kind, "toy", config=item.config, tokenizer=tokenizer), out, lock={})
    return out, load(out)


@pytest.fixture
def changeable(stored, tmp_path, monkeypatch):
    """A cache with the stored program, its library and its kernels, which a test may change."""
    cache = tmp_path / "cache"
    shutil.copytree(native.cache_directory(), cache, ignore=shutil.ignore_patterns("tmp*"))
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(cache))


def test_a_stored_program_is_not_loaded_where_its_target_does_not_run(stored, monkeypatch):
    """As one with tile registers, which a process may be refused."""
    out, model = stored
    target = model.native.description.target
    assert native.find(out, target) is not None
    monkeypatch.setattr(host, "families", lambda: ("generic",))
    assert native.find(out, target) is None


def test_a_load_stores_the_program_and_the_next_one_finds_it(stored, monkeypatch):
    out, model = stored
    assert model.native is not None and native.find(out) is not None
    monkeypatch.setattr(prepare, "build_native", lambda *_: pytest.fail("built again"))
    assert load(out).native.directory == model.native.directory


def rewrite(file: Path, content: bytes):
    """A new file in place of one that a process may have mapped."""
    (file.parent / "new").write_bytes(content)
    (file.parent / "new").rename(file)


def append(file: Path):
    rewrite(file, file.read_bytes() + b" ")


def flip(file: Path):
    """One bit, with the size and the time of the last change as they were."""
    content, status = bytearray(file.read_bytes()), file.stat()
    content[len(content) // 2] ^= 1
    rewrite(file, content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_kernels_that_are_given_are_used(stored, tmp_path, monkeypatch):
    """Also where a program of others is stored."""
    copied = tmp_path / "out"
    shutil.copytree(stored[0], copied)
    others = ReferenceKernels()
    model = load(copied, kernels=others)
    assert model.native is None and model.kernels is others
    monkeypatch.setattr(progress, "_warned", set())
    with pytest.warns(
        progress.LbllmWarning, match=r"not tuned for cpu.*\d+ of \d+ schedules are guesses, which may be"
    ):
        found = load(copied)
    assert found.native is not None
    place, kernels = found.native.directory, found.kernels
    library = (place / native.LIBRARY).stat().st_ino
    assert load(copied, kernels=kernels).native.directory == place
    assert (place / native.LIBRARY).stat().st_ino == library
    (record, *rest) = kernels.records()
    kernels._records = [{**record, "searched": "elsewhere"}, *rest]
    again = load(copied, kernels=kernels).native
    assert again.directory == place and again.description.schedules != found.native.description.schedules
    assert (place / native.LIBRARY).stat().st_ino != library


@pytest.mark.parametrize("change", [append, flip])
@pytest.mark.parametrize("name", ["graph.json", "tokenizer.json", "model.safetensors"])
def test_an_altered_artifact_has_no_stored_program(stored, tmp_path, name, change):
    copy = tmp_path / "copy"
    shutil.copytree(stored[0], copy)
    assert native.find(copy) is not None
    change(copy / name)
    assert native.find(copy) is None
    with pytest.raises(artifact.ArtifactError, match=r"bytes instead of|was altered"):
        load(copy)


def test_an_artifact_with_an_unlisted_template_has_no_stored_program(stored, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(stored[0], copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert native.find(copy) is None


def test_large_files_are_read_once_for_their_checksum(stored, monkeypatch, tmp_path):
    monkeypatch.setattr(cache_files, "_SMALL", 0)
    monkeypatch.setattr(cache_files, "_CLOCK_TICK_NS", 0)
    assert native.find(stored[0]) is not None
    read = []
    monkeypatch.setattr(cache_files, "sha256", lambda path: read.append(path) or sha256(path))
    assert native.find(stored[0]) is not None and read == []
    config = stored[0] / "config.json"
    os.utime(config)
    assert native.find(stored[0]) is not None and read == [config]


def truncate(file: Path):
    rewrite(file, file.read_bytes()[:-7])


@pytest.mark.parametrize("change", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", [native.LIBRARY, native.WEIGHTS, native.DESCRIPTION, native.SEAL])
def test_a_damaged_stored_program_is_not_used_and_that_is_said(stored, tmp_path, name, change):
    place = native.find(stored[0]).directory
    shutil.copytree(place, tmp_path / "whole")
    change(place / name)
    notes = Notes()
    found = native.find(stored[0], progress=notes)
    shutil.rmtree(place, ignore_errors=True)
    (tmp_path / "whole").rename(place)
    assert found is None
    if (name, change) != (native.DESCRIPTION, Path.unlink):  # which is how a program is recognized
        assert len(notes.said) == 1 and "is damaged" in notes.said[0] and "prepared anew" in notes.said[0]


@pytest.mark.usefixtures("changeable")
def test_a_damaged_stored_program_is_prepared_anew(stored):
    """So is its library, where that is damaged too, and all of it is said."""
    place = load(stored[0]).native.directory
    for library in native.programs_directory().glob("*.library"):
        flip(library)
    truncate(place / native.WEIGHTS)
    notes = Notes()
    again = load(stored[0], progress=notes).native
    assert again is not None and again.directory == place
    ids = np.array([[3, 1, 4, 1, 5]])
    assert np.array_equal(again.session(1).logits(ids), stored[1].native.session(1).logits(ids))
    assert sum("is damaged" in said for said in notes.said) == 2
    notes = Notes()
    assert native.find(stored[0], progress=notes) is not None and notes.said == []


def test_the_same_graph_of_weights_of_other_shapes_has_another_library():
    before = stages("llama")[1]
    other = before.copy()
    name = next(n.target for n in other.graph.nodes if n.op == "get_attr" and n.target.endswith("norm.weight"))
    set_attribute(other.module, name, get_attribute(other.module, name)[None])
    assert graph_json.dumps(other.module) == graph_json.dumps(before.module)
    first, libraries = program("llama"), {*native.programs_directory().glob("*.library")}
    second = build(other, Path(tempfile.mkdtemp(dir=native.cache_directory())))
    ids = np.array([[3, 1, 4, 1, 5]])
    assert np.array_equal(first.session(1).logits(ids), second.session(1).logits(ids))
    assert libraries and len({*native.programs_directory().glob("*.library")} - libraries) == 1


def test_a_library_that_two_store_at_once_is_one_of_theirs(tmp_path, monkeypatch):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path))
    file, notes = native.programs_directory() / "key.library", Notes()
    writers, rounds = 3, 40

    def work(number):
        if number < writers:
            for _ in range(rounds):
                prepare._keep_library(file, bytes([number, 10]) * 5000, {"sizes": number})
            return None
        place, found = tmp_path / "copy.so", []
        while len(found) < rounds:
            description = prepare._stored_library(file, place, notes)
            if description is not None:
                found.append((description["sizes"], place.read_bytes()))
        return found

    *_, found = in_threads(work, writers + 1)
    assert all(content == bytes([number, 10]) * 5000 for number, content in found)
    assert notes.said == []


@pytest.mark.usefixtures("changeable")
def test_what_stands_in_the_place_of_a_program_gives_way(stored):
    place = load(stored[0]).native.directory
    (place / native.DESCRIPTION).unlink()
    assert native.find(stored[0]) is None
    assert load(stored[0]).native.directory == place
    assert native.find(stored[0]) is not None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(KernelError, match=r"cannot store a program in .*set LBLLM_CACHE_DIR"), prepare.workshop():
        pass


def test_a_program_is_for_a_number_of_threads(monkeypatch):
    places = set()
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("TVM_NUM_THREADS", threads)
        places.add(native.stored_at("0", Target.parse("cpu:generic")))
    assert len(places) == 3


@pytest.mark.usefixtures("changeable")
def test_tuning_an_artifact_lets_its_program_be_prepared_anew(stored):
    first = load(stored[0]).native
    assert first is not None and native.find(stored[0]) is not None
    for source in ("search", "stored"):  # what was found for another artifact counts as well
        assert {choice.source for choice in tune(TuneOptions(directory=stored[0], trials=1)).choices} == {source}
        assert native.find(stored[0]) is None
        assert load(stored[0]).native is not None
        assert [path.name for path in native.programs_directory().iterdir() if path.name.startswith(".")] == []


def test_programs_that_nothing_uses_are_removed(stored):
    used = stored[1].native.directory
    unused = native.programs_directory() / "unused"
    unused.mkdir()
    (unused / native.SEAL).write_text("{}")
    for file in (unused / native.SEAL, used / native.SEAL):
        os.utime(file, (0, 0))
    assert native.find(stored[0]) is not None
    with native.held_programs():  # as a process that opens a program
        prepare._forget_unused()
        assert unused.exists()
    prepare._forget_unused()
    assert used.is_dir() and not unused.exists()


def test_a_program_of_another_form_is_named(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / native.DESCRIPTION).write_text("{}")
    with pytest.raises(KernelError, match=r"stored program .*broken is damaged"):
        NativeProgram(broken)


# Several threads and processes


def greedy(model, prompts, tokens=24):
    return list(model.generate_ids(prompts, Sampling(max_new_tokens=tokens), ()))


def in_threads(work, count):
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return [done.result() for done in [pool.submit(work, i) for i in range(count)]]


@pytest.mark.parametrize("seconds", [2, pytest.param(90, marks=pytest.mark.slow)])
def test_threads_generate_at_once(seconds):
    """Two threads, single sequences in few launches and batches kernel by kernel, each gets its own tokens."""
    model = NativeModel(toy(), None)
    prompts = [[[5, 3, 8]], [[9, 1, 1, 2], [7]]]
    expected = [greedy(model, p) for p in prompts]

    def work(index):
        end, rounds = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            assert greedy(model, prompts[index]) == expected[index]
            rounds += 1
        return rounds

    assert min(in_threads(work, 2)) > 1


def test_threads_generate_at_once_in_torch(stored):
    """As :func:`test_threads_generate_at_once`, on the executor: one that both share, with a session in each."""
    model = CompiledModel(stored[1].program, stored[1].kernels)
    prompts = [[[5, 3, 8]], [[9, 1, 1, 2], [7]]]
    expected = [greedy(model, p, 6) for p in prompts]
    given = inputs(2, 21)["input_ids"] % TOY_VOCABULARY
    logits = model.logits(given)

    def work(index):
        return [(greedy(model, prompts[index], 6), model.logits(given)) for _ in range(8)]

    for index, rounds in enumerate(in_threads(work, 2)):
        for tokens, whole in rounds:
            assert tokens == expected[index] and torch.equal(whole, logits)


def test_overlapping_blocks_of_one_torch_thread_leave_the_count_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def work(index):
        if index == 0:
            with one_torch_thread():
                first_is_in.set()
                second_is_in.wait()
            first_is_out.set()
        else:
            first_is_in.wait()
            with one_torch_thread():
                second_is_in.set()
                first_is_out.wait()
                assert torch.get_num_threads() == 1
        return torch.get_num_threads()

    assert in_threads(work, 2) == [3, 3]
    assert in_threads(lambda _: torch.get_num_threads(), 1) == [3]
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_a_thread_that_is_new_to_torch_generates_the_same_and_gets_its_count(stored):
    """It begins while another is in the block, which has set the count that new threads take over."""
    model = CompiledModel(stored[1].program, stored[1].kernels)
    expected, before = greedy(model, [[5, 3, 8]], 6), torch.get_num_threads()
    torch.set_num_threads(3)
    with one_torch_thread():
        ((first, tokens, last),) = in_threads(
            lambda _: (torch.get_num_threads(), greedy(model, [[5, 3, 8]], 6), torch.get_num_threads()), 1
        )
    assert (first, tokens, last) == (1, expected, 3)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


PROCESS = """
import concurrent.futures, contextlib, os, sys, time
from pathlib import Path
from lbllm_compile.native.generate import Sampling
from lbllm_compile.native.program import SEAL, NativeModel, find

out, seconds = Path(sys.argv[1]), float(sys.argv[2])
end = time.monotonic() + seconds

def work(_):
    first = None
    while first is None or time.monotonic() < end:
        program = find(out)
        if program is None:
            from lbllm_compile.runtime import load
            program = load(out).native
        tokens = list(NativeModel(program, None).generate_ids([[5, 3, 8]], Sampling(max_new_tokens=12), ()))
        assert first in (None, tokens), (first, tokens)
        first = tokens
        if seconds:
            from lbllm_compile.lowering import build
            for file in (*build.programs_directory().glob("[!.]*.*"), program.directory / SEAL):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(file, (0, 0))
            build._forget_unused()
    return first

with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first, second = pool.map(work, range(2))
assert first == second, (first, second)
print(first)
"""


@pytest.mark.parametrize("seconds", [0, pytest.param(120, marks=pytest.mark.slow)])
def test_processes_use_programs_at_once(stored, tmp_path, seconds):
    """Four of two threads each that share a cache.

    In the long form nothing is stored at first, and each forgets all programs at times.
    """
    expected = str(greedy(stored[1], [[5, 3, 8]], 12)) + "\n"
    if not seconds:
        shutil.copytree(native.cache_directory(), tmp_path / "cache")
    environment = {**os.environ, "LBLLM_CACHE_DIR": str(tmp_path / "cache")}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(stored[0]), str(seconds)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    assert [child.communicate()[0] for child in children] == [expected] * 4
    assert [child.returncode for child in children] == [0] * 4
    left = [path.name for path in (tmp_path / "cache" / "programs").iterdir()]
    assert [name for name in left if name.startswith(".")] == []


def test_run_needs_neither_torch_nor_the_compiler(stored):
    """The same text as the loaded artifact's, from a process in which torch and TVM's compiler cannot be imported."""
    out, model = stored
    command = runtime_only.command("run", str(out), "--prompt", "w5 w3 w8", "--max-tokens", "6", "--raw")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == model.generate("w5 w3 w8", max_new_tokens=6).strip()


def test_a_plain_tokenizer_does_what_the_transformers_one_does(stored, tmp_path):
    tokenizer = stored[1].tokenizer
    assert text.agrees(tokenizer, tmp_path)
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, unk_token="w0", eos_token="w1")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {{ eos_token }}{% endfor %}"
    folder = tmp_path / "chat"
    assert text.agrees(tokenizer, folder)
    plain = text.TextTokenizer(folder)
    assert plain.apply_chat_template([{"role": "user", "content": "w3"}]) == "w3 w1"
    assert plain.eos_token_id == 1


class Writes(list):
    """A file that notes what it is given."""

    def write(self, data):
        self.append(bytes(data))


@pytest.mark.parametrize("pieces", [[], [b""], [b"abc"], [b"abcd"], [b"a", b"", b"bcdefgh"], [b"abcdefghijklmn", b"o"]])
def test_weights_are_written_in_whole_pages(pieces, monkeypatch):
    monkeypatch.setattr(prepare, "PAGE", 4)
    file = Writes()
    prepare.write_in_blocks(file, map(memoryview, pieces))
    assert b"".join(file) == b"".join(pieces)
    assert all(len(written) == 4 for written in file[:-1])
    assert len(file[-1]) < 4


def test_the_block_of_weights_is_what_its_layout_says():
    tensors = {"a": torch.arange(5, dtype=torch.int16), "b": torch.tensor(2.5), "c": torch.arange(6.0).view(2, 3).t()}
    specs = [TensorSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
    layout = Layout.of(specs, 64)
    block = b"".join(translate.Translated(None, tensors, layout, layout, layout, (), 0).weight_bytes())
    assert len(block) == layout.bytes == 192
    for name, tensor in tensors.items():
        data = tensor.contiguous().numpy().tobytes()
        assert block[layout.offsets[name] :][: len(data)] == data


def test_positions_that_the_graph_counts_go_on_behind_past_tokens(tmp_path):
    program = language_model(positions="counted")
    found = build(program, tmp_path)
    assert found is not None and found.description.workspaces
    for batch in (1, 3):
        ids = np.random.default_rng(batch).integers(0, TOY_VOCABULARY, (batch, 12))
        whole = language_model().run(frontend.language_model_inputs(torch.from_numpy(ids)))
        session = found.session(batch)
        steps = [session.step(step) for step in (ids[:, :5], ids[:, 5:7], *np.split(ids[:, 7:], 5, axis=1))]
        agree(torch.from_numpy(np.stack(steps, 1)), whole[:, [4, *range(6, 12)]], torch.ones(batch, 7).bool())


@pytest.mark.parametrize(
    "positions", ["shifted", *(pytest.param(p, marks=pytest.mark.slow) for p in ("given", "sliced"))]
)
def test_positions_beyond_their_table_are_refused_in_torch_and_natively(tmp_path, monkeypatch, positions):
    """Kernels would read the last row instead, and answer with other logits."""
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path))
    program = language_model(positions=positions)
    native_program = build(program, tmp_path)
    kernels = kernels_of(program)
    ids = torch.ones((1, CONTEXT + 1), dtype=torch.int64)
    for model in (CompiledModel(program, kernels), CompiledModel(program, kernels, native_program)):
        assert model.logits(ids[:, :CONTEXT]).shape == (1, CONTEXT, TOY_VOCABULARY)
        session = model.session(1)
        session.step(ids[:, :CONTEXT].numpy())
        for call in (lambda model=model: model.logits(ids), lambda s=session: s.step(ids[:, :1].numpy())):
            with pytest.raises(GenerationError, match=f"positions for {CONTEXT} tokens, and {CONTEXT + 1} are given"):
                call()
