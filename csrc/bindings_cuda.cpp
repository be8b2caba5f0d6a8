// Registers the CUDA kernels in torch.ops.fastgist_native, where nvcc built them. The schemas are in bindings.cpp.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "bindings.h"
#include "cuda/bidirectional_kl.h"

namespace fastgist {
namespace {

// The stream that torch would launch on for `x`'s device. (A typed accessor came to the stable ABI after 2.11.)
void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": CUDA launch failed: ", error == nullptr ? "" : error);
}

void bidirectional_kl_fwd_cuda(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                               double temperature, const Tensor& row_loss, const Tensor& stats) {
  const LogitPair in = check_logits(kFwd, logits, "other_logits", other_logits, mask, temperature);
  const ForwardOutputs out = check_outputs(kFwd, logits, row_loss, stats);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(kFwd, cuda::bidirectional_kl_fwd(in, out, current_stream(logits)));
}

void bidirectional_kl_bwd_cuda(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                               const Tensor& stats, const Tensor& row_grad, double temperature,
                               const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_other) {
  const LogitPair in = check_logits(kBwd, logits, "other_logits", other_logits, mask, temperature);
  const BackwardArguments args = check_backward(kBwd, logits, stats, row_grad, grad_logits, "grad_other", grad_other);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(kBwd, cuda::bidirectional_kl_bwd(in, args, current_stream(logits)));
}

}  // namespace
}  // namespace fastgist

STABLE_TORCH_LIBRARY_IMPL(fastgist_native, CUDA, m) {
  m.impl("bidirectional_kl_fwd", TORCH_BOX(&fastgist::bidirectional_kl_fwd_cuda));
  m.impl("bidirectional_kl_bwd", TORCH_BOX(&fastgist::bidirectional_kl_bwd_cuda));
}
