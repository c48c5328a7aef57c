"""What the pass ``smooth`` does for 4-bit activations and keys: what docs/recipes.md shows.

    python -m benchmarks.smoothing --text FILE [--model MODEL] [--calibration FILE] [--chunks 8]

Weights stay float; activations and the KV cache are quantized without clipping, in simulation. So all that is lost is
lost by their rounding. Perplexity, and mean KL divergence from the float model. The last rows quantize keys in front of
the rotary embedding, with and without their mean there, which the smoothed keys behind it are compared with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.passes.base import batches_of
from lbllm_compile.passes.ir.program import Program, set_attribute
from torch import Tensor, fx

from . import calibrated

OPTIONS = (
    (False, 0.0, False),
    (True, 0.0, False),
    (True, 0.25, False),
    (True, 0.5, False),
    (True, 1.0, False),
    (False, 0.25, True),
    (True, 0.25, True),
)
"""Whether keys are centered, the strength, and whether keys are quantized in front of the rotary embedding."""

KEYS = {
    (False, False): "as they are",
    (True, False): "centered",
    (False, True): "before rotation",
    (True, True): "before rotation, centered",
}

MEAN_SEQUENCES = 8
"""Calibration sequences on which the keys' means in front of the rotary embedding are taken."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to score")
    calibrated.add_options(parser)
    calibrated.add_text_options(parser)
    options = parser.parse_args()
    try:
        measure(options)
    except LbllmError as error:
        sys.exit(str(error))


def measure(options: argparse.Namespace) -> None:
    """Prints the table."""
    from lbllm_compile.passes.activate import insert_quantizers
    from lbllm_compile.passes.smooth import Smooth

    program, context, scorer = calibrated.scored(options)
    formats = {"A4, KV16": (4, 64, 16), "A4, KV4": (4, 64, 4)}
    print(f"| keys | strength | {' | '.join(formats)} |\n|---|---|{'---|' * len(formats)}")
    for centered, strength, unrotated in OPTIONS:
        item = Smooth(strength=strength, center_keys=centered and not unrotated, sequences=calibrated.SEQUENCES)
        smoothed = item.apply(program, context).program
        cells = []
        for bits, group, kv in formats.values():
            quantized = insert_quantizers(smoothed, bits, group, kv)
            if unrotated:
                quantize_before_rotation(quantized, context.calibration[0] if centered else None)
            figures = scorer.score(quantized)
            cells.append("not finite" if figures is None else f"{figures['ppl']:.2f} (KL {figures['kld_mean']:.3f})")
        print(f"| {KEYS[centered, unrotated]} | {strength:g} | {' | '.join(cells)} |", flush=True)


def quantize_before_rotation(program: Program, batch: Mapping[str, Any] | None) -> None:
    """Moves the quantizers of keys in front of the rotary embedding, in place.

    Args:
        batch: inputs on which the keys' means are taken, which are subtracted before and added behind the quantizer.
    """
    from lbllm_compile.passes.ir.rewrite import before_repeat, calls, is_call, make_attribute, make_call

    graph, aten, lbllm = program.graph, torch.ops.aten, torch.ops.lbllm
    moved: dict[fx.Node, fx.Node] = {}
    for attention in calls(graph, aten.scaled_dot_product_attention.default):
        _, quantizer = before_repeat(attention, attention.args[1])
        assert is_call(quantizer, lbllm.fake_quantize_kv.default), "keys have a quantizer"
        rotated = quantizer.args[0]
        # key * cos + rotated half of the key * sin
        assert is_call(rotated, aten.add.Tensor) and is_call(rotated.args[0], aten.mul.Tensor), "keys are rotated"
        moved[quantizer] = rotated.args[0].args[0]
    means = {}
    if batch is not None:
        few = next(batches_of(batch, MEAN_SEQUENCES))
        means = Means(program.module, moved.values()).of(program.arguments(few))
    for quantizer, key in moved.items():
        quantizer.replace_all_uses_with(quantizer.args[0])
        bits = quantizer.args[1]
        graph.erase_node(quantizer)
        users = list(key.users)
        with graph.inserting_before(next(n for n in graph.nodes if n in key.users)):
            if key in means:
                path = f"{key.name}_mean"
                set_attribute(program.module, path, means[key])
                mean = make_attribute(graph, path, key)
                centered = make_call(graph, aten.sub.Tensor, (key, mean), key)
                coarse = make_call(graph, lbllm.fake_quantize_kv.default, (centered, bits), key)
                result = make_call(graph, aten.add.Tensor, (coarse, mean), key)
            else:
                result = make_call(graph, lbllm.fake_quantize_kv.default, (key, bits), key)
        for user in users:
            user.replace_input_with(key, result)
    program.module.recompile()


class Means(fx.Interpreter):
    """Runs a program and takes the mean ``[H, 1, D]`` of some keys ``[B, H, S, D]``."""

    def __init__(self, module: fx.GraphModule, keys: Iterable[fx.Node]):
        super().__init__(module)
        self._keys = set(keys)
        self._found: dict[fx.Node, Tensor] = {}

    @torch.no_grad()
    def of(self, arguments: Sequence[Any]) -> dict[fx.Node, Tensor]:
        self.run(*arguments)
        return self._found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._keys:
            self._found[n] = value.mean((0, 2)).unsqueeze(1)
        return value


if __name__ == "__main__":
    main()
