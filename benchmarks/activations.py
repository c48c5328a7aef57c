"""The error of 4-bit activations by the way they are quantized: what docs/recipes.md shows.

    python -m benchmarks.activations

Tokens of 1024 channels are drawn from distributions that inputs of linears resemble; the error is the mean over tokens
of ``||quantized - x||^2 / ||x||^2``. Clip factors are the best of a few, the same for both ends; knees are placed as
the pass ``activate`` places them, without clipping.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lbllm_compile.codegen import reference
from lbllm_compile.passes.calibrate.knees import best_knees
from torch import Tensor

TOKENS, CHANNELS = 256, 1024

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)

GROUPS = (0, 128, 64)
"""Channels per scale; 0 is one scale a token."""


def samples(seed: int = 0) -> dict[str, Tensor]:
    """Tokens ``[TOKENS, CHANNELS]`` of every distribution."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn((TOKENS, CHANNELS, *shape), generator=generator)

    student = normal() / normal(3).square().mean(-1).sqrt()
    outliers = normal()
    outliers[:, [3, 77, 200, 411, 600, 900]] *= 20
    gated = normal() * F.silu(normal() * 2)
    squared = normal().relu().square()
    uniform = torch.rand((TOKENS, CHANNELS), generator=generator)
    laplace = torch.distributions.Laplace(0.0, 1.0).icdf(uniform * 0.9998 + 0.0001)
    return {
        "normal": normal(),
        "Laplace": laplace,
        "Student t, 3 degrees of freedom": student,
        "normal, 6 channels 20 times larger": outliers,
        "product of a normal and the SiLU of another": gated,
        "squared ReLU of a normal": squared,
    }


def error(x: Tensor, clip: Tensor, group: int, knees: Tensor | None = None) -> float:
    """Mean relative squared error of ``x [M, K]``."""
    values, scale = reference.quantize_activation(x, clip, 4, group, knees)
    difference = reference.dequantize_activation(values, scale, group) - x
    return float((difference.square().sum(-1) / x.square().sum(-1)).mean())


def main() -> None:
    heads = [f"{f'per {g}' if g else 'per token'}, {kind}" for g in GROUPS for kind in ("clip", "knees")]
    print(f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    unclipped = torch.ones(2)
    for name, x in samples().items():
        cells = []
        for group in GROUPS:
            cells.append(min(error(x, torch.full((2,), factor), group) for factor in CLIPS))
            cells.append(error(x, unclipped, group, best_knees(x, unclipped, group)))
        print(f"| {name} | {' | '.join(f'{cell:.4f}' for cell in cells)} |")


if __name__ == "__main__":
    main()
