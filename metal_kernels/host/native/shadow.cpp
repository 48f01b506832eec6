// The access checker, called by the instrumentation that clang's -fsanitize=thread puts around every load and store.
// It knows nothing of scheduling: only how many barriers each thread has passed.
#include "shadow.h"

#include <stdio.h>
#include <string.h>

namespace msl {
namespace {
struct Actor {
  uint32_t thread, barrier_epoch, simd_epoch;
};

uint32_t threadgroup_of(uint32_t thread) { return thread / kMaxThreads; }
uint32_t simdgroup_of(uint32_t thread) { return thread / kLanes; }  // unique over the grid

// Over which threads `trace` spreads that are not ordered before `actor`: nobody when all of them are.
Spread unordered(const Trace& trace, const Actor& actor) {
  if (trace.spread == kNobody) return kNobody;
  if (trace.spread == kSeveralThreadgroups || threadgroup_of(trace.thread) != threadgroup_of(actor.thread))
    return kSeveralThreadgroups;  // nothing orders two threadgroups of one dispatch
  if (trace.barrier_epoch < actor.barrier_epoch) return kNobody;
  if (trace.spread == kOneThreadgroup || simdgroup_of(trace.thread) != simdgroup_of(actor.thread))
    return kOneThreadgroup;
  if (trace.simd_epoch < actor.simd_epoch) return kNobody;
  if (trace.spread == kOneSimdgroup || trace.thread != actor.thread) return kOneSimdgroup;
  return kOneThread;  // the actor's own: program order
}
bool conflicts(const Trace& trace, const Actor& actor) { return unordered(trace, actor) > kOneThread; }

void record(Trace& trace, const Actor& actor) {
  const Spread spread = unordered(trace, actor);
  trace = {actor.thread, actor.barrier_epoch, actor.simd_epoch & 0x1fffffff, spread == kNobody ? kOneThread : spread};
}

struct Place {
  const char* name;
  size_t offset;
  uintptr_t pc;
};

void report_race(const char* what, const Trace& other, const Actor& actor, const Place& place) {
  const bool same = threadgroup_of(other.thread) == threadgroup_of(actor.thread);
  report("race", place.pc, 0, "%s '%s' byte %zu by thread %u of %s, with no barrier in between", what, place.name,
         place.offset, other.thread % kMaxThreads, same ? "its threadgroup" : "another threadgroup");
}

void check_granule(Cell& cell, uint8_t bytes, Access kind, const Actor& actor, const Place& place) {
  const bool reads = kind == Access::read || kind == Access::atomic_read;
  const bool atomic = kind == Access::atomic_read || kind == Access::atomic_write;
  if (reads && (cell.written & bytes) != bytes) {
    report("uninitialised", place.pc, 0, "reads '%s' byte %zu, which nobody has written", place.name, place.offset);
    cell.written |= bytes;
  }
  const char* what = reads ? "read" : "write";
  char text[64];
  const auto race_after = [&](const char* earlier, const Trace& trace) {
    if (!conflicts(trace, actor)) return;
    snprintf(text, sizeof text, "%s after %s of", what, earlier);
    report_race(text, trace, actor, place);
  };
  race_after("a write", cell.writes);
  if (!atomic) race_after("an atomic access", cell.atomics);
  if (!reads) race_after("a read", cell.reads);

  if (atomic) {
    record(cell.atomics, actor);
  } else if (reads) {
    record(cell.reads, actor);
  } else {
    cell.reads = cell.writes = cell.atomics = {};
    record(cell.writes, actor);
  }
  if (!reads) cell.written |= bytes;
}

void check_cells(Cell* cells, uint32_t shift, size_t offset, uint32_t bytes, Access kind, Space space, Place place) {
  Worker* worker = this_worker;
  const Fibre* fibre = worker->current;
  const Actor actor = {worker->threadgroup * kMaxThreads + fibre->id.index_in_threadgroup, worker->epoch[space],
                       fibre->group->epoch[space]};
  const size_t last_byte = offset + bytes - 1, first = offset >> shift, last = last_byte >> shift;
  const uint32_t within = (1u << shift) - 1;
  for (size_t granule = first; granule <= last; granule++) {
    const uint32_t from = granule == first ? offset & within : 0, to = granule == last ? last_byte & within : within;
    place.offset = granule << shift;
    check_granule(cells[granule], uint8_t((2u << to) - (1u << from)), kind, actor, place);
  }
}

// The address is in no buffer and no variable, or runs over the end of one.
__attribute__((noinline)) void check_stray(uintptr_t address, uint32_t bytes, Access kind, uintptr_t pc) {
  const bool reads = kind == Access::read || kind == Access::atomic_read;
  const char* verb = reads ? "reads" : "writes";
  if (in_kernel_data(address, bytes)) {  // the kernel's own constants
    if (!reads) report("write-to-constant", pc, 0, "writes to program-scope data");
    return;
  }
  Worker* worker = this_worker;
  if (address - (uintptr_t)worker->threadgroup_memory < kThreadgroupArena) {
    const long at = long(address - (uintptr_t)worker->threadgroup_memory);
    const ThreadgroupVariable* nearest = nullptr;
    long nearest_distance = 0;
    for (uint32_t i = 0; i < worker->variable_count; i++) {
      const ThreadgroupVariable& variable = worker->variables[i];
      const long offset = at - long(variable.offset), distance = offset < 0 ? -offset : offset - long(variable.size);
      if (!nearest || distance < nearest_distance) nearest = &variable, nearest_distance = distance;
    }
    if (nearest)
      report("out-of-bounds", pc, 0, "%s %u bytes at offset %ld of threadgroup variable '%s', which has %u", verb,
             bytes, at - long(nearest->offset), nearest->name, nearest->size);
    return;
  }
  const Buffer* nearest = nullptr;
  size_t nearest_distance = 0;
  for (uint32_t i = 0; i < buffer_count && in_arena(address); i++) {
    const uintptr_t base = (uintptr_t)buffers[i].base, end = base + buffers[i].size;
    const size_t distance = address < base ? base - address : address < end ? 0 : address - end;
    if (!nearest || distance < nearest_distance) nearest = &buffers[i], nearest_distance = distance;
  }
  if (nearest) {
    report("out-of-bounds", pc, 0, "%s %u bytes at offset %ld of buffer '%s', which has %zu", verb, bytes,
           long(address - (uintptr_t)nearest->base), nearest->name, nearest->size);
    return;
  }
  report("out-of-bounds", pc, 0, "%s %u bytes at a wild address, %p", verb, bytes, (void*)address);
  abandon_threadgroup();
}

inline __attribute__((always_inline)) void check(uintptr_t address, uint32_t bytes, Access kind, uintptr_t pc) {
  Worker* worker = this_worker;
  if (!worker || !worker->current) return;
  if (address - (uintptr_t)worker->memory < sizeof(Private)) return;  // the thread's own stack, or a SIMD-group slot
  worker->accesses++;
  if (Buffer* buffer = buffer_at(address)) {
    const size_t offset = address - (uintptr_t)buffer->base;
    if (offset >= buffer->size || bytes > buffer->size - offset) return check_stray(address, bytes, kind, pc);
    if (!buffer->read_only)
      return check_cells(buffer->cells, buffer->granule_shift, offset, bytes, kind, kDeviceSpace,
                         {buffer->name, 0, pc});
    if (kind == Access::write || kind == Access::atomic_write)
      report("write-to-input", pc, 0, "writes to input '%s' at byte %zu", buffer->name, offset);
    return;
  }
  const size_t at = address - (uintptr_t)worker->threadgroup_memory;
  if (at < kThreadgroupArena && worker->variable_of_block[at / 16]) {
    const ThreadgroupVariable& variable = worker->variables[worker->variable_of_block[at / 16] - 1];
    const size_t offset = at - variable.offset;
    if (offset + bytes <= variable.size)
      return check_cells(variable.cells, variable.granule_shift, offset, bytes, kind, kThreadgroupSpace,
                         {variable.name, 0, pc});
  }
  check_stray(address, bytes, kind, pc);
}
}  // namespace
}  // namespace msl

// ---- what the compiled kernel calls ----
using msl::Access;
extern "C" {
#define MSL_ACCESS(name, bytes, kind) \
  void __tsan_##name##bytes(void* address) { msl::check((uintptr_t)address, bytes, Access::kind, MSL_PC); }
#define MSL_LOADS_AND_STORES(bytes)        \
  MSL_ACCESS(read, bytes, read)            \
  MSL_ACCESS(write, bytes, write)          \
  MSL_ACCESS(unaligned_read, bytes, read)  \
  MSL_ACCESS(unaligned_write, bytes, write)
MSL_LOADS_AND_STORES(1)
MSL_LOADS_AND_STORES(2)
MSL_LOADS_AND_STORES(4)
MSL_LOADS_AND_STORES(8)
MSL_LOADS_AND_STORES(16)

void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  if (bytes) msl::check((uintptr_t)from, uint32_t(bytes), Access::read, MSL_PC);
  if (bytes) msl::check((uintptr_t)to, uint32_t(bytes), Access::write, MSL_PC);
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  if (bytes) msl::check((uintptr_t)from, uint32_t(bytes), Access::read, MSL_PC);
  if (bytes) msl::check((uintptr_t)to, uint32_t(bytes), Access::write, MSL_PC);
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  if (bytes) msl::check((uintptr_t)to, uint32_t(bytes), Access::write, MSL_PC);
  return memset(to, value, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

uint32_t msl_atomic_load(const volatile void* address) {
  if (msl::options.check) msl::check((uintptr_t)address, 4, Access::atomic_read, MSL_PC);
  return __atomic_load_n((const volatile uint32_t*)address, __ATOMIC_RELAXED);
}
void msl_atomic_store(volatile void* address, uint32_t value) {
  if (msl::options.check) msl::check((uintptr_t)address, 4, Access::atomic_write, MSL_PC);
  __atomic_store_n((volatile uint32_t*)address, value, __ATOMIC_RELAXED);
}
bool msl_atomic_exchange_if(volatile void* address, uint32_t* expected, uint32_t desired) {
  if (msl::options.check) msl::check((uintptr_t)address, 4, Access::atomic_read, MSL_PC);
  if (msl::options.check) msl::check((uintptr_t)address, 4, Access::atomic_write, MSL_PC);
  return __atomic_compare_exchange_n((volatile uint32_t*)address, expected, desired, false, __ATOMIC_RELAXED,
                                     __ATOMIC_RELAXED);
}

// Of clang's -fsanitize=undefined, the checks that compile.py turns on.
#define MSL_UNDEFINED(handler, text) \
  void __ubsan_handle_##handler() { msl::report("undefined", MSL_PC, 0, text); }
MSL_UNDEFINED(type_mismatch_v1, "misaligned access through a vector or wider pointer")
MSL_UNDEFINED(shift_out_of_bounds, "shift by a negative amount, or by the width of the type or more")
MSL_UNDEFINED(divrem_overflow, "integer division by zero")
MSL_UNDEFINED(float_cast_overflow, "float to integer conversion out of range")
MSL_UNDEFINED(add_overflow, "signed integer overflow in an addition")
MSL_UNDEFINED(sub_overflow, "signed integer overflow in a subtraction")
MSL_UNDEFINED(mul_overflow, "signed integer overflow in a multiplication")
MSL_UNDEFINED(negate_overflow, "signed integer overflow in a negation")
void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
  msl::report("undefined", MSL_PC, 0, "array index %ld is outside the declared bounds", long(index));
}
}
