"""Makes what the CUDA benchmarks measure, where TVM and a CUDA compiler are; no GPU is needed.

    python -m benchmarks.cuda_pack FOLDER [--arch sm_90 ...] [--shapes NxK:GROUP ...] [--models SHAPE|DIR ...]

Kernels of the shapes, with the default schedule and others, and decoding programs of the models: a shape's has random
weights, rounded to nearest; a directory is an artifact. Of a random model whose weights are larger than 32 MB the codes
are drawn on arrival, so that the folder stays small: its speed is that of any, its text is nobody's.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lbllm_compile.codegen.cache import cache_directory
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.cuda.compiler import CudaCompiler, SpillError
from lbllm_compile.codegen.cuda.dp4a import DEFAULT_TILE, gemm_schedules, pack_bit_weight, pitch
from lbllm_compile.codegen.cuda.emit import cached_binary, emit, schedules
from lbllm_compile.codegen.cuda.emulator import Launch, Sparse
from lbllm_compile.codegen.cuda.kernel import EmittedKernel, Form, Schedule
from lbllm_compile.codegen.cuda.mma import mma_schedules
from lbllm_compile.codegen.cuda.program.compile import compile_launches
from lbllm_compile.codegen.cuda.program.kernels import ProgramKernels
from lbllm_compile.codegen.cuda.program.launches import PART, TOKEN
from lbllm_compile.codegen.cuda.proof import proof_runs
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.format import QuantizedWeight, codes_to_planes
from lbllm_compile.codegen.program.builder import Layout
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target
from torch import Tensor

from lbllm_compile import runtime
from lbllm_compile.evaluate import bits_per_weight
from lbllm_compile.lowering.compare import explained, probed
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.lowering.translate import translate

from . import cuda_timing, harness, subjects
from .cuda_packed import (
    EXPECTED,
    IMAGE,
    KEPT,
    PROVEN_PROMPT,
    PROVEN_TOKENS,
    Case,
    PackedKernel,
    PackedModel,
    Piece,
    write_cases,
    write_index,
)

KERNELS, MODELS = "kernels", "models"
"""Folders in a packed one."""

SHAPES = ((4096, 4096, 128), (11008, 4096, 128), (4096, 11008, 128), (14336, 4096, 128))
GROUP = 64
"""Columns of a group, of a model of random weights."""

FORMS: tuple[Form, ...] = ("gemv", "gemm")

COUNTS = (DEFAULT_TILE, 4, 16, 128)
"""Tokens for which tiles are packed: of a part of a prompt, and those that ``cuda_gemm`` measures; more than 128
have the tiles of so many."""

SCHEDULES = 8
"""Schedules of a form and shape, the default among them."""

DRAWN_FROM = 32 << 20
"""Bytes of a random model's weights from which on its codes are drawn on arrival."""

DRAWN_TENSOR = 64 << 10
"""Bytes of such a tensor at least."""

DRAWN_DTYPES = ("int32", "int8", "uint8")
"""Of packed codes, levels and rows, of which any bits are valid; scales and norms are kept."""


def measured_spec(rows: int, columns: int, group: int) -> LinearSpec:
    """The linear that is measured for a shape."""
    return LinearSpec("bit", rows, columns, group)


def candidates(spec: LinearSpec, form: Form) -> list[Schedule]:
    """The schedules of a kernel that are worth measuring, the default first.

    Those for several tokens of both kinds take turns, tensor cores and ``dp4a``, and so do tiles that fit the numbers
    of tokens that are measured.
    """
    if form == "gemv":
        return [*schedules(spec, form)]
    turns = [of_kind(spec, tokens) for tokens in COUNTS for of_kind in (mma_schedules, gemm_schedules)]
    found = (schedule for turn in itertools.zip_longest(*turns) for schedule in turn if schedule is not None)
    return [*dict.fromkeys(found)]


def pack_kernels(folder: Path, shapes: Sequence[tuple[int, int, int]], archs: Sequence[str], most: int) -> None:
    """Compiles the kernels of some shapes.

    Args:
        folder: where they go.
        shapes: ``(rows, columns, group)``.
        archs: architectures.
        most: schedules of a form and shape.

    Raises:
        LbllmError: there is no compiler, or no kernel for a shape.
    """
    compiler, left_out = CudaCompiler.find(), dict[str, str]()
    compiler.check(archs)
    folder.mkdir(parents=True)
    found: list[PackedKernel] = []
    for shape, form in itertools.product(shapes, FORMS):
        spec = measured_spec(*shape)
        proven = dict.fromkeys(archs, "")
        for number, schedule in enumerate(candidates(spec, form)[:most]):
            kernel = emit(spec, form, archs[0], schedule)
            name = f"{kernel.symbol}.{number}"
            for arch in archs:
                try:
                    binary = cached_binary(compiler, kernel.source, arch, cache_directory() / "cuda")
                except SpillError as error:
                    left_out[f"{name} for {arch}"] = str(error)
                    continue
                (folder / f"{name}.{arch}.cubin").write_bytes(binary.cubin)
                proof = ""
                if not proven[arch]:
                    proven[arch] = proof = f"{name}.npz"
                    if not (folder / proof).exists():
                        write_cases(folder / proof, list(_cases(kernel)))
                taken = binary.kernels.get(kernel.symbol)
                found.append(_packed(kernel, f"{name}.{arch}.cubin", arch, taken and taken.registers, proof))
            harness.CONSOLE.print(f"[dim]{name}: {schedule}[/dim]")
    write_index(folder, found, left_out)


def _packed(kernel: EmittedKernel, file: str, arch: str, registers: int | None, proof: str) -> PackedKernel:
    spec, schedule = kernel.spec, dataclasses.asdict(kernel.schedule)
    assert isinstance(spec, LinearSpec)
    weight = _zero_weight(spec)
    return PackedKernel(
        file=file,
        arch=arch,
        form=kernel.form,
        symbol=kernel.symbol,
        parameters=kernel.parameters,
        block=kernel.block,
        rows_per_block=kernel.rows_per_block,
        tokens_per_block=kernel.tokens_per_block,
        shape=(spec.out_features, spec.in_features),
        group=spec.group,
        act_bits=spec.act_bits,
        pitch=pitch(spec.in_features),
        x_scales=spec.x_scales,
        sizes={name: part.numel() * part.element_size() for name, part in pack_bit_weight(weight).items()},
        stored_bytes=weight.stored_bits / 8,
        registers=registers,
        schedule=schedule,
        multiplied_by=kernel.multiplied_by,
        proof=proof,
    )


def _zero_weight(spec: LinearSpec) -> QuantizedWeight:
    codes = torch.zeros(spec.out_features, spec.in_features, dtype=torch.uint8)
    levels = torch.zeros(spec.out_features, spec.groups, 4, dtype=torch.int8)
    scale = torch.ones(spec.out_features, spec.groups).half()
    return QuantizedWeight(*codes_to_planes(codes), levels, scale, spec.in_features, spec.group)


def _cases(kernel: EmittedKernel) -> Iterator[Case]:
    """What a device must get right, as the emulation must."""
    for name, launch, expected in proof_runs(kernel):
        ((columns, wanted),) = expected.values()
        (output,) = launch.outputs.values()
        tokens, _ = shape = (int(output.shape[0]), int(output.shape[1]))
        parts, sizes = _parts(launch)
        assert columns is not None
        yield Case(name, launch.grid, tokens, sizes, parts, shape, columns.numpy(), wanted.numpy().reshape(tokens, -1))


def _parts(launch: Launch) -> tuple[list[tuple[str, int, np.ndarray]], dict[str, int]]:
    """What the buffers of a launch hold, and how large they are."""
    parts: list[tuple[str, int, np.ndarray]] = []
    sizes: dict[str, int] = {}
    for name, value in launch.inputs.items():
        if isinstance(value, Sparse):
            sizes[name] = value.size
            parts += [(name, offset, part.contiguous().numpy()) for offset, part in value.segments]
        elif isinstance(value, Tensor):
            sizes[name] = value.numel() * value.element_size()
            parts.append((name, 0, value.contiguous().numpy()))
    return parts, sizes


def pack_model(folder: Path, source: str, archs: Sequence[str]) -> None:
    """Compiles the decoding program of a model.

    Args:
        folder: where it goes.
        source: the name of a shape in :data:`.subjects.SHAPES`, or an artifact.
        archs: architectures.

    Raises:
        LbllmError: there is no such model, or no program can hold it.
    """
    config: dict[str, Any] = {}
    if source in subjects.SHAPES:
        program = subjects.lowered(subjects.random_model(source), source, GROUP)
        config = {
            **subjects.SHAPES[source],
            "max_position_embeddings": subjects.CONTEXT,
            "tie_word_embeddings": False,
        }
    else:
        program = runtime.load(source).program
    harness.CONSOLE.print(f"[dim]{source}: lowered[/dim]")
    folder.mkdir(parents=True)
    launches = part_launches = 0
    translated = None
    for arch in archs:
        kernels = ProgramKernels(Target.parse(f"cuda:{arch}"))
        translated = translate(program, kernels, [TOKEN, PART])
        compiled = compile_launches(translated.functions(), kernels)
        compiled.export(folder / f"{IMAGE}.{arch}")
        step, part = compiled.image.launches, compiled.image.launches.part
        launches, part_launches = len(step.launches), 0 if part is None else len(part.launches)
        harness.CONSOLE.print(f"[dim]{source}: compiled for {arch}[/dim]")
    assert translated is not None
    whole = b"".join(translated.weight_bytes())
    is_drawn = source in subjects.SHAPES and len(whole) > DRAWN_FROM
    pieces = list(_pieces(translated.layout, len(whole))) if is_drawn else [Piece(len(whole))]
    with (folder / KEPT).open("wb") as file:
        at = 0
        for piece in pieces:
            if piece.seed is None:
                file.write(whole[at : at + piece.bytes])
            at += piece.bytes
    vocabulary = translated.bounds.vocabulary
    if vocabulary is None:
        raise LbllmError(f"the graph of {source} does not say how many tokens it knows")
    # Weights that are drawn on arrival have no logits to compare with.
    bound = 0.0
    if not is_drawn:
        needed = requirements(program)
        on_cpu = KernelSet.build(needed.linears, needed.quantizers, Target.parse("cpu"), trials=0)
        ids = np.random.default_rng(0).integers(0, vocabulary, (1, PROVEN_PROMPT))
        ends = [*range(1 + PROVEN_TOKENS), PROVEN_PROMPT]
        found, moved = zip(*probed(program, on_cpu, ids, np.ones_like(ids), ends), strict=True)
        np.savez(folder / EXPECTED, ids=ids[0], logits=np.concatenate([logits[0, -1:].numpy() for logits in found]))
        bound = explained(max(moved))
    bits = bits_per_weight(program)["bits_per_weight"]
    model = PackedModel(folder.name, config, vocabulary, len(whole), bits, launches, part_launches, bound, pieces)
    model.write(folder)


def _pieces(layout: Layout, size: int) -> Iterator[Piece]:
    """The block of weights in pieces: kept, or drawn, each from a seed of its own."""
    at = 0
    for seed, (name, spec) in enumerate(sorted(layout.tensors.items(), key=lambda item: layout.offsets[item[0]])):
        if spec.dtype not in DRAWN_DTYPES or spec.bytes < DRAWN_TENSOR:
            continue
        begin = layout.offsets[name]
        if begin > at:
            yield Piece(begin - at)
        yield Piece(spec.bytes, seed)
        at = begin + spec.bytes
    if at < size:
        yield Piece(size - at)


def pack(
    folder: Path,
    archs: Sequence[str],
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    models: Sequence[str] = (),
    most: int = SCHEDULES,
) -> None:
    """Makes everything.

    Args:
        folder: which must not hold such things yet.
        archs: architectures.
        shapes, most: of :func:`pack_kernels`.
        models: of :func:`pack_model`.

    Raises:
        LbllmError: something is there already, or cannot be made.
    """
    for name in (KERNELS, MODELS):
        if (folder / name).exists():
            raise LbllmError(f"{folder / name} is there already; remove it, or name another folder")
    pack_kernels(folder / KERNELS, shapes, archs, most)
    for model in models:
        pack_model(folder / MODELS / Path(model).name, model, archs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], metavar="sm_NN", help="architectures of the GPUs")
    parser.add_argument("--shapes", nargs="+", type=harness.shape, default=SHAPES, metavar="NxK:GROUP")
    parser.add_argument("--models", nargs="*", default=["tiny", "1.1b"], metavar="SHAPE|DIR")
    parser.add_argument("--schedules", type=int, default=SCHEDULES, help="most of a form and shape")
    options = parser.parse_args()
    pack(options.folder, options.arch, options.shapes, options.models, options.schedules)


if __name__ == "__main__":
    cuda_timing.ended(main)
