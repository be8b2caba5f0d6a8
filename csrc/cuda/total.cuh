// The sum of the row losses, in an order that depends on their number alone. Not run on a GPU so far.
#pragma once

#include "device.cuh"
#include "pair_sums.cuh"

namespace fastgist::cuda {

// One block: each thread adds its rows in order, and the threads' sums join by a tree.
constexpr int kTotalThreads = 1024;

template <typename A>
__global__ void __launch_bounds__(kTotalThreads) _total_kernel(const A* row_loss, int64_t rows, A* loss) {
  __shared__ double of_warp[kTotalThreads / kWarpSize];
  double sum = 0;
#pragma unroll 4
  for (int64_t row = thread_x(); row < rows; row += kTotalThreads) sum += static_cast<double>(row_loss[row]);
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) sum += shuffle_xor(sum, distance);
  if (thread_x() % kWarpSize == 0) of_warp[thread_x() / kWarpSize] = sum;
  sync_block();
  sum = of_warp[thread_x() % kWarpSize];
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) sum += shuffle_xor(sum, distance);
  if (thread_x() == 0) *loss = static_cast<A>(sum);
}

}  // namespace fastgist::cuda
