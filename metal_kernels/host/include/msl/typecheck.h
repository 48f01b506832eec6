// Type check only, as C++14: address spaces are real qualifiers here, so mixing up two pointers is a compile error.
// Everything is a declaration; nothing in this pass is ever run.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "msl/type_traits.h"

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL_VERSION__ 310

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

namespace metal {
// ---- vectors: clang's own, which allow every swizzle ----
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
#define MSL_VECTOR_NAMES(name, T)                           \
  typedef T name##2 __attribute__((ext_vector_type(2)));    \
  typedef T name##3 __attribute__((ext_vector_type(3)));    \
  typedef T name##4 __attribute__((ext_vector_type(4)));
MSL_VECTOR_NAMES(float, float)
MSL_VECTOR_NAMES(half, half)
MSL_VECTOR_NAMES(bfloat, bfloat)
MSL_VECTOR_NAMES(int, int)
MSL_VECTOR_NAMES(uint, uint)
MSL_VECTOR_NAMES(short, short)
MSL_VECTOR_NAMES(ushort, ushort)
MSL_VECTOR_NAMES(char, signed char)
MSL_VECTOR_NAMES(uchar, uchar)
MSL_VECTOR_NAMES(long, long)
MSL_VECTOR_NAMES(ulong, ulong)
MSL_VECTOR_NAMES(bool, bool)
// C++ has no float4(a, b): the macros below turn it into msl_construct<float4>::from(a, b).
template <class V> struct msl_construct { template <class... Parts> static V from(Parts...); };

// ---- maths ----
#define MSL_FUNCTION1(name)                                            \
  float name(float);                                                   \
  half name(half);                                                     \
  bfloat name(bfloat);                                                 \
  template <class T, int N> vec<T, N> name(vec<T, N>);                 \
  namespace precise {                                                  \
  float name(float);                                                   \
  half name(half);                                                     \
  }                                                                    \
  namespace fast {                                                     \
  float name(float);                                                   \
  half name(half);                                                     \
  }
MSL_FUNCTION1(exp)
MSL_FUNCTION1(exp2)
MSL_FUNCTION1(exp10)
MSL_FUNCTION1(log)
MSL_FUNCTION1(log2)
MSL_FUNCTION1(log10)
MSL_FUNCTION1(sqrt)
MSL_FUNCTION1(rsqrt)
MSL_FUNCTION1(sin)
MSL_FUNCTION1(cos)
MSL_FUNCTION1(tan)
MSL_FUNCTION1(asin)
MSL_FUNCTION1(acos)
MSL_FUNCTION1(atan)
MSL_FUNCTION1(sinh)
MSL_FUNCTION1(cosh)
MSL_FUNCTION1(tanh)
MSL_FUNCTION1(asinh)
MSL_FUNCTION1(acosh)
MSL_FUNCTION1(atanh)
MSL_FUNCTION1(floor)
MSL_FUNCTION1(ceil)
MSL_FUNCTION1(trunc)
MSL_FUNCTION1(rint)
MSL_FUNCTION1(round)
MSL_FUNCTION1(fabs)
MSL_FUNCTION1(sign)
MSL_FUNCTION1(fract)
MSL_FUNCTION1(saturate)
#define MSL_FUNCTION2(name)      \
  float name(float, float);      \
  half name(half, half);         \
  bfloat name(bfloat, bfloat);   \
  template <class T, int N> vec<T, N> name(vec<T, N>, vec<T, N>);
MSL_FUNCTION2(pow)
MSL_FUNCTION2(powr)
MSL_FUNCTION2(atan2)
MSL_FUNCTION2(fmod)
MSL_FUNCTION2(fmin)
MSL_FUNCTION2(fmax)
MSL_FUNCTION2(fdim)
MSL_FUNCTION2(copysign)
template <class T> T min(T, T);
template <class T> T max(T, T);
template <class T> T clamp(T, T, T);
template <class T> T mix(T, T, T);
template <class T> T abs(T);
template <class T> T fma(T, T, T);
template <class T, class Condition> T select(T, T, Condition);
template <class T> bool any(T);
template <class T> bool all(T);
template <class T, int N> T dot(vec<T, N>, vec<T, N>);
bool isnan(float);
bool isinf(float);
bool isfinite(float);
bool signbit(float);
uint popcount(uint);
uint clz(uint);
uint ctz(uint);
template <class T> struct numeric_limits {
  static constexpr T max() { return T(); }
  static constexpr T min() { return T(); }
  static constexpr T lowest() { return T(); }
  static constexpr T epsilon() { return T(); }
  static constexpr T infinity() { return T(); }
  static constexpr T quiet_NaN() { return T(); }
};

// ---- barriers and SIMD-group functions: not for bool, nor for 64-bit types ----
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <class T> struct msl_simd_type : bool_constant<true> {};
template <> struct msl_simd_type<bool> : bool_constant<false> {};
template <> struct msl_simd_type<long> : bool_constant<false> {};
template <> struct msl_simd_type<ulong> : bool_constant<false> {};
template <> struct msl_simd_type<long long> : bool_constant<false> {};
template <> struct msl_simd_type<unsigned long long> : bool_constant<false> {};
template <class T> using msl_if_simd = enable_if_t<msl_simd_type<T>::value, T>;
#define MSL_SIMD_OF_VALUE(name) template <class T> msl_if_simd<T> name(T);
MSL_SIMD_OF_VALUE(simd_sum)
MSL_SIMD_OF_VALUE(simd_product)
MSL_SIMD_OF_VALUE(simd_max)
MSL_SIMD_OF_VALUE(simd_min)
MSL_SIMD_OF_VALUE(simd_and)
MSL_SIMD_OF_VALUE(simd_or)
MSL_SIMD_OF_VALUE(simd_xor)
MSL_SIMD_OF_VALUE(simd_broadcast_first)
MSL_SIMD_OF_VALUE(simd_prefix_inclusive_sum)
MSL_SIMD_OF_VALUE(simd_prefix_exclusive_sum)
MSL_SIMD_OF_VALUE(simd_prefix_inclusive_product)
MSL_SIMD_OF_VALUE(simd_prefix_exclusive_product)
#define MSL_SIMD_OF_LANE(name) template <class T> msl_if_simd<T> name(T, ushort);
MSL_SIMD_OF_LANE(simd_shuffle)
MSL_SIMD_OF_LANE(simd_broadcast)
MSL_SIMD_OF_LANE(simd_shuffle_xor)
MSL_SIMD_OF_LANE(simd_shuffle_up)
MSL_SIMD_OF_LANE(simd_shuffle_down)
MSL_SIMD_OF_LANE(simd_shuffle_rotate_up)
MSL_SIMD_OF_LANE(simd_shuffle_rotate_down)
template <class T> msl_if_simd<T> simd_shuffle_and_fill_up(T, T, ushort);
template <class T> msl_if_simd<T> simd_shuffle_and_fill_down(T, T, ushort);
struct simd_vote {
  explicit operator uint64_t() const;
  bool all() const;
  bool any() const;
};
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();

// ---- matrices ----
template <class T, int Rows, int Columns> struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "simdgroup_matrix: only 8x8 exists");
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  vec<T, 2>& thread_elements();
  vec<T, 2> elements;
};
template <class T> using msl_matrix = simdgroup_matrix<T, 8, 8>;
typedef msl_matrix<float> simdgroup_float8x8;
typedef msl_matrix<half> simdgroup_half8x8;
typedef msl_matrix<bfloat> simdgroup_bfloat8x8;
template <class T, int Rows, int Columns> simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T);
#define MSL_MATRIX_MEMORY(space)                                                                                  \
  template <class T> void simdgroup_load(msl_matrix<T>&, const space T*, ulong = 8, ulong2 = 0, bool = false);    \
  template <class T> void simdgroup_store(msl_matrix<T>, space T*, ulong = 8, ulong2 = 0, bool = false);
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(msl_matrix<D>&, msl_matrix<A>, msl_matrix<B>, msl_matrix<C>);
template <class D, class A, class B> void simdgroup_multiply(msl_matrix<D>&, msl_matrix<A>, msl_matrix<B>);

// ---- atomics ----
enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
  static_assert(sizeof(T) == 4, "only 32-bit atomics");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
#define MSL_ATOMIC(name, space) template <class T> T name(volatile space atomic<T>*, T, memory_order);
#define MSL_ATOMICS(space)                                                                     \
  template <class T> T atomic_load_explicit(const volatile space atomic<T>*, memory_order);    \
  template <class T> void atomic_store_explicit(volatile space atomic<T>*, T, memory_order);   \
  template <class T>                                                                           \
  bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>*, T*, T, memory_order, memory_order); \
  MSL_ATOMIC(atomic_exchange_explicit, space)                                                  \
  MSL_ATOMIC(atomic_fetch_add_explicit, space)                                                 \
  MSL_ATOMIC(atomic_fetch_sub_explicit, space)                                                 \
  MSL_ATOMIC(atomic_fetch_min_explicit, space)                                                 \
  MSL_ATOMIC(atomic_fetch_max_explicit, space)                                                 \
  MSL_ATOMIC(atomic_fetch_and_explicit, space)                                                 \
  MSL_ATOMIC(atomic_fetch_or_explicit, space)                                                  \
  MSL_ATOMIC(atomic_fetch_xor_explicit, space)
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)
// On floats there are only load, store, exchange, compare-exchange and, in device memory, add and sub.
float atomic_fetch_min_explicit(volatile device atomic<float>*, float, memory_order) = delete;
float atomic_fetch_max_explicit(volatile device atomic<float>*, float, memory_order) = delete;
float atomic_fetch_min_explicit(volatile threadgroup atomic<float>*, float, memory_order) = delete;
float atomic_fetch_max_explicit(volatile threadgroup atomic<float>*, float, memory_order) = delete;
float atomic_fetch_add_explicit(volatile threadgroup atomic<float>*, float, memory_order) = delete;
float atomic_fetch_sub_explicit(volatile threadgroup atomic<float>*, float, memory_order) = delete;

template <class To, class From> To as_type(From) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  return To();
}
}  // namespace metal
using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
#include "msl/constants.h"

template <class T> threadgroup T& msl_threadgroup_memory();
template <class T> using msl_type = T;  // `half4 (` would be the macro
#define MSL_THREADGROUP_VARIABLE(id, T, name, ...) \
  threadgroup msl_type<T>(&name) __VA_ARGS__ = msl_threadgroup_memory<T __VA_ARGS__>()

#define MSL_CONSTRUCT(type, ...) msl_construct<metal::type>::from(__VA_ARGS__)
#define float2(...) MSL_CONSTRUCT(float2, __VA_ARGS__)
#define float3(...) MSL_CONSTRUCT(float3, __VA_ARGS__)
#define float4(...) MSL_CONSTRUCT(float4, __VA_ARGS__)
#define half2(...) MSL_CONSTRUCT(half2, __VA_ARGS__)
#define half3(...) MSL_CONSTRUCT(half3, __VA_ARGS__)
#define half4(...) MSL_CONSTRUCT(half4, __VA_ARGS__)
#define bfloat2(...) MSL_CONSTRUCT(bfloat2, __VA_ARGS__)
#define bfloat3(...) MSL_CONSTRUCT(bfloat3, __VA_ARGS__)
#define bfloat4(...) MSL_CONSTRUCT(bfloat4, __VA_ARGS__)
#define int2(...) MSL_CONSTRUCT(int2, __VA_ARGS__)
#define int3(...) MSL_CONSTRUCT(int3, __VA_ARGS__)
#define int4(...) MSL_CONSTRUCT(int4, __VA_ARGS__)
#define uint2(...) MSL_CONSTRUCT(uint2, __VA_ARGS__)
#define uint3(...) MSL_CONSTRUCT(uint3, __VA_ARGS__)
#define uint4(...) MSL_CONSTRUCT(uint4, __VA_ARGS__)
#define short2(...) MSL_CONSTRUCT(short2, __VA_ARGS__)
#define short3(...) MSL_CONSTRUCT(short3, __VA_ARGS__)
#define short4(...) MSL_CONSTRUCT(short4, __VA_ARGS__)
#define ushort2(...) MSL_CONSTRUCT(ushort2, __VA_ARGS__)
#define ushort3(...) MSL_CONSTRUCT(ushort3, __VA_ARGS__)
#define ushort4(...) MSL_CONSTRUCT(ushort4, __VA_ARGS__)
#define char2(...) MSL_CONSTRUCT(char2, __VA_ARGS__)
#define char3(...) MSL_CONSTRUCT(char3, __VA_ARGS__)
#define char4(...) MSL_CONSTRUCT(char4, __VA_ARGS__)
#define uchar2(...) MSL_CONSTRUCT(uchar2, __VA_ARGS__)
#define uchar3(...) MSL_CONSTRUCT(uchar3, __VA_ARGS__)
#define uchar4(...) MSL_CONSTRUCT(uchar4, __VA_ARGS__)
#define long2(...) MSL_CONSTRUCT(long2, __VA_ARGS__)
#define long3(...) MSL_CONSTRUCT(long3, __VA_ARGS__)
#define long4(...) MSL_CONSTRUCT(long4, __VA_ARGS__)
#define ulong2(...) MSL_CONSTRUCT(ulong2, __VA_ARGS__)
#define ulong3(...) MSL_CONSTRUCT(ulong3, __VA_ARGS__)
#define ulong4(...) MSL_CONSTRUCT(ulong4, __VA_ARGS__)
#define bool2(...) MSL_CONSTRUCT(bool2, __VA_ARGS__)
#define bool3(...) MSL_CONSTRUCT(bool3, __VA_ARGS__)
#define bool4(...) MSL_CONSTRUCT(bool4, __VA_ARGS__)
