// The SIMD-group functions: one list of public names over a handful of primitives, which the target (host.h, cuda.h)
// defines before it includes this file:
//   uint msl_lane()                                        this thread's lane
//   uint msl_active_lanes(name)                            the lanes that take part, as a mask
//   T msl_from_lane<T>(x, name, lane, fallback)            another lane's x; `fallback` for a lane of 32 or more
//   T msl_from_valid_lane<T>(x, name, lane)                the same, where a lane of 32 or more is the caller's error
//   T msl_reduce<T>(x, name, f), msl_scan<T>(x, name, f, identity, inclusive)
//   uint msl_ballot(bool)
// `name` is the Metal function's, for the checker's reports.
#pragma once

namespace metal {
struct msl_add { template <class T> MSL_INLINE T operator()(T a, T b) const { return T(a + b); } };
struct msl_multiply { template <class T> MSL_INLINE T operator()(T a, T b) const { return T(a * b); } };
struct msl_max { template <class T> MSL_INLINE T operator()(T a, T b) const { return max(a, b); } };
struct msl_min { template <class T> MSL_INLINE T operator()(T a, T b) const { return min(a, b); } };
struct msl_and { template <class T> MSL_INLINE T operator()(T a, T b) const { return T(a & b); } };
struct msl_or { template <class T> MSL_INLINE T operator()(T a, T b) const { return T(a | b); } };
struct msl_xor { template <class T> MSL_INLINE T operator()(T a, T b) const { return T(a ^ b); } };

template <class T> MSL_INLINE T simd_sum(T x) { return msl_reduce(x, "simd_sum", msl_add()); }
template <class T> MSL_INLINE T simd_product(T x) { return msl_reduce(x, "simd_product", msl_multiply()); }
template <class T> MSL_INLINE T simd_max(T x) { return msl_reduce(x, "simd_max", msl_max()); }
template <class T> MSL_INLINE T simd_min(T x) { return msl_reduce(x, "simd_min", msl_min()); }
template <class T> MSL_INLINE T simd_and(T x) { return msl_reduce(x, "simd_and", msl_and()); }
template <class T> MSL_INLINE T simd_or(T x) { return msl_reduce(x, "simd_or", msl_or()); }
template <class T> MSL_INLINE T simd_xor(T x) { return msl_reduce(x, "simd_xor", msl_xor()); }

template <class T> MSL_INLINE T simd_prefix_inclusive_sum(T x) {
  return msl_scan(x, "simd_prefix_inclusive_sum", msl_add(), T(0), true);
}
template <class T> MSL_INLINE T simd_prefix_exclusive_sum(T x) {
  return msl_scan(x, "simd_prefix_exclusive_sum", msl_add(), T(0), false);
}
template <class T> MSL_INLINE T simd_prefix_inclusive_product(T x) {
  return msl_scan(x, "simd_prefix_inclusive_product", msl_multiply(), T(1), true);
}
template <class T> MSL_INLINE T simd_prefix_exclusive_product(T x) {
  return msl_scan(x, "simd_prefix_exclusive_product", msl_multiply(), T(1), false);
}

template <class T> MSL_INLINE T simd_shuffle(T x, ushort lane) {
  return msl_from_valid_lane(x, "simd_shuffle", lane);
}
template <class T> MSL_INLINE T simd_broadcast(T x, ushort lane) {
  return msl_from_valid_lane(x, "simd_broadcast", lane);
}
template <class T> MSL_INLINE T simd_shuffle_xor(T x, ushort mask) {
  return msl_from_valid_lane(x, "simd_shuffle_xor", msl_lane() ^ mask);
}
template <class T> MSL_INLINE T simd_shuffle_down(T x, ushort delta) {  // lanes past the end keep their own value
  return msl_from_lane(x, "simd_shuffle_down", msl_lane() + delta, x);
}
template <class T> MSL_INLINE T simd_shuffle_up(T x, ushort delta) {  // wraps below lane 0, so it is "32 or more"
  return msl_from_lane(x, "simd_shuffle_up", msl_lane() - delta, x);
}
template <class T> MSL_INLINE T simd_shuffle_rotate_down(T x, ushort delta) {
  return msl_from_valid_lane(x, "simd_shuffle_rotate_down", (msl_lane() + delta) & 31);
}
template <class T> MSL_INLINE T simd_shuffle_rotate_up(T x, ushort delta) {
  return msl_from_valid_lane(x, "simd_shuffle_rotate_up", (msl_lane() - delta) & 31);
}
template <class T> MSL_INLINE T simd_shuffle_and_fill_down(T x, T fill, ushort delta) {
  const uint source = msl_lane() + delta;
  const T shifted = msl_from_lane(x, "simd_shuffle_and_fill_down", source & 31, x);
  const T filled = msl_from_lane(fill, "simd_shuffle_and_fill_down", source & 31, fill);
  return source < 32 ? shifted : filled;
}
template <class T> MSL_INLINE T simd_shuffle_and_fill_up(T x, T fill, ushort delta) {
  const uint source = msl_lane() - delta;
  const T shifted = msl_from_lane(x, "simd_shuffle_and_fill_up", source & 31, x);
  const T filled = msl_from_lane(fill, "simd_shuffle_and_fill_up", source & 31, fill);
  return source < 32 ? shifted : filled;
}
template <class T> MSL_INLINE T simd_broadcast_first(T x) {
  const uint first = ctz(msl_active_lanes("simd_broadcast_first"));
  return msl_from_lane(x, "simd_broadcast_first", first, x);
}

struct simd_vote {
  uint64_t lanes;
  MSL_INLINE explicit operator uint64_t() const { return lanes; }
  MSL_INLINE bool all() const { return lanes == 0xffffffffu; }
  MSL_INLINE bool any() const { return lanes != 0; }
};
MSL_INLINE simd_vote simd_ballot(bool predicate) { return simd_vote{msl_ballot(predicate)}; }
MSL_INLINE simd_vote simd_active_threads_mask() { return simd_vote{msl_active_lanes("simd_active_threads_mask")}; }
MSL_INLINE bool simd_any(bool predicate) { return simd_or(uint(predicate)) != 0; }
MSL_INLINE bool simd_all(bool predicate) { return simd_and(uint(predicate)) != 0; }
MSL_INLINE bool simd_is_first() { return msl_lane() == ctz(msl_active_lanes("simd_is_first")); }
}  // namespace metal
