// Launches of the row kernels: what the device is, and the plan's way.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>

#include "again_rows.cuh"
#include "arguments.cuh"
#include "kept_rows.cuh"

namespace fastgist::cuda {

static_assert(sizeof(RowSums<float, kKl>) == kPartialBytes && sizeof(RowSums<float, kGistAny>) == kPartialBytes,
              "plan.h counts the sums' bytes");
static_assert(Kept<1>::kRows == kWarpRows && Kept<kBlockWarps>::kRows == 1 &&
                  Again<float, kGistAny, true, 1>::kRows == kWarpRows,
              "plan.h counts a block's rows");
static_assert(kWarpRows * 2 * 16 * ((kWarpClasses + 3 + 3) / 4) <= 48 * 1024, "shared memory that needs no asking");

// What is said of an error is not left behind for whoever asks next, which would be torch at another operation.
inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// -- the device -------------------------------------------------------------------------------------------------------

template <typename Kernel, typename... Args>
cudaError_t launch(Kernel* kernel, const Plan& plan, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows));
  config.dynamicSmemBytes = static_cast<size_t>(plan.bytes);
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// The largest cluster of blocks with all the shared memory they may have that the current device would run.
template <typename Kernel>
int largest_cluster(Kernel* kernel, const Device& device) {
  for (int cluster = 16; cluster > 1; cluster /= 2) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(cluster));
    config.blockDim = dim3(kBlockWarps * kWarpSize);
    config.dynamicSmemBytes = static_cast<size_t>(device.shared_a_block);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) return cluster;
    cudaGetLastError();  // a size that this device does not run is no fault of the launch to come
  }
  return 1;
}

// Allows the kernel its shared memory beyond 48 KiB and clusters of 16 on the current device, and says what that device
// has. Clusters only where the binary in use knows them: not where the driver compiled sm_80's PTX.
template <typename Kernel>
cudaError_t prepare(Kernel* kernel, int index, Device& device) {
  const cudaDeviceAttr asked[] = {cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                  cudaDevAttrMaxSharedMemoryPerMultiprocessor};
  int* const answers[] = {&device.processors, &device.shared_a_block, &device.shared_a_processor};
  for (int i = 0; i < 3; ++i) {
    const cudaError_t error = cudaDeviceGetAttribute(answers[i], asked[i], index);
    if (error != cudaSuccess) return error;
  }
  device.largest_cluster = 1;
  cudaFuncAttributes compiled;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_a_block);
  if (error == cudaSuccess) {
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, kernel);
  if (error != cudaSuccess || compiled.ptxVersion < 90) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) device.largest_cluster = largest_cluster(kernel, device);
  return error;
}

// The current device as the kernel that keeps rows may use it. Asked once a kernel and device.
template <typename T, int kLoss>
cudaError_t device_for(Device& device) {
  constexpr int kRemembered = 64;
  static Device known[kRemembered];
  static std::atomic<bool> ready[kRemembered];
  static std::mutex mutex;
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  if (index < kRemembered && ready[index].load(std::memory_order_acquire)) {
    device = known[index];
    return cudaSuccess;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  error = prepare(&_kept_rows_kernel<T, kLoss, kBlockWarps>, index, device);
  if (error == cudaSuccess && index < kRemembered && !ready[index].load(std::memory_order_relaxed)) {
    known[index] = device;
    ready[index].store(true, std::memory_order_release);
  }
  return error;
}

// -- the launches -----------------------------------------------------------------------------------------------------

// A forward that finishes the gradients, all but the sum of the row losses.
template <typename T, int kLoss, typename A>
cudaError_t finish_rows(const Arguments<A>& args, cudaStream_t stream) {
  Device device = {};
  if constexpr (sizeof(T) < 8) {
    const cudaError_t error = device_for<T, kLoss>(device);
    if (error != cudaSuccess) return error;
  }
  const Plan plan = choose(rows_of(args), device, true);
  if constexpr (sizeof(T) < 8) {
    switch (plan.path) {
      case Path::kWarp:
        return launch(&_kept_rows_kernel<T, kLoss, 1>, plan, stream, args, plan.slice);
      case Path::kKept:
        return launch(&_kept_rows_kernel<T, kLoss, kBlockWarps>, plan, stream, args, plan.slice);
      case Path::kAgain:
        return launch(&_again_rows_kernel<T, kLoss, true, kAgainWarps>, plan, stream, args, Pass::kFinish);
      default:
        break;
    }
  }
  return launch(&_again_rows_kernel<T, kLoss, false, kAgainWarps>, plan, stream, args, Pass::kFinish);
}

// A forward or a backward alone.
template <typename T, int kLoss, typename A>
cudaError_t pass_rows(const Arguments<A>& args, Pass pass, cudaStream_t stream) {
  Plan plan = choose(rows_of(args), {}, false);
  const auto run = [&](auto kernel, int64_t classes_a_tile) {
    cudaLaunchConfig_t config = {};
    // A backward has enough blocks to fill a GPU when there are few rows: about 4096, and no more than there are tiles.
    const int64_t tiles = ceil_div(args.in.classes, classes_a_tile);
    const int64_t stretches =
        pass == Pass::kBackward ? std::clamp<int64_t>(4096 / args.in.rows, 1, std::min<int64_t>(tiles, 65535)) : 1;
    config.gridDim = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(stretches));
    config.blockDim = dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows));
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, args, pass);
  };
  if constexpr (sizeof(T) < 8) {
    if (plan.path == Path::kAgain && plan.threads == kWarpSize) {
      return run(&_again_rows_kernel<T, kLoss, true, 1>, kWarpSize * Again<T, kLoss, true, 1>::kItems);
    }
    if (plan.path == Path::kAgain) {
      using Layout = Again<T, kLoss, true, kAgainWarps>;
      return run(&_again_rows_kernel<T, kLoss, true, kAgainWarps>, Layout::kThreads * Layout::kItems);
    }
  }
  using Layout = Again<T, kLoss, false, kAgainWarps>;
  return run(&_again_rows_kernel<T, kLoss, false, kAgainWarps>, Layout::kThreads * Layout::kItems);
}

}  // namespace fastgist::cuda
