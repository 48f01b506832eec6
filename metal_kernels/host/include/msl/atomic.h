// Atomics, for the host and the CUDA pass: relaxed and 32 bits wide, as in MSL.
// Needs msl_atomic_load, msl_atomic_store and msl_atomic_exchange_if of the target.
#pragma once

namespace metal {
enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
  static_assert(sizeof(T) == 4, "only 32-bit atomics");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

template <class T> MSL_INLINE T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  return as_type<T>(msl_atomic_load(object));
}
template <class T> MSL_INLINE void atomic_store_explicit(volatile atomic<T>* object, T desired, memory_order) {
  msl_atomic_store(object, as_type<uint32_t>(desired));
}
template <class T>
MSL_INLINE bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected, T desired, memory_order,
                                                      memory_order) {
  uint32_t bits = as_type<uint32_t>(*expected);
  const bool exchanged = msl_atomic_exchange_if(object, &bits, as_type<uint32_t>(desired));
  *expected = as_type<T>(bits);
  return exchanged;
}
template <class T, class F> MSL_INLINE T msl_atomic_update(volatile atomic<T>* object, F updated) {
  uint32_t old = msl_atomic_load(object);
  while (!msl_atomic_exchange_if(object, &old, as_type<uint32_t>(updated(as_type<T>(old))))) {
  }
  return as_type<T>(old);
}
#define MSL_ATOMIC(name, expression)                                                             \
  template <class T> MSL_INLINE T name(volatile atomic<T>* object, T operand, memory_order) {    \
    return msl_atomic_update(object, [operand](T old) { return T(expression); });                \
  }
MSL_ATOMIC(atomic_exchange_explicit, (old, operand))
MSL_ATOMIC(atomic_fetch_add_explicit, old + operand)
MSL_ATOMIC(atomic_fetch_sub_explicit, old - operand)
MSL_ATOMIC(atomic_fetch_min_explicit, operand < old ? operand : old)
MSL_ATOMIC(atomic_fetch_max_explicit, old < operand ? operand : old)
MSL_ATOMIC(atomic_fetch_and_explicit, old & operand)
MSL_ATOMIC(atomic_fetch_or_explicit, old | operand)
MSL_ATOMIC(atomic_fetch_xor_explicit, old ^ operand)
}  // namespace metal
