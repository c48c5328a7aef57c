"""Which channels behind a layer matter: gradients streamed layer by layer are those of the whole model."""

from __future__ import annotations

import pytest
import torch
from graphs import program
from lbllm_compile.passes.base import PassContext, PassError
from lbllm_compile.passes.calibrate import layers, sensitivity, simulate
from lbllm_compile.passes.calibrate.sensitivity import channel_weights
from stages import annotated, batches, context
from torch import Tensor, fx


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Retaining(fx.Interpreter):
    """Runs a graph and keeps the gradients of some nodes' values."""

    def __init__(self, module: fx.GraphModule, names: set[str]):
        super().__init__(module)
        self.names = names
        self.kept: dict[str, Tensor] = {}

    def call_function(self, target, args, kwargs):
        if target is torch.ops.lbllm.grouped_linear.default:
            return simulate.grouped_linear(*args)
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node):
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, Tensor) and value.is_floating_point():
            if not value.requires_grad:
                value.requires_grad_()
            value.retain_grad()
            self.kept[n.name] = value
        return value


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "mixtral"])
def test_weights_are_the_squared_gradients_of_the_whole_model(name):
    program, data = annotated(name), context(name, count=3)
    parts = layers.split(program)
    names = {n for layer in parts.layers for n in layer.outputs}
    found = channel_weights(program, parts, data, "float32")
    drawn = data.generator(sensitivity.STREAM)
    costs: dict[str, Tensor] = {}
    shares: dict[str, Tensor] = {}
    for batch in layers.calibration_batches(program, data.calibration, 1):
        run = Retaining(program.module, names)
        with torch.enable_grad():
            output = run.run(*[batch[node.name] for node in program.placeholders()])
            logits = output[0] if isinstance(output, (tuple, list)) else output
            logits.backward(sensitivity._of_drawn_tokens(logits.detach(), drawn))
        for key, value in run.kept.items():
            size = value.detach().square().sum(-1, keepdim=True)
            assert value.grad is not None
            costs[key] = costs.get(key, 0) + (value.grad.square() * size).sum((0, 1))
            shares[key] = shares.get(key, 0) + (value.detach().square() / size).sum((0, 1))
    tokens = 3 * 2 * 24
    assert set(found) == set(costs)
    for key, cost in costs.items():
        expected = cost / ((cost * shares[key]).sum() / tokens)
        assert torch.allclose(found[key], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_tokens_are_drawn_as_often_as_the_model_says():
    logits = torch.tensor([0.0, 1.0, 2.0, -30.0]).expand(1, 4096, 4)
    probabilities = logits[0, 0].softmax(-1)
    gradient = sensitivity._of_drawn_tokens(logits, _generator())
    drawn = probabilities - gradient[0]
    assert torch.allclose(drawn.sum(-1), torch.ones(4096), atol=1e-5)
    assert torch.allclose(drawn.mean(0), probabilities, atol=0.03) and drawn[:, 3].abs().max() < 1e-6


def test_a_last_row_that_is_short_of_one_draws_a_token_that_exists():
    """Sums of float32 probabilities can end below the drawn number."""

    logits = torch.randn((1, 40, 7), generator=_generator())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda shape, generator: torch.ones(shape))
        gradient = sensitivity._of_drawn_tokens(logits, _generator())
    assert torch.allclose(gradient[0, :, 6], logits.softmax(-1)[0, :, 6] - 1, atol=1e-6)


def test_a_plain_module_has_weights_for_its_only_layer():
    matrix = torch.diag(torch.tensor([1.0, 10.0])) @ torch.randn((2, 4), generator=_generator())
    item = program({"a.weight": matrix}, lambda root, x: torch.ops.aten.linear.default(x, root.a.weight), kind="module")
    data = PassContext(calibration=[{"x": torch.randn((512, 4), generator=_generator(1))}])
    (weights,) = channel_weights(item, layers.split(item), data, "float32").values()
    # The output's own squared error is the measure, so its channels weigh the same.
    assert torch.allclose(weights, torch.ones(2), atol=0.3) and not torch.equal(weights, torch.ones(2))


def test_gradients_that_are_no_numbers_are_an_error(monkeypatch):
    monkeypatch.setattr(sensitivity, "_of_drawn_tokens", lambda logits, _: torch.full_like(logits, torch.nan))
    with pytest.raises(PassError, match="left the range of numbers"):
        channel_weights(annotated(), layers.split(annotated()), context(count=1), "float32")


def test_bfloat16_products_give_nearly_the_same():
    parts, data = layers.split(annotated()), context(count=16)
    exact, rounded = (channel_weights(annotated(), parts, data, p) for p in ("float32", "bfloat16"))
    for name, weights in exact.items():
        assert not torch.equal(weights, rounded[name])
        assert torch.corrcoef(torch.stack([weights, rounded[name]]))[0, 1] > 0.9


def test_no_more_tokens_are_taken_than_needed():
    taken = list(sensitivity.first_tokens(layers.calibration_batches(annotated(), batches(4), 1), 40))
    assert len(taken) == 2
