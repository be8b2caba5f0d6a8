// Registers the CUDA kernels in torch.ops.fastgist_native, where nvcc built them. The schemas are in bindings.cpp.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "bindings.h"
#include "cuda/bidirectional_kl.h"
#include "cuda/gist_loss.h"

namespace fastgist {
namespace {

constexpr const char* kFinish = "fastgist_native::bidirectional_kl_fwd_bwd";
constexpr const char* kGistFinish = "fastgist_native::gist_loss_fwd_bwd";

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

void check_one_number(const char* op, const char* name, const Tensor& x, const Tensor& logits) {
  STD_TORCH_CHECK(x.numel() == 1, op, ": ", name, " must hold one number, got ", x.numel());
  check_dtype(op, name, x, accumulation_type(logits));
  check_device(op, name, x, logits);
}

FinishedOutputs finished_outputs(const char* op, const Tensor& logits, const std::optional<Tensor>& divisor,
                                 double scale, const Tensor& row_loss, const Tensor& loss,
                                 const std::optional<Tensor>& grad_logits, const char* other_name,
                                 const std::optional<Tensor>& grad_other) {
  if (divisor.has_value()) check_one_number(op, "divisor", *divisor, logits);
  check_vector(op, "row_loss", row_loss, logits.size(0));
  check_dtype(op, "row_loss", row_loss, accumulation_type(logits));
  check_device(op, "row_loss", row_loss, logits);
  check_contiguous(op, "row_loss", row_loss);
  check_one_number(op, "loss", loss, logits);
  return {scale,
          divisor.has_value() ? divisor->data_ptr() : nullptr,
          row_loss.data_ptr(),
          loss.data_ptr(),
          check_grad(op, "grad_logits", grad_logits, logits),
          check_grad(op, other_name, grad_other, logits)};
}

void bidirectional_kl_fwd_bwd_cuda(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                                   const std::optional<Tensor>& divisor, double temperature, double scale,
                                   const Tensor& row_loss, const Tensor& loss, const std::optional<Tensor>& grad_logits,
                                   const std::optional<Tensor>& grad_other) {
  const LogitPair in = check_logits(kFinish, logits, "other_logits", other_logits, mask, temperature);
  const FinishedOutputs out =
      finished_outputs(kFinish, logits, divisor, scale, row_loss, loss, grad_logits, "grad_other", grad_other);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(kFinish, cuda::bidirectional_kl_fwd_bwd(in, out, current_stream(logits)));
}

// check_gist, and what the kernels ask beyond it.
GistLossInputs check_gist_on_device(const char* op, const Tensor& logits, const Tensor& gist_logits,
                                    const Tensor& target, double alpha, double beta, double beta_logits,
                                    double beta_gist, double temperature, double label_smoothing,
                                    int64_t ignore_index) {
  STD_TORCH_CHECK(beta_logits == beta_gist || beta_logits == 0 || beta_gist == 0, op,
                  ": beta_logits and beta_gist must be equal unless one is 0, got ", beta_logits, " and ", beta_gist);
  return check_gist(op, logits, gist_logits, target, alpha, beta, beta_logits, beta_gist, temperature, label_smoothing,
                    ignore_index);
}

void gist_loss_fwd_cuda(const Tensor& logits, const Tensor& gist_logits, const Tensor& target, double alpha,
                        double beta, double beta_logits, double beta_gist, double temperature, double label_smoothing,
                        int64_t ignore_index, const Tensor& row_loss, const Tensor& stats) {
  const GistLossInputs in = check_gist_on_device(kGistFwd, logits, gist_logits, target, alpha, beta, beta_logits,
                                                 beta_gist, temperature, label_smoothing, ignore_index);
  const ForwardOutputs out = check_outputs(kGistFwd, logits, row_loss, stats, kGistStats);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(kGistFwd, cuda::gist_loss_fwd(in, out, current_stream(logits)));
}

void gist_loss_bwd_cuda(const Tensor& logits, const Tensor& gist_logits, const Tensor& target, const Tensor& stats,
                        const Tensor& row_grad, double alpha, double beta, double beta_logits, double beta_gist,
                        double temperature, double label_smoothing, int64_t ignore_index,
                        const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_gist) {
  const GistLossInputs in = check_gist_on_device(kGistBwd, logits, gist_logits, target, alpha, beta, beta_logits,
                                                 beta_gist, temperature, label_smoothing, ignore_index);
  const BackwardArguments args =
      check_backward(kGistBwd, logits, stats, row_grad, grad_logits, "grad_gist", grad_gist, kGistStats);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(kGistBwd, cuda::gist_loss_bwd(in, args, current_stream(logits)));
}

void gist_loss_fwd_bwd_cuda(const Tensor& logits, const Tensor& gist_logits, const Tensor& target,
                            const std::optional<Tensor>& divisor, double alpha, double beta, double beta_logits,
                            double beta_gist, double temperature, double label_smoothing, int64_t ignore_index,
                            double scale, const Tensor& row_loss, const Tensor& loss,
                            const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_gist) {
  const GistLossInputs in = check_gist_on_device(kGistFinish, logits, gist_logits, target, alpha, beta, beta_logits,
                                                 beta_gist, temperature, label_smoothing, ignore_index);
  const FinishedOutputs out =
      finished_outputs(kGistFinish, logits, divisor, scale, row_loss, loss, grad_logits, "grad_gist", grad_gist);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(kGistFinish, cuda::gist_loss_fwd_bwd(in, out, current_stream(logits)));
}

}  // namespace
}  // namespace fastgist

STABLE_TORCH_LIBRARY_IMPL(fastgist_native, CUDA, m) {
  m.impl("bidirectional_kl_fwd", TORCH_BOX(&fastgist::bidirectional_kl_fwd_cuda));
  m.impl("bidirectional_kl_bwd", TORCH_BOX(&fastgist::bidirectional_kl_bwd_cuda));
  m.impl("bidirectional_kl_fwd_bwd", TORCH_BOX(&fastgist::bidirectional_kl_fwd_bwd_cuda));
  m.impl("gist_loss_fwd", TORCH_BOX(&fastgist::gist_loss_fwd_cuda));
  m.impl("gist_loss_bwd", TORCH_BOX(&fastgist::gist_loss_bwd_cuda));
  m.impl("gist_loss_fwd_bwd", TORCH_BOX(&fastgist::gist_loss_fwd_bwd_cuda));
}
