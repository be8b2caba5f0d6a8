// csrc/cuda/device.cuh in plain C++: the row kernels run on a CPU, each CUDA thread a fiber of its own, so that
// barriers, shuffles, copies and clusters mean what they mean on a device. Included before a kernel's header, it takes
// the place of device.cuh.
//
// It is unkind on purpose. A chunk that is being copied reads as NaN until its thread has waited for it; shared memory
// begins as NaN, and so does that of a block that has ended; a fiber that waits at another place than the rest of its
// warp or block stops the program.
#pragma once
#define FASTGIST_DEVICE

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __global__
#define __global__
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace fastgist::emulated {

struct Copy {
  uint4* to;
  const uint4* from;
};

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf point;       // where it waits
  bool begun = false;
  std::vector<char> stack;
  int x, y, block;  // block of the cluster
  bool done = false;
  std::vector<Copy> started;             // copies of the group that is not closed yet
  std::deque<std::vector<Copy>> groups;  // closed groups under way, oldest first
  // What it waits at: nothing, its warp, its block or its cluster; the barriers of each kind that it has passed.
  enum Wait { kNone, kWarp, kBlock, kCluster } wait = kNone;
  uint64_t exchanged[2] = {};  // what it offers to its warp; two, for a fast lane may offer the next already
  int shuffles = 0;
};

struct Machine {
  int threads_x, threads_y, blocks_a_cluster;
  int64_t cluster, grid_x, block_y, grid_y;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::vector<uint4>> shared;  // of each block
  ucontext_t scheduler;                    // only ever left, to begin a fiber
  jmp_buf point;
  Fiber* running = nullptr;
  std::function<void()> body;
};

inline Machine* machine = nullptr;

inline void stop(const char* what) {
  std::printf("the emulated device stops: %s\n", what);
  std::exit(2);
}

// Fibers begin by swapcontext and then change by _longjmp, which makes no system call.
inline void resume(Fiber* fiber) {
  machine->running = fiber;
  if (_setjmp(machine->point) != 0) return;
  if (fiber->begun) _longjmp(fiber->point, 1);
  fiber->begun = true;
  swapcontext(&machine->scheduler, &fiber->context);
}

inline void wait_at(Fiber::Wait wait) {
  Fiber* self = machine->running;
  self->wait = wait;
  if (_setjmp(self->point) == 0) _longjmp(machine->point, 1);
}

inline void enter() {
  machine->body();
  Fiber* self = machine->running;
  if (!self->started.empty() ||
      std::any_of(self->groups.begin(), self->groups.end(), [](auto& g) { return !g.empty(); })) {
    stop("a thread ended with copies under way");
  }
  self->done = true;
  _longjmp(machine->point, 1);
}

inline void poison(uint4* at, int64_t count) { std::memset(static_cast<void*>(at), 0xFF, count * sizeof(uint4)); }

// Let every fiber of a set go on whose members all wait at `wait` (those that have ended are left out: a device does so
// too). True if any set went on.
inline bool release(Fiber::Wait wait) {
  Machine& m = *machine;
  bool any = false;
  const auto key = [&](const Fiber& f) {
    const int in_block = (f.y * m.threads_x + f.x) / 32;
    return wait == Fiber::kCluster ? 0 : wait == Fiber::kBlock ? f.block : f.block * 1024 + in_block;
  };
  for (size_t i = 0; i < m.fibers.size();) {
    size_t end = i;
    bool all = true, live = false;
    while (end < m.fibers.size() && key(*m.fibers[end]) == key(*m.fibers[i])) {
      all = all && (m.fibers[end]->done || m.fibers[end]->wait == wait);
      live = live || !m.fibers[end]->done;
      if (wait == Fiber::kCluster && m.fibers[end]->done) stop("a thread has ended that a cluster waits for");
      ++end;
    }
    if (all && live) {
      for (size_t f = i; f < end; ++f) m.fibers[f]->wait = Fiber::kNone;
      any = true;
    }
    i = end;
  }
  return any;
}

// Run one cluster of a grid.
inline void run_cluster(Machine& m, int64_t bytes) {
  machine = &m;
  m.shared.assign(m.blocks_a_cluster, std::vector<uint4>((bytes + 15) / 16 + 1));
  for (auto& block : m.shared) poison(block.data(), block.size());
  m.fibers.clear();
  for (int block = 0; block < m.blocks_a_cluster; ++block) {
    for (int y = 0; y < m.threads_y; ++y) {
      for (int x = 0; x < m.threads_x; ++x) {
        auto fiber = std::make_unique<Fiber>();
        fiber->x = x, fiber->y = y, fiber->block = block;
        fiber->stack.resize(32 * 1024);
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.data();
        fiber->context.uc_stack.ss_size = fiber->stack.size();
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, enter, 0);
        m.fibers.push_back(std::move(fiber));
      }
    }
  }
  for (;;) {
    bool ran = false, all_done = true;
    for (auto& fiber : m.fibers) {
      if (fiber->done || fiber->wait != Fiber::kNone) continue;
      resume(fiber.get());
      ran = true;
    }
    for (auto& fiber : m.fibers) all_done = all_done && fiber->done;
    if (all_done) break;
    const bool warp = release(Fiber::kWarp);
    const bool block = !warp && release(Fiber::kBlock);
    if (!ran && !warp && !block && !release(Fiber::kCluster)) stop("threads wait for each other at different places");
  }
}

// kernel<<<grid, (threads_x, threads_y), bytes>>> in clusters of so many blocks.
template <typename Body>
void launch(int64_t blocks_x, int64_t blocks_y, int blocks_a_cluster, int threads_x, int threads_y, int64_t bytes,
            const Body& body) {
  Machine m;
  m.threads_x = threads_x, m.threads_y = threads_y, m.blocks_a_cluster = blocks_a_cluster;
  m.grid_x = blocks_x, m.grid_y = blocks_y;
  m.body = body;
  for (m.block_y = 0; m.block_y < blocks_y; ++m.block_y) {
    for (m.cluster = 0; m.cluster < blocks_x / blocks_a_cluster; ++m.cluster) run_cluster(m, bytes);
  }
}

}  // namespace fastgist::emulated

namespace fastgist::cuda {

using emulated::Fiber;
using emulated::machine;

inline int thread_x() { return machine->running->x; }
inline int thread_y() { return machine->running->y; }
inline int64_t block_x() { return machine->cluster * machine->blocks_a_cluster + machine->running->block; }
inline int64_t block_y() { return machine->block_y; }
inline int64_t grid_x() { return machine->grid_x; }
inline int64_t grid_y() { return machine->grid_y; }
inline void sync_block() { emulated::wait_at(Fiber::kBlock); }

template <typename A>
A shuffle_xor(A x, int lane_mask) {
  static_assert(sizeof(A) <= 8);
  Fiber* self = machine->running;
  const int turn = self->shuffles++ % 2;
  std::memcpy(&self->exchanged[turn], &x, sizeof(A));
  emulated::wait_at(Fiber::kWarp);
  const int at = (self->block * machine->threads_y + self->y) * machine->threads_x + self->x;
  const Fiber* partner = machine->fibers[(at / 32 * 32) + ((at % 32) ^ lane_mask)].get();
  if (partner->shuffles != self->shuffles && partner->shuffles != self->shuffles + 1) {
    emulated::stop("lanes of a warp shuffle different things");
  }
  A y;
  std::memcpy(&y, &partner->exchanged[turn], sizeof(A));
  return y;
}

inline uint4* dynamic_shared() { return machine->shared[machine->running->block].data(); }

inline void copy_async(uint4* to, const uint4* from) {
  emulated::poison(to, 1);
  machine->running->started.push_back({to, from});
}
inline void commit_copies() {
  machine->running->groups.push_back(std::move(machine->running->started));
  machine->running->started.clear();
}
inline void wait_copies(int left) {
  auto& groups = machine->running->groups;
  for (; static_cast<int>(groups.size()) > left; groups.pop_front()) {
    for (const emulated::Copy& copy : groups.front()) *copy.to = *copy.from;
  }
}

inline int cluster_size() { return machine->blocks_a_cluster; }
inline int cluster_rank() { return machine->running->block; }
inline void sync_cluster() { emulated::wait_at(Fiber::kCluster); }
template <typename X>
const X* of_rank(const X* shared, int rank) {
  const auto& own = machine->shared[machine->running->block];
  return reinterpret_cast<const X*>(
      reinterpret_cast<const char*>(machine->shared[rank].data()) +
      (reinterpret_cast<const char*>(shared) - reinterpret_cast<const char*>(own.data())));
}

}  // namespace fastgist::cuda
