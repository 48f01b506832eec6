// The checker's memory of who touched what. A race is two accesses of one granule, one of them a write, by two threads
// that no barrier orders. Barriers are counted (epochs), so "ordered" is a comparison of counts.
#pragma once
#include "runtime.h"

namespace msl {
// Over which threads the accesses are spread that no barrier has ordered before the latest one.
enum Spread : uint32_t { kNobody, kOneThread, kOneSimdgroup, kOneThreadgroup, kSeveralThreadgroups };

// The latest access of one kind, with those it is not ordered after. Earlier ones need no keeping: what is ordered
// after the latest access is ordered after them too.
struct Trace {
  uint32_t thread;  // threadgroup * 1024 + index in threadgroup
  uint32_t barrier_epoch;
  uint32_t simd_epoch : 29;
  uint32_t spread : 3;
};

struct Cell {
  Trace reads, writes, atomics;
  uint8_t written;  // one bit a byte
};

// An atomic read counts like an atomic write: it races with a plain access, even a read, by another thread. MSL's
// atomic<T> can be read plainly only through a cast.
enum class Access { read, write, atomic_read, atomic_write };

inline uint32_t granule_shift(size_t scalar_bytes) { return scalar_bytes >= 4 ? 2 : scalar_bytes == 2 ? 1 : 0; }
}  // namespace msl
