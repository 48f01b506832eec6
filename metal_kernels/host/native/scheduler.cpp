// Fibres and the points where they wait: SIMD-group functions, simdgroup_barrier and threadgroup_barrier.
// A fibre runs until it waits. When a whole SIMD-group has stopped, its function is carried out and it runs on; when
// the whole threadgroup waits at a barrier, the barrier opens. This file knows nothing of memory.
#include <string.h>

#include "runtime.h"

extern "C" void msl_switch(void** save_stack_pointer, void* stack_pointer);
// Saves the registers a call must preserve on this stack, and takes those of the other stack.
asm(R"(
.text
.globl msl_switch
.type msl_switch, @function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace msl {
__thread Worker* this_worker __attribute__((tls_model("initial-exec")));
Options options;

uint32_t random_below(Worker* worker, uint32_t bound) {  // xorshift64*
  worker->random ^= worker->random >> 12;
  worker->random ^= worker->random << 25;
  worker->random ^= worker->random >> 27;
  return uint32_t((worker->random * 0x2545F4914F6CDD1Dull) >> 32) % bound;
}

namespace {
void shuffle(Worker* worker, uint32_t* values, uint32_t count) {
  for (uint32_t i = count; i > 1; i--) {
    const uint32_t j = random_below(worker, i), other = values[j];
    values[j] = values[i - 1];
    values[i - 1] = other;
  }
}

// 0, 1, 2, ... in the order that the options ask for.
void fill_order(Worker* worker, uint32_t* values, uint32_t count) {
  for (uint32_t i = 0; i < count; i++) values[i] = options.order == kReverse ? count - 1 - i : i;
  if (options.order == kShuffled) shuffle(worker, values, count);
}

void return_to_worker() {
  void* never_resumed;
  msl_switch(&never_resumed, this_worker->own_stack_pointer);
}

void continue_with(Fibre* next) {
  Worker* worker = this_worker;
  Fibre* self = worker->current;
  if (next == self) return;
  worker->current = next;
  worker->switches++;
  msl_switch(&self->stack_pointer, next->stack_pointer);
}

Fibre* ready_after(Fibre* self) {
  Fibre* const first = self->group->fibres;
  Fibre* const end = first + self->group->size;
  for (Fibre* fibre = self + 1; fibre < end; fibre++)
    if (fibre->state == State::ready) return fibre;
  for (Fibre* fibre = first; fibre < self; fibre++)
    if (fibre->state == State::ready) return fibre;
  return nullptr;
}

void report_divergence(const SimdGroup* group, Fibre* first, uint32_t mask) {
  this_worker->current = first;
  for (uint32_t i = 0; i < group->size; i++) {
    const Fibre& other = group->fibres[i];
    if (other.state == State::done || (other.state == State::in_simd_function && other.site == first->site)) continue;
    report("simd-divergence", first->site, other.site,
           "%s is reached by only some lanes of the SIMD-group (%08x); lane %u waits in %s at {other}", first->waits_in,
           mask, other.id.lane, other.waits_in);
    return;
  }
}

// Carries out the SIMD-group function that the lanes wait in; null when they wait in none.
Fibre* finish_simd_function(SimdGroup* group) {
  Fibre* first = nullptr;
  uint32_t mask = 0, alive = 0;
  for (uint32_t i = 0; i < group->size; i++) {
    Fibre& fibre = group->fibres[i];
    if (fibre.state == State::done) continue;
    alive |= 1u << fibre.id.lane;
    if (fibre.state != State::in_simd_function) continue;
    if (!first) first = &fibre;
    if (fibre.site == first->site) mask |= 1u << fibre.id.lane;
  }
  if (!first) return nullptr;
  if (mask != alive && !options.allow_divergence) {
    report_divergence(group, first, mask);
    abandon_threadgroup();
  }
  if (first->whole_group && mask != 0xffffffffu)
    report("simd-divergence", first->site, 0, "%s needs all 32 lanes; these are there: %08x", first->waits_in, mask);

  if (first->combine) first->combine(group->slots[group->parity], mask);
  if (first->mem_flags & kMemThreadgroup) group->epoch[kThreadgroupSpace]++;
  if (first->mem_flags & kMemDevice) group->epoch[kDeviceSpace]++;
  group->parity ^= 1;
  const uintptr_t site = first->site;
  for (uint32_t i = 0; i < group->size; i++) {
    Fibre& fibre = group->fibres[i];
    if (fibre.state != State::in_simd_function || fibre.site != site) continue;
    fibre.state = State::ready;
    fibre.lanes.mask = mask;
  }
  return first;
}

Fibre* first_of_next_group(Worker* worker) {
  for (uint32_t i = 0; i < worker->groups; i++) {
    SimdGroup& group = worker->memory->groups[worker->group_order[i]];
    for (uint32_t j = 0; group.runnable && j < group.size; j++)
      if (group.fibres[j].state == State::ready) return &group.fibres[j];
  }
  return nullptr;
}

// Opens the threadgroup_barrier that everybody waits at; null when everybody is done.
Fibre* open_barrier(Worker* worker) {
  Fibre *first = nullptr, *elsewhere = nullptr;
  uint32_t waiting = 0;
  for (uint32_t i = 0; i < worker->threads; i++) {
    Fibre& fibre = worker->memory->fibres[i];
    if (fibre.state == State::done) continue;
    waiting++;
    if (!first) first = &fibre;
    if (fibre.site != first->site) elsewhere = &fibre;
  }
  if (!first) return nullptr;
  if (!options.allow_divergence && (elsewhere || waiting < worker->threads)) {
    worker->current = first;
    if (elsewhere)
      report("barrier-divergence", first->site, elsewhere->site,
             "other threads of the threadgroup wait at another threadgroup_barrier, at {other}");
    else
      report("barrier-divergence", first->site, 0,
             "threadgroup_barrier is reached by %u of %u threads; the others returned", waiting, worker->threads);
    abandon_threadgroup();
  }
  if (first->mem_flags & kMemThreadgroup) worker->epoch[kThreadgroupSpace]++;
  if (first->mem_flags & kMemDevice) worker->epoch[kDeviceSpace]++;
  for (uint32_t i = 0; i < worker->threads; i++) {
    Fibre& fibre = worker->memory->fibres[i];
    if (fibre.state == State::at_barrier) fibre.state = State::ready;
  }
  for (uint32_t i = 0; i < worker->groups; i++) worker->memory->groups[i].runnable = true;
  if (options.order == kShuffled) shuffle(worker, worker->group_order, worker->groups);
  return first_of_next_group(worker);
}

// The current fibre cannot run on: run whatever can. Returns when it is this fibre's turn again.
void wait() {
  Worker* worker = this_worker;
  Fibre* self = worker->current;
  Fibre* next = ready_after(self);
  if (!next) next = finish_simd_function(self->group);
  if (!next) {
    self->group->runnable = false;
    next = first_of_next_group(worker);
  }
  if (!next) next = open_barrier(worker);
  if (!next) return_to_worker();
  continue_with(next);
}

void stop_at(State state, uintptr_t site, const char* waits_in, uint32_t mem_flags, bool whole_group, Combine combine) {
  Fibre* self = this_worker->current;
  self->state = state;
  self->site = site;
  self->waits_in = waits_in;
  self->mem_flags = mem_flags;
  self->whole_group = whole_group;
  self->combine = combine;
  wait();
}

void fibre_main() {
  Worker* worker = this_worker;
  worker->kernel(worker->arguments, &worker->current->id);
  stop_at(State::done, 0, "its end", 0, false, nullptr);
  __builtin_trap();
}

// A stack on which msl_switch "returns" into fibre_main.
void* fresh_stack(char* stack) {
  uintptr_t* top = (uintptr_t*)((uintptr_t)(stack + kStackBytes - 64) & ~uintptr_t(15));
  *--top = 0;
  *--top = (uintptr_t)fibre_main;
  for (int i = 0; i < 6; i++) *--top = 0;
  return top;
}
}  // namespace

void abandon_threadgroup() {
  return_to_worker();
  __builtin_unreachable();
}

// Threadgroup `number` (x fastest) of the grid. Threadgroups at the edge are smaller, as with dispatchThreads.
void run_threadgroup(Worker* worker, uint64_t number, const uint32_t grid[3], const uint32_t threadgroup[3]) {
  uint32_t count[3], position[3], size[3];
  for (int k = 0; k < 3; k++) count[k] = (grid[k] + threadgroup[k] - 1) / threadgroup[k];
  position[0] = uint32_t(number % count[0]);
  position[1] = uint32_t(number / count[0] % count[1]);
  position[2] = uint32_t(number / count[0] / count[1]);
  for (int k = 0; k < 3; k++) {
    const uint32_t left = grid[k] - position[k] * threadgroup[k];
    size[k] = left < threadgroup[k] ? left : threadgroup[k];
  }
  worker->threads = size[0] * size[1] * size[2];
  worker->groups = (worker->threads + kLanes - 1) / kLanes;
  worker->threadgroup = uint32_t(number + 1);
  worker->epoch[0] = worker->epoch[1] = 1;
  worker->random = (options.seed + number) * 0x9E3779B97F4A7C15ull | 1;
  begin_threadgroup_memory(worker);
  fill_order(worker, worker->group_order, worker->groups);

  for (uint32_t g = 0; g < worker->groups; g++) {
    SimdGroup& group = worker->memory->groups[g];
    const uint32_t first = g * kLanes;
    group.fibres = &worker->memory->fibres[first];
    group.size = worker->threads - first < kLanes ? worker->threads - first : kLanes;
    group.parity = 0;
    group.epoch[0] = group.epoch[1] = 1;
    group.runnable = true;
    uint32_t lane_order[kLanes];
    fill_order(worker, lane_order, group.size);
    for (uint32_t i = 0; i < group.size; i++) {
      Fibre& fibre = group.fibres[i];
      const uint32_t lane = lane_order[i], index = first + lane;
      fibre.group = &group;
      fibre.state = State::ready;
      fibre.lanes.lane = lane;
      fibre.stack_pointer = fresh_stack(worker->memory->stacks[first + i]);
      msl_thread& id = fibre.id;
      id.position_in_threadgroup[0] = index % size[0];
      id.position_in_threadgroup[1] = index / size[0] % size[1];
      id.position_in_threadgroup[2] = index / size[0] / size[1];
      for (int k = 0; k < 3; k++) {
        id.threadgroup_position[k] = position[k];
        id.position_in_grid[k] = position[k] * threadgroup[k] + id.position_in_threadgroup[k];
        id.threadgroups_per_grid[k] = count[k];
        id.threads_per_grid[k] = grid[k];
        id.threads_per_threadgroup[k] = size[k];
        id.dispatch_threads_per_threadgroup[k] = threadgroup[k];
      }
      id.index_in_threadgroup = index;
      id.lane = lane;
      id.simdgroup = g;
      id.simdgroups_per_threadgroup = worker->groups;
    }
  }
  worker->current = first_of_next_group(worker);
  msl_switch(&worker->own_stack_pointer, worker->current->stack_pointer);
  worker->current = nullptr;
}
}  // namespace msl

// ---- what the compiled kernel calls; the return addresses tell where in it ----
using namespace msl;
extern "C" {
__attribute__((noinline)) const Lanes* msl_simd_wait(const void* value, uint32_t bytes, const char* name,
                                                     uint32_t flags, Combine combine) {
  Fibre* self = this_worker->current;
  self->lanes.slots = self->group->slots[self->group->parity];
  __builtin_memcpy(self->lanes.slots + self->lanes.lane * kSlotBytes, value, bytes);
  stop_at(State::in_simd_function, MSL_PC, name, 0, flags != 0, combine);
  return &self->lanes;
}
__attribute__((noinline)) void msl_wait_simdgroup(uint32_t mem_flags) {
  stop_at(State::in_simd_function, MSL_PC, "simdgroup_barrier", mem_flags, false, nullptr);
}
__attribute__((noinline)) void msl_wait_threadgroup(uint32_t mem_flags) {
  stop_at(State::at_barrier, MSL_PC, "threadgroup_barrier", mem_flags, false, nullptr);
}
uint32_t msl_current_lane() { return this_worker->current->lanes.lane; }
}
