// One dispatch: the grid's threadgroups over the workers, in a forked child so that a crash or an endless loop of the
// kernel is a finding too. And the functions Python calls.
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>

#include "shadow.h"

namespace msl {
namespace {
constexpr uint32_t kEnoughFindings = 200;
constexpr int kMaxWorkers = 64;

struct Segment {
  uintptr_t from, to;
};
Segment kernel_segments[16];
int kernel_segment_count;
uintptr_t kernel_base;

// Where the kernel's shared object lies; `entry` points into it.
int find_kernel(struct dl_phdr_info* info, size_t, void* entry) {
  bool found = false;
  int count = 0;
  Segment segments[16];
  for (int i = 0; i < info->dlpi_phnum && count < 16; i++) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    const uintptr_t from = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr, to = from + info->dlpi_phdr[i].p_memsz;
    segments[count++] = {from, to};
    found = found || ((uintptr_t)entry >= from && (uintptr_t)entry < to);
  }
  if (!found) return 0;
  memcpy(kernel_segments, segments, sizeof segments);
  kernel_segment_count = count;
  kernel_base = info->dlpi_addr;
  return 1;
}

void* map_private(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  return memory;
}

struct Job {
  void (*kernel)(void**, const msl_thread*);
  void** arguments;
  uint32_t grid[3], threadgroup[3];
  uint64_t total;
  std::atomic<uint64_t> next{0};

  // The n-th threadgroup to run, in the order that the options ask for.
  uint64_t nth(uint64_t n) const {
    if (options.order == kReverse) return total - 1 - n;
    if (options.order == kForward || total < 3) return n;
    uint64_t step = total / 2 + options.seed % 97 + 1;
    while (greatest_common_divisor(step, total) != 1) step++;
    return (n * step + options.seed) % total;
  }
  static uint64_t greatest_common_divisor(uint64_t a, uint64_t b) {
    while (b) {
      const uint64_t remainder = a % b;
      a = b;
      b = remainder;
    }
    return a;
  }
};

void* work(void* argument) {
  Job* job = (Job*)argument;
  Worker* worker = (Worker*)map_private(sizeof(Worker));
  worker->memory = (Private*)map_private(sizeof(Private));
  worker->threadgroup_memory = (char*)map_private(kThreadgroupArena);
  worker->variable_of_block = (uint8_t*)map_private(kThreadgroupArena / 16 + 1);
  worker->threadgroup_cells = (Cell*)map_private((kThreadgroupArena + kMaxThreadgroupVariables) * sizeof(Cell));
  worker->kernel = job->kernel;
  worker->arguments = job->arguments;
  this_worker = worker;
  for (uint64_t n; (n = job->next++) < job->total && shared->findings < kEnoughFindings;)
    run_threadgroup(worker, job->nth(n), job->grid, job->threadgroup);
  this_worker = nullptr;
  __atomic_add_fetch(&shared->switches, worker->switches, __ATOMIC_RELAXED);
  __atomic_add_fetch(&shared->accesses, worker->accesses, __ATOMIC_RELAXED);
  munmap(worker->threadgroup_cells, (kThreadgroupArena + kMaxThreadgroupVariables) * sizeof(Cell));
  munmap(worker->variable_of_block, kThreadgroupArena / 16 + 1);
  munmap(worker->threadgroup_memory, kThreadgroupArena);
  munmap(worker->memory, sizeof(Private));
  munmap(worker, sizeof(Worker));
  return nullptr;
}

void run(Job* job, int workers) {
  if (workers <= 1) {
    work(job);
    return;
  }
  pthread_t threads[kMaxWorkers];
  for (int i = 0; i < workers; i++) pthread_create(&threads[i], nullptr, work, job);
  for (int i = 0; i < workers; i++) pthread_join(threads[i], nullptr);
}

// Both end the child, so the lock that the interrupted thread may hold no longer matters.
void on_crash(int signal, siginfo_t* info, void* context) {
  const uintptr_t pc = (uintptr_t)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] + 1;  // as a return address
  shared->lock = 0;
  report("crash", pc, 0, "%s at address %p", strsignal(signal), info->si_addr);
  _exit(3);
}
void on_alarm(int, siginfo_t*, void* context) {
  const uintptr_t pc = (uintptr_t)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] + 1;
  shared->lock = 0;
  report("timeout", pc, 0, "the kernel is still running");
  _exit(4);
}
void catch_signals(uint32_t timeout_s) {
  static char signal_stack[64 * 1024];
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  action.sa_sigaction = on_crash;
  const int crashes[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
  for (int signal : crashes) sigaction(signal, &action, nullptr);
  action.sa_sigaction = on_alarm;
  sigaction(SIGALRM, &action, nullptr);
  alarm(timeout_s);
}
}  // namespace

bool in_kernel_data(uintptr_t address, size_t bytes) {
  for (int i = 0; i < kernel_segment_count; i++)
    if (address >= kernel_segments[i].from && address + bytes <= kernel_segments[i].to) return true;
  return false;
}
}  // namespace msl

using namespace msl;
extern "C" {
// Runs the grid and waits for it. `timeout_s` 0: in this process, where a crash is a crash. Returns waitpid's status.
int msl_dispatch(void (*kernel)(void**, const msl_thread*), void** arguments, const uint32_t grid[3],
                 const uint32_t threadgroup[3], int workers, int check, int order, int allow_divergence, uint64_t seed,
                 uint32_t timeout_s) {
  options = {check, order, allow_divergence, seed};
  Job job;
  job.kernel = kernel;
  job.arguments = arguments;
  job.total = 1;
  for (int k = 0; k < 3; k++) {
    job.grid[k] = grid[k];
    job.threadgroup[k] = threadgroup[k] < grid[k] ? threadgroup[k] : grid[k];
    job.total *= (grid[k] + job.threadgroup[k] - 1) / job.threadgroup[k];
  }
  dl_iterate_phdr(find_kernel, (void*)kernel);
  if (workers > kMaxWorkers) workers = kMaxWorkers;
  if (!timeout_s) {
    run(&job, workers);
    return 0;
  }
  const pid_t child = fork();
  if (child < 0) return -1;
  if (child == 0) {
    catch_signals(timeout_s);
    run(&job, workers);
    _exit(0);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return -1;
  return status;
}

uint64_t msl_kernel_base() { return kernel_base; }

// What the last dispatch did: findings, fibre switches, checked accesses, bytes of threadgroup memory.
void msl_statistics(uint64_t statistics[4]) {
  statistics[0] = shared->findings;
  statistics[1] = shared->switches;
  statistics[2] = shared->accesses;
  statistics[3] = shared->threadgroup_bytes;
}
}
