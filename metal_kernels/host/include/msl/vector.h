// vec<T, N>, its operators and swizzles, for the host and the CUDA pass (the type-check pass has clang's own vectors).
// Needs MSL_INLINE; MSL_COMPONENT(i, n), when defined, checks a component index.
#pragma once
#include "msl/swizzles.h"
#include "msl/type_traits.h"

#ifndef MSL_COMPONENT
#define MSL_COMPONENT(i, n) (i)
#endif

namespace metal {
template <class T, int N> struct vec;

// `v.yx` and the like: some components of a vector, in place (a member of the vector's union).
template <class T, int Width, int... Index> struct swizzle {
  typedef vec<T, sizeof...(Index)> value;
  T component[Width];

  MSL_INLINE operator value() const {
    value result;
    int k = 0;
    ((result.v[k++] = component[Index]), ...);
    return result;
  }
  MSL_INLINE void operator=(const value& other) {
    int k = 0;
    ((component[Index] = other.v[k++]), ...);
  }
  MSL_INLINE void operator=(const swizzle& other) { *this = value(other); }
  template <class Other> MSL_INLINE void operator+=(const Other& other) { *this = value(*this) + other; }
  template <class Other> MSL_INLINE void operator-=(const Other& other) { *this = value(*this) - other; }
  template <class Other> MSL_INLINE void operator*=(const Other& other) { *this = value(*this) * other; }
};

#define MSL_VECTOR_MEMBERS(N)                                                                            \
  MSL_INLINE vec() = default;                                                                            \
  MSL_INLINE vec(const vec& other) { for (int i = 0; i < N; i++) v[i] = other.v[i]; }                    \
  MSL_INLINE vec(T all) { for (int i = 0; i < N; i++) v[i] = all; }                                      \
  template <class U, enable_if_t<!is_same_v<U, T>, int> = 0>                                             \
  MSL_INLINE explicit vec(const vec<U, N>& other) { for (int i = 0; i < N; i++) v[i] = T(other.v[i]); }  \
  MSL_INLINE vec& operator=(const vec& other) {                                                          \
    for (int i = 0; i < N; i++) v[i] = other.v[i];                                                       \
    return *this;                                                                                        \
  }                                                                                                      \
  MSL_INLINE T& operator[](int i) { return v[MSL_COMPONENT(i, N)]; }                                     \
  MSL_INLINE const T& operator[](int i) const { return v[MSL_COMPONENT(i, N)]; }

template <class T> struct alignas(sizeof(T) * 2) vec<T, 2> {
  union {
    T v[2];
    struct { T x, y; };
    struct { T r, g; };
    MSL_SWIZZLES_2(T)
  };
  MSL_VECTOR_MEMBERS(2)
  MSL_INLINE vec(T a, T b) { v[0] = a; v[1] = b; }
};

template <class T> struct alignas(sizeof(T) * 4) vec<T, 3> {
  union {
    T v[3];
    struct { T x, y, z; };
    struct { T r, g, b; };
    MSL_SWIZZLES_3(T)
  };
  MSL_VECTOR_MEMBERS(3)
  MSL_INLINE vec(T a, T b, T c) { v[0] = a; v[1] = b; v[2] = c; }
  MSL_INLINE vec(vec<T, 2> ab, T c) { v[0] = ab.v[0]; v[1] = ab.v[1]; v[2] = c; }
  MSL_INLINE vec(T a, vec<T, 2> bc) { v[0] = a; v[1] = bc.v[0]; v[2] = bc.v[1]; }
};

template <class T> struct alignas(sizeof(T) * 4) vec<T, 4> {
  union {
    T v[4];
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    MSL_SWIZZLES_4(T)
  };
  MSL_VECTOR_MEMBERS(4)
  MSL_INLINE vec(T a, T b, T c, T d) { v[0] = a; v[1] = b; v[2] = c; v[3] = d; }
  MSL_INLINE vec(vec<T, 2> ab, vec<T, 2> cd) { v[0] = ab.v[0]; v[1] = ab.v[1]; v[2] = cd.v[0]; v[3] = cd.v[1]; }
  MSL_INLINE vec(vec<T, 2> ab, T c, T d) { v[0] = ab.v[0]; v[1] = ab.v[1]; v[2] = c; v[3] = d; }
  MSL_INLINE vec(vec<T, 3> abc, T d) { v[0] = abc.v[0]; v[1] = abc.v[1]; v[2] = abc.v[2]; v[3] = d; }
};

// How many components a type has (0: a scalar) and of which type they are; whether it is a swizzle.
template <class T> struct vector_traits {
  static constexpr int width = 0;
  static constexpr bool is_swizzle = false;
  typedef T element;
};
template <class T, int N> struct vector_traits<vec<T, N>> {
  static constexpr int width = N;
  static constexpr bool is_swizzle = false;
  typedef T element;
};
template <class T, int Width, int... Index> struct vector_traits<swizzle<T, Width, Index...>> {
  static constexpr int width = sizeof...(Index);
  static constexpr bool is_swizzle = true;
  typedef T element;
};

template <class A> MSL_INLINE const A& as_vector(const A& a) { return a; }
template <class T, int Width, int... Index>
MSL_INLINE vec<T, sizeof...(Index)> as_vector(const swizzle<T, Width, Index...>& a) { return a; }

template <class A> MSL_INLINE const A& component_of(const A& scalar, int) { return scalar; }
template <class T, int N> MSL_INLINE T component_of(const vec<T, N>& a, int i) { return a.v[i]; }

// The type of `a op b`: two vectors of one type, or a vector and a scalar that converts to its element.
template <class A, class B> struct vector_operation {
  static constexpr int width_a = vector_traits<A>::width, width_b = vector_traits<B>::width;
  static constexpr int width = width_a ? width_a : width_b;
  typedef typename vector_traits<A>::element element_a;
  typedef typename vector_traits<B>::element element_b;
  typedef conditional_t<(width_a > 0), element_a, element_b> element;
  static constexpr bool one_vector = (width_a == 0) != (width_b == 0);
  static constexpr bool allowed = one_vector || (width_a > 0 && width_a == width_b && is_same_v<element_a, element_b>);
};

#define MSL_BINARY(op, result_element)                                                 \
  template <class A, class B, enable_if_t<vector_operation<A, B>::allowed, int> = 0>   \
  MSL_INLINE auto operator op(const A& a, const B& b) {                                \
    typedef typename vector_operation<A, B>::element T;                                \
    constexpr int N = vector_operation<A, B>::width;                                   \
    const auto& left = as_vector(a);                                                   \
    const auto& right = as_vector(b);                                                  \
    vec<result_element, N> result;                                                     \
    for (int i = 0; i < N; i++)                                                        \
      result.v[i] = result_element(T(component_of(left, i)) op T(component_of(right, i))); \
    return result;                                                                     \
  }
MSL_BINARY(+, T)
MSL_BINARY(-, T)
MSL_BINARY(*, T)
MSL_BINARY(/, T)
MSL_BINARY(%, T)
MSL_BINARY(&, T)
MSL_BINARY(|, T)
MSL_BINARY(^, T)
MSL_BINARY(<<, T)
MSL_BINARY(>>, T)
MSL_BINARY(<, bool)
MSL_BINARY(>, bool)
MSL_BINARY(<=, bool)
MSL_BINARY(>=, bool)
MSL_BINARY(==, bool)
MSL_BINARY(!=, bool)
MSL_BINARY(&&, bool)
MSL_BINARY(||, bool)

#define MSL_COMPOUND(op)                                                                            \
  template <class T, int N, class B, enable_if_t<vector_operation<vec<T, N>, B>::allowed, int> = 0> \
  MSL_INLINE vec<T, N>& operator op##=(vec<T, N>& a, const B& b) {                                  \
    a = a op b;                                                                                     \
    return a;                                                                                       \
  }
MSL_COMPOUND(+)
MSL_COMPOUND(-)
MSL_COMPOUND(*)
MSL_COMPOUND(/)
MSL_COMPOUND(%)
MSL_COMPOUND(&)
MSL_COMPOUND(|)
MSL_COMPOUND(^)
MSL_COMPOUND(<<)
MSL_COMPOUND(>>)

#define MSL_UNARY(op)                                                   \
  template <class T, int N> MSL_INLINE vec<T, N> operator op(const vec<T, N>& a) { \
    vec<T, N> result;                                                   \
    for (int i = 0; i < N; i++) result.v[i] = T(op a.v[i]);             \
    return result;                                                      \
  }
MSL_UNARY(-)
MSL_UNARY(~)
MSL_UNARY(!)

// MSL_LIFTn(f): f of n scalars, applied component by component; a swizzle becomes a vector first.
#define MSL_LIFT1(f)                                                        \
  template <class T, int N> MSL_INLINE vec<T, N> f(const vec<T, N>& a) {    \
    vec<T, N> result;                                                       \
    for (int i = 0; i < N; i++) result.v[i] = f(a.v[i]);                    \
    return result;                                                          \
  }                                                                         \
  template <class A, enable_if_t<vector_traits<A>::is_swizzle, int> = 0>    \
  MSL_INLINE auto f(const A& a) { return f(as_vector(a)); }
#define MSL_SWIZZLE_ARGUMENTS(f)                                                                             \
  template <class A, class B, enable_if_t<vector_traits<A>::is_swizzle || vector_traits<B>::is_swizzle, int> = 0> \
  MSL_INLINE auto f(const A& a, const B& b) { return f(as_vector(a), as_vector(b)); }
#define MSL_LIFT2(f)                                                                         \
  template <class T, int N> MSL_INLINE vec<T, N> f(const vec<T, N>& a, const vec<T, N>& b) { \
    vec<T, N> result;                                                                        \
    for (int i = 0; i < N; i++) result.v[i] = f(a.v[i], b.v[i]);                             \
    return result;                                                                           \
  }                                                                                          \
  template <class T, int N> MSL_INLINE vec<T, N> f(const vec<T, N>& a, T b) {                \
    return f(a, vec<T, N>(b));                                                               \
  }                                                                                          \
  MSL_SWIZZLE_ARGUMENTS(f)
#define MSL_LIFT3(f)                                                                     \
  template <class T, int N>                                                              \
  MSL_INLINE vec<T, N> f(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {   \
    vec<T, N> result;                                                                    \
    for (int i = 0; i < N; i++) result.v[i] = f(a.v[i], b.v[i], c.v[i]);                 \
    return result;                                                                       \
  }

MSL_INLINE bool any(bool a) { return a; }
MSL_INLINE bool all(bool a) { return a; }
template <int N> MSL_INLINE bool any(const vec<bool, N>& a) {
  bool result = false;
  for (int i = 0; i < N; i++) result = result || a.v[i];
  return result;
}
template <int N> MSL_INLINE bool all(const vec<bool, N>& a) {
  bool result = true;
  for (int i = 0; i < N; i++) result = result && a.v[i];
  return result;
}

template <class T, int N> MSL_INLINE T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T result = a.v[0] * b.v[0];
  for (int i = 1; i < N; i++) result = result + a.v[i] * b.v[i];
  return result;
}
MSL_SWIZZLE_ARGUMENTS(dot)

template <class T> MSL_INLINE T select(T if_false, T if_true, bool condition) { return condition ? if_true : if_false; }
template <class T, int N>
MSL_INLINE vec<T, N> select(const vec<T, N>& if_false, const vec<T, N>& if_true, const vec<bool, N>& condition) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.v[i] = condition.v[i] ? if_true.v[i] : if_false.v[i];
  return result;
}

template <class To, class From> MSL_INLINE To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace metal
