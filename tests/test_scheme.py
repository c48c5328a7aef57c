"""Schemes: their text, which linears get which, what passes make of them, and mixed ones from text to native code."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lbllm_compile.codegen.operators import Arguments
from lbllm_compile.codegen.operators.arguments import parameters
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import LINEAR, Annotate, linears
from lbllm_compile.passes.base import PassError, PassResult
from lbllm_compile.passes.ir import graph_json
from lbllm_compile.passes.ir.program import Program, get_attribute
from lbllm_compile.passes.ir.rewrite import calls
from lbllm_compile.passes.ir.scheme import CODEBOOKS, KEYS, Entry, Scheme, SchemeError, parse, render
from lbllm_compile.passes.lower import stored_weights
from proven_kernels import kernels_of
from reference_kernels import ReferenceKernels
from stages import Memory, annotated, apply, batches, context
from test_levels import SYMMETRIC, is_symmetric
from zoo import captured, user_model

from lbllm_compile import plan, recipe
from lbllm_compile.lowering.build import build_native
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.options import CompileOptions, OptionError
from lbllm_compile.runtime import CompiledModel

MIXED = (
    "*.down_proj: group=64 act=8; *.1.self_attn: act=8 group=128 act-group=0; *.0.self_attn: levels=symmetric;"
    " *.0.mlp.down_proj: dense; *.1.mlp.up_proj: levels=symmetric"
)

# The text

ENTRIES = st.builds(
    Entry,
    st.text("abz_.*?[]!0123|", min_size=1, max_size=20),
    st.fixed_dictionaries(
        {},
        optional={
            "group": st.sampled_from((32, 64, 128, 256)),
            "levels": st.sampled_from(("free", SYMMETRIC.name)),
            "act": st.sampled_from((4, 8, 16)),
            "act-group": st.sampled_from((0, 32, 64)),
            "codebook": st.sampled_from(CODEBOOKS),
            "outliers": st.integers(1, 500),
            "bits": st.sampled_from((2, 4, 8)),
            "embedding": st.sampled_from((4, 8)),
        },
    ).flatmap(lambda settings: st.permutations(list(settings.items())).map(tuple)),
)


@given(st.lists(ENTRIES, max_size=5).map(tuple))
def test_text_and_entries_convert_without_loss(entries):
    text = render(entries)
    assert parse(text) == entries
    item = Annotate(scheme=text)
    (again,) = pipeline.parse(pipeline.render([item]))
    assert again == item
    (full,) = pipeline.parse(pipeline.render([item], full=True))
    assert full == item


def test_entries_may_be_written_loosely():
    assert parse(" a.*:group=32   act=8 ;; b : dense; ") == (Entry("a.*", (("group", 32), ("act", 8))), Entry("b"))
    assert parse("") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*.down_proj", "'\\*.down_proj' is no entry; write"),
        ("*.down_proj:", "is no entry; write"),
        (": group=32", "'' is no pattern"),
        ("a b: group=32", "'a b' is no pattern"),
        ("*: grup=32", r"there is no 'grup' \(did you mean 'group'\?\)"),
        ("*: group=48", "group cannot be 48; choose 32, 64, 128, 256"),
        ("*: group=wide", "group cannot be wide; choose 32"),
        ("*: group=0", "group cannot be 0"),
        ("*: act=3", "act cannot be 3; choose 4, 8, 16"),
        ("*: act-group=16", "act-group cannot be 16; choose 0, 32"),
        ("*: codebook=knee", "codebook cannot be knee; choose none, knees, planes"),
        ("*: levels=strange", "there is no level rule 'strange'; known are free"),
        ("*: outliers=many", "outliers must be a number of columns"),
        ("*: group", "'group' in '\\*: group' is no setting"),
        ("*: group=", "is no setting"),
        ("*: group=32 group=64", "'group' is given twice"),
        ("*: dense group=32", "settings beside dense"),
    ],
)
def test_text_that_cannot_be_read(text, message):
    with pytest.raises(SchemeError, match=message):
        Annotate(scheme=text)
    with pytest.raises(SchemeError, match=message):
        pipeline.parse(f"canonicalize,annotate{{scheme={json.dumps(text)}}}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense": True, "group": 32}, "dense has no other setting"),
        ({"group": 32, "act_group": 64}, "act-group=64 does not go with group=32"),
        ({"codebook": "knees"}, "codebook=knees needs act=4"),
        ({"codebook": "planes", "act_bits": 16}, "codebook=planes needs act=4"),
        ({"codebook": "knees", "act_bits": 8}, "codebook=knees needs act=4"),
        ({"group": True}, "group cannot be True"),
        ({"bits": 4, "outliers": 8}, "outliers=8 does not go with bits=4"),
    ],
)
def test_schemes_that_cannot_be(fields, message):
    with pytest.raises(SchemeError, match=message):
        Scheme(**fields)


# Which linear gets which


def chosen(text: str, name: str = "llama", **options: Any) -> dict[str, Any]:
    program = (
        Annotate(scheme=text, **options).apply(apply(captured(name)[1], "canonicalize").program, context()).program
    )
    return {info.path: info for _, info in linears(program)}


def test_later_entries_win_setting_by_setting():
    found = chosen("*.mlp.*: group=32 act=8; *.1.*: group=128; *.0.*: dense; *.0.mlp.gate_proj: act=8")
    schemes = {path.removeprefix("model.layers."): str(info.scheme) for path, info in found.items()}
    assert schemes["0.mlp.gate_proj"] == "act=8" and schemes["0.mlp.up_proj"] == "dense"
    assert schemes["1.mlp.up_proj"] == "group=128 act=8" and schemes["1.self_attn.q_proj"] == "group=128"
    assert schemes["lm_head"] == ""


def test_codes_are_for_all_linears_that_a_pattern_matches():
    found = chosen(
        "*: act=8; *: group=128; *: bits=4 group=64; *.1.*: dense; *.1.mlp.*: bits=4; *.1.mlp.down_proj: group=32"
    )
    schemes = {path.removeprefix("model.layers."): str(info.scheme) for path, info in found.items()}
    assert schemes["0.self_attn.q_proj"] == "bits=4 group=64 act=8" and schemes["1.self_attn.q_proj"] == "dense"
    assert schemes["1.mlp.up_proj"] == "bits=4" and schemes["1.mlp.down_proj"] == "bits=4 group=32"
    assert schemes["lm_head"] == "bits=4 group=64"
    alone = chosen("lm_head: bits=4 group=32")
    assert {str(info.scheme) for path, info in alone.items() if path != "lm_head"} == {""}
    beside = chosen("*: bits=4 group=64 embedding=8; *.0.mlp.down_proj: bits=4 group=64 act=8 act-group=0")
    assert beside["lm_head"].scheme == Scheme(64, bits=4, embedding=8)
    assert {str(info.scheme) for path, info in beside.items() if path != "lm_head"} == {
        "",
        "bits=4 group=64 act=8 act-group=0",
    }


def test_an_entry_with_an_embedding_is_for_heads_alone_and_is_their_whole_form():
    found = chosen("*: group=128; *: bits=4 group=32 embedding=4; lm_head: act-group=0; lm_head: bits=2")
    assert found["lm_head"].scheme == Scheme(bits=2, act_group=0)
    assert {str(info.scheme) for path, info in found.items() if path != "lm_head"} == {"group=128"}


def test_dense_is_keep_dense():
    text, option = chosen("model.layers.0.self_attn: dense; lm_head: dense"), chosen("", keep_dense=("*.0.self_attn",))
    path = "model.layers.0.self_attn.q_proj"
    assert text[path].role == option[path].role == "dense" and text[path].scheme == option[path].scheme
    assert text["lm_head"].role == "dense" and option["lm_head"].role == "head"
    both = chosen("*: act=8", keep_dense=("*.0.*",))
    assert both[path].role == "dense" and both["model.layers.1.self_attn.q_proj"].scheme.act_bits == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*.donw_proj: group=32", r"scheme: the pattern '\*.donw_proj' matches no linear; did you mean '\*.down_proj'"),
        ("lm_head: group=32", "none of the linears that 'lm_head' matches has the settings"),
        ("*.q_proj: bits=2", "bits=8, bits=2 and embedding are of output heads; .* has W\\(1\\+1\\) without bits"),
        ("*.q_proj: bits=4 embedding=4", "none of the linears that '\\*.q_proj' matches has the settings"),
        ("*: bits=2 act=8", "cannot set act: bits=8, bits=2 and embedding are of output heads, which have group and"),
        ("lm_head: bits=4 act=8", "cannot set act: an output head has group, embedding and act-group beside bits"),
        ("*: bits=4 levels=symmetric", "cannot set levels, which is of W\\(1\\+1\\); leave it out, or bits=4"),
        ("*: levels=symmetric; *: bits=4", "'.*' cannot have .*: levels=symmetric does not go with bits=4"),
        ("*: group=32 embedding=4", "sets embedding, which goes with bits=4 or bits=2 of an output head"),
        ("lm_head: bits=8 group=32", "group=32 does not go with bits=8: int8 rows have a scale a row"),
        ("lm_head: bits=8 embedding=4", "embedding=4 needs bits=4 or bits=2 beside it"),
        ("*.down_proj: act-group=32", "has act-group=32 and no group"),
        ("*.down_proj: group=64 act-group=64; *.1.*: group=32", "'.*1.mlp.down_proj' cannot have .* does not go with"),
        (
            "*.q_proj: act=8",
            r"'.*0.self_attn.q_proj' \(act=8\) and '.*k_proj' \(without a scheme\) read the same input",
        ),
        (
            "*.up_proj: group=64 act-group=32",
            r"and '.*up_proj' \(group=64 act-group=32\) read the same input, .* same act, act-group and codebook",
        ),
    ],
)
def test_schemes_that_a_model_cannot_have(text, message):
    with pytest.raises(PassError, match=message):
        chosen(text)


def test_weights_behind_one_quantizer_may_differ_where_scales_are_per_token():
    found = chosen("*.mlp.*: act-group=0; *.up_proj: group=32; *.gate_proj: levels=symmetric")
    assert found["model.layers.0.mlp.up_proj"].scheme == Scheme(32, act_group=0)


# What passes make of them


def facts(program: Program) -> dict[str, tuple[int, int, int, bool]]:
    """By path: the group of a simulated linear's weight, and bits, group and knees of its input."""
    found = {}
    for node, info in linears(program):
        if info.role == "decoder":
            weight, quantizer = Arguments(Arguments(node).weight), Arguments(node.args[0])
            knees = quantizer.knees is not None
            found[info.path] = (weight.group, quantizer.bits, quantizer.group, knees)
    return found


FIT = "observe,ptq{group=32,init=rtn,compensate=false}"


@pytest.mark.parametrize(
    ("scheme", "activate", "down", "up"),
    [
        ("", "activate{group=32,steps=0}", (32, 4, 32, False), (32, 4, 32, False)),
        ("", "activate{bits=8,group=0,steps=0}", (32, 8, 0, False), (32, 8, 0, False)),
        ("*.down_proj: group=64", "activate{group=32,steps=0}", (64, 4, 32, False), (32, 4, 32, False)),
        (
            "*.mlp.*: group=128 act-group=32; *.down_proj: act-group=128",
            "activate{group=32,steps=0}",
            (128, 4, 128, False),
            (128, 4, 32, False),
        ),
        ("*.down_proj: group=64", "activate{group=0,steps=0}", (64, 4, 0, False), (32, 4, 0, False)),
        ("*.down_proj: act=8", "activate{group=32,steps=0,ranges=knees}", (32, 8, 32, False), (32, 4, 32, True)),
        (
            "*.down_proj: codebook=none",
            "activate{group=32,steps=0,ranges=knees}",
            (32, 4, 32, False),
            (32, 4, 32, True),
        ),
        ("*.down_proj: act=4 codebook=knees", "activate{bits=8,group=0,steps=0}", (32, 4, 0, True), (32, 8, 0, False)),
        ("*: group=128", "activate{steps=0}", (128, 4, 64, False), (128, 4, 64, False)),
        ("*.down_proj: act-group=0", "activate{group=32,steps=0}", (32, 4, 0, False), (32, 4, 32, False)),
        # gate keeps the groups of ptq, and reads what up does
        ("*.up_proj: group=128", "activate{group=32,steps=0}", (32, 4, 32, False), (128, 4, 32, False)),
        ("*: group=128; *.gate_proj: group=64", "activate{steps=0}", (128, 4, 64, False), (128, 4, 64, False)),
    ],
)
def test_options_of_passes_are_the_scheme_of_what_has_none(scheme, activate, down, up):
    program = apply(captured("llama")[1], f'canonicalize,annotate{{scheme="{scheme}"}}').program
    held = dataclasses.replace(context(count=2), teacher=program)
    item = apply(program, f"{FIT},{activate}", held).program
    found = facts(item)
    assert {v for path, v in found.items() if path.endswith("down_proj")} == {down}
    assert {v for path, v in found.items() if path.endswith("up_proj")} == {up}


def test_groups_that_contradict_are_refused_as_before():
    program = apply(annotated(), FIT, context(count=2)).program
    with pytest.raises(PassError, match="group cannot be 64; choose 32, as the weights have groups of 32, or 0"):
        apply(program, "activate{steps=0}", context(count=2))
    scoped = apply(captured("llama")[1], 'canonicalize,annotate{scheme="*.down_proj: group=64"}').program
    program = apply(scoped, FIT, dataclasses.replace(context(count=2), teacher=scoped)).program
    with pytest.raises(PassError, match="group cannot be 64; choose 32"):
        apply(program, "activate{group=64,steps=0}", dataclasses.replace(context(count=2), teacher=scoped))


def test_a_fit_in_a_scheme_of_its_own_is_the_fit_of_that_group():
    """Matrices behind one observer with unlike schemes are fitted as if each were alone."""

    def fitted(scheme: str) -> PassResult:
        text = f'canonicalize,annotate{{scheme="{scheme}"}},observe,ptq{{group=32}}'
        return apply(captured("llama")[1], text, context())

    mixed = fitted("*.mlp.*: act-group=0; *.up_proj: group=64")
    for name, alone in (("up_proj", fitted("*.mlp.*: group=64")), ("gate_proj", fitted(""))):
        for part in ("sign", "bitmap", "levels", "scale"):
            path = f"model.layers.0.mlp.{name}.weight.{part}"
            assert torch.equal(get_attribute(mixed.program.module, path), get_attribute(alone.program.module, path))
    rows = {row["linear"]: row["scheme"] for row in mixed.rows}
    assert rows["model.layers.0.mlp.up_proj"] == "group=64" and rows["model.layers.0.mlp.gate_proj"] == "group=32"


def test_finished_layers_of_another_scheme_are_not_taken():
    memory = Memory()
    held = context(count=2, checkpoints=memory)
    apply(annotated(), FIT, held)
    assert memory.kept
    assert apply(annotated(), FIT, held).rows and memory.loaded
    other = apply(captured("llama")[1], 'canonicalize,annotate{scheme="*.down_proj: group=64"}').program
    with pytest.raises(PassError, match="fitted with group=32, not group=64; pass --fresh"):
        apply(other, FIT, held)


# Command line and plan


def test_options_of_a_compile_reach_annotate():
    made = recipe.passes(recipe.choices(CompileOptions("m", scheme=("*.a: act=8", "*.b: dense"))), "cpu")
    (item,) = [each for each in made if isinstance(each, Annotate)]
    assert item.scheme == "*.a: act=8; *.b: dense"
    assert pipeline.parse(pipeline.render(made)) == made
    with pytest.raises(OptionError, match="--scheme and --pipeline contradict each other"):
        recipe.passes(recipe.choices(CompileOptions("m", scheme=("*.a: act=8",), pipeline="annotate")), "cpu")
    with pytest.raises(SchemeError, match="act cannot be 5"):
        recipe.passes(recipe.choices(CompileOptions("m", scheme=("*.a: act=5",))), "cpu")
    by_model = recipe.choices(CompileOptions("m"), {"scheme": ["*.a: act=8"]})
    assert by_model.scheme == ("*.a: act=8",)
    piped = recipe.choices(CompileOptions("m", pipeline="annotate"), {"scheme": ["*.a: act=8"], "preset": "quick"})
    assert (piped.scheme, piped.preset) == ((), "quick") and recipe.passes(piped, "cpu") == [Annotate()]


def test_the_plan_tells_schemes_and_their_bytes(tmp_path):
    user_model("llama").module.save_pretrained(tmp_path / "model")
    options = CompileOptions(str(tmp_path / "model"), preset="quick", scheme=tuple(MIXED.split("; ")), group=32)
    made, plain = plan.make_plan(options), plan.make_plan(dataclasses.replace(options, scheme=()))
    told = {t.path.removeprefix("model.layers."): t for t in made.linears}
    assert told["0.mlp.down_proj"].treatment == "float"
    assert told["0.mlp.up_proj"].treatment == "W(1+1) g32, A4 with knees"
    assert told["1.mlp.down_proj"].treatment == "W(1+1) g64, A8 g32"
    assert told["1.mlp.up_proj"].treatment == "W(1+1) g32 symmetric, A4 with knees"
    assert told["1.self_attn.q_proj"].treatment == "W(1+1) g128, A8 per token"
    rows, columns = told["1.mlp.down_proj"].shape
    assert told["1.mlp.down_proj"].bytes_after == rows * (2 * -(-columns // 8) + 6 * -(-columns // 64))
    assert {t.treatment for t in plain.linears} == {"W(1+1) g32, A4 with knees", "int8 per row, A8"}
    with pytest.raises(PassError, match="did you mean"):
        plan.make_plan(dataclasses.replace(options, scheme=("*.donw_proj: act=8",)))


# From text to native code


@pytest.fixture(scope="module")
def mixed() -> Program:
    text = (
        f'canonicalize,annotate{{scheme="{MIXED}"}},smooth,observe,ptq{{group=32}},distill{{epochs=1}},'
        "activate{group=32,steps=1},finetune{steps=1},head,merge,lower,cache,cleanup"
    )
    held = context(count=4, probe=batches(1, length=9, seed=2)[0])
    held.teacher = None
    return pipeline.run(captured("llama")[1], pipeline.parse(text), held)[0]


def test_a_lowered_program_says_its_schemes(mixed):
    found = {info.path.removeprefix("model.layers."): info.scheme for _, info in linears(mixed)}
    assert found == {
        "0.self_attn.q_proj+k_proj+v_proj": Scheme(32, "symmetric", 4, 32, "none"),
        "0.self_attn.o_proj": Scheme(32, "symmetric", 4, 32, "none"),
        "0.mlp.gate_proj+up_proj": Scheme(32, "free", 4, 32, "none"),
        "0.mlp.down_proj": Scheme(dense=True),
        "1.self_attn.q_proj+k_proj+v_proj": Scheme(128, "free", 8, 0, "none"),
        "1.self_attn.o_proj": Scheme(128, "free", 8, 0, "none"),
        "1.mlp.gate_proj": Scheme(32, "free", 4, 32, "none"),  # of other levels than up, so not merged with it
        "1.mlp.up_proj": Scheme(32, "symmetric", 4, 32, "none"),
        "1.mlp.down_proj": Scheme(64, "free", 8, 32, "none"),
        "lm_head": Scheme(None, "free", 8, 64, "none", bits=8),
    }
    rules = {path: bool(is_symmetric(weight.levels).all()) for path, weight in stored_weights(mixed).items()}
    assert {path for path, symmetric in rules.items() if symmetric} == {
        path for path in rules if ".0.self_attn." in path or path.endswith(".1.mlp.up_proj.weight")
    }


def test_mixed_schemes_give_the_references_bits_and_run_natively(mixed, tmp_path, monkeypatch):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path))
    needed = requirements(mixed)
    assert {(spec.group, spec.act_bits, spec.per_token) for spec in needed.linears if spec.kind == "bit"} == {
        (32, 4, False),
        (32, 8, False),  # a weight with groups of 64 and an input with groups of 32
        (128, 8, True),
    }
    kernels = kernels_of(mixed)
    item = batches(1, rows=1, length=11, seed=3)[0]
    ids, mask = item["input_ids"], item["attention_mask"]
    logits = CompiledModel(mixed, kernels).logits(ids, mask)
    assert torch.equal(logits, CompiledModel(mixed, ReferenceKernels()).logits(ids, mask))
    native = build_native(mixed, kernels, tmp_path)
    assert native is not None
    session = native.session(1)
    found = torch.from_numpy(np.asarray(session.logits(ids.numpy())))
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)


# Stored graphs


def test_schemes_come_back_from_a_stored_graph(mixed):
    stored = graph_json.loads(graph_json.dumps(mixed.module), dict(mixed.parameters()))
    again = {n.name: n.meta[LINEAR] for n in stored.graph.nodes if LINEAR in n.meta}
    assert again == {n.name: info for n, info in linears(mixed)}


def stored_linear(program: Program, operator: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The graph's document, and in it the description of its first call of an operator."""
    document = json.loads(graph_json.dumps(program.module))
    name = calls(program.graph, operator)[0].name
    return document, next(node for node in document["nodes"] if node["name"] == name)["meta"]["linear"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 64, "act_group": 64}, "has 32 as group, and 64 in its scheme"),
        ({"act_bits": 8}, "has 4 as act_bits, and 8 in its scheme"),
        ({"act_group": 0}, "has 32 as act_group, and 0 in its scheme"),
        ({"codebook": "knees"}, "has none as codebook, and knees in its scheme"),
        ({"group": 7}, "has a scheme that cannot be: group cannot be 7"),
        ({"group": "32"}, "group is not an integer"),
        ({"group": 1 << 80}, "group is not an integer"),
        ({"levels": "nobody's"}, "there is no level rule \"?'?nobody's"),
        ({"levels": 3}, "levels is not a short text"),
        ({"outliers": -2}, "outliers is not an integer"),
        ({"outliers": None}, "outliers is not an integer"),
        ({"levels": None}, "levels must be the name"),
        ({"dense": 1}, "dense is neither true nor false"),
        ({"width": 1}, "unknown field 'width'"),
    ],
)
def test_a_stored_scheme_that_is_wrong_is_refused(mixed, changes, message):
    document, linear = stored_linear(mixed, torch.ops.lbllm.bit_linear.default)
    linear["scheme"].update(changes)
    with pytest.raises(graph_json.GraphFormatError, match=message):
        graph_json.decode(document, dict(mixed.parameters()))


def test_a_scheme_of_float_for_a_quantized_linear_is_refused(mixed):
    document, linear = stored_linear(mixed, torch.ops.lbllm.bit_linear.default)
    linear["scheme"] = {"dense": True}
    with pytest.raises(graph_json.GraphFormatError, match="in its scheme"):
        graph_json.decode(document, dict(mixed.parameters()))


def test_a_stored_scheme_is_held_against_arguments_by_name(mixed):
    document, linear = stored_linear(mixed, torch.ops.lbllm.bit_linear.default)
    linear["scheme"]["act_bits"] = 8
    node = next(node for node in document["nodes"] if node.get("meta", {}).get("linear") is linear)
    names = parameters(torch.ops.lbllm.bit_linear.default)
    node["kwargs"] = dict(zip(names, node.pop("args"), strict=True))
    with pytest.raises(graph_json.GraphFormatError, match="has 4 as act_bits, and 8 in its scheme"):
        graph_json.decode(document, dict(mixed.parameters()))


def test_graphs_stored_without_schemes_are_read(mixed):
    document, linear = stored_linear(mixed, torch.ops.lbllm.bit_linear.default)
    del linear["scheme"]
    module = graph_json.decode(document, dict(mixed.parameters()))
    assert any(n.meta[LINEAR].scheme == Scheme() for n in module.graph.nodes if LINEAR in n.meta)


def test_schemes_that_say_there_are_no_outliers_are_read(mixed):
    document, linear = stored_linear(mixed, torch.ops.lbllm.bit_linear.default)
    module = graph_json.decode(document, dict(mixed.parameters()))
    linear["scheme"]["outliers"] = 0
    older = graph_json.decode(document, dict(mixed.parameters()))
    assert [n.meta.get(LINEAR) for n in older.graph.nodes] == [n.meta.get(LINEAR) for n in module.graph.nodes]


def test_keys_name_all_fields_but_dense():
    assert {*KEYS.values(), "dense"} == {f.name for f in dataclasses.fields(Scheme)}
