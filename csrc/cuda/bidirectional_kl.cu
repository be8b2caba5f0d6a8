// Launchers of bidirectional_kl: choose the path by V, layout and alignment. CUDA headers only.
#include "bidirectional_kl.h"

#include <algorithm>

#include "bidirectional_kl.cuh"

namespace fastgist::cuda {
namespace {

constexpr int64_t kOneWarpClasses = 1024;  // rows up to this long belong to one warp
constexpr int64_t kMaxGridX = 2147483647;

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0; }

// 16-byte accesses are right for every row of a (rows, classes) matrix.
template <typename T>
bool vectorises(const void* data, int64_t stride_m, int64_t stride_v, int64_t classes) {
  constexpr int64_t kVec = kVectorBytes / sizeof(T);
  return stride_v == 1 && stride_m % kVec == 0 && classes % kVec == 0 && aligned(data);
}

template <typename T>
bool vectorises(const LogitPair& in) {
  return vectorises<T>(in.z, in.z_stride_m, in.z_stride_v, in.classes) &&
         vectorises<T>(in.o, in.o_stride_m, in.o_stride_v, in.classes);
}

template <typename Tile>
dim3 block() {
  return dim3(Tile::kThreads, Tile::kRows);
}

template <typename Tile>
dim3 grid(const LogitPair& in, int64_t stretches) {
  return dim3(static_cast<unsigned>(std::min((in.rows + Tile::kRows - 1) / Tile::kRows, kMaxGridX)),
              static_cast<unsigned>(stretches));
}

template <typename T, bool kVectorised, int kWarps>
void launch_fwd(const LogitPair& in, const ForwardOutputs& out, cudaStream_t stream) {
  using Tile = Tile<T, kVectorised, kWarps>;
  _bidirectional_kl_fwd_kernel<T, kVectorised, kWarps><<<grid<Tile>(in, 1), block<Tile>(), 0, stream>>>(in, out);
}

template <typename T, bool kVectorised, int kWarps>
void launch_bwd(const LogitPair& in, const BackwardArguments& args, cudaStream_t stream) {
  using Tile = Tile<T, kVectorised, kWarps>;
  // Enough blocks to fill a GPU when there are few rows: about 4096, and no more than there are tiles.
  const int64_t tiles = (in.classes + Tile::kClasses - 1) / Tile::kClasses;
  const int64_t stretches = std::clamp<int64_t>(4096 / in.rows, 1, std::min<int64_t>(tiles, 65535));
  _bidirectional_kl_bwd_kernel<T, kVectorised, kWarps>
      <<<grid<Tile>(in, stretches), block<Tile>(), 0, stream>>>(in, args);
}

template <typename T>
void fwd(const LogitPair& in, const ForwardOutputs& out, cudaStream_t stream) {
  const bool one_warp = in.classes <= kOneWarpClasses;
  if (vectorises<T>(in)) {
    one_warp ? launch_fwd<T, true, 1>(in, out, stream) : launch_fwd<T, true, 8>(in, out, stream);
  } else {
    one_warp ? launch_fwd<T, false, 1>(in, out, stream) : launch_fwd<T, false, 8>(in, out, stream);
  }
}

template <typename T>
void bwd(const LogitPair& in, const BackwardArguments& args, cudaStream_t stream) {
  const bool one_warp = in.classes <= kOneWarpClasses;
  if (vectorises<T>(in) && aligned(args.grad_z) && aligned(args.grad_o)) {
    one_warp ? launch_bwd<T, true, 1>(in, args, stream) : launch_bwd<T, true, 8>(in, args, stream);
  } else {
    one_warp ? launch_bwd<T, false, 1>(in, args, stream) : launch_bwd<T, false, 8>(in, args, stream);
  }
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* bidirectional_kl_fwd(const LogitPair& in, const ForwardOutputs& out, void* stream) {
  if (in.rows == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (in.dtype) {
    case DType::kFloat32:
      fwd<float>(in, out, s);
      break;
    case DType::kFloat64:
      fwd<double>(in, out, s);
      break;
    case DType::kBFloat16:
      fwd<__nv_bfloat16>(in, out, s);
      break;
    case DType::kFloat16:
      fwd<__half>(in, out, s);
      break;
  }
  return launch_error();
}

const char* bidirectional_kl_bwd(const LogitPair& in, const BackwardArguments& args, void* stream) {
  if (in.rows == 0 || in.classes == 0 || (args.grad_z == nullptr && args.grad_o == nullptr)) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (in.dtype) {
    case DType::kFloat32:
      bwd<float>(in, args, s);
      break;
    case DType::kFloat64:
      bwd<double>(in, args, s);
      break;
    case DType::kBFloat16:
      bwd<__nv_bfloat16>(in, args, s);
      break;
    case DType::kFloat16:
      bwd<__half>(in, args, s);
      break;
  }
  return launch_error();
}

}  // namespace fastgist::cuda
