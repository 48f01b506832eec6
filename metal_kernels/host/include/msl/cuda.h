// The same MSL text through NVRTC (-std=c++17 --device-as-default-execution-space), for running on an NVIDIA GPU.
// A SIMD-group is a warp, a threadgroup a block, and address spaces vanish. No CUDA header is needed.
#pragma once
#define MSL_INLINE __forceinline__
#define MSL_CONSTEXPR  // half is a struct here, and its conversion an instruction

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

#define __builtin_memcpy memcpy
#define __builtin_memset memset
#define __builtin_inff() __builtin_bit_cast(float, 0x7f800000)
#define __builtin_nanf(text) __builtin_bit_cast(float, 0x7fc00000)

#include "msl/thread_id.h"
#include "msl/type_traits.h"

// half as clang's _Float16 on the host: with a half or an integer it stays half, with a float it becomes float.
struct half {
  uint16_t bits;

  half() = default;
  MSL_INLINE half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  MSL_INLINE half(int x) : half(float(x)) {}
  MSL_INLINE half(uint x) : half(float(x)) {}
  MSL_INLINE half(long x) : half(float(x)) {}
  MSL_INLINE half(ulong x) : half(float(x)) {}
  MSL_INLINE operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};
template <class T> using msl_if_integer = metal::enable_if_t<metal::is_integral_v<T>, int>;
#define MSL_HALF_OPERATOR(op, result)                                                                                \
  MSL_INLINE result operator op(half a, half b) { return result(float(a) op float(b)); }                             \
  template <class T, msl_if_integer<T> = 0>                                                                          \
  MSL_INLINE result operator op(half a, T b) { return result(float(a) op float(half(b))); }                          \
  template <class T, msl_if_integer<T> = 0>                                                                          \
  MSL_INLINE result operator op(T a, half b) { return result(float(half(a)) op float(b)); }
#define MSL_HALF_ARITHMETIC(op)                                                         \
  MSL_HALF_OPERATOR(op, half)                                                           \
  MSL_INLINE float operator op(half a, float b) { return float(a) op b; }               \
  MSL_INLINE float operator op(float a, half b) { return a op float(b); }               \
  template <class T> MSL_INLINE half& operator op##=(half& a, T b) { return a = half(a op b); }
#define MSL_HALF_COMPARISON(op)                                              \
  MSL_HALF_OPERATOR(op, bool)                                                \
  MSL_INLINE bool operator op(half a, float b) { return float(a) op b; }     \
  MSL_INLINE bool operator op(float a, half b) { return a op float(b); }
MSL_HALF_ARITHMETIC(+)
MSL_HALF_ARITHMETIC(-)
MSL_HALF_ARITHMETIC(*)
MSL_HALF_ARITHMETIC(/)
MSL_HALF_COMPARISON(<)
MSL_HALF_COMPARISON(>)
MSL_HALF_COMPARISON(<=)
MSL_HALF_COMPARISON(>=)
MSL_HALF_COMPARISON(==)
MSL_HALF_COMPARISON(!=)
MSL_INLINE half operator-(half a) {
  a.bits ^= 0x8000;
  return a;
}
#include "msl/bfloat.h"
#include "msl/vector.h"

#define MSL_C(name) ::name##f
#define MSL_POPCOUNT __popc
#define MSL_CLZ __clz
#define MSL_CTZ(x) (__ffs(x) - 1)
#include "msl/math.h"

// CUDA has global types of these names.
#define MSL_RENAMED(name) msl_##name
#define char2 MSL_RENAMED(char2)
#define char3 MSL_RENAMED(char3)
#define char4 MSL_RENAMED(char4)
#define uchar2 MSL_RENAMED(uchar2)
#define uchar3 MSL_RENAMED(uchar3)
#define uchar4 MSL_RENAMED(uchar4)
#define short2 MSL_RENAMED(short2)
#define short3 MSL_RENAMED(short3)
#define short4 MSL_RENAMED(short4)
#define ushort2 MSL_RENAMED(ushort2)
#define ushort3 MSL_RENAMED(ushort3)
#define ushort4 MSL_RENAMED(ushort4)
#define int2 MSL_RENAMED(int2)
#define int3 MSL_RENAMED(int3)
#define int4 MSL_RENAMED(int4)
#define uint2 MSL_RENAMED(uint2)
#define uint3 MSL_RENAMED(uint3)
#define uint4 MSL_RENAMED(uint4)
#define long2 MSL_RENAMED(long2)
#define long3 MSL_RENAMED(long3)
#define long4 MSL_RENAMED(long4)
#define ulong2 MSL_RENAMED(ulong2)
#define ulong3 MSL_RENAMED(ulong3)
#define ulong4 MSL_RENAMED(ulong4)
#define float2 MSL_RENAMED(float2)
#define float3 MSL_RENAMED(float3)
#define float4 MSL_RENAMED(float4)
#include "msl/types.h"
#include "msl/constants.h"

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
MSL_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

MSL_INLINE uint msl_index_in_block() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
MSL_INLINE uint msl_lane() { return msl_index_in_block() % 32; }
// The lanes of this warp that the launch made, those that have returned included.
MSL_INLINE uint msl_warp() {
  const uint left = blockDim.x * blockDim.y * blockDim.z - msl_index_in_block() / 32 * 32;
  return left >= 32 ? 0xffffffffu : (1u << left) - 1;
}
MSL_INLINE void threadgroup_barrier(mem_flags) { __syncthreads(); }  // orders shared and global memory both
MSL_INLINE void simdgroup_barrier(mem_flags) { __syncwarp(msl_warp()); }

// ---- primitives of simd.h and matrix.h ----
MSL_INLINE uint msl_active_lanes(const char*) { return __ballot_sync(msl_warp(), 1); }
MSL_INLINE uint msl_ballot(bool predicate) { return __ballot_sync(msl_warp(), predicate); }

template <class T> MSL_INLINE T msl_from_valid_lane(T x, const char*, uint source) {
  constexpr int words = (sizeof(T) + 3) / 4;
  uint32_t parts[words] = {};
  memcpy(parts, &x, sizeof x);
  for (int i = 0; i < words; i++) parts[i] = __shfl_sync(msl_warp(), parts[i], source & 31);
  memcpy(&x, parts, sizeof x);
  return x;
}
template <class T> MSL_INLINE T msl_from_lane(T x, const char* name, uint source, T fallback) {
  const T other = msl_from_valid_lane(x, name, source);
  return source < 32 ? other : fallback;
}
// With all lanes there: the same tree of additions as on the host. Otherwise lane after lane.
template <class T, class F> MSL_INLINE T msl_reduce(T x, const char* name, F f) {
  const uint active = msl_active_lanes(name);
  if (active == 0xffffffffu) {
    for (uint stride = 1; stride < 32; stride *= 2) x = f(x, msl_from_valid_lane(x, name, msl_lane() ^ stride));
    return x;
  }
  T result = msl_from_valid_lane(x, name, __ffs(active) - 1);
  for (uint lane = __ffs(active); lane < 32; lane++) {
    const T other = msl_from_valid_lane(x, name, lane);
    if (active >> lane & 1) result = f(result, other);
  }
  return result;
}
template <class T, class F> MSL_INLINE T msl_scan(T x, const char* name, F f, T identity, bool inclusive) {
  const uint active = msl_active_lanes(name);
  T result = identity;
  for (uint lane = 0; lane < 32; lane++) {
    const T other = msl_from_valid_lane(x, name, lane);
    if (lane < msl_lane() + inclusive && (active >> lane & 1)) result = f(result, other);
  }
  return result;
}

MSL_INLINE void msl_matrix_access(const char*) { __syncwarp(); }
}  // namespace metal
#include "msl/matrix.h"
#include "msl/simd.h"

namespace metal {
// The lane that owns (row, column): the inverse of msl_matrix_row and msl_matrix_column.
MSL_INLINE constexpr uint msl_matrix_owner(uint row, uint column) {
  return (row & 4) * 4 + (row & 3) * 2 + (column & 4) * 2 + (column >> 1 & 1);
}
constexpr bool msl_owners_are_right() {
  for (uint lane = 0; lane < 32; lane++)
    for (uint e = 0; e < 2; e++)
      if (msl_matrix_owner(msl_matrix_row(lane), msl_matrix_column(lane) + e) != lane) return false;
  return true;
}
static_assert(msl_owners_are_right(), "msl_matrix_owner");
template <class D, class MatrixA, class MatrixB, class MatrixC>
MSL_INLINE void msl_multiply_accumulate(D& d, MatrixA a, MatrixB b, MatrixC c) {
  const uint row = msl_matrix_row(msl_lane()), column = msl_matrix_column(msl_lane());
  float sum[2] = {float(c.elements.v[0]), float(c.elements.v[1])};
  for (uint k = 0; k < 8; k++) {
    const auto left = msl_from_valid_lane(a.elements, "", msl_matrix_owner(row, k));
    const auto right = msl_from_valid_lane(b.elements, "", msl_matrix_owner(k, column));
    for (int e = 0; e < 2; e++) sum[e] += float(left.v[k & 1]) * float(right.v[e]);
  }
  for (int e = 0; e < 2; e++) d.elements.v[e] = decltype(d.elements.x)(sum[e]);
}

MSL_INLINE uint32_t msl_atomic_load(const volatile void* address) { return *(const volatile uint32_t*)address; }
MSL_INLINE void msl_atomic_store(volatile void* address, uint32_t value) { atomicExch((uint32_t*)address, value); }
MSL_INLINE bool msl_atomic_exchange_if(volatile void* address, uint32_t* expected, uint32_t desired) {
  const uint32_t before = atomicCAS((uint32_t*)address, *expected, desired), wanted = *expected;
  *expected = before;
  return before == wanted;
}
}  // namespace metal
#include "msl/atomic.h"
using namespace metal;

#define METAL_FUNC __forceinline__
#define __METAL_VERSION__ 310
#define MSL_THREADGROUP_VARIABLE(id, T, name, ...) __shared__ T name __VA_ARGS__
