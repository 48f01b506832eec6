// Device buffers and threadgroup variables, spaced so that an index out of bounds lands in nobody's memory.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "shadow.h"

namespace msl {
namespace {
constexpr size_t kArenaBytes = 16ull << 30;  // address space only: pages appear when touched
constexpr size_t kGapBytes = 1 << 20, kPageBytes = 4096;
constexpr size_t kRedZone = 512;  // between threadgroup variables, in check mode

char* arena;
size_t arena_top;
uint16_t* buffer_of_page;  // number of the buffer on each of the arena's pages, from 1

// Shared, so that what the forked child writes is seen here.
void* map_shared(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

size_t cells_of(const Buffer& buffer) { return (buffer.size >> buffer.granule_shift) + 1; }
}  // namespace

Buffer buffers[kMaxBuffers];
uint32_t buffer_count;
Shared* shared;

bool in_arena(uintptr_t address) { return address - (uintptr_t)arena < kArenaBytes; }

Buffer* buffer_at(uintptr_t address) {
  const size_t offset = address - (uintptr_t)arena;
  if (offset >= arena_top) return nullptr;
  const uint16_t number = buffer_of_page[offset / kPageBytes];
  return number ? &buffers[number - 1] : nullptr;
}

void begin_threadgroup_memory(Worker* worker) {
  worker->variable_count = worker->memory_top = worker->cells_top = 0;
  memset(worker->variable_of_id, -1, sizeof worker->variable_of_id);
  if (options.check) memset(worker->variable_of_block, 0, kThreadgroupArena / 16);
}
}  // namespace msl

using namespace msl;
extern "C" {
// Forgets the buffers and findings of the last dispatch. False: the address space cannot be had.
bool msl_reset() {
  if (!arena) {
    arena = (char*)map_shared(kArenaBytes);
    buffer_of_page = (uint16_t*)map_shared(kArenaBytes / kPageBytes * sizeof(uint16_t));
    shared = (Shared*)map_shared(sizeof(Shared));
    if (!arena || !buffer_of_page || !shared) return false;
  } else {
    for (uint32_t i = 0; i < buffer_count; i++)
      if (buffers[i].cells) munmap(buffers[i].cells, cells_of(buffers[i]) * sizeof(Cell));
    madvise(arena, kArenaBytes, MADV_REMOVE);
    memset(buffer_of_page, 0, (arena_top / kPageBytes + 1) * sizeof(uint16_t));
  }
  buffer_count = 0;
  arena_top = kGapBytes;
  memset(shared, 0, offsetof(Shared, text));
  return true;
}

// A buffer of `bytes` that begins `offset` bytes after a page does. Outputs are filled with 0xFF, which is NaN in every
// float type. Null when there is no room.
void* msl_buffer(const char* name, size_t bytes, size_t offset, int scalar_bytes, int read_only, int written,
                 int check) {
  const size_t pages = (offset + bytes + kPageBytes - 1) / kPageBytes + 1;
  if (buffer_count == kMaxBuffers || arena_top + pages * kPageBytes + kGapBytes > kArenaBytes) return nullptr;
  Buffer& buffer = buffers[buffer_count++];
  snprintf(buffer.name, sizeof buffer.name, "%s", name);
  buffer.base = arena + arena_top + offset;
  buffer.size = bytes;
  buffer.read_only = read_only;
  buffer.granule_shift = granule_shift(size_t(scalar_bytes));
  buffer.cells = nullptr;
  for (size_t page = 0; page < pages; page++) buffer_of_page[arena_top / kPageBytes + page] = uint16_t(buffer_count);
  arena_top += pages * kPageBytes + kGapBytes;
  if (read_only) return buffer.base;

  memset(buffer.base, 0xFF, bytes);
  if (check) {
    const size_t cells = cells_of(buffer);
    buffer.cells = (Cell*)map_shared(cells * sizeof(Cell));
    if (!buffer.cells) return nullptr;
    if (written)
      for (size_t i = 0; i < cells; i++) buffer.cells[i].written = 0xF;
  }
  return buffer.base;
}

// How many granules of a buffer no thread has written, and where the first one is.
size_t msl_unwritten(uint32_t number, size_t* first_byte) {
  const Buffer& buffer = buffers[number];
  const uint8_t all = uint8_t((1u << (1u << buffer.granule_shift)) - 1);
  size_t unwritten = 0;
  for (size_t i = 0; buffer.cells && i < buffer.size >> buffer.granule_shift; i++) {
    if ((buffer.cells[i].written & all) == all) continue;
    if (!unwritten++) *first_byte = i << buffer.granule_shift;
  }
  return unwritten;
}

// Memory of the threadgroup variable with this number in the kernel's text; the first thread to get there makes it.
void* msl_threadgroup_variable(int id, size_t bytes, size_t scalar_bytes, const char* name) {
  Worker* worker = this_worker;
  if (worker->variable_of_id[id] >= 0)
    return worker->threadgroup_memory + worker->variables[worker->variable_of_id[id]].offset;

  const size_t offset = (worker->memory_top + (options.check ? kRedZone : 0) + 63) & ~size_t(63);
  size_t declared = bytes;
  for (uint32_t i = 0; i < worker->variable_count; i++) declared += (worker->variables[i].size + 15) & ~15u;
  if (declared > shared->threadgroup_bytes) shared->threadgroup_bytes = declared;
  if (declared > kThreadgroupBytes) {
    report("threadgroup-size", MSL_PC, 0, "'%s' makes it %zu bytes of threadgroup memory; there are %zu", name,
           declared, kThreadgroupBytes);
    if (offset + bytes + kRedZone > kThreadgroupArena) abandon_threadgroup();
  }
  ThreadgroupVariable& variable = worker->variables[worker->variable_count];
  const uint32_t shift = granule_shift(scalar_bytes);
  const size_t cells = (bytes >> shift) + 1;
  variable = {uint32_t(offset), uint32_t(bytes), shift, name, worker->threadgroup_cells + worker->cells_top};
  worker->variable_of_id[id] = int(worker->variable_count++);
  worker->memory_top = uint32_t(offset + bytes);
  if (options.check) {
    worker->cells_top += uint32_t(cells);
    memset((void*)variable.cells, 0, cells * sizeof(Cell));
    memset(worker->variable_of_block + offset / 16, int(worker->variable_count), (bytes + 15) / 16);
  }
  memset(worker->threadgroup_memory + offset, 0xFF, bytes);
  return worker->threadgroup_memory + offset;
}
}
