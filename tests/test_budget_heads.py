"""The pass budget over a whole model: the forms of embedding and head are choices as groups are."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import pytest
from lbllm_compile.codegen.sizes import int8_bytes, matrix_bytes
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassError
from lbllm_compile.passes.budget import Budget
from lbllm_compile.passes.choices import head_site, sites
from lbllm_compile.passes.head import Head, outside_matrices
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.annotations import linears
from lbllm_compile.passes.ir.program import get_attribute
from lbllm_compile.passes.ir.scheme import Scheme, parse
from stages import Memory, annotated, apply, batches, context
from test_driver import MODEL, SMALL

from lbllm_compile import artifact, driver, evaluate, frontend, plan, recipe
from lbllm_compile.html_report.contents import parts_of
from lbllm_compile.options import CompileOptions, OptionError
from lbllm_compile.recipe import Choices

FEW = (
    "*: group=64; *: group=128; *: bits=8; lm_head: bits=4 group=64; *: bits=4 group=32 embedding=4;"
    " *: bits=2 group=64; *: bits=2 group=32 embedding=4; *: dense"
)
TIED, UNTIED = "llama-tied", "llama"
MODELS = pytest.mark.parametrize("name", [TIED, UNTIED])


def head_scheme(program) -> str:
    (scheme,) = [str(info.scheme) for _, info in linears(program) if info.path == "lm_head"]
    return scheme


def weights(program) -> int:
    """Of the decoder layers' linears, the embedding and the head; a tied matrix once."""
    inside = {info.weight for _, info in linears(program) if info.layer is not None}
    matrices = [*(get_attribute(program.module, path) for path in inside), *outside_matrices(program).values()]
    return sum(matrix.numel() for matrix in matrices)


def stored_bits(program) -> int:
    """Of all matrices of a program behind ``head``, and of what describes them."""
    parts = {"sign", "bitmap", "levels", "scale", "rows", "row_scale", "codes", "table", "code_scale", "weight"}
    found = [(path, tensor) for path, tensor in program.parameters() if "norm" not in path and ".ln_" not in path]
    return sum(8 * tensor.nbytes for path, tensor in found if path.rpartition(".")[2] in parts)


@functools.cache
def costs_of(name: str) -> Memory:
    """The checkpoints of a budget over the whole model, the measurement of its choice left out."""
    memory = Memory()
    Budget(bits=30, over="model", choices=FEW).apply(annotated(name), context(name, count=4, checkpoints=memory))
    return without_choice(memory)


def without_choice(memory: Memory) -> Memory:
    memory.kept = {key: kept for key, kept in memory.kept.items() if "-ptq" not in key[0]}
    return memory


def chosen(name: str, **options):
    memory = without_choice(costs_of(name))
    where = context(name, count=4, checkpoints=memory)
    return Budget(over="model", choices=FEW, **options).apply(annotated(name), where)


@MODELS
@pytest.mark.parametrize("bits", [3.8, 4.5, 7.5, 20.0])
def test_bits_are_those_of_everything_that_is_stored(name, bits):
    result = chosen(name, bits=bits)
    stored = apply(result.program, "observe,ptq,activate{steps=0},head", context(name, count=4)).program
    assert result.summary["bits"] == pytest.approx(stored_bits(stored) / weights(annotated(name)))
    assert result.summary["bits"] <= bits


@MODELS
@pytest.mark.parametrize("bits", [3.8, 4.5, 6.0, 9.0])
def test_no_other_choice_within_the_bits_costs_less(name, bits):
    result = chosen(name, bits=bits)
    found, costs = everything(name)
    best = math.inf
    for indices in itertools.product(*(range(len(site.options)) for site in found)):
        taken = sum(site.options[index].bits for site, index in zip(found, indices, strict=True))
        if taken <= bits * weights(annotated(name)):
            best = min(best, sum(row[index] for row, index in zip(costs, indices, strict=True)))
    assert result.summary["predicted"] == pytest.approx(best)


def everything(name: str):
    """What there is to choose for, the head last, and the divergence of every choice."""
    kept = costs_of(name).kept
    rows = {tuple(paths): row for layer in range(2) for paths, row in kept["budget", layer][1]["costs"]}
    layers, head = sites(annotated(name), parse(FEW)), head_site(annotated(name), parse(FEW))
    assert head is not None
    costs = [rows[site.paths] for site in layers]
    costs.append([kept["budget-head", index][1]["divergence"] for index in range(len(head.options))])
    return [*layers, head], costs


@MODELS
def test_what_a_form_costs_is_the_divergence_of_the_model_with_it_alone(name):
    (*_, head), (*_, costs) = everything(name)
    where = context(name, count=4)
    for option, cost in zip(head.options, costs, strict=True):
        scheme = option.schemes["lm_head"]
        form = (
            Head(bits=scheme.bits, group=scheme.group or 64, embedding=scheme.embedding or 8) if scheme.bits else None
        )
        alone = form.apply(annotated(name), where).program if form else annotated(name)
        assert cost == pytest.approx(divergence(alone, name), rel=1e-3, abs=1e-7)
    assert costs[-1] == 0 < min(costs[:-1]), "a float head costs nothing, and is the largest"


def divergence(program, name: str) -> float:
    found = []
    for batch in context(name, count=4).calibration:
        log_p, log_q = (p.run(batch).log_softmax(-1) for p in (annotated(name), program))
        found.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    return sum(found) / len(found)


def test_the_measured_divergence_is_that_of_the_whole_fitted_model():
    result = chosen(UNTIED, bits=4.5)
    assert head_scheme(result.program).startswith("bits=")
    fitted = apply(result.program, "observe,ptq,head", context(UNTIED, count=4)).program
    assert result.summary["measured"] == pytest.approx(divergence(fitted, UNTIED), rel=0.02)


def test_a_limit_on_the_divergence_takes_the_fewest_bits_of_the_whole_model():
    sizes, forms = [], []
    for limit in (0.01, 0.1, 100.0):
        result = chosen(UNTIED, max_kl=limit)
        assert result.summary["predicted"] <= limit
        sizes.append(result.summary["bits"])
        forms.append(head_scheme(result.program))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    assert forms[-1] == "bits=2 group=64" or forms[-1] == "bits=2 group=32 embedding=4"


def test_a_tied_matrix_is_not_stored_twice_where_its_int8_rows_do():
    """A coarser head beside an embedding's own form takes more bits than that form for both, which is nearer."""
    of = {name: head_site(annotated(name), parse(FEW)) for name in (TIED, UNTIED)}
    forms = {name: [str(o.schemes["lm_head"]) for o in site.options] for name, site in of.items() if site}
    assert forms[TIED] == ["bits=4 group=32 embedding=4", "bits=8", "dense"]
    assert {"bits=4 group=64", "bits=2 group=64"} < {*forms[UNTIED]}


def test_the_choice_is_in_the_dump_and_in_the_rows():
    result = chosen(UNTIED, bits=4.5)
    form = head_scheme(result.program)
    assert f'role="head", reason="computes the output", scheme="{form}"' in dump.render(result.program)
    (row,) = [row for row in result.rows if row["linear"] == "lm_head"]
    assert row["scheme"] == form and row["layer"] is None and row["least"] == 0 < row["most"]


def test_an_interrupted_choice_goes_on_where_it_was():
    memory, kills = Memory(saves=2), 0
    while True:
        try:
            where = context(TIED, count=4, checkpoints=memory)
            result = Budget(bits=6, over="model", choices=FEW).apply(annotated(TIED), where)
            break
        except Memory.KilledError:
            memory.left, kills = 2, kills + 1
    at_once = chosen(TIED, bits=6)
    assert kills > 3 and any(stage == "budget-head" for stage, _ in memory.kept)
    assert head_scheme(result.program) == head_scheme(at_once.program) and result.summary == at_once.summary


def test_what_annotate_was_told_of_a_head_stands_and_counts():
    for told, form, choices in (
        ("lm_head: bits=4 group=32", "bits=4 group=32", FEW),
        ("lm_head: bits=4", "bits=4 group=64", "*: group=64; *: group=128"),
        ("lm_head: dense", "dense", FEW),
    ):
        start = apply(annotated(UNTIED), f'annotate{{scheme="{told}"}}').program
        where = context(UNTIED, count=4)
        result = Budget(bits=20, over="model", choices=choices).apply(start, where)
        assert head_scheme(result.program) == form
        stored = apply(result.program, "observe,ptq,activate{steps=0},head", where).program
        assert result.summary["bits"] == pytest.approx(stored_bits(stored) / weights(start))


def test_a_form_without_a_group_is_stored_in_the_groups_that_were_counted():
    where = context(UNTIED, count=4)
    result = Budget(bits=20, over="model", choices="*: group=64; *: bits=2").apply(annotated(UNTIED), where)
    assert parse(f"lm_head: {head_scheme(result.program)}") == parse(f"lm_head: {Scheme(bits=2, group=64)}")
    stored = apply(result.program, "observe,ptq,activate{steps=0},head{group=32}", where).program
    assert result.summary["bits"] == pytest.approx(stored_bits(stored) / weights(annotated(UNTIED)))


def test_learned_positions_stay_float_and_count():
    assert [path for path in outside_matrices(annotated("gpt2")) if "wpe" in path]
    where = context("gpt2", count=4)
    result = Budget(bits=20, over="model", choices="*: group=64; *: bits=8").apply(annotated("gpt2"), where)
    stored = apply(result.program, "observe,ptq,activate{steps=0},head", where).program
    every = sum(tensor.numel() for _, tensor in annotated("gpt2").parameters() if tensor.dim() == 2)
    assert weights(annotated("gpt2")) == every
    assert result.summary["bits"] == pytest.approx(stored_bits(stored) / every)


@MODELS
def test_a_head_of_planes_is_counted_outside_the_layers(name):
    where = context(name, count=4, probe=batches(1)[0])
    quantized = apply(annotated(name), "observe,ptq,activate{steps=0}", where).program
    lowered = {bits: apply(quantized, f"head{{bits={bits}}},lower", where).program for bits in (8, 2)}
    figures = {bits: evaluate.bits_per_weight(program) for bits, program in lowered.items()}
    sizes = {bits: evaluate.sizes(program, None)["bytes_decoder"] for bits, program in lowered.items()}
    assert figures[2]["bits_per_weight"] == figures[8]["bits_per_weight"] and sizes[2] == sizes[8]
    rows, columns = get_attribute(annotated(name).module, [*outside_matrices(annotated(name))][-1]).shape
    more = matrix_bytes(rows, columns, 64) - (0 if name == TIED else int8_bytes(rows, columns))
    parameters = sum(tensor.numel() for _, tensor in annotated(name).parameters())
    change = figures[2]["bits_per_weight_file"] - figures[8]["bits_per_weight_file"]
    assert change == pytest.approx(8 * more / parameters, rel=0.01)
    assert "W(1+1) head" in parts_of(lowered[2]).values() and "W(1+1) head" not in parts_of(lowered[8]).values()


def test_over_the_layers_alone_a_head_is_as_the_pass_head_says():
    result = Budget(bits=3.1).apply(annotated(), context(count=4))
    assert head_scheme(result.program) == "" and "lm_head" not in [row["linear"] for row in result.rows]


def test_limits_below_the_smallest_choice_and_heads_without_choice_are_told():
    with pytest.raises(PassError, match=r"bits=2 cannot be met: the smallest choice for every linear takes \d\.\d+"):
        chosen(TIED, bits=2.0)
    with pytest.raises(PassError, match=r"none of the choices is for 'lm_head'; add one, e\.g\. '\*: bits=8'"):
        Budget(bits=9, over="model", choices="*: group=64").apply(annotated(), context(count=4))


def test_a_rehearsal_tries_the_smallest_form_alone():
    memory = Memory()
    item = Budget(bits=2.0, over="model", choices=FEW).rehearsal()
    result = item.apply(annotated(TIED), context(TIED, count=4, checkpoints=memory))
    assert head_scheme(result.program) == "bits=4 group=32 embedding=4"
    assert [index for stage, index in memory.kept if stage == "budget-head"] == [0]


def test_the_command_line_says_what_a_limit_is_on():
    item = pipeline.render(recipe.passes(Choices(bits=3.5, budget_over="model"), "cpu"))
    assert "budget{bits=3.5,over=model}" in item
    assert "budget{bits=3.5}" in pipeline.render(recipe.passes(Choices(bits=3.5, budget_over="layers"), "cpu"))
    for choices, message in (
        ({"budget_over": "model"}, "--budget-over says what a limit is on; give --bits or --max-kl with it"),
        ({"pipeline": "annotate,budget{bits=3,over=model},observe"}, "which the pass 'head' makes; add 'head'"),
        ({"pipeline": "budget{bits=3,over=model},head{group=32},lower"}, "the options that the pass 'head' has by def"),
        ({"bits": 3.5, "budget_over": "all"}, "--budget-over cannot be 'all'; choose layers or model"),
    ):
        with pytest.raises(OptionError, match=message):
            recipe.passes(Choices(**choices), "cpu")


def asked(choices: str | None, **limit: float) -> CompileOptions:
    """A budget over the whole model, with choices of its own or the default ones."""
    ((name, value),) = limit.items()
    own = f',choices="{choices}"' if choices else ""
    text = f"canonicalize,annotate,budget{{{name}={value},over=model{own}}},observe,ptq,activate,head,lower,cache"
    return CompileOptions("examples/tiny_llama.py", preset="quick", pipeline=text)


@pytest.mark.parametrize("limit", [{"bits": 3.9}, {"max_kl": 0.5}])
def test_plan_says_that_the_form_of_the_head_is_open(limit, monkeypatch):
    monkeypatch.setattr(plan, "matmul_speed", lambda *_, **__: 1e11)  # a busy machine's changes from plan to plan
    planned = plan.make_plan(CompileOptions("examples/tiny_llama.py", preset="quick", budget_over="model", **limit))
    (head,) = [t for t in planned.linears if t.role == "head"]
    assert head.treatment == "int8, int4, W(1+1) or float, as the budget chooses, A8"
    for choices, forms in (
        ("*: group=64; *: bits=4", "int4"),
        ("*: group=64; *: bits=2; lm_head: bits=8", "int8 or W(1+1)"),
    ):
        given = plan.make_plan(asked(choices, **limit))
        (other,) = [t for t in given.linears if t.role == "head"]
        assert other.treatment == f"{forms}, as the budget chooses, A8"
    layers = plan.make_plan(CompileOptions("examples/tiny_llama.py", preset="quick", **limit))
    assert planned.seconds["budget"] > layers.seconds["budget"]
    if "bits" in limit:
        assert head.bytes_after == int(3.9 * head.bytes_before / 2 / 8)


@pytest.mark.parametrize(
    ("scheme", "treatment"),
    [
        ("lm_head: bits=4 group=32", "int4 g32, A8"),
        ("lm_head: bits=2 group=128", "W(1+1) g128, A8"),
        ("lm_head: bits=8", "int8 per row, A8"),
    ],
)
def test_plan_shows_the_form_that_a_scheme_gives_a_head(scheme, treatment):
    planned = plan.make_plan(CompileOptions("examples/tiny_llama.py", preset="quick", scheme=(scheme,)))
    (head,) = [t for t in planned.linears if t.role == "head"]
    assert head.treatment == treatment
    form = Head().form(dataclasses.replace(Scheme(), **fields(scheme)))
    assert head.bytes_after == form.bytes(*head.shape)


def fields(text: str) -> dict[str, int]:
    (entry,) = parse(text)
    return {key: int(value) for key, value in entry.settings}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bits", [4.2, 6.0])
def test_a_compile_under_a_limit_on_the_model_keeps_within_it(tmp_path, monkeypatch, bits):
    monkeypatch.setitem(recipe.PRESETS, "quick", SMALL)
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "small.py").write_text(MODEL)
    asked = CompileOptions(
        str(tmp_path / "small.py"),
        preset="quick",
        bits=bits,
        budget_over="model",
        out=tmp_path / "out",
        no_sheet=True,
    )
    report = driver.compile(asked)
    (record,) = [record for record in report.records if record.name == "budget"]
    (chosen,) = [row["scheme"] for row in record.rows if row["linear"] == "lm_head"]
    program = artifact.load(report.out).program
    (head,) = [info for _, info in linears(program) if info.path == "lm_head"]
    kept = dataclasses.replace(head.scheme, act_bits=None, act_group=None, codebook=None)
    assert str(kept) == chosen and head.role == "head"
    assert record.summary["bits"] == pytest.approx(stored_bits(program) / weights(captured_of(asked)))
    assert record.summary["bits"] <= bits


def captured_of(asked: CompileOptions):
    """The model's program as it was before any pass chose for it."""
    return apply(frontend.capture(frontend.load(asked.model)), "canonicalize,annotate").program
