// Scalar maths and its lift to vectors, for the host and the CUDA pass; half and bfloat compute in float, round once.
// Needs vector.h, MSL_C(name): the target's C function on floats, and MSL_POPCOUNT, MSL_CLZ, MSL_CTZ.
// The functions have the C library's rounding, not Apple's. One that is missing is a compile error: add it here.
#pragma once
#ifndef MSL_CONSTEXPR
#define MSL_CONSTEXPR constexpr
#endif

namespace metal {
MSL_INLINE float msl_rsqrt(float x) { return 1.0f / MSL_C(sqrt)(x); }
MSL_INLINE float msl_exp10(float x) { return MSL_C(pow)(10.0f, x); }
MSL_INLINE float msl_sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x != x ? 0.0f : x; }
MSL_INLINE float msl_saturate(float x) { return MSL_C(fmin)(MSL_C(fmax)(x, 0.0f), 1.0f); }
MSL_INLINE float msl_fract(float x) {
  float fraction = x - MSL_C(floor)(x);
  return fraction < 1.0f ? fraction : 0x1.fffffep-1f;
}

// metal::f, metal::precise::f and metal::fast::f are one function here: all three are precise.
#define MSL_FUNCTION1(name, on_float)                                                  \
  MSL_INLINE float name(float x) { return on_float(x); }                               \
  MSL_INLINE half name(half x) { return half(on_float(float(x))); }                    \
  MSL_INLINE bfloat name(bfloat x) { return bfloat(on_float(float(x))); }              \
  MSL_LIFT1(name)                                                                      \
  namespace precise {                                                                  \
  MSL_INLINE float name(float x) { return on_float(x); }                               \
  MSL_INLINE half name(half x) { return half(on_float(float(x))); }                    \
  }                                                                                    \
  namespace fast {                                                                     \
  MSL_INLINE float name(float x) { return on_float(x); }                               \
  MSL_INLINE half name(half x) { return half(on_float(float(x))); }                    \
  }
MSL_FUNCTION1(exp, MSL_C(exp))
MSL_FUNCTION1(exp2, MSL_C(exp2))
MSL_FUNCTION1(exp10, msl_exp10)
MSL_FUNCTION1(log, MSL_C(log))
MSL_FUNCTION1(log2, MSL_C(log2))
MSL_FUNCTION1(log10, MSL_C(log10))
MSL_FUNCTION1(sqrt, MSL_C(sqrt))
MSL_FUNCTION1(rsqrt, msl_rsqrt)
MSL_FUNCTION1(sin, MSL_C(sin))
MSL_FUNCTION1(cos, MSL_C(cos))
MSL_FUNCTION1(tan, MSL_C(tan))
MSL_FUNCTION1(asin, MSL_C(asin))
MSL_FUNCTION1(acos, MSL_C(acos))
MSL_FUNCTION1(atan, MSL_C(atan))
MSL_FUNCTION1(sinh, MSL_C(sinh))
MSL_FUNCTION1(cosh, MSL_C(cosh))
MSL_FUNCTION1(tanh, MSL_C(tanh))
MSL_FUNCTION1(asinh, MSL_C(asinh))
MSL_FUNCTION1(acosh, MSL_C(acosh))
MSL_FUNCTION1(atanh, MSL_C(atanh))
MSL_FUNCTION1(floor, MSL_C(floor))
MSL_FUNCTION1(ceil, MSL_C(ceil))
MSL_FUNCTION1(trunc, MSL_C(trunc))
MSL_FUNCTION1(rint, MSL_C(rint))
MSL_FUNCTION1(round, MSL_C(round))
MSL_FUNCTION1(fabs, MSL_C(fabs))
MSL_FUNCTION1(sign, msl_sign)
MSL_FUNCTION1(fract, msl_fract)
MSL_FUNCTION1(saturate, msl_saturate)

#define MSL_FUNCTION2(name, on_float)                                                                      \
  MSL_INLINE float name(float x, float y) { return on_float(x, y); }                                       \
  MSL_INLINE half name(half x, half y) { return half(on_float(float(x), float(y))); }                      \
  MSL_INLINE bfloat name(bfloat x, bfloat y) { return bfloat(on_float(float(x), float(y))); }              \
  MSL_LIFT2(name)
MSL_FUNCTION2(pow, MSL_C(pow))
MSL_FUNCTION2(powr, MSL_C(pow))
MSL_FUNCTION2(atan2, MSL_C(atan2))
MSL_FUNCTION2(fmod, MSL_C(fmod))
MSL_FUNCTION2(fmin, MSL_C(fmin))
MSL_FUNCTION2(fmax, MSL_C(fmax))
MSL_FUNCTION2(fdim, MSL_C(fdim))
MSL_FUNCTION2(copysign, MSL_C(copysign))

MSL_INLINE float fma(float a, float b, float c) { return MSL_C(fma)(a, b, c); }
MSL_INLINE half fma(half a, half b, half c) { return half(MSL_C(fma)(float(a), float(b), float(c))); }
MSL_LIFT3(fma)

// min and max: a NaN loses against a number, as with fmin and fmax.
template <class T>
constexpr bool is_floating = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
constexpr bool is_other_scalar = !is_floating<T> && vector_traits<T>::width == 0;
template <class T> MSL_INLINE enable_if_t<is_other_scalar<T>, T> min(T a, T b) { return b < a ? b : a; }
template <class T> MSL_INLINE enable_if_t<is_other_scalar<T>, T> max(T a, T b) { return a < b ? b : a; }
MSL_INLINE float min(float a, float b) { return fmin(a, b); }
MSL_INLINE float max(float a, float b) { return fmax(a, b); }
MSL_INLINE half min(half a, half b) { return fmin(a, b); }
MSL_INLINE half max(half a, half b) { return fmax(a, b); }
MSL_INLINE bfloat min(bfloat a, bfloat b) { return fmin(a, b); }
MSL_INLINE bfloat max(bfloat a, bfloat b) { return fmax(a, b); }
MSL_LIFT2(min)
MSL_LIFT2(max)
template <class T> MSL_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> MSL_INLINE T mix(T a, T b, T t) { return a + (b - a) * t; }

template <class T> MSL_INLINE enable_if_t<is_other_scalar<T>, T> abs(T x) { return x < T(0) ? T(-x) : x; }
MSL_INLINE float abs(float x) { return fabs(x); }
MSL_INLINE half abs(half x) { return fabs(x); }
MSL_INLINE bfloat abs(bfloat x) { return fabs(x); }
MSL_LIFT1(abs)

MSL_INLINE bool isnan(float x) { return x != x; }
MSL_INLINE bool isinf(float x) { return fabs(x) == __builtin_inff(); }
MSL_INLINE bool isfinite(float x) { return fabs(x) < __builtin_inff(); }
MSL_INLINE bool signbit(float x) { return as_type<uint32_t>(x) >> 31; }

MSL_INLINE uint popcount(uint x) { return MSL_POPCOUNT(x); }
MSL_INLINE uint clz(uint x) { return x ? MSL_CLZ(x) : 32u; }
MSL_INLINE uint ctz(uint x) { return x ? MSL_CTZ(x) : 32u; }

template <class T> struct numeric_limits;
template <> struct numeric_limits<float> {
  static constexpr float max() { return 3.402823466e+38f; }
  static constexpr float min() { return 1.175494351e-38f; }
  static constexpr float lowest() { return -max(); }
  static constexpr float epsilon() { return 1.192092896e-07f; }
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
};
#define MSL_SMALL_FLOAT_LIMITS(T, largest, smallest, step)                          \
  template <> struct numeric_limits<T> {                                            \
    static MSL_CONSTEXPR T max() { return T(largest); }                             \
    static MSL_CONSTEXPR T min() { return T(smallest); }                            \
    static MSL_CONSTEXPR T lowest() { return T(-largest); }                         \
    static MSL_CONSTEXPR T epsilon() { return T(step); }                            \
    static MSL_CONSTEXPR T infinity() { return T(__builtin_inff()); }               \
    static MSL_CONSTEXPR T quiet_NaN() { return T(__builtin_nanf("")); }            \
  };
MSL_SMALL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f)
MSL_SMALL_FLOAT_LIMITS(bfloat, 3.38953139e38f, 1.175494351e-38f, 7.8125e-03f)
#define MSL_INTEGER_LIMITS(T, low, high)          \
  template <> struct numeric_limits<T> {          \
    static constexpr T max() { return high; }     \
    static constexpr T min() { return low; }      \
    static constexpr T lowest() { return low; }   \
  };
MSL_INTEGER_LIMITS(bool, false, true)
MSL_INTEGER_LIMITS(int8_t, -128, 127)
MSL_INTEGER_LIMITS(uint8_t, 0, 255)
MSL_INTEGER_LIMITS(int16_t, -32768, 32767)
MSL_INTEGER_LIMITS(uint16_t, 0, 65535)
MSL_INTEGER_LIMITS(int32_t, -2147483647 - 1, 2147483647)
MSL_INTEGER_LIMITS(uint32_t, 0u, 4294967295u)
MSL_INTEGER_LIMITS(int64_t, -9223372036854775807ll - 1, 9223372036854775807ll)
MSL_INTEGER_LIMITS(uint64_t, 0ull, 18446744073709551615ull)
}  // namespace metal
