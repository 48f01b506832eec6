// Runs a compiled kernel: every GPU thread is a fibre with its own stack, switched by hand, and one host thread (a
// Worker) runs a whole threadgroup, so its threads interleave only where the kernel lets them wait for each other.
// This header is what the parts share. They are: scheduler.cpp (fibres, SIMD-group functions, barriers), memory.cpp
// (buffers and threadgroup variables), shadow.cpp (the checker), report.cpp (findings), dispatch.cpp (the grid, and the
// functions Python calls). x86-64 Linux only.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../include/msl/thread_id.h"

namespace msl {
constexpr uint32_t kLanes = 32, kMaxThreads = 1024, kMaxSimdgroups = kMaxThreads / kLanes;
constexpr uint32_t kSlotBytes = 64;
constexpr size_t kStackBytes = 64 * 1024 + 320;  // not a power of two: the stacks' hot lines must not share cache sets
constexpr size_t kThreadgroupBytes = 32 * 1024;  // what a kernel may declare
constexpr size_t kThreadgroupArena = 128 * 1024;
constexpr uint32_t kMaxThreadgroupVariables = 64, kMaxBuffers = 256;
constexpr uint32_t kPlaces = 256;  // places in the kernel with findings that are told apart

enum MemFlags : uint32_t { kMemDevice = 1, kMemThreadgroup = 2 };  // the values of metal::mem_flags
enum Space : uint32_t { kThreadgroupSpace = 0, kDeviceSpace = 1 };
enum Order : int { kForward = 0, kReverse = 1, kShuffled = 2 };

// ---- fibres ----
struct Lanes {  // laid out as msl_lanes of include/msl/host.h
  char* slots;
  uint32_t mask;
  uint32_t lane;
};
typedef void (*Combine)(char* slots, uint32_t mask);
enum class State : uint32_t { ready, in_simd_function, at_barrier, done };

struct SimdGroup;
struct Fibre {
  void* stack_pointer;
  SimdGroup* group;
  State state;
  uint32_t mem_flags;      // of the barrier it waits at
  bool whole_group;        // its SIMD-group function is defined only with all lanes
  uintptr_t site;          // the call it waits in: a return address in the kernel
  const char* waits_in;    // that function's name
  Combine combine;
  Lanes lanes;
  msl_thread id;
};

struct SimdGroup {
  alignas(64) char slots[2][kLanes * kSlotBytes];  // two sets: the next exchange begins while this one is still read
  Fibre* fibres;
  uint32_t size;
  uint32_t parity;
  uint32_t epoch[2];  // simdgroup_barriers passed, by memory space
  bool runnable;      // its fibres are ready rather than waiting at a threadgroup_barrier
};

// ---- the checker's shadow of one granule of memory: see shadow.h ----
struct Cell;

struct ThreadgroupVariable {
  uint32_t offset, size, granule_shift;
  const char* name;
  Cell* cells;
};

struct Buffer {
  char* base;
  size_t size;
  uint32_t granule_shift;
  bool read_only;
  Cell* cells;  // none for inputs, none in fast mode
  char name[64];
};

// What only the runtime touches while a kernel runs; the checker lets the kernel's own code read it (SIMD-group slots).
struct Private {
  char stacks[kMaxThreads][kStackBytes];
  SimdGroup groups[kMaxSimdgroups];
  Fibre fibres[kMaxThreads];
};

struct Worker {
  Fibre* current;
  Private* memory;
  void* own_stack_pointer;
  void (*kernel)(void**, const msl_thread*);
  void** arguments;

  uint32_t threads, groups;
  uint32_t threadgroup;               // number of the threadgroup in the grid, from 1
  uint32_t epoch[2];                  // threadgroup_barriers passed, by memory space
  uint32_t group_order[kMaxSimdgroups];
  uint64_t random;

  char* threadgroup_memory;
  Cell* threadgroup_cells;
  uint8_t* variable_of_block;         // for each 16 bytes of threadgroup memory: number of its variable, from 1
  ThreadgroupVariable variables[kMaxThreadgroupVariables];
  int variable_of_id[kMaxThreadgroupVariables];
  uint32_t variable_count, memory_top, cells_top;

  uint64_t switches, accesses;
};
extern __thread Worker* this_worker __attribute__((tls_model("initial-exec")));

struct Options {
  int check, order, allow_divergence;
  uint64_t seed;
};
extern Options options;

// ---- shared with the forked child, which is where a dispatch runs ----
struct Shared {
  uint32_t findings;  // all of them; only the first few are described in `text`
  uint32_t text_length;
  uint64_t switches, accesses, threadgroup_bytes;
  int lock;
  struct { uintptr_t pc; const char* kind; } seen[kPlaces];
  uint32_t seen_count;
  char text[1 << 16];
};
extern Shared* shared;

// report.cpp: `pc` is where, `other_pc` (or 0) is named {other} in the message.
void report(const char* kind, uintptr_t pc, uintptr_t other_pc, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

// memory.cpp
extern Buffer buffers[kMaxBuffers];
extern uint32_t buffer_count;
Buffer* buffer_at(uintptr_t address);  // the buffer whose pages hold the address, or null
void begin_threadgroup_memory(Worker* worker);
bool in_arena(uintptr_t address);

// scheduler.cpp
void run_threadgroup(Worker* worker, uint64_t number, const uint32_t grid[3], const uint32_t threadgroup[3]);
[[noreturn]] void abandon_threadgroup();  // after a finding that leaves nothing sensible to continue with
uint32_t random_below(Worker* worker, uint32_t bound);

// dispatch.cpp
bool in_kernel_data(uintptr_t address, size_t bytes);
}  // namespace msl

#define MSL_PC ((uintptr_t)__builtin_return_address(0))
