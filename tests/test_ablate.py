"""Ablations: what is compared, what is shared between variants, what a rerun takes over, and what a table says."""

from __future__ import annotations

import io
import math

import pytest
import torch
from lbllm_compile.codegen.format import LEVELS
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.activate import Activate
from lbllm_compile.passes.budget import Costs
from lbllm_compile.passes.calibrate.fit import even_grid, factor, fit
from lbllm_compile.passes.calibrate.training import DivergenceError
from lbllm_compile.passes.finetune import Finetune
from lbllm_compile.passes.ir import dump
from stages import annotated, apply, batches, context, quantized, same_tensors
from test_driver import SMALL
from test_errors import fails
from zoo import VOCABULARY

from lbllm_compile import ablate, evaluate, recipe
from lbllm_compile.ablate import AblationError, Parts
from lbllm_compile.checkpoint import WorkDir, WorkDirError
from lbllm_compile.options import CompileOptions
from lbllm_compile.report import terminal
from lbllm_compile.variants import DivergedError, Scorer, Tree

EXAMPLE = "examples/tiny_llama.py"

PREPARATION = pipeline.parse("observe")
STAGES = "ptq{group=32},distill{epochs=1},activate{group=32,steps=2},finetune{steps=2},head"


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipe.PRESETS, "quick", SMALL)
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    return path


def tree(work: WorkDir) -> Tree:
    return Tree.start(annotated(), PREPARATION, context(count=4, probe=batches(1)[0]), work)


def chunks(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCABULARY, (1, 20), generator=generator) for _ in range(count)]


def test_scores_are_those_of_the_whole_programs():
    student = apply(quantized(), "activate{group=32,steps=0},head", context(count=4)).program

    def logits(program):
        return lambda ids: program.run({"input_ids": ids, **masks(ids)})

    expected = evaluate.compare(logits(student), logits(annotated()), chunks(3)).summary()
    figures = Scorer(annotated(), chunks(3)).score(student)
    assert figures == pytest.approx(expected, rel=1e-5)


def masks(ids):
    mask = torch.ones_like(ids)
    return {"attention_mask": mask, "position_ids": mask.cumsum(-1) - 1}


def test_the_float_model_against_itself_does_not_diverge():
    figures = Scorer(annotated(), chunks(2)).score(annotated())
    assert figures is not None
    assert figures["ppl"] == figures["ppl_teacher"] and figures["kld_mean"] == 0 and figures["top1_agreement"] == 1


def test_logits_that_are_not_finite_have_no_score():
    broken = annotated().copy()
    path, weight = next((p, t) for p, t in broken.parameters() if t.dim() == 2 and "mlp" in p)
    broken = apply_tensor(broken, path, torch.full_like(weight, math.nan))
    assert Scorer(annotated(), chunks(2)).score(broken) is None


def apply_tensor(program, path, tensor):
    from lbllm_compile.passes.calibrate.chains import with_tensors

    return with_tensors(program, {path: tensor})


def test_a_tree_gives_what_the_pipeline_gives_and_takes_finished_passes_over(tmp_path):
    passes = pipeline.parse(STAGES)
    expected = apply(annotated(), "observe," + STAGES, context(count=4)).program
    work = WorkDir(tmp_path / "w", {})
    first = tree(work).reach(passes)
    assert same_tensors(first.program, expected)
    # Of a finished pass the program alone is kept, not its layers.
    assert all(stage.startswith(("after-", "prepared-")) for stage in work.finished())
    again = tree(work)
    again._run = None  # type: ignore[assignment]
    second = again.reach(passes)
    assert same_tensors(second.program, expected) and second.seconds == first.seconds
    assert Scorer(annotated(), chunks(1)).score(second.program) == Scorer(annotated(), chunks(1)).score(expected)


def test_what_a_preparation_measured_is_taken_over_and_its_time_is_that_of_the_first(tmp_path, monkeypatch):
    work, preparation = (
        WorkDir(tmp_path / "w", {}),
        pipeline.parse('budget{bits=4,choices="*: group=32; *: group=64"},observe'),
    )

    def start() -> Tree:
        return Tree.start(annotated(), preparation, context(count=4, probe=batches(1)[0]), work)

    first = start().prepared
    monkeypatch.setattr(Costs, "_layer", None)  # what a layer's choices cost is not measured again
    second = start().prepared
    assert (second.seconds, second.peak_memory) == (first.seconds, first.peak_memory) and first.seconds > 0
    assert dump.render(second.program) == dump.render(first.program)
    assert start().reach(pipeline.parse("ptq")).seconds > first.seconds


@pytest.mark.slow
def test_passes_after_a_reloaded_one_give_the_same(tmp_path):
    passes = pipeline.parse(STAGES)
    expected = apply(annotated(), "observe," + STAGES, context(count=4)).program
    for count in range(1, len(passes)):
        work = WorkDir(tmp_path / str(count), {})
        tree(work).reach(passes[:count])
        assert same_tensors(tree(work).reach(passes).program, expected), passes[count]
        work.release()


def test_pipelines_that_begin_alike_share_their_beginning(tmp_path, monkeypatch):
    ran = []
    run = pipeline.run

    def recorded(program, passes, *rest):
        ran.extend(passes)
        return run(program, passes, *rest)

    monkeypatch.setattr(pipeline, "run", recorded)
    grown = tree(WorkDir(tmp_path / "w", {}))
    for text in ("ptq{group=32}", "ptq{group=32},distill{epochs=1}", "ptq{group=32},activate{group=32,steps=0}"):
        grown.reach(pipeline.parse(text))
    assert [item.name for item in ran] == ["observe", "ptq", "distill", "activate"]


def test_a_diverged_training_stays_diverged(tmp_path, monkeypatch):
    def diverge(*_):
        raise DivergenceError("the training diverged after 3 steps")

    work = WorkDir(tmp_path / "w", {})
    with monkeypatch.context() as patch:
        patch.setattr(Finetune, "apply", diverge)
        with pytest.raises(DivergedError, match="after 3 steps"):
            tree(work).reach(pipeline.parse("ptq{group=32},finetune{steps=2}"))
    with pytest.raises(DivergedError, match="after 3 steps"):
        tree(work).reach(pipeline.parse("ptq{group=32},finetune{steps=2},head"))


def test_rounding_to_nearest_takes_an_even_grid_and_ignores_the_inputs():
    weight = torch.randn((5, 40), generator=torch.Generator().manual_seed(1))
    fits = []
    for seed in (2, 3):
        x = torch.randn((80, 40), generator=torch.Generator().manual_seed(seed))
        fits.append(fit(weight, factor(x.t() @ x / 80, 32, 0.01), 32, init="rtn", compensate=False))
    assert torch.equal(fits[0].codes, fits[1].codes) and torch.equal(fits[0].levels, fits[1].levels)
    blocks = weight[:, :32], weight[:, 32:]
    for index, block in enumerate(blocks):
        grid = even_grid(block)
        assert torch.equal(grid[:, 0], block.amin(-1)) and torch.equal(grid[:, -1], block.amax(-1))
        assert torch.allclose(grid.diff(dim=1), grid.diff(dim=1)[:, :1].expand(-1, LEVELS - 1))
        # int8 steps of the largest level
        assert torch.allclose(fits[0].levels[:, index], grid, atol=float(grid.abs().max()) / 100)


def test_weights_train_under_quantized_activations():
    start = apply(quantized(), "activate{group=32,steps=0}", context(count=4)).program
    trained = apply(start, "distill{epochs=2}", context(count=4))
    assert trained.summary["mean_after"] < trained.summary["mean_before"]
    clips = [path for path, _ in start.parameters() if path.endswith("input_clip")]
    assert clips and all(torch.equal(dict(trained.program.parameters())[p], torch.ones(2)) for p in clips)


def test_parts_do_some_work_where_the_recipe_has_none():
    parts = Parts.of(pipeline.parse("annotate,observe,ptq{group=128},distill{epochs=5},activate{group=128,steps=0}"))
    assert [p.name for p in parts.preparation] == ["annotate", "observe"]
    assert parts.distill.epochs == 5 and parts.quantize.steps == 0
    assert parts.activate.steps > 0 and parts.finetune.steps > 0 and parts.activate.group == 128
    assert Parts.of(pipeline.parse("ptq{group=32}")).quantize.group == 32
    with pytest.raises(AblationError, match="no 'ptq'"):
        Parts.of(pipeline.parse("annotate"))


def test_every_variant_is_a_pipeline_that_parses_back():
    found = ablate.comparisons(Parts.of(recipe.passes(recipe.Choices(), "cpu")))
    assert [c.name for c in found] == ["weights", "distill", "trained", "joint", "activations", "finetune", "tuned"]
    for passes in (p for c in found for p in c.variants.values()):
        assert tuple(pipeline.parse(pipeline.render(passes))) == passes


CHOICES = [
    *(recipe.Choices(recipe=name) for name in recipe.RECIPES),
    *(recipe.Choices(act_bits=bits) for bits in (8, 16)),
    recipe.Choices(recipe="db-llm", act_bits=4),
]


@pytest.fixture(scope="module")
def of_groups():
    """A model after stage 1, by its weights' group."""
    return {group: quantized(group=group) for group in (32, 64, 128)}


@pytest.mark.parametrize("choices", CHOICES, ids=lambda c: f"{c.recipe}-{c.act_bits}")
def test_every_recipe_has_variants_that_can_run_and_are_told_apart(choices, of_groups):
    parts = Parts.of(recipe.passes(choices, "cpu"))
    found = ablate.comparisons(parts)
    shown = {c.name: c.variants for c in found}
    sizes = {"weights": 8, "distill": 4, "trained": 4, "joint": 2, "finetune": 4}
    assert {name: len(shown[name]) for name in sizes} == sizes
    assert len(shown["activations"]) == (7 if parts.quantize.bits == 4 else 5)
    assert len(shown.get("tuned", ())) == (0 if choices.recipe == "db-llm" else 2)
    for comparison in found:
        assert len({*comparison.variants.values()}) == len(comparison.variants)
        for passes in comparison.variants.values():
            assert tuple(pipeline.parse(pipeline.render(passes))) == passes
            for item in passes:
                if isinstance(item, Activate):
                    item._check(of_groups[parts.ptq.group])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, text):
    chosen = options(tmp_path_factory.mktemp("outcome"))
    return ablate.ablate(chosen, text, seq_len=32, chunks=3, only=["joint"])


def options(tmp_path, **changes):
    return CompileOptions(EXAMPLE, preset="quick", work_dir=tmp_path / "work", **changes)


def test_the_table_names_what_was_scored_and_how(outcome, text):
    stream = io.StringIO()
    console = terminal.make_console(file=stream)
    for part in ablate.render(outcome):
        console.print(part)
    # A long path is broken anywhere.
    shown = "".join(stream.getvalue().split())
    assert f"{text}:3chunksof32tokens,93tokensscored;simulatedprograms" in shown
    assert "floatmodel" in shown and "afterstage2" in shown and "jointtraining" in shown
    document = outcome.to_json()
    assert document["tokens"] == 93 and document["original"]["figures"]["kld_mean"] == 0
    assert [c["name"] for c in document["comparisons"]] == ["joint"]
    assert all(v["figures"]["ppl"] > 1 and v["seconds"] > 0 for c in document["comparisons"] for v in c["variants"])


def test_a_rerun_takes_finished_variants_over(outcome, text, monkeypatch):
    monkeypatch.setattr(Tree, "reach", None)
    again = ablate.ablate(options(outcome.work.parent), text, seq_len=32, chunks=3, only=["joint"])
    assert again == outcome


@pytest.mark.slow
def test_an_interrupted_ablation_gives_the_same_figures(outcome, tmp_path, text, monkeypatch):
    saves = 0
    save = WorkDir.save

    def interrupted(self, *piece):
        nonlocal saves
        save(self, *piece)
        saves += 1
        if saves % 4 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkDir, "save", interrupted)
    for _ in range(20):
        try:
            again = ablate.ablate(options(tmp_path), text, seq_len=32, chunks=3, only=["joint"])
            break
        except KeyboardInterrupt:
            continue
    for (_, expected), (_, found) in zip(outcome.results, again.results, strict=True):
        assert [m.figures for m in found.values()] == [m.figures for m in expected.values()]


def test_a_diverged_variant_is_a_row(tmp_path, text, monkeypatch):
    def diverge(*_):
        raise DivergenceError("the training diverged after 3 steps")

    monkeypatch.setattr(Finetune, "apply", diverge)
    outcome = ablate.ablate(options(tmp_path), text, seq_len=32, chunks=1, only=["finetune"])
    (_, measured) = outcome.results[0]
    assert ablate.cells(measured["on, A16"])[0] == "diverged" and measured["off, A16"].figures is not None
    diverged = [v for v in outcome.to_json()["comparisons"][0]["variants"] if v["diverged"]]
    assert len(diverged) == 2


def test_another_ablation_is_refused_and_told_what_changed(outcome, text):
    with pytest.raises(WorkDirError, match=r"holds a study with another calibration, seed; pass --fresh"):
        ablate.ablate(options(outcome.work.parent, seed=1), text, seq_len=32, chunks=3)


def test_mistakes_are_found_before_the_model_is_read(tmp_path, text):
    missing = CompileOptions("missing.py", preset="quick", work_dir=tmp_path / "w")
    with pytest.raises(
        AblationError, match=r"no comparison 'weigths' \(did you mean 'weights'\?\); choose weights, dis"
    ):
        ablate.ablate(missing, text, only=["weigths"])
    with pytest.raises(evaluate.EvaluationError, match="cannot read the text"):
        ablate.ablate(missing, tmp_path / "none.txt")
    with pytest.raises(evaluate.EvaluationError, match="--seq-len"):
        ablate.ablate(missing, text, seq_len=1)


def test_comparisons_may_be_named_one_by_one(text):
    sentence = fails("ablate", "missing.py", "--text", str(text), "--only", "weigths", "--only", "distill,finetune")
    assert "no comparison 'weigths'" in sentence


def test_a_plain_module_cannot_be_scored(tmp_path, text):
    with pytest.raises(evaluate.EvaluationError, match="not a language model"):
        ablate.ablate(CompileOptions("examples/mlp.py", preset="quick", work_dir=tmp_path / "w"), text)
