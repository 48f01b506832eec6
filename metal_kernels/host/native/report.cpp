// Findings, as text that Python parses: kind, place, other place and message, separated by 0x1F, one a line.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "runtime.h"

namespace msl {
namespace {
constexpr uint32_t kDescribed = 12;  // a broken kernel finds the same thing in thousands of threads

// One finding per place and kind. True the first time.
bool first_time(const char* kind, uintptr_t pc) {
  for (uint32_t i = 0; i < shared->seen_count; i++)
    if (shared->seen[i].pc == pc && shared->seen[i].kind == kind) return false;
  if (shared->seen_count < kPlaces) shared->seen[shared->seen_count++] = {pc, kind};
  return true;
}
}  // namespace

void report(const char* kind, uintptr_t pc, uintptr_t other_pc, const char* format, ...) {
  while (__atomic_exchange_n(&shared->lock, 1, __ATOMIC_ACQUIRE)) {
  }
  if (first_time(kind, pc) && shared->findings++ < kDescribed) {
    char line[1024];
    size_t length = size_t(snprintf(line, sizeof line, "%s\x1f%zx\x1f%zx\x1f", kind, pc, other_pc));
    if (this_worker && this_worker->current) {
      const msl_thread& id = this_worker->current->id;
      length += size_t(snprintf(line + length, sizeof line - length,
                                "thread (%u,%u,%u) of threadgroup (%u,%u,%u), SIMD-group %u lane %u, ",
                                id.position_in_threadgroup[0], id.position_in_threadgroup[1],
                                id.position_in_threadgroup[2], id.threadgroup_position[0], id.threadgroup_position[1],
                                id.threadgroup_position[2], id.simdgroup, id.lane));
    }
    va_list arguments;
    va_start(arguments, format);
    length += size_t(vsnprintf(line + length, sizeof line - length, format, arguments));
    va_end(arguments);
    if (length > sizeof line - 1) length = sizeof line - 1;
    line[length++] = '\n';
    if (shared->text_length + length < sizeof shared->text) {
      memcpy(shared->text + shared->text_length, line, length);
      shared->text_length += uint32_t(length);
    }
  }
  __atomic_store_n(&shared->lock, 0, __ATOMIC_RELEASE);
}
}  // namespace msl

extern "C" {
void msl_bad_lane(const char* name, uint32_t source, uint32_t mask) {
  msl::report("inactive-lane", MSL_PC, 0, "%s reads lane %u, which takes no part (those that do: %08x)", name, source,
              mask);
}
void msl_bad_component(long index, long width) {
  msl::report("undefined", MSL_PC, 0, "component %ld of a vector of %ld", index, width);
}
const char* msl_findings() {
  msl::shared->text[msl::shared->text_length] = 0;
  return msl::shared->text;
}
}
