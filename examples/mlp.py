"""A plain torch module with odd sizes: not a language model, and no dimension is a multiple of a group.

    lbllm-compile examples/mlp.py --target cpu --preset quick

A matrix of 100 x 259 has four groups of 64 columns and a tail of 3. From Python::

    model = lbllm_compile.load("mlp-lbllm")
    y = model(x=torch.randn(8, 259))
"""

from __future__ import annotations

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(259, 100)
        self.middle = nn.Linear(100, 259, bias=False)
        self.leave = nn.Linear(259, 33)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.enter(x))
        return self.leave(nn.functional.gelu(self.middle(hidden)))


def build_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mlp()


def example_inputs():
    return torch.randn(8, 259, generator=torch.Generator().manual_seed(0))
