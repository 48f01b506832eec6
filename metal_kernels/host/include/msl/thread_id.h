// What one GPU thread knows about itself; filled by the runtime, read by the generated kernel entry.
#pragma once
#ifndef __CUDACC_RTC__
#include <stdint.h>
#endif

struct msl_thread {
  uint32_t position_in_grid[3];
  uint32_t position_in_threadgroup[3];
  uint32_t threadgroup_position[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t threads_per_grid[3];
  uint32_t threads_per_threadgroup[3];           // of this threadgroup: smaller at the grid's edge
  uint32_t dispatch_threads_per_threadgroup[3];  // of a full threadgroup
  uint32_t index_in_threadgroup;
  uint32_t lane;
  uint32_t simdgroup;
  uint32_t simdgroups_per_threadgroup;
};
