"""Perplexity, divergence and size of a compiled model."""

from __future__ import annotations

import dataclasses
import math
import shutil

import pytest
import tokenizers
import torch
import transformers
from graphs import normal, program
from lbllm_compile.passes.annotate import LINEAR, LinearInfo
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.ir.rewrite import calls
from reference_kernels import ReferenceKernels
from test_artifact import lowered
from test_runtime import CONTEXT, VOCABULARY, language_model, model

from lbllm_compile import artifact, evaluate
from lbllm_compile.evaluate import EvaluationError
from lbllm_compile.frontend import UserModel
from lbllm_compile.report import summary
from lbllm_compile.runtime import loader

aten = torch.ops.aten


def test_scores_are_what_the_definitions_say():
    ids = torch.tensor([[0, 2, 1]])
    student, teacher = normal(1, 3, 4, seed=1), normal(1, 3, 4, seed=2)
    scores = evaluate.Scores()
    scores.add(ids, student, teacher)
    q, p = torch.softmax(student[0, :2].double(), -1), torch.softmax(teacher[0, :2].double(), -1)
    figures = scores.summary()
    assert figures["ppl"] == pytest.approx(math.exp(-(q[0, 2].log() + q[1, 1].log()) / 2), rel=1e-5)
    assert figures["ppl_teacher"] == pytest.approx(math.exp(-(p[0, 2].log() + p[1, 1].log()) / 2), rel=1e-5)
    divergence = (p * (p / q).log()).sum(-1)
    assert figures["kld_mean"] == pytest.approx(float(divergence.mean()), rel=1e-5)
    assert figures["kld_p99"] == pytest.approx(float(divergence.max()), rel=1e-5)
    assert figures["top1_agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert figures["ppl_ratio"] == figures["ppl"] / figures["ppl_teacher"]


def test_an_answer_flips_where_one_of_the_two_alone_is_right():
    """Of five tokens both find the first, the model alone the second, the original alone the third, none the rest."""
    ids = torch.tensor([[0, 1, 1, 1, 1, 1]])
    student, teacher = torch.zeros(1, 6, 4), torch.zeros(1, 6, 4)
    for position, (one, other) in enumerate([(1, 1), (1, 2), (3, 1), (2, 2), (2, 3)]):
        student[0, position, one] = teacher[0, position, other] = 5.0
    scores = evaluate.Scores()
    scores.add(ids, student, teacher)
    assert scores.summary()["flips"] == pytest.approx(2 / 5)
    assert scores.summary()["top1_agreement"] == pytest.approx(2 / 5)


def scored(count: int, spread: float, seed: int = 0) -> evaluate.Scores:
    """Chunks of 8 tokens whose mean log-likelihoods, divergences and so on differ by ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    means = 3.0 + spread * torch.randn(count, generator=generator, dtype=torch.float64)
    chunks = [mean.expand(8) for mean in means]
    return evaluate.Scores(
        nll=chunks,
        teacher_nll=[chunk - 1.0 for chunk in chunks],
        divergence=[chunk / 10 for chunk in chunks],
        agreement=[chunk > 3.0 for chunk in chunks],
        flips=[chunk < 2.9 for chunk in chunks],
    )


def test_intervals_are_those_of_means_over_chunks():
    """With many chunks the bootstrap's interval is the normal one, 1.96 standard errors to either side."""
    scores = scored(400, 0.2)
    means = torch.stack([chunk.mean() for chunk in scores.nll])
    error = float(1.96 * means.std(correction=0) / 20)
    low, high = scores.intervals()["ppl"]
    assert math.log(low) == pytest.approx(float(means.mean()) - error, abs=0.15 * error)
    assert math.log(high) == pytest.approx(float(means.mean()) + error, abs=0.15 * error)
    figures = scores.summary()
    for name, (low, high) in scores.intervals().items():
        # Where all chunks have one ratio, all three are the same but for rounding.
        assert low <= figures[name] <= high or figures[name] == pytest.approx(low, rel=1e-12), name


def test_what_both_models_find_difficult_cancels_in_the_ratio():
    intervals = scored(20, 0.5).intervals()
    assert intervals["ppl_ratio"] == pytest.approx((math.e, math.e))
    assert intervals["ppl"][1] / intervals["ppl"][0] > 1.1


def test_intervals_are_the_same_every_time_and_leave_other_random_numbers_alone():
    torch.manual_seed(3)
    first = scored(9, 0.3).intervals()
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), drawn) and scored(9, 0.3).intervals() == first


def test_chunks_count_by_their_tokens():
    scores = evaluate.Scores(nll=[torch.zeros(1), torch.ones(99)])
    drawn = evaluate._resampled_means(scores.nll)
    assert set(drawn.tolist()) == {0.0, 0.99, 1.0}


def test_a_single_chunk_and_a_missing_original_have_no_intervals():
    assert set(scored(1, 0.2).intervals().values()) == {None}
    intervals = evaluate.Scores(nll=[torch.ones(3), torch.zeros(3)]).intervals()
    assert intervals.pop("ppl") == (1.0, math.e) and set(intervals.values()) == {None}


def test_a_model_against_itself_does_not_diverge():
    chunks = evaluate.cut(list(range(3, 27)), 8, 3)
    figures = evaluate.compare(model().logits, model().logits, chunks).summary()
    assert (figures["kld_mean"], figures["kld_p99"], figures["top1_agreement"]) == (0.0, 0.0, 1.0)
    assert figures["ppl"] == figures["ppl_teacher"]


def test_without_teacher_its_figures_are_none():
    figures = evaluate.compare(model().logits, None, evaluate.cut(list(range(3, 27)), 8, 3)).summary()
    assert figures.pop("ppl") > 1 and set(figures.values()) == {None}


def test_chunks_come_from_the_start_without_overlap():
    assert [c.tolist() for c in evaluate.cut(range(11), 4, 9)] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert len(evaluate.cut(range(100), 4, 3)) == 3
    with pytest.raises(EvaluationError, match="has 3 tokens, fewer than one chunk of 4"):
        evaluate.cut(range(3), 4, 1)
    with pytest.raises(EvaluationError, match="--seq-len"):
        evaluate.cut(range(3), 1, 1)


@pytest.mark.parametrize(
    ("asked", "context", "length"),
    [(None, None, 512), (None, 128, 128), (None, 2048, 512), (128, 128, 128), (9, None, 9)],
)
def test_chunks_fit_the_context(asked, context, length):
    assert evaluate.chunk_length(asked, context) == length


def test_a_model_with_a_short_context_is_scored_within_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    artifact.save(dataclasses.replace(language_model(), tokenizer=tokenizer), tmp_path / "out", lock={})
    monkeypatch.setattr(loader, "build_kernels", lambda *_, **__: ReferenceKernels())
    text = tmp_path / "text"
    text.write_text("w3 w1 w4 " * CONTEXT)
    figures = evaluate.evaluate(tmp_path / "out", text)
    assert figures["tokens"] == 3 * (CONTEXT - 1) and figures["ppl"] > 1
    assert figures["greedy_tokens"] == CONTEXT * 3 // 4 and 0 <= figures["loops"] <= 1
    assert figures["loops_teacher"] is None and figures["bytes_original"] is None
    assert evaluate.evaluate(tmp_path / "out", text, seq_len=CONTEXT, chunks=1)["tokens"] == CONTEXT - 1
    with pytest.raises(EvaluationError, match=f"--seq-len cannot be {CONTEXT + 1}.*context holds {CONTEXT} tokens"):
        evaluate.evaluate(tmp_path / "out", text, seq_len=CONTEXT + 1)


@pytest.mark.parametrize(("share", "value"), [(0.99, 99.0), (0.5, 50.0), (1.0, 100.0), (0.0, 1.0)])
def test_percentiles(share, value):
    assert evaluate.percentile(torch.arange(1.0, 101.0).flip(0), share) == value


def test_bits_per_weight_are_as_stored():
    # a.weight: 40x40 in groups of 32: two planes of 5 bytes, two groups of 4 int8 levels and an fp16 scale a row
    bits = 40 * 8 * (2 * 5 + 2 * (4 + 2))
    figures = evaluate.bits_per_weight(lowered())
    assert figures["bits_per_weight"] == pytest.approx(bits / 1600)
    # embed.weight: 11x40 int8 and an fp32 scale a row; two fp32 clip factors for each of two quantizers
    whole = bits + 11 * (40 * 8 + 32) + 2 * 2 * 32
    assert figures["bits_per_weight_file"] == pytest.approx(whole / (1600 + 440))


@pytest.mark.parametrize(("path", "weights"), [("embed.weight", 280), ("head.weight", 560)])
def test_a_matrix_that_is_stored_in_two_forms_is_no_more_weights(path, weights):
    item = parse(f"""
        %ids: i64[1, 3] = input input_ids
        %rows: i8[7, 40] = weight embed.weight.rows
        %row_scale: f32[7] = weight embed.weight.row_scale
        %embedding = lbllm.int8_embedding(%rows, %row_scale, %ids)
        %codes: u8[7, 20] = weight {path}.codes
        %table: i8[16] = weight {path}.table
        %code_scale: f16[7, 2] = weight {path}.code_scale
        %decoded = lbllm.int4_embedding(%codes, %table, %code_scale, %ids, 40, 32)
        %both = aten.add.Tensor(%embedding, %decoded)
        return %both
    """)
    bits = 7 * (40 * 8 + 32) + 7 * (20 * 8 + 2 * 16) + 16 * 8
    assert evaluate.bits_per_weight(item)["bits_per_weight_file"] == pytest.approx(bits / weights)


def test_parameters_that_are_only_called_like_scales_are_weights():
    item = parse("""
        %ids: i64[1, 3] = input input_ids
        %codes: u8[7, 20] = weight embed.weight.codes
        %levels: i8[16] = weight embed.weight.table
        %code_scale: f16[7, 2] = weight embed.weight.code_scale
        %decoded = lbllm.int4_embedding(%codes, %levels, %code_scale, %ids, 40, 32)
        %table: f32[40] = weight own.table
        %both = aten.add.Tensor(%decoded, %table)
        return %both
    """)
    bits = 7 * (20 * 8 + 2 * 16) + 16 * 8 + 40 * 32
    assert evaluate.bits_per_weight(item)["bits_per_weight_file"] == pytest.approx(bits / (280 + 40))


def test_sizes_are_those_of_all_weights_and_of_the_decoders():
    stored = lowered()
    figures = evaluate.sizes(stored, None)
    decoder = 40 * (2 * 5 + 2 * (4 + 2))
    assert figures["bytes_decoder"] == decoder and figures["bytes_original"] is None
    assert figures["bytes_compiled"] == decoder + 11 * (40 + 4) + 2 * 2 * 4
    assert {k: figures[k] for k in evaluate.bits_per_weight(stored)} == evaluate.bits_per_weight(stored)
    head = torch.nn.Linear(40, 11)
    tied = torch.nn.ModuleDict({"embed": torch.nn.Embedding(11, 40), "head": head})
    tied["embed"].weight = head.weight
    original = UserModel(tied, "causal-lm", "tied", "")
    assert evaluate.sizes(stored, original)["bytes_original"] == 2 * (11 * 40 + 11)


@pytest.mark.parametrize(("layer", "bits"), [(0, 32.0), (None, None)])
def test_linears_that_stay_float_have_the_bits_that_are_stored(layer, bits):
    """Those outside decoder layers do not count as the decoder's, and without any there is no figure."""
    weights = {"a.weight": normal(40, 40)}
    item = program(weights, lambda root, x: aten.linear.default(x, root.a.weight), kind="module")
    (node,) = calls(item.graph, aten.linear.default)
    node.meta[LINEAR] = LinearInfo("a", "a.weight", layer, "dense", 0, "test")
    figures = evaluate.bits_per_weight(item)
    assert figures == {"bits_per_weight": bits, "bits_per_weight_file": 32.0}
    cells = [list(map(str, column.cells)) for column in summary.sheet(figures).columns]
    shown = (["bits per weight", ""], ["32", "32"]) if bits else (["bits per weight"], ["32"])
    assert (cells[0], cells[2]) == shown


def test_texts_that_cannot_be_used_are_told(tmp_path):
    (tmp_path / "latin").write_bytes("é".encode("latin-1") * 5)
    with pytest.raises(EvaluationError, match="not UTF-8 text"):
        evaluate.read_text(tmp_path / "latin")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(EvaluationError, match="is empty"):
        evaluate.read_text(tmp_path / "empty")
    with pytest.raises(EvaluationError, match="cannot read"):
        evaluate.read_text(tmp_path / "missing")


class Notes:
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_code_that_a_foreign_artifact_names_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    bait = tmp_path / "model.py"
    bait.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    artifact.save(lowered(), tmp_path / "out", lock={"source": str(bait), "model": "0" * 64})
    shutil.rmtree(tmp_path / "cache")
    notes = Notes()
    assert evaluate.find_teacher(artifact.load(tmp_path / "out"), None, notes) is None
    assert "is code, and this user's cache does not record" in notes.notes[0]
    assert not (tmp_path / "ran").exists()


def test_a_missing_source_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    artifact.save(lowered(), tmp_path / "out", lock={"source": "/nowhere/model"})
    notes = Notes()
    assert evaluate.find_teacher(artifact.load(tmp_path / "out"), None, notes) is None
    assert "is not on this machine; name it with --teacher" in notes.notes[0]


def test_a_plain_module_or_one_without_tokenizer_is_not_scored(tmp_path, monkeypatch):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    artifact.save(lowered(), tmp_path / "out", lock={})
    (tmp_path / "text").write_text("words")
    with pytest.raises(EvaluationError, match="not a language model with a tokenizer"):
        evaluate.evaluate(tmp_path / "out", tmp_path / "text")
