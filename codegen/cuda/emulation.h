// What CUDA kernel text needs to compile as C++: the types, built-in variables, barriers and single instructions that the
// generated kernels use. Anything else does not compile, on purpose. The semantics of threads, barriers and memory are in
// emulation.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
// All shared memory lies in one section, whose bounds the linker gives to the runtime.
#define __shared__ static __attribute__((section("cuda_shared")))
#define alignas(bytes) __attribute__((aligned(bytes)))

#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short

namespace emulation {

struct Index {
  unsigned x, y, z;
};

Index thread_index();
Index block_index();
Index block_shape();
Index grid_shape();

// Waits for the whole block. A thread that waits elsewhere, or has returned, is an error.
void block_barrier(int line);

// Waits for the lanes in `mask`, gives them `value`, returns the value of `source` (a lane of the same warp).
uint64_t warp_exchange(int line, unsigned mask, uint64_t value, int source);
int lane();

// Waits for all lanes of the warp, gives them `count` words, returns those of all lanes, lane by lane. They stay until
// this thread's next call. It orders no memory: what lanes wrote before is not seen for that by others.
const unsigned* warp_gather(int line, const unsigned* words, int count);

// Copies to shared memory that run by themselves: what is there before copy_wait is undefined.
void copy_begin(int line, void* to, const void* from, int bytes);
void copy_commit();
// Waits until no more than `left` groups of this thread's copies are under way.
void copy_wait(int left);

// Runs the kernel once as the current thread; defined beside the kernel text.
void call_kernel(void** arguments);

template <class T>
T exchange(int line, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "shuffles move at most eight bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_exchange(line, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
__attribute__((no_sanitize("thread"), always_inline)) inline T argument(void* slot) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(slot);
  } else {
    return *static_cast<T*>(slot);
  }
}

template <class... A, std::size_t... I>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(A...), void** slots, std::index_sequence<I...>) {
  kernel(argument<A>(slots[I])...);
}

template <class... A>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(A...), void** slots) {
  call(kernel, slots, std::index_sequence_for<A...>{});
}

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_shape())
#define gridDim (emulation::grid_shape())

// The line of the kernel that calls one of the preamble's functions, as a parameter of these and as an argument within.
// All lanes of a warp must meet at the same product, and not in one of two branches each.
#define SITE , int line = __builtin_LINE()
#define OF_SITE , line

#define __syncthreads() emulation::block_barrier(__LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulation::warp_exchange(line, mask, 0, emulation::lane());
}

// The lanes of the warp; where they have parted, a shuffle with this mask is an error.
inline unsigned __activemask() {
  emulation::Index shape = emulation::block_shape(), at = emulation::thread_index();
  unsigned threads = shape.x * shape.y * shape.z, first = at.x + shape.x * (at.y + shape.y * at.z) - emulation::lane();
  return threads - first >= 32 ? 0xffffffffu : (1u << (threads - first)) - 1;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  int lane = emulation::lane();
  return emulation::exchange(line, mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, int line = __builtin_LINE()) {
  int lane = emulation::lane(), source = lane ^ lane_mask;
  return emulation::exchange(line, mask, value, source < ((lane & ~(width - 1)) + width) ? source : lane);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  int lane = emulation::lane(), source = lane + int(delta);
  return emulation::exchange(line, mask, value, source / width == lane / width ? source : lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  int lane = emulation::lane(), source = lane - int(delta);
  return emulation::exchange(line, mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}

#define EMULATED_VECTORS(type, name)                                                            \
  struct __attribute__((aligned(2 * sizeof(type)))) name##2 { type x, y; };                     \
  struct __attribute__((aligned(4 * sizeof(type)))) name##4 { type x, y, z, w; };               \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                              \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned int, uint)
EMULATED_VECTORS(float, float)
#undef EMULATED_VECTORS

// The overloads are CUDA's, so that a call nvcc finds ambiguous does not compile here either.
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += int(int8_t(a >> i)) * int(int8_t(b >> i));
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255u) * (b >> i & 255u);
  return c;
}

// Instructions of PTX, by mnemonic.
inline void ptx_griddepcontrol_launch_dependents() {}
inline void ptx_griddepcontrol_wait() {}

inline unsigned ptx_and_b32(unsigned a, unsigned b) { return a & b; }

inline unsigned ptx_prmt_b32(unsigned a, unsigned b, unsigned c) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    unsigned pick = c >> 4 * i & 15u, byte = bytes >> (pick & 7u) * 8 & 255u;
    if (pick & 8u) byte = byte & 128u ? 255u : 0u;  // the byte's sign, eight times
    result |= byte << 8 * i;
  }
  return result;
}

// Fragments are those of the PTX ISA, "Matrix Fragments for mma.m8n8k16" and "mma.m16n8k32" with .s8: a lane has four
// inputs of a row of A, or of a column of B, in each word.
namespace emulation {

// What four lanes' words of a row of A and of a column of B, so many words apart, give.
__attribute__((no_sanitize("thread"), noinline)) inline int product(const unsigned* a, const unsigned* b, int stride) {
  int sum = 0;
  for (int at = 0; at < 4 * stride; at += stride)
    for (int i = 0; i < 32; i += 8) sum += int(int8_t(a[at] >> i)) * int(int8_t(b[at] >> i));
  return sum;
}

__attribute__((no_sanitize("thread"), noinline)) inline void multiply_m8n8k16(
    int line, unsigned a, unsigned b, const int* c, int* d) {
  const unsigned given[] = {a, b};
  const unsigned* all = warp_gather(line, given, 2);
  const int row = lane() / 4, column = lane() % 4 * 2;
  for (int i = 0; i < 2; i++) d[i] = c[i] + product(all + row * 8, all + (column + i) * 8 + 1, 2);
}

__attribute__((no_sanitize("thread"), noinline)) inline void multiply_m16n8k32(
    int line, const unsigned* a, const unsigned* b, const int* c, int* d) {
  const unsigned given[] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned* all = warp_gather(line, given, 6);
  const int row = lane() / 4, column = lane() % 4 * 2;
  for (int i = 0; i < 4; i++) {
    d[i] = c[i];
    for (int half = 0; half < 2; half++)
      d[i] += product(all + row * 24 + i / 2 + 2 * half, all + (column + i % 2) * 24 + 4 + half, 6);
  }
}

}  // namespace emulation

inline int2 ptx_mma_sync_aligned_m8n8k16_row_col_s32_s8_s8_s32(unsigned a, unsigned b, int2 c SITE) {
  int given[] = {c.x, c.y}, d[2];
  emulation::multiply_m8n8k16(line, a, b, given, d);
  return {d[0], d[1]};
}

inline int4 ptx_mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(uint4 a, uint2 b, int4 c SITE) {
  unsigned of_a[] = {a.x, a.y, a.z, a.w}, of_b[] = {b.x, b.y};
  int given[] = {c.x, c.y, c.z, c.w}, d[4];
  emulation::multiply_m16n8k32(line, of_a, of_b, given, d);
  return {d[0], d[1], d[2], d[3]};
}

template <int bytes>
void ptx_cp_async_ca_shared_global(void* to, const void* from SITE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async.ca copies 4, 8 or 16 bytes");
  emulation::copy_begin(line, to, from, bytes);
}

template <int bytes>
void ptx_cp_async_cg_shared_global(void* to, const void* from SITE) {
  static_assert(bytes == 16, "cp.async.cg copies 16 bytes");
  emulation::copy_begin(line, to, from, bytes);
}

inline void ptx_cp_async_commit_group() { emulation::copy_commit(); }

template <int left>
void ptx_cp_async_wait_group() {
  emulation::copy_wait(left);
}

// Compiled without contraction, so each is one correctly rounded operation.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __int2float_rn(int a) { return float(a); }
inline int __float2int_rn(float a) { return int(std::rint(a)); }
inline float __uint_as_float(unsigned a) {
  float result;
  std::memcpy(&result, &a, sizeof result);
  return result;
}
inline unsigned __float_as_uint(float a) {
  unsigned result;
  std::memcpy(&result, &a, sizeof result);
  return result;
}
inline int __float_as_int(float a) { return int(__float_as_uint(a)); }
inline double __longlong_as_double(long long a) {
  double result;
  std::memcpy(&result, &a, sizeof result);
  return result;
}

#define EMULATED_EXTREMES(type, least, greatest)                     \
  inline type min(type a, type b) { return least; }                  \
  inline type max(type a, type b) { return greatest; }
EMULATED_EXTREMES(int, a < b ? a : b, a < b ? b : a)
EMULATED_EXTREMES(unsigned, a < b ? a : b, a < b ? b : a)
EMULATED_EXTREMES(long, a < b ? a : b, a < b ? b : a)
EMULATED_EXTREMES(long long, a < b ? a : b, a < b ? b : a)
EMULATED_EXTREMES(float, std::fmin(a, b), std::fmax(a, b))
#undef EMULATED_EXTREMES
