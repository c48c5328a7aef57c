"""The real model on CUDA: a stand-in for the driver runs SmolLM2's decode step, and gives what its launches give."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import standin
from lbllm_compile.codegen.backend import backend_of
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.cuda.driver import Driver
from lbllm_compile.codegen.cuda.program.compile import compile_launches
from lbllm_compile.codegen.cuda.program.kernels import ProgramKernels
from lbllm_compile.codegen.cuda.program.launches import TOKEN
from lbllm_compile.codegen.cuda.program.session import DeviceProgram
from lbllm_compile.codegen.targets import Target
from test_smollm2 import TEXT, lowered, needs_weights, tokens

from lbllm_compile.lowering.compare import explained, probed
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.lowering.translate import translate


@pytest.mark.slow
@needs_weights
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the search path")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run CUDA kernels with")
@pytest.mark.timeout(1800)
def test_cuda_decodes_to_the_bit_what_its_launches_do_one_by_one(tmp_path):
    """The kernels of a compile for ``cpu,cuda:sm_90``, and the launch list that compiles for a GPU without spills, on a
    stand-in for the driver. A step takes it tens of seconds, so there are three, of which the last one goes on with the
    token that was chosen; the tokens, and but for rounding the logits, are those of the CPU."""
    model, _, program = lowered()
    needed, target = requirements(program), Target.parse("cuda:sm_90")
    emitted = backend_of(target).emit(needed.linears, needed.quantizers, [target])
    assert emitted.proofs == ["sm_90: emulated on CPU, unverified on device"]
    kernels = ProgramKernels(target)
    translated = translate(program, kernels, [TOKEN])
    launches = compile_launches(translated.functions(), kernels).image.launches
    ids, found = tokens(model, TEXT)["input_ids"][0, :2].tolist(), []
    with Driver(library=standin.driver()) as driver:
        cubin = standin.cubin(launches.source(), tmp_path)
        on_device = DeviceProgram(driver, launches, cubin, translated.weight_bytes())
        replayed, launched = (on_device.sequence(4) for _ in range(2))
        for given in (*ids, None):
            replayed.step(given)
            launched.step_by_launch(given)
            found.append((replayed.token(), replayed.logits()))
            assert found[-1][0] == launched.token() and np.array_equal(found[-1][1], launched.logits())
            assert replayed.state() == launched.state()
    on_cpu = KernelSet.build(needed.linears, needed.quantizers, Target.parse("cpu"), trials=0)
    fed = np.array([[*ids, found[1][0]]])
    for (token, ours), (theirs, moved) in zip(
        found, probed(program, on_cpu, fed, np.ones_like(fed), range(4)), strict=True
    ):
        expected = theirs[0, 0].numpy()
        difference, centered = (values - values.mean() for values in (ours - expected, expected))
        assert np.linalg.norm(difference) <= explained(moved) * np.linalg.norm(centered)
        assert token == expected.argmax()
