// Execution on a CPU: MSL as C++17 under clang, each GPU thread a fibre of the runtime (../native).
// Address spaces vanish here; the type-check pass (typecheck.h) is where they are enforced.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "msl/thread_id.h"

#define MSL_INLINE inline __attribute__((always_inline))
// Calls that lanes wait at: the optimiser may not copy, merge or move them, so a call site is a place in the kernel.
#define MSL_CONVERGENT __attribute__((convergent, noduplicate, nomerge))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
#include "msl/bfloat.h"

// ---- the runtime's side, see ../native/runtime.h ----
extern "C" {
struct msl_lanes {
  char* slots;    // 32 slots of 64 bytes: what each lane brought
  uint32_t mask;  // the lanes that take part
  uint32_t lane;  // this one
};
enum { MSL_SLOT_BYTES = 64, MSL_WHOLE_SIMDGROUP = 1 };
typedef void (*msl_combine)(char* slots, uint32_t mask);  // run once, by the last lane to arrive

MSL_CONVERGENT const msl_lanes* msl_simd_wait(const void* value, uint32_t bytes, const char* name, uint32_t flags,
                                              msl_combine combine);
MSL_CONVERGENT void msl_wait_threadgroup(uint32_t mem_flags);
MSL_CONVERGENT void msl_wait_simdgroup(uint32_t mem_flags);
uint32_t msl_current_lane();
void* msl_threadgroup_variable(int id, size_t bytes, size_t scalar_bytes, const char* name);
void msl_bad_lane(const char* name, uint32_t source, uint32_t mask);
void msl_bad_component(long index, long width);
uint32_t msl_atomic_load(const volatile void* address);
void msl_atomic_store(volatile void* address, uint32_t value);
bool msl_atomic_exchange_if(volatile void* address, uint32_t* expected, uint32_t desired);
}

#ifdef MSL_CHECK
#define MSL_COMPONENT(i, n) ((unsigned)(i) < (unsigned)(n) ? (i) : (msl_bad_component(i, n), 0))
#endif
#include "msl/vector.h"

#define MSL_C(name) __builtin_##name##f
#define MSL_POPCOUNT __builtin_popcount
#define MSL_CLZ __builtin_clz
#define MSL_CTZ __builtin_ctz
#include "msl/math.h"
#include "msl/types.h"
#include "msl/constants.h"

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
MSL_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
MSL_INLINE void threadgroup_barrier(mem_flags flags) { msl_wait_threadgroup(uint(flags)); }
MSL_INLINE void simdgroup_barrier(mem_flags flags) { msl_wait_simdgroup(uint(flags)); }

// ---- primitives of simd.h and matrix.h: bring a value, wait for the other lanes, read their slots ----
template <class T> MSL_INLINE T& msl_slot(char* slots, uint lane) { return *(T*)(slots + lane * MSL_SLOT_BYTES); }
template <class T> MSL_INLINE const msl_lanes* msl_exchange(const T& x, const char* name, msl_combine combine = nullptr,
                                                            uint flags = 0) {
  static_assert(sizeof(T) <= MSL_SLOT_BYTES, "too large a value for a SIMD-group function");
  return msl_simd_wait(&x, sizeof x, name, flags, combine);
}
MSL_INLINE uint msl_lane() { return msl_current_lane(); }
MSL_INLINE uint msl_active_lanes(const char* name) { return msl_exchange(0u, name)->mask; }

template <class T> MSL_INLINE T msl_from_lane(T x, const char* name, uint source, T fallback) {
  const msl_lanes* lanes = msl_exchange(x, name);
  if (source >= 32) return fallback;
  if (!(lanes->mask >> source & 1)) msl_bad_lane(name, source, lanes->mask);
  return msl_slot<T>(lanes->slots, source);
}
template <class T> MSL_INLINE T msl_from_valid_lane(T x, const char* name, uint source) {
  const msl_lanes* lanes = msl_exchange(x, name);
  if (source >= 32 || !(lanes->mask >> source & 1)) msl_bad_lane(name, source, lanes->mask);
  return msl_slot<T>(lanes->slots, source & 31);
}

// A tree over the lanes that take part, neighbours first, as mlx-lm's kernels say Apple's GPUs have it.
template <class T, class F> MSL_INLINE T msl_reduce(T x, const char* name, F) {
  const msl_combine tree = [](char* slots, uint32_t mask) {
    for (uint stride = 1; stride < 32; stride *= 2)
      for (uint lane = 0; lane < 32; lane += 2 * stride) {
        T& mine = msl_slot<T>(slots, lane);
        T& other = msl_slot<T>(slots, lane + stride);
        if (!(mask >> (lane + stride) & 1)) continue;
        mine = mask >> lane & 1 ? F()(mine, other) : other;
        mask |= 1u << lane;
      }
  };
  return msl_slot<T>(msl_exchange(x, name, tree)->slots, 0);
}
template <class T, class F> MSL_INLINE T msl_scan(T x, const char* name, F f, T identity, bool inclusive) {
  const msl_lanes* lanes = msl_exchange(x, name);
  T result = identity;
  for (uint lane = 0; lane < lanes->lane + inclusive; lane++)
    if (lanes->mask >> lane & 1) result = f(result, msl_slot<T>(lanes->slots, lane));
  return result;
}
MSL_INLINE uint msl_ballot(bool predicate) {
  const msl_lanes* lanes = msl_exchange(uint(predicate), "simd_ballot");
  uint ballot = 0;
  for (uint lane = 0; lane < 32; lane++)
    if (lanes->mask >> lane & 1) ballot |= msl_slot<uint>(lanes->slots, lane) << lane;
  return ballot;
}

#ifdef MSL_CHECK
MSL_INLINE void msl_matrix_access(const char* name) { msl_exchange(0u, name, nullptr, MSL_WHOLE_SIMDGROUP); }
#else
MSL_INLINE void msl_matrix_access(const char*) {}
#endif
}  // namespace metal
#include "msl/matrix.h"
#include "msl/simd.h"
#include "msl/atomic.h"

namespace metal {
template <class D, class MatrixA, class MatrixB, class MatrixC>
MSL_INLINE void msl_multiply_accumulate(D& d, MatrixA a, MatrixB b, MatrixC c) {
  struct part { MatrixA a; MatrixB b; MatrixC c; D d; };
  const msl_combine multiply = [](char* slots, uint32_t) {
    float left[8][8], right[8][8], sum[8][8];
    for (uint lane = 0; lane < 32; lane++)
      for (uint e = 0; e < 2; e++) {
        const part& p = msl_slot<part>(slots, lane);
        const uint row = msl_matrix_row(lane), column = msl_matrix_column(lane) + e;
        left[row][column] = float(p.a.elements.v[e]);
        right[row][column] = float(p.b.elements.v[e]);
        sum[row][column] = float(p.c.elements.v[e]);
      }
    for (uint row = 0; row < 8; row++)
      for (uint k = 0; k < 8; k++)
        for (uint column = 0; column < 8; column++) sum[row][column] += left[row][k] * right[k][column];
    for (uint lane = 0; lane < 32; lane++) {
      const uint row = msl_matrix_row(lane), column = msl_matrix_column(lane);
      auto& result = msl_slot<part>(slots, lane).d.elements;
      result.v[0] = decltype(result.x)(sum[row][column]);
      result.v[1] = decltype(result.x)(sum[row][column + 1]);
    }
  };
  const msl_lanes* lanes =
      msl_exchange(part{a, b, c, d}, "simdgroup_multiply_accumulate", multiply, MSL_WHOLE_SIMDGROUP);
  d = msl_slot<part>(lanes->slots, lanes->lane).d;
}

// What one thread may write without touching its neighbour's: the granule of the checker's shadow memory.
template <class T> constexpr size_t msl_scalar_bytes = alignof(T);
template <class T, int N> constexpr size_t msl_scalar_bytes<vec<T, N>> = sizeof(T);
}  // namespace metal
using namespace metal;

#define METAL_FUNC MSL_INLINE
#define __METAL_VERSION__ 310
#define kernel
#define device
#define thread
#define threadgroup
#define constant const
// `threadgroup T name[4][8];` in a kernel: a reference to memory that the threadgroup's threads share.
#define MSL_THREADGROUP_VARIABLE(id, T, name, ...) \
  T(&name) __VA_ARGS__ =                           \
      *(T(*) __VA_ARGS__)msl_threadgroup_variable(id, sizeof(T __VA_ARGS__), metal::msl_scalar_bytes<T>, #name)
