// The forward of bidirectional_kl that finishes the gradients.
#include "bidirectional_kl.h"
#include "launch.cuh"
#include "total.h"

namespace fastgist::cuda {
namespace {

template <typename T>
cudaError_t rows(const LogitPair& in, const FinishedOutputs& out, cudaStream_t stream) {
  using A = typename Accumulate<T>::type;
  Arguments<A> args = arguments_of<A>(in);
  finish_into(args, out);
  return finish_rows<T, kKl>(args, stream);
}

}  // namespace

const char* bidirectional_kl_fwd_bwd(const LogitPair& in, const FinishedOutputs& out, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (in.rows > 0) {
    switch (in.dtype) {
      case DType::kFloat32:
        error = rows<float>(in, out, s);
        break;
      case DType::kFloat64:
        error = rows<double>(in, out, s);
        break;
      case DType::kBFloat16:
        error = rows<__nv_bfloat16>(in, out, s);
        break;
      case DType::kFloat16:
        error = rows<__half>(in, out, s);
        break;
    }
  }
  if (error != cudaSuccess) return error_text(error);
  return error_text(total(in.dtype == DType::kFloat64, out.row_loss, in.rows, out.loss, s));
}

}  // namespace fastgist::cuda
