"""Greedy text: what counts as a loop, how long continuations are, and whose tokens they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lbllm_compile.codegen.progress import NoProgress
from test_runtime import CONTEXT, model

from lbllm_compile import evaluate, greedy
from lbllm_compile.evaluate import EvaluationError
from lbllm_compile.frontend import UserModel

tokens = st.integers(0, 9)


@given(st.lists(tokens, min_size=24, max_size=40), st.lists(tokens, min_size=1, max_size=8))
def test_what_repeats_to_its_end_loops(before, period):
    assert greedy.loops([*before, *period * (len(before) + 24)])


@given(st.integers(24, 200), st.data())
def test_what_breaks_its_period_in_the_second_half_does_not_loop(length, data):
    period = data.draw(st.integers(1, length // 8))
    made = [i % period for i in range(length)]
    made[data.draw(st.integers(length - length // 4, length - 1))] = -1
    assert not greedy.loops(made)


def test_a_period_counts_that_fits_three_times_into_the_second_half():
    assert greedy.loops([*range(100, 130), *[*range(10)] * 3])
    assert not greedy.loops([*range(100, 130), *[*range(11)] * 2, *range(8)])
    assert not greedy.loops([*range(60)])


@pytest.mark.parametrize(
    ("asked", "prompt", "context", "count"),
    [(None, 32, None, 256), (None, 32, 2048, 256), (None, 8, 40, 32), (None, 8, 31, 0), (0, 8, 64, 0), (24, 8, 32, 24)],
)
def test_continuations_fit_the_context(asked, prompt, context, count):
    assert evaluate.greedy_length(asked, prompt, context) == count


@pytest.mark.parametrize(("asked", "message"), [(23, "24 tokens or more; 0"), (-1, "24 tokens"), (57, "room for 56")])
def test_lengths_that_cannot_be_are_told(asked, message):
    with pytest.raises(EvaluationError, match=f"--greedy-tokens cannot be {asked}.*{message}"):
        evaluate.greedy_length(asked, 8, 64)


def test_prompts_are_the_beginnings_of_chunks():
    pieces = evaluate.cut(range(128), 64, 2)
    assert greedy.prompts(pieces, None) == [[*range(32)], [*range(64, 96)]]
    assert greedy.prompts(pieces, 64) == [[*range(16)], [*range(64, 80)]]
    assert greedy.prompts(evaluate.cut(range(8), 4, 2), 4096) == [[0, 1, 2, 3], [4, 5, 6, 7]]


class Continued:
    """An original model whose next token follows from the last one alone; its cache counts tokens."""

    def __init__(self, following):
        self.following = following

    def __call__(self, input_ids, past_key_values, use_cache):
        logits = torch.nn.functional.one_hot(torch.tensor(self.following)[input_ids], len(self.following)).float()
        seen = (past_key_values or 0) + input_ids.shape[1]
        return SimpleNamespace(logits=logits, past_key_values=seen)


def test_the_originals_loops_are_counted_and_an_end_token_ends_them():
    # 0 and 1 follow each other; 2 goes on to 8 and stays there.
    original = UserModel(Continued([1, 0, 3, 4, 5, 6, 7, 8, 8]), "causal-lm", "made", "")
    prompts = [[0, 1]] * 9 + [[1, 2]] * 3
    rate = greedy.original_rate(original, prompts, 24, (), NoProgress())
    assert rate == 1.0
    assert greedy.original_rate(original, prompts, 24, (8,), NoProgress()) == 9 / 12


def test_the_compiled_models_loops_are_those_of_its_tokens():
    runtime = model()
    prompts = [[3, 1], [4, 2], [7, 7]]
    count = CONTEXT - 2
    steps = list(runtime.generate_ids(prompts, greedy.Sampling(max_new_tokens=count), runtime.stop_tokens()))
    made = [row for row in zip(*steps, strict=True) if None not in row]
    rate = greedy.compiled_rate(runtime, prompts, count, NoProgress())
    assert rate == sum(len(row) == count and greedy.loops(row) for row in made) / 3
