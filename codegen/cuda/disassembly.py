"""What the instructions of a compiled kernel are, and which of them its main loop has.

nvdisasm reads cubins. It is part of the CUDA toolkit and a package of its own (``nvidia-cuda-nvdisasm``, in the extra
``cuda``). Where it is missing PTX is read in its place, which is what the compiler's last stage starts from: the counts
are then a little off, and said to be of PTX.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import KernelError
from .compiler import find_tool

PACKAGE = "nvidia-cuda-nvdisasm"

PIPES: Mapping[str, str] = {
    "alu": "LOP3 PRMT SHF IADD3 IADD LEA ISETP SEL IABS IMNMX VIADD VIADDMNMX VIMNMX FSETP FMNMX FSEL PLOP3 I2FP F2FP"
    " MOV SGXT BMSK FCHK P2R R2P and or xor not lop3 prmt shl shr shf add sub min max setp selp bfe bfi abs neg mov",
    "fma": "IMAD IDP IMUL FFMA FMUL FADD HFMA2 HADD2 HMUL2 FSWZADD FFMA2 FADD2 FMUL2 mad mul dp4a fma",
    "tensor": "IMMA BMMA HMMA IGMMA HGMMA mma wgmma",
    "memory": "LDG STG LDS STS LD ST LDL STL LDSM LDGSTS SHFL ATOM ATOMS ATOMG RED ld st shfl ldmatrix cp atom red",
    "special": "MUFU I2F F2I F2F FRND POPC FLO BREV I2I popc rcp sqrt ex2 cvt",
}
"""Mnemonics by pipe, of SASS (capitals) and of PTX, as the documentation of NVIDIA's Nsight Compute divides them: *alu*
has logic, shifts, permutations, integer sums and comparisons, *fma* products, of integers, too, and the dot product of
bytes. What is named nowhere (uniform instructions, constants, branches, barriers) is ``"other"``."""

_PIPE = {mnemonic: pipe for pipe, mnemonics in PIPES.items() for mnemonic in mnemonics.split()}

_INTEGER = (
    "LOP3 PRMT SHF IADD3 IADD LEA ISETP SEL IABS IMNMX VIADD VIADDMNMX VIMNMX SGXT BMSK IMAD IDP IMUL"
    " and or xor not lop3 prmt shl shr shf bfe bfi dp4a"
)
_PTX_TYPED = "add sub min max setp selp mad mul abs neg"
_PTX_INTEGER = re.compile(r"\.[sub](?:16|32|64)\b")

_PRODUCTS = {
    "IDP.4A": 4,
    "dp4a": 4,
    "IMMA.8816": 32,
    "IMMA.16816": 64,
    "IMMA.16832": 128,
    "mma.sync.aligned.m8n8k16": 32,
    "mma.sync.aligned.m16n8k32": 128,
}
"""Multiply-adds of a thread in one instruction; those of a tensor core are a warp's, shared out."""

_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);", re.MULTILINE)
_PTX = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?P<opcode>[a-z]\w*(?:[.:]+\w+)*)(?P<rest>[^;]*);", re.MULTILINE)
_LABEL = re.compile(r"^\s*(?P<label>(?:\.L|\$L)\w+):", re.MULTILINE)
_TARGET = re.compile(r"(?:\.L|\$L)\w+")
_SASS_HEAD = re.compile(r"^\.text\.(\w+):", re.MULTILINE)
_PTX_HEAD = re.compile(r"\.entry\s+(\w+)\(")

_BRANCHES = frozenset({"BRA", "bra"})
_ENDS = _BRANCHES | {"BAR", "EXIT", "bar", "barrier", "ret"}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its modifiers, e.g. ``"IDP.4A.S8.S8"``.
        target: number of the instruction that it branches to; None where it does not branch.
    """

    opcode: str
    target: int | None = None

    @property
    def mnemonic(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def pipe(self) -> str:
        """One of :data:`PIPES`, or ``"other"``."""
        return _PIPE.get(self.mnemonic, "other")

    @property
    def integer(self) -> bool:
        """Whether it computes with integers, in every thread."""
        if self.mnemonic in _PTX_TYPED.split():
            return _PTX_INTEGER.search(self.opcode) is not None
        return self.mnemonic in _INTEGER.split()

    @property
    def products(self) -> int:
        """Multiply-adds of 8-bit integers that it does for a thread.

        Raises:
            KernelError: it multiplies in a way that is not known here.
        """
        for opcode, products in _PRODUCTS.items():
            if self.opcode == opcode or self.opcode.startswith(f"{opcode}."):
                return products
        if self.pipe == "tensor" or self.mnemonic == "IDP":
            raise KernelError(f"how much the instruction {self.opcode} multiplies is not known")
        return 0


@dataclass(frozen=True)
class MainLoop:
    """What a kernel does most, see :func:`main_loop`.

    Attributes:
        pipes: instructions by pipe.
        integers: those that compute with integers.
        products: multiply-adds of 8-bit integers of a thread.
        source: ``"SASS"`` or ``"PTX"``.
        around: instructions of the next loop around it, its own not among them; 0 where there is none.
        unrolled: all instructions of a kernel whose products are in no loop; 0 where they are.
    """

    pipes: Mapping[str, int]
    integers: int
    products: int
    source: str
    around: int = 0
    unrolled: int = 0

    @property
    def integers_per_product(self) -> float | None:
        """Integer instructions a multiply-add; None where there are no multiply-adds."""
        return self.integers / self.products if self.products else None

    def instructions(self, products: int) -> float:
        """All instructions of a thread for so many multiply-adds, after which the loop around it begins anew. Where the
        products are in no loop, their share of the whole kernel: its beginning and its end are then among them."""
        if self.unrolled:
            return self.unrolled * products / self.products
        return sum(self.pipes.values()) * products / self.products + self.around


def nvdisasm() -> str | None:
    """Path of nvdisasm, of the CUDA toolkit or of its package; None where there is neither."""
    if found := find_tool("nvdisasm"):
        return found
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.stem == "nvdisasm"), None)


def disassemble(cubin: bytes) -> str:
    """The SASS of a cubin.

    Raises:
        KernelError: there is no nvdisasm, or it cannot read the cubin.
    """
    tool = nvdisasm()
    if tool is None:
        raise KernelError(
            "a cubin is read with nvdisasm; install the CUDA toolkit, or: pip install 'lbllm-compile[cuda]'"
        )
    with tempfile.TemporaryDirectory(prefix="lbllm-nvdisasm-") as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        process = subprocess.run([tool, "-c", str(file)], capture_output=True, text=True, errors="replace", check=False)
    if process.returncode:
        raise KernelError(f"nvdisasm cannot read a kernel: {process.stderr.strip()[:500]}")
    return process.stdout


def instructions(text: str, symbol: str) -> list[Instruction]:
    """The instructions of one kernel, in order.

    Args:
        text: SASS of :func:`disassemble`, or PTX.
        symbol: the kernel's.

    Raises:
        KernelError: it is not there.
    """
    head, pattern = (_PTX_HEAD, _PTX) if ".entry" in text else (_SASS_HEAD, _SASS)
    heads = list(head.finditer(text))
    for match, end in zip(heads, [*(h.start() for h in heads[1:]), len(text)], strict=True):
        if match[1] == symbol:
            return _instructions(text[match.end() : end], pattern)
    raise KernelError(f"there is no kernel {symbol} in what was compiled")


def _instructions(body: str, pattern: re.Pattern[str]) -> list[Instruction]:
    found = list(pattern.finditer(body))
    labels = {m["label"]: sum(match.start("opcode") < m.start() for match in found) for m in _LABEL.finditer(body)}
    result = []
    for match in found:
        branches = match["opcode"].partition(".")[0] in _BRANCHES
        label = _TARGET.search(match["rest"]) if branches else None
        result.append(Instruction(match["opcode"], labels[label[0]] if label else None))
    return result


def main_loop(found: Sequence[Instruction], source: str) -> MainLoop:
    """What a kernel does most: its innermost loops that multiply integers, or, where those are unrolled, the straight
    stretches that do; of a kernel that multiplies none its innermost loops, or all of it where it has no loop.

    Of an unrolled loop whatever no branch and no barrier divides from it counts, too: addresses, the last sum.
    """
    back = [(i.target, at) for at, i in enumerate(found) if i.target is not None and i.target < at]
    inner = [span for span in back if not any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in back)]
    multiplying = [at for at, instruction in enumerate(found) if instruction.products]
    spans, unrolled = inner or [(0, len(found) - 1)], 0
    if multiplying:
        looped = _with_any(multiplying, inner)
        unrolled, spans = 0 if looped else len(found), looped or _with_any(multiplying, _stretches(found))
    begin, end = min(b for b, _ in spans), max(e for _, e in spans)
    outer = [1 + e - b for b, e in back if b <= begin and end <= e and (b, e) not in spans]
    chosen = [found[at] for at in sorted({at for begin, end in spans for at in range(begin, end + 1)})]
    return MainLoop(
        dict(Counter(i.pipe for i in chosen)),
        sum(i.integer for i in chosen),
        sum(i.products for i in chosen),
        source,
        min(outer) - len(chosen) if outer else 0,
        unrolled,
    )


def _with_any(places: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(begin, end) for begin, end in spans if any(begin <= at <= end for at in places)]


def _stretches(found: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Runs of instructions that no branch, barrier or label divides."""
    ends = (at + 1 for at, instruction in enumerate(found) if instruction.mnemonic in _ENDS)
    targets = (i.target for i in found if i.target is not None)
    begins = sorted({0, *ends, *targets} - {len(found)})
    return [(begin, end - 1) for begin, end in zip(begins, [*begins[1:], len(found)], strict=True)]
