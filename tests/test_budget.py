"""The pass budget: what it chooses, what it keeps, and that costs are those of the model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from graphs import normal
from lbllm_compile.codegen.progress import LbllmWarning
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import Annotate, decoder_linears
from lbllm_compile.passes.base import PassContext, PassError
from lbllm_compile.passes.budget import Budget, Costs
from lbllm_compile.passes.choices import sites
from lbllm_compile.passes.ir.annotations import LINEAR, linears
from lbllm_compile.passes.ir.scheme import Scheme, parse
from lbllm_compile.passes.lower import stored_int4, stored_weights
from lbllm_compile.passes.pipeline import PassRecord
from stages import Memory, annotated, apply, batches, context
from test_driver import MODEL, SMALL

from lbllm_compile import artifact, driver, evaluate, frontend, plan, recipe
from lbllm_compile.frontend import UserModel
from lbllm_compile.options import CompileOptions, OptionError
from lbllm_compile.recipe import Choices
from lbllm_compile.records import CompileReport, MeasuredPass
from lbllm_compile.report import overview, summary, terminal

GROUPS = "*: group=32; *: group=64; *: group=128"


def schemes(program) -> dict[str, str]:
    return {info.path: str(info.scheme) for _, info in linears(program) if info.role != "head"}


def chosen(text: str, where=None, start=None):
    return apply(start or annotated(), text, where or context(count=4))


MEMORY = Memory()


@pytest.fixture(scope="module")
def within():
    """A choice of groups. The model's linears have 72 and 104 columns, so even the largest group has a tail."""
    return chosen(f'budget{{bits=3.1,choices="{GROUPS}"}}', context(count=4, checkpoints=MEMORY))


def compiled(program):
    """The lowered program behind a choice."""
    return apply(program, "observe,ptq,activate{steps=0},head,lower", context(count=4, probe=batches(1)[0])).program


def test_bits_are_those_that_are_stored(within):
    assert within.summary["bits"] <= 3.1
    lowered = compiled(within.program)
    assert evaluate.bits_per_weight(lowered)["bits_per_weight"] == pytest.approx(within.summary["bits"])
    groups = {path: weight.group for path, weight in stored_weights(lowered).items()}
    assert len({*groups.values()}) > 1
    assert all(
        f"group={group}" == schemes(within.program)[path.removesuffix(".weight")] for path, group in groups.items()
    )


CODES = f"{GROUPS}; *: bits=4 group=32; *.mlp: bits=4 group=64; *: bits=8; *: bits=4 group=32 embedding=4"
"""What linears of decoder layers may have in it: groups and codes; forms of heads are not chosen for."""


def test_codes_are_chosen_where_the_model_is_sensitive(within):
    result = chosen(f'budget{{bits=3.1,choices="{CODES}"}}')
    made = schemes(result.program)
    assert {scheme for scheme in made.values() if "bits" in scheme} <= {"bits=4 group=32", "bits=4 group=64"}
    assert any("bits" in scheme for scheme in made.values()) and any("bits" not in s for s in made.values())
    assert result.summary["measured"] < within.summary["measured"] and result.summary["bits"] <= 3.1
    lowered = compiled(result.program)
    assert evaluate.bits_per_weight(lowered)["bits_per_weight"] == pytest.approx(result.summary["bits"])
    for path, weight in {**stored_weights(lowered), **stored_int4(lowered)}.items():
        if path != "lm_head.weight":
            bits = "bits=4 " if path in stored_int4(lowered) else ""
            assert made[path.removesuffix(".weight")] == f"{bits}group={weight.group}"


def test_codes_without_a_group_get_one_and_no_code_contradicts_what_was_told():
    """A linear that was told codes keeps them, one that was told a level rule has none; experts have none at all."""
    told = "*.o_proj: bits=4; *.down_proj: levels=additive; *.0.mlp.*_proj: act=8; *.1.self_attn.o_proj: group=256"
    start = apply(annotated(), f'annotate{{scheme="{told}"}}').program
    found = {site.paths[0]: site.options for site in sites(start, parse(CODES))}
    options = {path: [str(o.schemes[path]) for o in each] for path, each in found.items()}
    assert options["model.layers.0.self_attn.o_proj"] == ["bits=4 group=128", "bits=4 group=64", "bits=4 group=32"]
    assert options["model.layers.1.self_attn.o_proj"] == ["bits=4 group=256"]
    down = [f"group={group} levels=additive act=8" for group in (128, 64, 32)]
    assert options["model.layers.0.mlp.down_proj"] == down
    assert options["model.layers.0.mlp.gate_proj"][-2:] == ["bits=4 group=64 act=8", "bits=4 group=32 act=8"]
    experts = [site for site in sites(annotated("mixtral"), parse(CODES)) if "experts" in site.paths[0]]
    assert experts and not any(s.bits for site in experts for o in site.options for s in o.schemes.values())


def test_linears_behind_one_input_share_a_choice(within):
    for behind in decoder_linears(within.program.graph).values():
        assert len({node.meta[LINEAR].scheme for node in behind}) == 1


def test_the_graph_stays_as_it_is(within):
    inputs = batches(1)[0]
    assert torch.equal(within.program.run(inputs), annotated().run(inputs))
    assert schemes(annotated()) != schemes(within.program)


def test_no_other_choice_within_the_bits_costs_less(within):
    found = sites(annotated(), parse(GROUPS))
    costs = {tuple(paths): row for layer in range(2) for paths, row in MEMORY.kept["budget", layer][1]["costs"]}
    weights = sum(matrix.numel() for path, matrix in annotated().parameters() if "proj" in path)
    best = min(
        sum(costs[site.paths][index] for site, index in zip(found, indices, strict=True))
        for indices in itertools.product(*(range(len(site.options)) for site in found))
        if sum(site.options[index].bits for site, index in zip(found, indices, strict=True)) <= 3.1 * weights
    )
    assert within.summary["predicted"] == pytest.approx(best)
    uniform = sum(costs[site.paths][-2] for site in found)
    assert found[0].options[-2].schemes[found[0].paths[0]].group == 64 and best < 2 * uniform


def test_what_a_choice_costs_is_the_divergence_of_the_model_with_it_alone(within):
    """Of the choice that is measured: the linears behind one input, fitted to the float model's inputs."""
    site = sites(annotated(), parse(GROUPS))[-1]
    (row,) = [r for r in (MEMORY.kept["budget", 1][1]["costs"]) if tuple(r[0]) == site.paths]
    infos = [info for _, info in linears(annotated()) if info.role == "decoder"]
    alone = Annotate(
        scheme="; ".join(f"{path}: group=64" for path in site.paths),
        keep_dense=tuple(info.path for info in infos if info.path not in site.paths),
    )
    where = context(count=4)
    program = apply(alone.apply(annotated(), where).program, "observe,ptq", where).program
    assert row[1][site.measured] == pytest.approx(divergence(program, where), rel=0.02)


def divergence(program, where) -> float:
    """Mean KL divergence from the float model on the calibration tokens, all of which are measured on."""
    found = []
    for batch in where.calibration:
        log_p, log_q = (p.run(batch).log_softmax(-1) for p in (annotated(), program))
        found.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    return sum(found) / len(found)


def test_more_bits_never_cost_more_divergence():
    memory = Memory()
    costs = []
    for bits in (2.8, 3.1, 3.6, 8, 40):
        where = context(count=4, checkpoints=memory)
        memory.kept = {k: v for k, v in memory.kept.items() if not k[0].startswith("budget-ptq")}
        result = Budget(bits=bits).apply(annotated(), where)
        costs.append((result.summary["predicted"], result.summary["bits"]))
        assert result.summary["bits"] <= bits
    assert [c for c, _ in costs] == sorted((c for c, _ in costs), reverse=True)
    assert costs[-1] == (0.0, 32.0), "with 40 bits every linear stays float"


def test_a_limit_on_the_divergence_takes_the_fewest_bits():
    memory = Memory()
    sizes = {}
    for limit in (0.02, 0.2, 100.0):
        memory.kept = {k: v for k, v in memory.kept.items() if "-ptq" not in k[0]}
        result = Budget(max_kl=limit).apply(annotated(), context(count=4, checkpoints=memory))
        assert result.summary["predicted"] <= limit
        sizes[limit] = result.summary["bits"]
    assert sizes[0.02] >= sizes[0.2] >= sizes[100.0]
    smallest = 2 * math.ceil(72 / 8) * 8 / 72  # of the planes alone
    assert smallest < sizes[100.0] < 3.2


def test_people_see_what_came_of_it(within):
    (item,) = pipeline.parse(f'budget{{bits=3.1,choices="{GROUPS}"}}')
    measured = MeasuredPass(item.name, pipeline.render_pass(item), "exact", within.rows, within.summary)
    report = CompileReport(Path(), [], [], {}, 0, {}, 0)
    first_page = overview.page(within.program, [], [], [measured], None)
    record = PassRecord(1, item.name, measured.text, 1.0, 1.0, 9, 9, "exact", 0.0, within.rows, within.summary)
    for parts in (first_page, summary.compile_report(dataclasses.replace(report, records=[record]))):
        (table,) = [part for part in parts if str(getattr(part, "title", "")).startswith("What budget{bits=3.1")]
        names, figures = ([str(cell) for cell in column.cells] for column in table.columns)
        assert names == ["bits per weight", "divergence, predicted", "divergence, measured"]
        assert figures == [terminal.figure(within.summary[name]) for name in ("bits", "predicted", "measured")]


def test_the_measured_divergence_is_that_of_the_fitted_model(within):
    where = context(count=4)
    quantized = apply(within.program, "observe,ptq", where).program
    assert within.summary["measured"] == pytest.approx(divergence(quantized, where), rel=0.02)


def test_a_choice_that_is_made_again_is_measured_again():
    memory, where, again = Memory(), context(count=4), []
    for limit in (0.05, 0.1):
        memory.kept = {k: v for k, v in memory.kept.items() if "-ptq" not in k[0]}
        result = Budget(max_kl=limit).apply(annotated(), dataclasses.replace(where, checkpoints=memory))
        again.append(any("again" in stage for stage, _ in memory.kept))
        quantized = apply(result.program, "observe,ptq", where).program
        assert result.summary["measured"] == pytest.approx(divergence(quantized, where), rel=0.02)
    assert any(again)


def test_a_model_above_the_limit_is_told(monkeypatch):
    monkeypatch.setattr(Costs, "measured", lambda _, program, prefix="": 0.41 if prefix else 0.5)
    with pytest.warns(LbllmWarning, match=r"diverges by 0\.41, more than max_kl=0\.4, .*; give a smaller limit"):
        result = Budget(max_kl=0.4).apply(annotated(), context(count=4))
    assert result.summary["predicted"] <= 0.4 < result.summary["measured"] == 0.41


def test_what_annotate_was_told_stands():
    start = apply(annotated(), 'annotate{scheme="*.o_proj: group=256",keep_dense="*.down_proj"}').program
    result = chosen('budget{bits=14,choices="*: group=32; *: group=64"}', start=start)
    for path, scheme in schemes(result.program).items():
        if path.endswith("o_proj"):
            assert scheme == "group=256"
        elif path.endswith("down_proj"):
            assert scheme == "dense"
        else:
            assert scheme in ("group=32", "group=64")
    lowered = compiled(result.program)
    assert evaluate.bits_per_weight(lowered)["bits_per_weight"] == pytest.approx(result.summary["bits"])


def test_choices_may_be_for_some_linears_alone():
    result = chosen('budget{bits=40,choices="*: group=64; *.down_proj: group=32; *.layers.0.*: dense"}')
    for path, scheme in schemes(result.program).items():
        if ".layers.0." in path:
            assert scheme == "dense"
        else:
            assert scheme == ("group=32" if path.endswith("down_proj") else "group=64")


def test_an_interrupted_choice_goes_on_where_it_was(within):
    text = f'budget{{bits=3.1,choices="{GROUPS}"}}'
    memory, kills = Memory(saves=2), 0
    while True:
        try:
            result = chosen(text, context(count=4, checkpoints=memory))
            break
        except Memory.KilledError:
            memory.left, kills = 2, kills + 1
    assert kills > 1 and memory.loaded > 1
    assert schemes(result.program) == schemes(within.program) and result.summary == within.summary


def test_experts_are_chosen_for():
    result = apply(annotated("mixtral"), f'budget{{bits=3.3,choices="{GROUPS}"}}', context("mixtral", count=4))
    assert any("experts" in row["linear"] for row in result.rows)
    assert result.summary["bits"] <= 3.3 and result.summary["predicted"] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget", "needs a limit; set bits or max_kl"),
        ("budget{bits=3,max_kl=1}", "and not both"),
        ("budget{bits=2}", r"bits=2 cannot be met: the smallest choice for every linear takes 2\.\d+ bits"),
        (f'budget{{max_kl=0.000001,choices="{GROUPS}"}}', "max_kl=1e-06 cannot be met.*add 'dense' to the choices"),
        ('budget{bits=3,choices="*.down_proj: group=64"}', "none of the choices is for 'model.layers.0"),
        ('budget{bits=3,choices="*.down_prj: group=64"}', "matches no linear; did you mean"),
    ],
)
def test_what_cannot_be_chosen_is_told(text, message):
    with pytest.raises(PassError, match=message):
        chosen(text)


@pytest.mark.parametrize("limit", [Budget(bits=2.0), Budget(max_kl=1e-9, choices=GROUPS)])
def test_a_rehearsal_asks_whether_it_works_and_not_whether_one_layer_meets_the_limit(limit):
    result = limit.rehearsal().apply(annotated(), context(count=4))
    assert {str(scheme) for scheme in schemes(result.program).values()} <= {"group=128", "group=256"}


def test_a_plain_module_is_chosen_for_by_its_relative_error():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(96, 40), torch.nn.ReLU(), torch.nn.Linear(40, 24))
    module.requires_grad_(False)
    inputs = {"input": normal(64, 96, seed=1)}
    item = apply(
        frontend.capture(UserModel(module, "module", "mlp", "", inputs=inputs)), "canonicalize,annotate"
    ).program
    where = PassContext(teacher=item, calibration=[inputs, {"input": normal(64, 96, seed=2)}])
    free = Budget(max_kl=1.0).apply(item, where)
    tight = Budget(max_kl=0.05).apply(item, where)
    assert tight.summary["predicted"] <= 0.05 and tight.summary["bits"] > free.summary["bits"]


@pytest.mark.parametrize("unit", [2.0**-10, 0.001])
def test_what_the_middle_choice_holds_exactly_is_not_free_to_coarser_ones(unit):
    """Four levels in every 64 columns, and others in the next 64; as stored, or all but that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.ReLU(), torch.nn.Linear(64, 24))
    module.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    picked = torch.tensor([-127.0, -30.0, 11.0, 127.0])[torch.randint(4, (64, 256), generator=generator)]
    module[0].weight.copy_(picked * torch.tensor([1.0, 3.0, 7.0, 13.0]).repeat_interleave(64) * unit)
    inputs = {"input": normal(512, 256, seed=1)}
    user = UserModel(module, "module", "mlp", "", inputs=inputs)
    item = apply(frontend.capture(user), 'canonicalize,annotate{keep_dense="2"}').program
    where = PassContext(teacher=item, calibration=[inputs])
    result = Budget(max_kl=0.05, choices=GROUPS, precision="float32").apply(item, where)
    costs = {row["linear"]: row for row in result.rows}
    assert costs["0"]["scheme"] == "group=64" and 0.1 < costs["0"]["most"] < 0.5
    assert result.summary["measured"] <= 0.05


def test_a_weight_behind_two_inputs_is_refused_or_kept_float():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear, last = torch.nn.Linear(96, 96), torch.nn.Linear(96, 96)
    module = torch.nn.Sequential(linear, torch.nn.ReLU(), linear, torch.nn.ReLU(), last).requires_grad_(False)
    inputs = {"input": normal(64, 96, seed=1)}
    user = UserModel(module, "module", "mlp", "", inputs=inputs)
    item = apply(frontend.capture(user), "canonicalize,annotate").program
    with pytest.raises(PassError, match=r"'0' and '2' share one weight and .* float with --keep-dense"):
        Budget(bits=3.5).apply(item, PassContext(teacher=item, calibration=[inputs]))
    with pytest.raises(PassError, match=r"'0', which stays float .*, and '2' share one weight, .* quantize both"):
        apply(item, 'annotate{keep_dense="0"}')
    both = apply(item, 'annotate{keep_dense="0|2"}').program
    result = Budget(bits=18).apply(both, PassContext(teacher=both, calibration=[inputs]))
    assert schemes(result.program) | {"4": ""} == {"0": "dense", "2": "dense", "4": ""}
    assert 17 < result.summary["bits"] <= 18


def test_outlier_channels_are_refused_because_they_are_not_counted():
    start = annotated().copy()
    for node, info in linears(start):
        if info.path.endswith("down_proj"):
            node.meta[LINEAR] = dataclasses.replace(info, scheme=Scheme(outliers=8))
    with pytest.raises(PassError, match="budget does not count the channels that keep 8 bits"):
        chosen("budget{bits=3}", start=start)


def test_it_needs_calibration_and_annotations():
    with pytest.raises(PassError, match="budget needs calibration batches"):
        Budget(bits=3).apply(annotated(), context(count=0))


def test_its_text_round_trips():
    text = f'budget{{bits=2.5,choices="{GROUPS}"}}'
    assert pipeline.render(pipeline.parse(text)) == text


def test_a_limit_puts_the_pass_in_front_of_the_observers():
    passes = recipe.passes(Choices(bits=2.5), "cpu")
    names = [item.name for item in passes]
    assert names[names.index("budget") + 1] == "observe" and names.index("annotate") < names.index("budget")
    assert pipeline.render(passes).count("budget{bits=2.5}") == 1
    assert "budget{max_kl=0.5}" in pipeline.render(recipe.passes(Choices(max_kl=0.5, recipe="lbllm-paper"), "cpu"))
    assert "budget" not in [item.name for item in recipe.passes(Choices(), "cpu")]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"bits": 0.0}, "--bits cannot be 0; give a number above 0, e.g. 2.5"),
        ({"max_kl": -1.0}, "--max-kl cannot be -1; .*e.g. 0.5"),
        ({"max_kl": math.inf}, "--max-kl cannot be inf"),
        ({"bits": 2.5, "max_kl": 1.0}, "--bits and --max-kl contradict each other"),
        ({"bits": 2.5, "group": 64}, "--group and --bits contradict each other: --bits chooses groups"),
        ({"bits": 2.5, "recipe": "bwa"}, "--bits cannot be given with the recipe 'bwa'"),
        ({"bits": 2.5, "pipeline": "cleanup"}, "--bits and --pipeline contradict"),
        ({"pipeline": "annotate,budget{bits=3},outliers,observe"}, "'budget' does not count the channels that 'outl"),
        ({"pipeline": "annotate,outliers,budget{bits=3},observe"}, "'budget' does not count the channels that 'outl"),
    ],
)
def test_limits_that_cannot_be_are_one_sentence(choices, message):
    with pytest.raises(OptionError, match=message):
        recipe.passes(Choices(**choices), "cpu")


def test_a_number_is_a_number():
    assert CompileOptions("model.py", bits=3).bits == 3.0
    with pytest.raises(OptionError, match="--bits cannot be 'few'; give a number"):
        CompileOptions("model.py", bits="few")


def test_plan_says_what_is_open_and_what_it_will_take():
    asked = CompileOptions("examples/tiny_llama.py", preset="quick", bits=2.9, scheme=("*.o_proj: group=32",))
    planned = plan.make_plan(asked)
    treatments = {t.path.rpartition(".")[2]: t for t in planned.linears}
    assert "as the budget chooses" in treatments["down_proj"].treatment and ", A4" in treatments["down_proj"].treatment
    assert treatments["o_proj"].treatment.startswith("W(1+1) g32")
    weights = treatments["down_proj"].bytes_before / 2
    assert treatments["down_proj"].bytes_after == int(2.9 * weights / 8)
    assert planned.seconds["budget"] > 0 and "budget{bits=2.9}" in planned.pipeline


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compile_under_a_limit_keeps_within_it(tmp_path, monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "quick", SMALL)
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "small.py").write_text(MODEL)
    asked = CompileOptions(str(tmp_path / "small.py"), preset="quick", bits=3.1, out=tmp_path / "out", no_sheet=True)
    report = driver.compile(asked)
    assert report.sheet["bits_per_weight"] <= 3.1
    (record,) = [record for record in report.records if record.name == "budget"]
    assert record.summary["bits"] == pytest.approx(report.sheet["bits_per_weight"]) and record.error == 0
    assert len({weight.group for weight in stored_weights(artifact.load(report.out).program).values()}) > 1
