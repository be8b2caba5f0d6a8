// Enough of CUDA to run a kernel on a CPU, a block at a time, a thread of the operating system for each of its threads:
// barriers, shuffles, shared memory. For tests of what a kernel computes where there is no GPU; include it before the
// kernel's own header. Shared arrays become static ones, so blocks must not overlap.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <barrier>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#undef __shared__
#undef __global__
#undef __device__
#undef __launch_bounds__
#undef __forceinline__
#define __shared__ static
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __forceinline__ inline

namespace emulate {

struct Block {
  explicit Block(unsigned threads) : all(threads), lanes(threads) {
    for (unsigned w = 0; w < (threads + 31) / 32; ++w) warps.push_back(std::make_unique<std::barrier<>>(32));
  }
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<float> lanes;
};

inline thread_local uint3 thread_index, block_index;
inline thread_local dim3 block_size, grid_size;
inline thread_local Block* block = nullptr;

inline unsigned flat() { return thread_index.y * block_size.x + thread_index.x; }

// Run kernel() as every thread of every block. Blocks are of whole warps.
inline void launch(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
  for (unsigned b = 0; b < grid.x; ++b) {
    Block shared(threads.x * threads.y);
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads.x * threads.y; ++t) {
      running.emplace_back([&, t] {
        thread_index = {t % threads.x, t / threads.x, 0};
        block_index = {b, 0, 0};
        block_size = threads;
        grid_size = grid;
        block = &shared;
        kernel();
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace emulate

#define threadIdx emulate::thread_index
#define blockIdx emulate::block_index
#define blockDim emulate::block_size
#define gridDim emulate::grid_size

inline void __syncthreads() { emulate::block->all.arrive_and_wait(); }
inline void __syncwarp() { emulate::block->warps[emulate::flat() / 32]->arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  const unsigned at = emulate::flat();
  emulate::block->lanes[at] = value;
  __syncwarp();
  const float other = emulate::block->lanes[at ^ static_cast<unsigned>(mask)];
  __syncwarp();
  return other;
}
