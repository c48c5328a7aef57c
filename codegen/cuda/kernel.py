"""One CUDA kernel: its text and launch shape, and, once compiled, its binary and how it was proven."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Literal

from ..errors import KernelError
from ..spec import LinearSpec, QuantizeSpec
from .compiler import Binary, is_virtual
from .dp4a import GemvSchedule
from .gemm import ManySchedule
from .mma import MmaSchedule
from .quantize import QuantizeSchedule

Schedule = GemvSchedule | ManySchedule | QuantizeSchedule

Form = Literal["gemv", "gemm", "quantize"]
"""One token, any number of tokens, or the quantizer of activations."""


def kernel_name(spec: LinearSpec | QuantizeSpec, form: Form) -> str:
    """A name that says what the kernel computes, usable as a C symbol."""
    if isinstance(spec, QuantizeSpec):
        codes = "knees" if spec.knees else "planes" if spec.planes else "a"
        return f"quantize_{spec.in_features}_g{spec.group}_{codes}{spec.bits}"
    marks = ("t" if spec.per_token else "g") + spec.marks
    return f"{spec.kind}_{form}_{spec.out_features}x{spec.in_features}_g{spec.group}_a{spec.act_bits}{marks}"


@dataclass(frozen=True)
class EmittedKernel:
    """A kernel's text and launch shape, before any CUDA compiler has seen it.

    Attributes:
        spec: what it computes.
        form: ``"gemv"`` (one token), ``"gemm"`` (any number of tokens) or ``"quantize"``.
        schedule: how it is cut.
        source: the CUDA text.
        symbol: the kernel's name in it.
        parameters: names of its parameters, in launch order; ``tokens`` is an ``int``, all others are pointers.
        block: threads along x, y, z.
        rows_per_block: weight rows of a thread block; 0 for a quantizer.
        tokens_per_block: tokens of a thread block.
    """

    spec: LinearSpec | QuantizeSpec
    form: Form
    schedule: Schedule
    source: str
    symbol: str
    parameters: tuple[str, ...]
    block: tuple[int, int, int]
    rows_per_block: int
    tokens_per_block: int

    @property
    def multiplied_by(self) -> str:
        """The instruction of its products; empty for a quantizer, which has none."""
        if isinstance(self.spec, QuantizeSpec):
            return ""
        return "mma.sync" if isinstance(self.schedule, MmaSchedule) else "dp4a"

    def grid(self, tokens: int) -> tuple[int, int, int]:
        """Thread blocks along x, y, z for a number of tokens.

        Raises:
            KernelError: the kernel's 32-bit indices do not reach that many.
        """
        columns = self.spec.out_features if isinstance(self.spec, LinearSpec) else 0
        widest = max(columns, self.spec.in_features + 256)
        if tokens < 1 or tokens * widest >= 2**31 or (self.form == "gemv" and tokens != 1):
            raise KernelError(f"{self.symbol} cannot take {tokens} tokens at once; split the call")
        down = -(-tokens // self.tokens_per_block)
        return (-(-columns // self.rows_per_block), down, 1) if self.rows_per_block else (down, 1, 1)


@dataclass(frozen=True)
class CudaKernel(EmittedKernel):
    """A kernel compiled for one architecture.

    Attributes:
        arch: e.g. ``"sm_90"``; ``"compute_90"`` for PTX.
        cubin: the ELF image, or the text of PTX.
        registers: per thread, none of which spills; None in PTX, whose registers the driver will choose.
        shared_bytes: static shared memory per block; None in PTX.
        proof: how it was checked.
    """

    arch: str
    cubin: bytes
    registers: int | None
    shared_bytes: int | None
    proof: str

    @classmethod
    def of(cls, kernel: EmittedKernel, binary: Binary, arch: str, proof: str) -> CudaKernel:
        """What a kernel is compiled to."""
        found = binary.kernels.get(kernel.symbol)
        registers, shared_bytes = (found.registers, found.shared_bytes) if found else (None, None)
        return cls(
            **vars(kernel),
            arch=arch,
            cubin=binary.cubin,
            registers=registers,
            shared_bytes=shared_bytes,
            proof=proof,
        )

    @property
    def name(self) -> str:
        """A file name stem, unique among the kernels of a model."""
        return f"{kernel_name(self.spec, self.form)}_{self.arch}"

    @property
    def file(self) -> str:
        """The file of what is compiled."""
        return f"{self.name}.{'ptx' if is_virtual(self.arch) else 'cubin'}"

    def record(self) -> dict[str, object]:
        """Everything but source and cubin, and what it multiplies by, for JSON."""
        fields = asdict(self)
        cubin = fields.pop("cubin")
        fields.pop("source")
        found = {"cubin_sha256": hashlib.sha256(cubin).hexdigest(), "cubin_bytes": len(cubin)}
        return fields | {"multiplied_by": self.multiplied_by} | found
