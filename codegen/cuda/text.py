"""What the text of a generated CUDA kernel says about itself: its symbol, its thread bound, its parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import KernelError

PREAMBLE = """\
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short
#define int64_t long long
#ifdef __CUDACC__
__device__ __forceinline__ uint ptx_and_b32(uint a, uint b) {
  uint d;
  asm("and.b32 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint ptx_prmt_b32(uint a, uint b, uint c) {
  uint d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
#endif
"""
"""Names TVM's text takes for granted (nothing else of its preamble is needed), and single instructions of PTX, each as
the function of its mnemonic. ``emulation.h`` has them for where no CUDA compiler reads the text."""

_HEAD = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\(([^)]*)\)')
_PARAMETER = re.compile(r"(?P<type>.*?)(?P<pointer>\*\s*__restrict__)?\s+(?P<name>\w+)")


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter: a pointer or, where ``pointer`` is false, an ``int`` by value."""

    name: str
    ctype: str
    pointer: bool


@dataclass(frozen=True)
class Signature:
    """Head of a kernel: symbol, most threads of a block, parameters in launch order."""

    symbol: str
    threads: int
    parameters: tuple[Parameter, ...]


def signature(source: str) -> Signature:
    """Reads the head of the one kernel in ``source``.

    TVM orders parameters by name, pointers before numbers, and drops those the kernel does not use, so launches take
    the order from here and never from the function it was generated from.

    Raises:
        KernelError: there is no kernel, or its parameters are not in that order.
    """
    head = _HEAD.search(source)
    if head is None:
        raise KernelError(
            "the generated CUDA text has no kernel with launch bounds; the installed TVM is not a tested one"
        )
    parameters = []
    for text in head[3].split(","):
        match = _PARAMETER.fullmatch(text.strip())
        if match is None:
            raise KernelError(f"the generated CUDA kernel has a parameter of unknown form: {text.strip()}")
        pointer = match["pointer"] is not None
        name = match["name"].removesuffix("_ptr") if pointer else match["name"]
        parameters.append(Parameter(name, match["type"].strip(), pointer))
    if parameters != sorted(parameters, key=lambda p: (not p.pointer, p.name)):
        raise KernelError(
            f"the parameters of {head[2]} are not in alphabetical order; the installed TVM is not a tested one"
        )
    return Signature(head[2], int(head[1]), tuple(parameters))
