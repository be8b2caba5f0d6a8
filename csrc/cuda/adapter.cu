// Launchers of adapter for a few hidden units: choose the kernel by dtype and number of units. CUDA headers only.
#include "adapter.h"

#include <type_traits>

#include "adapter.cuh"

namespace fastgist::cuda {
namespace {

constexpr int64_t kBlocksAProcessor = 4;  // as many rows of registers as a multiprocessor holds

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <int kUnits>
unsigned threads(const AdapterArguments& args) {
  const int64_t wanted = (args.columns + UnitTile<kUnits>::kCols - 1) / UnitTile<kUnits>::kCols;
  return static_cast<unsigned>((wanted + kWarpSize - 1) / kWarpSize * kWarpSize);
}

// Rows that each of `blocks` blocks walks, a multiple of the tile's.
template <int kUnits>
int64_t rows_a_block(const AdapterArguments& args, int64_t blocks) {
  const int64_t tiles = (args.rows + UnitTile<kUnits>::kRows - 1) / UnitTile<kUnits>::kRows;
  return (tiles + blocks - 1) / blocks * UnitTile<kUnits>::kRows;
}

template <typename T, int kUnits>
void fwd(const AdapterForward& args, cudaStream_t stream) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t rows = rows_a_block<kUnits>(args, kBlocksAProcessor * processors);
  const auto blocks = static_cast<unsigned>((args.rows + rows - 1) / rows);
  _adapter_units_fwd_kernel<T, kUnits><<<blocks, threads<kUnits>(args), 0, stream>>>(args, rows);
}

template <typename T, int kUnits>
void bwd(const AdapterBackward& args, cudaStream_t stream) {
  const int64_t rows = rows_a_block<kUnits>(args, args.programs);
  // All programs are launched: one without rows leaves zeros in its row of part.
  _adapter_units_bwd_kernel<T, kUnits>
      <<<static_cast<unsigned>(args.programs), threads<kUnits>(args), 0, stream>>>(args, rows);
}

template <typename T, typename Args>
void by_units(const Args& args, cudaStream_t stream) {
  const auto run = [&]<int kUnits>() {
    if constexpr (std::is_same_v<Args, AdapterForward>) {
      fwd<T, kUnits>(args, stream);
    } else {
      bwd<T, kUnits>(args, stream);
    }
  };
  switch (args.units) {
    case 1:
      return run.template operator()<1>();
    case 2:
      return run.template operator()<2>();
    case 3:
      return run.template operator()<3>();
    case 4:
      return run.template operator()<4>();
    case 5:
      return run.template operator()<5>();
    case 6:
      return run.template operator()<6>();
    case 7:
      return run.template operator()<7>();
    default:
      return run.template operator()<8>();
  }
}

template <typename Args>
const char* by_dtype(const Args& args, void* stream) {
  if (args.rows == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  args.dtype == DType::kBFloat16 ? by_units<__nv_bfloat16>(args, s) : by_units<__half>(args, s);
  return launch_error();
}

}  // namespace

const char* adapter_fwd(const AdapterForward& args, void* stream) { return by_dtype(args, stream); }

const char* adapter_bwd(const AdapterBackward& args, void* stream) { return by_dtype(args, stream); }

const char* adapter_reduce(const AdapterReduce& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t width = (2 * args.units + 1) * args.columns + args.units;
  const auto blocks = static_cast<unsigned>((width + kWarpSize - 1) / kWarpSize);
  const dim3 block(kWarpSize, kReduceGroups);
  switch (args.dtype) {
    case DType::kBFloat16:
      _adapter_units_reduce_kernel<__nv_bfloat16><<<blocks, block, 0, s>>>(args);
      break;
    case DType::kFloat16:
      _adapter_units_reduce_kernel<__half><<<blocks, block, 0, s>>>(args);
      break;
    default:
      _adapter_units_reduce_kernel<float><<<blocks, block, 0, s>>>(args);
  }
  return launch_error();
}

}  // namespace fastgist::cuda
