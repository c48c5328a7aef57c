"""Every supported architecture, from capture to cached decoding, against an independent eager model."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import exact, graph_json
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.lower import stored_weights
from oracle import Oracle
from proven_kernels import kernels_of
from reference_kernels import ReferenceKernels
from rtn import simulate
from torch import Tensor
from zoo import VOCABULARY, ZOO, captured

from lbllm_compile.evaluate import Scores
from lbllm_compile.frontend import language_model_inputs
from lbllm_compile.runtime import CompiledModel

DECODE_STEPS = 8


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Token ids; all but the last sequence of a batch have left padding."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(97 * batch + length))
    mask = torch.ones_like(ids)
    for row in range(batch - 1):
        mask[row, : (row + 1) * length // 4] = 0
    return language_model_inputs(ids, mask)


def apply(program: Program, text: str) -> Program:
    context = PassContext(probe=inputs(2, 9))
    for item in pipeline.parse(text):
        program = item.apply(program, context).program
    return program


@functools.cache
def stages(name: str) -> tuple[Program, Program]:
    """The simulated and the lowered program."""
    simulated = apply(simulate(apply(captured(name)[1], "canonicalize,annotate")), "head")
    return simulated, apply(simulated, "merge,lower,cache,cleanup")


@functools.cache
def oracle(name: str) -> Oracle:
    return Oracle(ZOO[name].build(), stages(name)[1])


@functools.cache
def compiled(name: str) -> CompiledModel:
    program = stages(name)[1]
    # as an artifact would give it back
    stored = graph_json.loads(graph_json.dumps(program.module), dict(program.parameters()))
    return CompiledModel(program.with_module(stored), ReferenceKernels())


def agree(actual: Tensor, expected: Tensor, seen: Tensor) -> None:
    """The bar between a lowered model and what it was lowered from: mean KLD at most 1e-3, top-1 at least 99 %."""
    scores = Scores()
    actual, expected = actual[seen], expected[seen]
    scores.add(torch.zeros(1, len(actual) + 1, dtype=torch.int64), pad(actual), pad(expected))
    figures = scores.summary()
    assert figures["kld_mean"] <= 1e-3
    assert figures["top1_agreement"] >= 0.99


def decodes_as_the_executor(model: CompiledModel, lowered: Program, item: dict[str, Tensor], prompt: int) -> None:
    """Holds a loaded model's logits of a batch against the executor's: of all tokens at once, and of single ones behind
    so many that are fed as a prompt."""
    ids, mask = item["input_ids"], item["attention_mask"]
    wanted = CompiledModel(lowered, ReferenceKernels()).logits(ids, mask)
    agree(model.logits(ids, mask), wanted, mask.bool())
    session = model.session(len(ids))
    session.start(mask[:, :prompt].numpy())
    parts = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    steps = np.stack([session.step(part.numpy()) for part in parts], 1)
    agree(torch.from_numpy(steps), wanted[:, prompt - 1 :], mask[:, prompt - 1 :].bool())


def pad(logits: Tensor) -> Tensor:
    """One more position, because the last of a sequence is not scored."""
    return torch.cat([logits, logits[-1:]])[None]


@pytest.mark.parametrize("name", ZOO)
def test_every_decoder_matrix_is_lowered(name):
    weights = stored_weights(stages(name)[1])
    for path, weight in weights.items():
        weight.validate(path)
    matrices = sum(w.sign.shape[0] if w.sign.dim() == 3 else 1 for w in weights.values())
    assert matrices == ZOO[name].matrices == oracle(name).replaced


@pytest.mark.parametrize("name", ZOO)
def test_the_lowered_model_is_the_eager_one(name):
    for batch in (1, 3):
        for length in (1, 7, 33):
            item = inputs(batch, length)
            seen = item["attention_mask"].bool()
            logits = compiled(name).logits(item["input_ids"], item["attention_mask"])
            agree(logits, oracle(name)(item), seen)


@pytest.mark.parametrize("name", ZOO)
def test_cached_decoding_is_the_eager_model(name):
    for batch, prefill in ((1, 7), (3, 12)):
        item = inputs(batch, prefill + DECODE_STEPS)
        ids, mask = item["input_ids"], item["attention_mask"]
        session = compiled(name).session(batch)
        session.start(mask[:, :prefill])
        parts = [session.logits(ids[:, :prefill])]
        parts += [session.logits(ids[:, i : i + 1]) for i in range(prefill, prefill + DECODE_STEPS)]
        agree(torch.cat(parts, 1), oracle(name)(item), mask.bool())


@pytest.mark.parametrize("name", ZOO)
def test_the_lowered_model_is_the_simulated_one(name):
    item = inputs(3, 33)
    simulated, lowered = stages(name)
    agree(lowered.run(item), exact.run(simulated, item), item["attention_mask"].bool())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.slow
def test_kernels_give_the_references_logits(name):
    model = CompiledModel(stages(name)[1], kernels_of(stages(name)[1]))
    for batch, length in ((1, 1), (3, 33)):
        item = inputs(batch, length)
        logits = model.logits(item["input_ids"], item["attention_mask"])
        assert torch.equal(logits, compiled(name).logits(item["input_ids"], item["attention_mask"]))
