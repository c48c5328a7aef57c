"""Quality from end to end: a GPT-2 that has really learned something, through every stage."""

from __future__ import annotations

import math
import runpy

import pytest
import torch
from test_driver import ROOT

from lbllm_compile import ablate
from lbllm_compile.options import CompileOptions

EXAMPLE = ROOT / "examples" / "gpt2_tiny.py"

HELD_OUT = 1000
"""A seed that the training text does not come from."""


def test_the_grammar_is_the_same_for_the_same_seed_and_agrees():
    grammar = runpy.run_path(str(EXAMPLE))["sentences"]
    assert list(grammar(50, 3)) == list(grammar(50, 3)) != list(grammar(50, 4))
    for sentence in grammar(200, 5):
        words = sentence.rstrip(".").split()
        if words[0].lower() in ("many", "these", "two") and "that" not in words:
            assert not any(word in ("sees", "follows", "helps", "finds", "likes", "knows") for word in words[:4])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    text = folder / "held-out.txt"
    text.write_text(" ".join(runpy.run_path(str(EXAMPLE))["sentences"](600, HELD_OUT)))
    chosen = CompileOptions(str(EXAMPLE), preset="quick", work_dir=folder / "work")
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(folder / "cache"))
        outcome = ablate.ablate(chosen, text, seq_len=64, chunks=64, only=["weights", "distill", "finetune"])
    assert torch.equal(torch.get_rng_state(), state)
    return outcome


def figures_of(outcome):
    return {f"{c.name}: {name}": m.figures for c, measured in outcome.results for name, m in measured.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_improves_on_the_first(outcome):
    rows = figures_of(outcome)
    # The grammar leaves about two bits a word open; a model that knows nothing is at 512.
    assert outcome.original.figures["ppl"] < 12
    first, quantized = rows["weights: EM+GPTQ, A16"], rows["weights: EM+GPTQ, A4"]
    for name in ("distill: on, A16", "finetune: on, A16"):
        assert rows[name]["kld_mean"] < first["kld_mean"] and rows[name]["ppl"] < first["ppl"], name
    for name in ("distill: on, A4", "finetune: off, A4", "finetune: on, A4"):
        assert rows[name]["kld_mean"] < quantized["kld_mean"], name
    # Behind stage 2 hardly anything is left to gain here; where validation gains nothing, tuning keeps what it had.
    assert rows["finetune: on, A16"]["kld_mean"] <= rows["finetune: off, A16"]["kld_mean"]
    assert all(math.isfinite(figures["kld_p99"]) for figures in rows.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xfail(reason="does not hold on this model yet", raises=AssertionError, strict=True)
@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("weights: EM, A16", "weights: RTN, A16"),
        ("finetune: on, A16", "finetune: off, A16"),
        ("finetune: on, A4", "finetune: off, A4"),
    ],
)
def test_each_part_earns_its_place(outcome, better, worse):
    rows = figures_of(outcome)
    assert rows[better]["kld_mean"] < rows[worse]["kld_mean"]
