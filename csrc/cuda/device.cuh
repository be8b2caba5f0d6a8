// What the row kernels ask of the machine, by name: places in the grid, barriers, shuffles, copies that run behind the
// arithmetic, and the shared memory of a cluster's other blocks. csrc/tests/emulated_device.h is the same in plain C++,
// which runs the kernels where there is no GPU.
#ifndef FASTGIST_DEVICE
#define FASTGIST_DEVICE

#include <cuda_runtime.h>

#include <cstdint>

namespace fastgist::cuda {

__device__ __forceinline__ int thread_x() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int thread_y() { return static_cast<int>(threadIdx.y); }
__device__ __forceinline__ int64_t block_x() { return blockIdx.x; }
__device__ __forceinline__ int64_t block_y() { return blockIdx.y; }
__device__ __forceinline__ int64_t grid_x() { return gridDim.x; }
__device__ __forceinline__ int64_t grid_y() { return gridDim.y; }

__device__ __forceinline__ void sync_block() { __syncthreads(); }

template <typename A>
__device__ __forceinline__ A shuffle_xor(A x, int lane_mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, lane_mask);
}

__device__ __forceinline__ uint4* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}

// -- copies of 16 bytes from global to shared memory that run behind what follows
// --------------------------------------

// A thread sees what it copied itself after it waited; other threads' copies it sees only after a barrier as well.
// `bytes`, from 1 to 16, are read; 0 stands for the rest.
__device__ __forceinline__ void copy_async(uint4* to, const uint4* from, int bytes) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until no more than `left` of this thread's latest groups of copies are under way.
__device__ __forceinline__ void wait_copies(int left) {
  switch (left) {
    case 3:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
}

// -- stores of 16 bytes
// -----------------------------------------------------------------------------------------------

// One instruction, where an assignment of the lanes would be one each. `to` lies on 16 bytes.
template <typename Lanes>
__device__ __forceinline__ void store_whole(void* to, const Lanes& from) {
  static_assert(sizeof(Lanes) == sizeof(uint4));
  uint4 words;
  memcpy(&words, &from, sizeof words);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// -- clusters: sm_90 and later; elsewhere a block is alone
// --------------------------------------------------------------

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterSizeInBlocks());
#else
  return 1;
#endif
}
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}
// A barrier of all threads of all blocks; what was written to shared memory before is seen by all after it.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();  // the barrier is one instruction of a whole warp
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}
// Where block `rank` of the cluster keeps what this block keeps at `shared`.
template <typename X>
__device__ __forceinline__ const X* of_rank(const X* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<const X*>(__cluster_map_shared_rank(shared, static_cast<unsigned>(rank)));
#else
  return shared;
#endif
}

}  // namespace fastgist::cuda

#endif  // FASTGIST_DEVICE
