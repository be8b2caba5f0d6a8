// gist_loss at any T, and the choice of the file that serves a call.
#include "gist_loss.h"

#include "gist_launch.cuh"
#include "total.h"

namespace fastgist::cuda {

cudaError_t gist_rows_at_any_t(const GistLossInputs& in, const GistCall& call, cudaStream_t stream) {
  switch (in.logits.dtype) {
    case DType::kFloat32:
      return gist_rows<float, kGistAny>(in, call, stream);
    case DType::kFloat64:
      return gist_rows<double, kGistAny>(in, call, stream);
    case DType::kBFloat16:
      return gist_rows<__nv_bfloat16, kGistAny>(in, call, stream);
    case DType::kFloat16:
      return gist_rows<__half, kGistAny>(in, call, stream);
  }
  return cudaErrorInvalidValue;
}

namespace {

cudaError_t rows(const GistLossInputs& in, const GistCall& call, cudaStream_t stream) {
  const bool cubed = in.logits.temperature == 3.0 && in.logits.dtype != DType::kFloat64;
  return cubed ? gist_rows_at_t_3(in, call, stream) : gist_rows_at_any_t(in, call, stream);
}

}  // namespace

const char* gist_loss_fwd(const GistLossInputs& in, const ForwardOutputs& out, void* stream) {
  if (in.logits.rows == 0) return nullptr;
  return error_text(rows(in, {&out, nullptr, nullptr}, static_cast<cudaStream_t>(stream)));
}

const char* gist_loss_bwd(const GistLossInputs& in, const BackwardArguments& args, void* stream) {
  const bool nothing = args.grad_z == nullptr && args.grad_o == nullptr;
  if (in.logits.rows == 0 || in.logits.classes == 0 || nothing) return nullptr;
  return error_text(rows(in, {nullptr, &args, nullptr}, static_cast<cudaStream_t>(stream)));
}

const char* gist_loss_fwd_bwd(const GistLossInputs& in, const FinishedOutputs& out, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const cudaError_t error = in.logits.rows == 0 ? cudaSuccess : rows(in, {nullptr, nullptr, &out}, s);
  if (error != cudaSuccess) return error_text(error);
  return error_text(total(in.logits.dtype == DType::kFloat64, out.row_loss, in.logits.rows, out.loss, s));
}

}  // namespace fastgist::cuda
