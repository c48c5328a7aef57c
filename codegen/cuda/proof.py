"""The proof of a generated CUDA kernel where there is no GPU: emulation against the reference, bit for bit.

Large linears are proven on a few tiles of rows, the first and the last among them: thread blocks of one kernel differ
only in the rows and tokens they are given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .. import prove, reference
from ..cache import write_atomically
from ..errors import DisprovedError
from ..spec import LinearSpec, QuantizeSpec
from .dp4a import ROWS, Geometry, pack_weight, pitch
from .emulator import Emulator, Launch, Sparse, compiler
from .kernel import EmittedKernel
from .text import steps

EMULATED = "emulated on CPU, unverified on device"
NOT_RUN = "not run: no g++ to emulate with, unverified on device"

TILES = 5
"""Most tiles of rows a proof runs."""

QUANTIZED_TOKENS = 9
"""Tokens of each quantizer case."""


def prove_emulated(kernel: EmittedKernel, cache_dir: Path) -> str:
    """Runs a kernel's text in emulation against the reference, for every architecture for which it means other
    instructions.

    Args:
        kernel: what was generated.
        cache_dir: keeps the names of proven texts, so that none is proven twice.

    Returns:
        What the artifact says about the proof.

    Raises:
        DisprovedError: a result differs, or the kernel races, diverges or leaves its buffers.
    """
    if compiler() is None:
        return NOT_RUN
    rules = b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.iterdir()) if f.is_file())
    rules += Path(prove.__file__).read_bytes() + Path(reference.__file__).read_bytes()
    digest = hashlib.sha256(rules + kernel.source.encode()).hexdigest()[:32]
    marker = cache_dir / f"{digest}.proven"
    if marker.exists():
        return EMULATED
    emulators = [Emulator(kernel.source, cache_dir, step) for step in steps(kernel.source)]
    for name, launch, expected in proof_runs(kernel):
        for emulator in emulators:
            check_outputs(kernel.symbol, name, emulator.run(launch), expected)
    write_atomically(marker, b"")
    return EMULATED


Expected = dict[str, tuple[Tensor | None, Tensor]]
"""By output: the columns to compare (``None``: all) and what they must hold."""


def proof_runs(kernel: EmittedKernel) -> Iterator[tuple[str, Launch, Expected]]:
    """The launches a kernel must get right: name, launch, and the outputs the reference defines."""
    return _quantize_runs(kernel) if isinstance(kernel.spec, QuantizeSpec) else _linear_runs(kernel)


def check_outputs(symbol: str, name: str, actual: Mapping[str, Tensor], expected: Expected) -> None:
    """Compares the outputs of one run bit for bit.

    Raises:
        DisprovedError: they differ.
    """
    for output, (columns, wanted) in expected.items():
        got = actual[output] if columns is None else actual[output][:, columns]
        if not prove.agree(got.contiguous(), wanted):
            wrong = int((got != wanted).sum())
            raise DisprovedError(f"{symbol} is wrong: {wrong} of {got.numel()} of its {output} differ for {name}")


def _linear_runs(kernel: EmittedKernel) -> Iterator[tuple[str, Launch, Expected]]:
    spec = kernel.spec
    assert isinstance(spec, LinearSpec)
    geometry = Geometry.of(spec)
    width, height = kernel.grid(1)[0], kernel.rows_per_block
    tiles = range(width) if width <= TILES else (0, 1, width // 2, width - 2, width - 1)
    rows = torch.cat([torch.arange(t * height, min((t + 1) * height, spec.out_features)) for t in tiles])
    blocks = torch.unique(rows // ROWS)
    for case in prove.linear_cases(replace(spec, out_features=len(rows))):
        packed = pack_weight(case.weight, spec.group)
        inputs: dict[str, Tensor | Sparse | int] = {
            name: _scattered(part, blocks, geometry.row_blocks) if part.dim() > 1 else part
            for name, part in packed.items()
        }
        if case.bias is not None:
            inputs["bias"] = torch.zeros(spec.out_features).index_copy(0, rows, case.bias)
        values, x_scale, expected = case.values, case.x_scale, case.expected
        if kernel.form == "gemv":
            values, x_scale, expected = values[:1], x_scale[:1], expected[:1]
        else:
            # Two thread blocks along the tokens at least, the last with a remainder.
            times = kernel.tokens_per_block // prove.TOKENS + 1
            values, x_scale, expected = (t.repeat(times, 1) for t in (values, x_scale, expected))
        tokens = values.shape[0]
        inputs["values"] = torch.nn.functional.pad(values, (0, pitch(spec.in_features) - spec.in_features))
        inputs["x_scale"] = x_scale
        inputs["tokens"] = tokens
        grid = kernel.grid(tokens)
        launch = Launch(
            grid=grid,
            block=kernel.block,
            inputs=inputs,
            outputs={"output": torch.full((tokens, spec.out_features), float("nan"))},
            blocks=[(x, y, 0) for y in range(grid[1]) for x in tiles],
        )
        yield case.name, launch, {"output": (rows, expected)}


def _scattered(part: Tensor, blocks: Tensor, count: int) -> Sparse:
    """Rows of packed blocks at their places in the whole matrix, of which the rest stays zero."""
    size = part[0].numel() * part.element_size()
    return Sparse(count * size, [(int(block) * size, part[i]) for i, block in enumerate(blocks)])


def _quantize_runs(kernel: EmittedKernel) -> Iterator[tuple[str, Launch, Expected]]:
    spec = kernel.spec
    assert isinstance(spec, QuantizeSpec)
    width = pitch(spec.in_features)
    for i, (x, clip, *shape) in enumerate(prove.quantizer_inputs(spec)):
        x = x[:QUANTIZED_TOKENS].contiguous()
        values, scale = prove.quantized(spec, x, clip, *shape)
        launch = Launch(
            grid=(QUANTIZED_TOKENS, 1, 1),
            block=kernel.block,
            inputs={"x": x, "clip": clip, **dict(zip(("shape",), shape, strict=False)), "tokens": QUANTIZED_TOKENS},
            outputs={
                "values": torch.full((QUANTIZED_TOKENS, width), 85, dtype=torch.int8),
                "scale": torch.full((QUANTIZED_TOKENS, spec.scales), float("nan")),
            },
        )
        padded = torch.nn.functional.pad(values, (0, width - spec.in_features))
        yield f"input {i}", launch, {"values": (None, padded), "scale": (None, scale)}
