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
#define SITE
#define OF_SITE
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
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void ptx_griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
}
__device__ __forceinline__ void ptx_griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" : : : "memory"); }
#endif
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ int4 ptx_mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(uint4 a, uint2 b, int4 c) {
  int4 d;
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
               " {%10, %11, %12, %13};"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(c.x), "r"(c.y), "r"(c.z), "r"(c.w));
  return d;
}
template <int bytes>
__device__ __forceinline__ void ptx_cp_async_ca_shared_global(void* to, const void* from) {
  uint at = (uint)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" : : "r"(at), "l"(from), "n"(bytes) : "memory");
}
template <int bytes>
__device__ __forceinline__ void ptx_cp_async_cg_shared_global(void* to, const void* from) {
  uint at = (uint)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], %2;" : : "r"(at), "l"(from), "n"(bytes) : "memory");
}
__device__ __forceinline__ void ptx_cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}
template <int left>
__device__ __forceinline__ void ptx_cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" : : "n"(left) : "memory");
}
#else
__device__ __forceinline__ int2 ptx_mma_sync_aligned_m8n8k16_row_col_s32_s8_s8_s32(uint a, uint b, int2 c) {
  int2 d;
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
               : "=r"(d.x), "=r"(d.y)
               : "r"(a), "r"(b), "r"(c.x), "r"(c.y));
  return d;
}
#endif
#endif
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void mma_m16n8k32(int* c, const uint* a, const uint* b SITE) {
  uint4 rows = make_uint4(a[0], a[1], a[2], a[3]);
  int4 d = make_int4(c[0], c[1], c[2], c[3]);
  d = ptx_mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(rows, make_uint2(b[0], b[1]), d OF_SITE);
  c[0] = d.x, c[1] = d.y, c[2] = d.z, c[3] = d.w;
}
__device__ __forceinline__ void copy_begin_16(void* to, const void* from SITE) {
  ptx_cp_async_cg_shared_global<16>(to, from OF_SITE);
}
__device__ __forceinline__ void copy_begin_4(void* to, const void* from SITE) {
  ptx_cp_async_ca_shared_global<4>(to, from OF_SITE);
}
__device__ __forceinline__ void copies_commit() { ptx_cp_async_commit_group(); }
template <int left>
__device__ __forceinline__ void copies_wait() { ptx_cp_async_wait_group<left>(); }
#else
__device__ __forceinline__ void mma_m16n8k32(int* c, const uint* a, const uint* b SITE) {
  int2 low = make_int2(c[0], c[1]), high = make_int2(c[2], c[3]);
  low = ptx_mma_sync_aligned_m8n8k16_row_col_s32_s8_s8_s32(a[0], b[0], low OF_SITE);
  high = ptx_mma_sync_aligned_m8n8k16_row_col_s32_s8_s8_s32(a[1], b[0], high OF_SITE);
  low = ptx_mma_sync_aligned_m8n8k16_row_col_s32_s8_s8_s32(a[2], b[1], low OF_SITE);
  high = ptx_mma_sync_aligned_m8n8k16_row_col_s32_s8_s8_s32(a[3], b[1], high OF_SITE);
  c[0] = low.x, c[1] = low.y, c[2] = high.x, c[3] = high.y;
}
__device__ __forceinline__ void copy_begin_16(void* to, const void* from) { *(int4*)to = *(const int4*)from; }
__device__ __forceinline__ void copy_begin_4(void* to, const void* from) { *(int*)to = *(const int*)from; }
__device__ __forceinline__ void copies_commit() {}
template <int left>
__device__ __forceinline__ void copies_wait() {}
#endif
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void begin_launch() {
  ptx_griddepcontrol_launch_dependents();
  ptx_griddepcontrol_wait();
}
#else
__device__ __forceinline__ void begin_launch() {}
#endif
"""
"""Names TVM's text takes for granted (nothing else of its preamble is needed), and single instructions of PTX, each as
the function of its mnemonic. ``emulation.h`` has them for where no CUDA compiler reads the text. Those that sm_75 lacks
have names without ``ptx_``, which there stand for what it has: four products of 8x8x16 are one of 16x8x32, fragment for
fragment, and a copy is done when it is begun. ``SITE`` and ``OF_SITE`` hand on from which line of the kernel they were
called, for the emulation alone."""

OVERLAPPING = """\
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define __restrict__
#endif
"""
"""Stands in front of kernels whose launches overlap. Of a pointer that is ``__restrict__`` the compiler takes what a
kernel only reads for constant while the kernel is there, and it is there before others have written that, so that no
wait orders such loads."""

BEGIN = "begin_launch();"
"""The first statement of every kernel of a program. From sm_90 on the launch behind it may begin now, as far as this
statement of its own, which waits until all launches in front of it have ended and what they wrote is there."""

STEPS = (750, 800)
"""Values of ``__CUDA_ARCH__`` from which on :data:`PREAMBLE` computes in another way."""

_STEPPED = re.compile(r"\b(?:mma_|cop(?:y|ies)_)\w+(?:<\d+>)?\(")

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


def _head(source: str) -> re.Match[str]:
    head = _HEAD.search(source)
    if head is None:
        raise KernelError(
            "the generated CUDA text has no kernel with launch bounds; the installed TVM is not a tested one"
        )
    return head


_BEGINS = re.compile(r"[^{]*\{\s*" + re.escape(BEGIN))


def begun(source: str) -> str:
    """The one kernel in ``source`` with :data:`BEGIN` in front of everything that it does.

    Raises:
        KernelError: there is no kernel.
    """
    opened = source.index("{", _head(source).end()) + 1
    return f"{source[:opened]}\n  {BEGIN}{source[opened:]}"


def begins(source: str) -> bool:
    """Whether :data:`BEGIN` is the first that the one kernel in ``source`` does."""
    return _BEGINS.match(source, _head(source).end()) is not None


def signature(source: str) -> Signature:
    """Reads the head of the one kernel in ``source``.

    TVM orders parameters by name, pointers before numbers, and drops those the kernel does not use, so launches take
    the order from here and never from the function it was generated from.

    Raises:
        KernelError: there is no kernel, or its parameters are not in that order.
    """
    head = _head(source)
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


def steps(source: str) -> tuple[int, ...]:
    """Those of :data:`STEPS` for which a kernel's text, with or without the preamble, means different instructions."""
    return STEPS if _STEPPED.search(source.removeprefix(PREAMBLE)) else STEPS[-1:]
