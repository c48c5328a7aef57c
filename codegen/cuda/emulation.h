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
