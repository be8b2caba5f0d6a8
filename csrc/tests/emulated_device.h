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
  int bytes;
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

using Fibers = std::vector<Fiber*>;

// Let the fibers of a set go on if all that have not ended wait at `wait`. True if any goes on.
inline bool release(const Fibers& set, Fiber::Wait wait) {
  const auto done = std::count_if(set.begin(), set.end(), [](const Fiber* fiber) { return fiber->done; });
  const bool live = done < static_cast<int64_t>(set.size());
  for (const Fiber* fiber : set) {
    if (!fiber->done && fiber->wait != wait) return false;
  }
  if (wait == Fiber::kCluster && live && done > 0) stop("a thread has ended that its cluster waits for");
  for (Fiber* fiber : set) fiber->wait = Fiber::kNone;
  return live;
}

// Run a warp as far as it goes without other warps.
inline bool run_warp(const Fibers& warp) {
  bool ran = false;
  do {
    for (Fiber* fiber : warp) {
      if (fiber->done || fiber->wait != Fiber::kNone) continue;
      resume(fiber);
      ran = true;
    }
  } while (release(warp, Fiber::kWarp));
  return ran;
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
  std::vector<Fibers> warps, blocks(m.blocks_a_cluster);
  Fibers all;
  for (auto& fiber : m.fibers) {
    if (all.size() % 32 == 0) warps.emplace_back();
    warps.back().push_back(fiber.get());
    blocks[fiber->block].push_back(fiber.get());
    all.push_back(fiber.get());
  }
  const auto ended = [](const Fibers& set) {
    return std::all_of(set.begin(), set.end(), [](const Fiber* fiber) { return fiber->done; });
  };
  // One warp after the other, each as far ahead of the rest as it may be, in an order that differs from cluster to
  // cluster.
  if (m.cluster % 2 == 1) std::reverse(warps.begin(), warps.end());
  while (!ended(all)) {
    bool ran = false;
    for (const Fibers& warp : warps) {
      const int block = warp[0]->block;
      if (run_warp(warp)) ran = true;
      if (ended(blocks[block])) poison(m.shared[block].data(), m.shared[block].size());
    }
    const auto goes_on = [](const Fibers& block) { return release(block, Fiber::kBlock); };
    if (std::any_of(blocks.begin(), blocks.end(), goes_on)) continue;  // the first that may, and it alone
    if (!release(all, Fiber::kCluster) && !ran) stop("threads wait for each other at different places");
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

template <typename Lanes>
void store_whole(void* to, const Lanes& from) {
  static_assert(sizeof(Lanes) == sizeof(uint4));
  if (reinterpret_cast<uintptr_t>(to) % sizeof(uint4) != 0)
    emulated::stop("a store of 16 bytes that does not lie on 16");
  std::memcpy(to, &from, sizeof from);
}

inline void copy_async(uint4* to, const uint4* from, int bytes) {
  emulated::poison(to, 1);
  machine->running->started.push_back({to, from, bytes});
}
inline void commit_copies() {
  machine->running->groups.push_back(std::move(machine->running->started));
  machine->running->started.clear();
}
inline void wait_copies(int left) {
  auto& groups = machine->running->groups;
  for (; static_cast<int>(groups.size()) > left; groups.pop_front()) {
    for (const emulated::Copy& copy : groups.front()) {
      *copy.to = {};
      std::memcpy(static_cast<void*>(copy.to), copy.from, copy.bytes);
    }
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

// The same for kernels that ask CUDA by its own names.
namespace fastgist::emulated {

struct Index {
  unsigned x, y;
};
inline Index thread() {
  return {static_cast<unsigned>(machine->running->x), static_cast<unsigned>(machine->running->y)};
}
inline Index block() { return {static_cast<unsigned>(cuda::block_x()), static_cast<unsigned>(machine->block_y)}; }
inline Index grid() { return {static_cast<unsigned>(machine->grid_x), static_cast<unsigned>(machine->grid_y)}; }

}  // namespace fastgist::emulated

#define threadIdx (::fastgist::emulated::thread())
#define blockIdx (::fastgist::emulated::block())
#define gridDim (::fastgist::emulated::grid())
#define __syncthreads ::fastgist::cuda::sync_block
#define __shfl_xor_sync(mask, x, lanes) ::fastgist::cuda::shuffle_xor(x, lanes)
