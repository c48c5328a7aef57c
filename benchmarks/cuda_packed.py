"""Kernels and programs in a folder, ready for a device: as ``cuda_pack`` writes them and a bare machine reads them.

It needs Python, NumPy and the driver's library alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from ctypes import c_int, c_uint64, c_void_p
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lbllm_compile.codegen.cuda.driver import Driver, Number
from lbllm_compile.codegen.cuda.program.image import Image
from lbllm_compile.codegen.cuda.program.launches import PART
from lbllm_compile.codegen.cuda.program.session import WORTH_A_PART, DeviceProgram
from lbllm_compile.codegen.errors import LbllmError

INDEX, IMAGE, MODEL, KEPT, EXPECTED = "kernels.json", "image", "model.json", "kept.bin", "expected.npz"

PROVEN_TOKENS = 3
"""Tokens of a proof of a program that are given one by one; as many more go on with what was chosen."""

PROVEN_PROMPT = (PART.length or 1) + WORTH_A_PART + 3
"""Tokens of a proof that are a prompt, the first ones those of :data:`PROVEN_TOKENS`: a whole part and one with
padding."""


@dataclass(frozen=True)
class PackedKernel:
    """A compiled kernel of a linear.

    Attributes:
        file: its cubin.
        arch: the architecture it is for.
        form: ``"gemv"`` or ``"gemm"``.
        symbol, parameters, block, rows_per_block, tokens_per_block: as of :class:`codegen.cuda.kernel.EmittedKernel`.
        shape: ``(rows, columns)`` of the weight.
        group: columns of a group.
        act_bits: of the activations.
        pitch: columns of the activation values in memory.
        x_scales: scales of a token.
        sizes: bytes of the packed weight's parts, by parameter.
        stored_bytes: of the weight as it is stored, padding left out.
        registers: of a thread.
        schedule: how it is cut.
        multiplied_by: the instruction of its products.
        proof: the file of cases it must get right; empty for those that are held against the one that has it.
    """

    file: str
    arch: str
    form: str
    symbol: str
    parameters: tuple[str, ...]
    block: tuple[int, int, int]
    rows_per_block: int
    tokens_per_block: int
    shape: tuple[int, int]
    group: int
    act_bits: int
    pitch: int
    x_scales: int
    sizes: dict[str, int]
    stored_bytes: float
    registers: int | None
    schedule: dict[str, int]
    multiplied_by: str
    proof: str = ""

    @property
    def name(self) -> str:
        """The shape, what multiplies, and the schedule, in words."""
        cut = " ".join(f"{key}={value}" for key, value in self.schedule.items())
        return f"{self.symbol} {self.multiplied_by} {cut}"

    def grid(self, tokens: int) -> tuple[int, int, int]:
        """Thread blocks along x, y, z."""
        return -(-self.shape[0] // self.rows_per_block), -(-tokens // self.tokens_per_block), 1

    def arguments(self, buffers: Mapping[str, int], tokens: int) -> list[Number]:
        """Of a launch, in the order of the parameters."""
        return [c_int(tokens) if name == "tokens" else c_uint64(buffers[name]) for name in self.parameters]


def write_index(folder: Path, kernels: list[PackedKernel], left_out: dict[str, str]) -> None:
    """Writes what :func:`read_index` reads.

    Args:
        folder: of the kernels.
        kernels: of all architectures.
        left_out: why schedules are not among them.
    """
    document = {"kernels": [asdict(kernel) for kernel in kernels], "left_out": left_out}
    (folder / INDEX).write_text(json.dumps(document, indent=1), encoding="utf-8")


def read_index(folder: Path, arch: str, form: str) -> tuple[list[PackedKernel], dict[str, str]]:
    """The kernels of a form for an architecture, and why schedules are not among them.

    Raises:
        LbllmError: there are none.
    """
    try:
        document = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        found = []
        for fields in document["kernels"]:
            fields |= {name: tuple(fields[name]) for name in ("parameters", "block", "shape")}
            found.append(PackedKernel(**fields))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LbllmError(f"{folder} holds no packed kernels ({error}); write them with cuda_all.sh pack") from error
    fitting = [kernel for kernel in found if (kernel.arch, kernel.form) == (arch, form)]
    if not fitting:
        archs = ", ".join(sorted({kernel.arch for kernel in found})) or "none"
        raise LbllmError(f"{folder} holds no {form} kernels for {arch}, but for {archs}; pack with --arch {arch}")
    return fitting, document["left_out"]


def load(driver: Driver, folder: Path, kernel: PackedKernel) -> c_void_p:
    """The kernel's function on a device."""
    return driver.function(driver.module((folder / kernel.file).read_bytes()), kernel.symbol)


@dataclass(frozen=True)
class Case:
    """A launch that a kernel must get right.

    Attributes:
        name: what is particular about it.
        grid: thread blocks along x, y, z.
        tokens: how many.
        sizes: bytes of every buffer.
        parts: ``(buffer, offset in bytes, contents)``; the rest of an input is zero.
        output: shape of the output.
        columns: of the output that are compared.
        expected: what these must hold, bit for bit.
    """

    name: str
    grid: tuple[int, int, int]
    tokens: int
    sizes: dict[str, int]
    parts: list[tuple[str, int, np.ndarray]]
    output: tuple[int, int]
    columns: np.ndarray
    expected: np.ndarray


def write_cases(path: Path, cases: list[Case]) -> None:
    """Writes what :func:`read_cases` reads."""
    arrays: dict[str, np.ndarray] = {}
    heads = []
    for number, case in enumerate(cases):
        arrays |= {f"{number}.columns": case.columns, f"{number}.expected": case.expected}
        for at, (_, _, content) in enumerate(case.parts):
            arrays[f"{number}.part.{at}"] = content
        fields = {key: value for key, value in vars(case).items() if key not in ("columns", "expected", "parts")}
        heads.append({**fields, "parts": [(name, offset) for name, offset, _ in case.parts]})
    with path.open("wb") as file:
        np.savez_compressed(file, heads=np.frombuffer(json.dumps(heads).encode(), np.uint8), **arrays)


def read_cases(path: Path) -> Iterator[Case]:
    """What :func:`write_cases` wrote."""
    with np.load(path) as arrays:
        for number, head in enumerate(json.loads(arrays["heads"].tobytes())):
            parts = [(name, at, arrays[f"{number}.part.{i}"]) for i, (name, at) in enumerate(head["parts"])]
            head |= {"parts": parts, "grid": tuple(head["grid"]), "output": tuple(head["output"])}
            yield Case(**head, columns=arrays[f"{number}.columns"], expected=arrays[f"{number}.expected"])


@dataclass(frozen=True)
class Piece:
    """Some bytes of a program's weights.

    Attributes:
        bytes: how many.
        seed: what they are drawn from; None for those that are kept.
    """

    bytes: int
    seed: int | None = None


@dataclass(frozen=True)
class PackedModel:
    """A program that decodes, in a folder.

    Attributes:
        name: of its shape, or of the artifact it is from.
        config: of transformers, to build the same shape in torch.
        vocabulary: tokens to draw from.
        weight_bytes: what a token reads of the weights at most: all of them.
        bits: of a decoder weight; None where there is none.
        launches: of a step.
        part_launches: of a part of a prompt; 0 where prompts are fed token by token.
        bound: how far logits may be from those of the graph, as a share of their length; 0 where weights are drawn on
            arrival, so that there are none to compare with.
        pieces: of the weights, in order.
    """

    name: str
    config: dict[str, Any]
    vocabulary: int
    weight_bytes: int
    bits: float | None
    launches: int
    part_launches: int
    bound: float
    pieces: list[Piece] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Writes what :meth:`read` reads."""
        (folder / MODEL).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> PackedModel:
        """What :meth:`write` wrote.

        Raises:
            LbllmError: it did not write that.
        """
        try:
            fields = json.loads((folder / MODEL).read_text(encoding="utf-8"))
            return cls(**{**fields, "pieces": [Piece(**piece) for piece in fields["pieces"]]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LbllmError(f"{folder} holds no packed model ({error}); write it with cuda_all.sh pack") from error

    def weights(self, folder: Path) -> Iterator[memoryview]:
        """The block of weights, in pieces."""
        with (folder / KEPT).open("rb") as kept:
            for piece in self.pieces:
                yield memoryview(kept.read(piece.bytes) if piece.seed is None else drawn(piece.bytes, piece.seed))

    def program(self, folder: Path, driver: Driver) -> DeviceProgram:
        """In the device's memory.

        Raises:
            LbllmError: it was not packed for the device's architecture, or the device refuses it.
        """
        file = folder / f"{IMAGE}.{driver.arch}"
        if not file.is_file():
            raise LbllmError(f"{folder} holds no program for {driver.arch}; pack with --arch {driver.arch}")
        image = Image.read(file)
        return DeviceProgram(driver, image.launches, image.cubin, self.weights(folder))


def drawn(size: int, seed: int) -> bytes:
    """Bytes drawn at random."""
    return np.random.default_rng(seed).bytes(size)
