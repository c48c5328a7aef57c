"""A simulated program in integer arithmetic is the lowered program, to the bit."""

import pytest
import torch
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.ir import exact
from lbllm_compile.passes.ir.compare import relative_error
from test_zoo import inputs, stages
from zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_lowering_changes_no_bit(name):
    simulated, _ = stages(name)
    item = inputs(3, 33)
    seen = item["attention_mask"].bool()
    lowered = simulated
    for text in ("lower", "cache", "cleanup"):
        (item_pass,) = pipeline.parse(text)
        lowered = item_pass.apply(lowered, PassContext(probe=inputs(2, 9))).program
    assert torch.equal(exact.run(simulated, item)[seen], lowered.run(item)[seen])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_it_is_the_float_simulation_up_to_rounding(name):
    simulated, _ = stages(name)
    item = inputs(1, 7)
    assert 0 < relative_error(simulated.run(item), exact.run(simulated, item)) < 1e-5
