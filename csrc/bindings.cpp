// Registers the compiled ops in torch.ops.fastgist_native, for CPU and, where nvcc built them, for CUDA tensors.
// Stable ABI only (libtorch >= 2.11): one binary serves every later libtorch, and no Python symbol is used.
// These ops write into tensors that fastgist/ops allocates; they check what would be read or written out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "bidirectional_kl.h"
#include "cpu/bidirectional_kl.h"
#include "cpu/gist_loss.h"
#include "gist_loss.h"
#ifdef FASTGIST_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/bidirectional_kl.h"
#endif

namespace fastgist {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that make it worth waking another thread: some 10 us of work.
constexpr int64_t kGrainElements = 16384;

DType dtype_of(const Tensor& x, const char* op, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

ScalarType accumulation_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_dtype(const char* op, const char* name, const Tensor& x, ScalarType expected) {
  STD_TORCH_CHECK(x.scalar_type() == expected, op, ": ", name, " must be ", torch::headeronly::toString(expected),
                  ", got ", torch::headeronly::toString(x.scalar_type()));
}

void check_device(const char* op, const char* name, const Tensor& x, const Tensor& logits) {
  STD_TORCH_CHECK(x.is_cuda() == logits.is_cuda() && x.is_cpu() == logits.is_cpu() &&
                      x.get_device_index() == logits.get_device_index(),
                  op, ": ", name, " is on another device than logits");
}

void check_vector(const char* op, const char* name, const Tensor& x, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == rows, op, ": expected ", name, " of shape (", rows,
                  ",), one a row of logits, got ", x.dim(), " dimension(s) and ", x.numel(), " element(s)");
}

void check_matrix(const char* op, const char* name, const Tensor& x, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": expected ", name, " of shape (", rows, ", ", columns, "), got ", x.dim(),
                  " dimension(s)");
  STD_TORCH_CHECK(x.size(0) == rows && x.size(1) == columns, op, ": expected ", name, " of shape (", rows, ", ",
                  columns, "), got (", x.size(0), ", ", x.size(1), ")");
}

void check_contiguous(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous");
}

LogitPair check_logits(const char* op, const Tensor& logits, const char* other_name, const Tensor& other,
                       const std::optional<Tensor>& mask, double temperature) {
  LogitPair in;
  in.dtype = dtype_of(logits, op, "logits");
  STD_TORCH_CHECK(logits.dim() == 2, op, ": expected logits of shape (M, V), got ", logits.dim(), " dimension(s)");
  in.rows = logits.size(0);
  in.classes = logits.size(1);
  check_matrix(op, other_name, other, in.rows, in.classes);
  check_dtype(op, other_name, other, logits.scalar_type());
  check_device(op, other_name, other, logits);
  STD_TORCH_CHECK(std::isfinite(temperature) && temperature > 0, op, ": temperature must be finite and > 0, got ",
                  temperature);
  in.temperature = temperature;
  in.z = logits.data_ptr();
  in.z_stride_m = logits.stride(0);
  in.z_stride_v = logits.stride(1);
  in.o = other.data_ptr();
  in.o_stride_m = other.stride(0);
  in.o_stride_v = other.stride(1);
  in.mask = nullptr;
  in.mask_stride = 0;
  if (mask.has_value()) {
    check_vector(op, "mask", *mask, in.rows);
    check_dtype(op, "mask", *mask, ScalarType::Bool);
    check_device(op, "mask", *mask, logits);
    in.mask = static_cast<const bool*>(mask->data_ptr());
    in.mask_stride = mask->stride(0);
  }
  return in;
}

void check_stats(const char* op, const Tensor& stats, const Tensor& logits, int64_t count) {
  check_matrix(op, "stats", stats, count, logits.size(0));
  check_dtype(op, "stats", stats, accumulation_type(logits));
  check_device(op, "stats", stats, logits);
  check_contiguous(op, "stats", stats);
}

ForwardOutputs check_outputs(const char* op, const Tensor& logits, const Tensor& row_loss, const Tensor& stats,
                             int64_t count = kStats) {
  check_vector(op, "row_loss", row_loss, logits.size(0));
  check_dtype(op, "row_loss", row_loss, accumulation_type(logits));
  check_device(op, "row_loss", row_loss, logits);
  check_contiguous(op, "row_loss", row_loss);
  check_stats(op, stats, logits, count);
  return {row_loss.data_ptr(), stats.data_ptr()};
}

void* check_grad(const char* op, const char* name, const std::optional<Tensor>& grad, const Tensor& logits) {
  if (!grad.has_value()) return nullptr;
  check_matrix(op, name, *grad, logits.size(0), logits.size(1));
  check_dtype(op, name, *grad, logits.scalar_type());
  check_device(op, name, *grad, logits);
  check_contiguous(op, name, *grad);
  return grad->data_ptr();
}

BackwardArguments check_backward(const char* op, const Tensor& logits, const Tensor& stats, const Tensor& row_grad,
                                 const std::optional<Tensor>& grad_logits, const char* other_name,
                                 const std::optional<Tensor>& grad_other, int64_t count = kStats) {
  check_stats(op, stats, logits, count);
  check_vector(op, "row_grad", row_grad, logits.size(0));
  check_dtype(op, "row_grad", row_grad, accumulation_type(logits));
  check_device(op, "row_grad", row_grad, logits);
  return {stats.data_ptr(), row_grad.data_ptr(), row_grad.stride(0), check_grad(op, "grad_logits", grad_logits, logits),
          check_grad(op, other_name, grad_other, logits)};
}

// Rows a task, so that small problems stay on the calling thread.
int64_t grain_rows(const LogitPair& in) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, in.classes));
}

constexpr const char* kFwd = "fastgist_native::bidirectional_kl_fwd";
constexpr const char* kBwd = "fastgist_native::bidirectional_kl_bwd";

void bidirectional_kl_fwd_cpu(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                              double temperature, const Tensor& row_loss, const Tensor& stats) {
  const LogitPair in = check_logits(kFwd, logits, "other_logits", other_logits, mask, temperature);
  const ForwardOutputs out = check_outputs(kFwd, logits, row_loss, stats);
  // torch's own thread pool: it honours torch.set_num_threads and there is no second OpenMP runtime to compete with it.
  torch::stable::parallel_for(0, in.rows, grain_rows(in),
                              [&](int64_t begin, int64_t end) { cpu::bidirectional_kl_fwd(in, out, begin, end); });
}

void bidirectional_kl_bwd_cpu(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                              const Tensor& stats, const Tensor& row_grad, double temperature,
                              const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_other) {
  const LogitPair in = check_logits(kBwd, logits, "other_logits", other_logits, mask, temperature);
  const BackwardArguments args = check_backward(kBwd, logits, stats, row_grad, grad_logits, "grad_other", grad_other);
  torch::stable::parallel_for(0, in.rows, grain_rows(in),
                              [&](int64_t begin, int64_t end) { cpu::bidirectional_kl_bwd(in, args, begin, end); });
}

GistLossInputs check_gist(const char* op, const Tensor& logits, const Tensor& gist_logits, const Tensor& target,
                          double alpha, double beta, double temperature, double label_smoothing, int64_t ignore_index) {
  GistLossInputs in;
  in.logits = check_logits(op, logits, "gist_logits", gist_logits, std::nullopt, temperature);
  check_device(op, "target", target, logits);
  if (target.scalar_type() == ScalarType::Long) {
    check_vector(op, "target", target, in.logits.rows);
    in.target = {static_cast<const int64_t*>(target.data_ptr()), nullptr, DType::kFloat32, target.stride(0), 0};
  } else {
    check_matrix(op, "target", target, in.logits.rows, in.logits.classes);
    in.target = {nullptr, target.data_ptr(), dtype_of(target, op, "target"), target.stride(0), target.stride(1)};
  }
  in.alpha = alpha;
  in.beta = beta;
  in.label_smoothing = label_smoothing;
  in.ignore_index = ignore_index;
  return in;
}

constexpr const char* kGistFwd = "fastgist_native::gist_loss_fwd";
constexpr const char* kGistBwd = "fastgist_native::gist_loss_bwd";

void gist_loss_fwd_cpu(const Tensor& logits, const Tensor& gist_logits, const Tensor& target, double alpha, double beta,
                       double temperature, double label_smoothing, int64_t ignore_index, const Tensor& row_loss,
                       const Tensor& stats) {
  const GistLossInputs in =
      check_gist(kGistFwd, logits, gist_logits, target, alpha, beta, temperature, label_smoothing, ignore_index);
  const ForwardOutputs out = check_outputs(kGistFwd, logits, row_loss, stats, kGistStats);
  torch::stable::parallel_for(0, in.logits.rows, grain_rows(in.logits),
                              [&](int64_t begin, int64_t end) { cpu::gist_loss_fwd(in, out, begin, end); });
}

void gist_loss_bwd_cpu(const Tensor& logits, const Tensor& gist_logits, const Tensor& target, const Tensor& stats,
                       const Tensor& row_grad, double alpha, double beta, double temperature, double label_smoothing,
                       int64_t ignore_index, const std::optional<Tensor>& grad_logits,
                       const std::optional<Tensor>& grad_gist) {
  const GistLossInputs in =
      check_gist(kGistBwd, logits, gist_logits, target, alpha, beta, temperature, label_smoothing, ignore_index);
  const BackwardArguments args =
      check_backward(kGistBwd, logits, stats, row_grad, grad_logits, "grad_gist", grad_gist, kGistStats);
  torch::stable::parallel_for(0, in.logits.rows, grain_rows(in.logits),
                              [&](int64_t begin, int64_t end) { cpu::gist_loss_bwd(in, args, begin, end); });
}

#ifdef FASTGIST_WITH_CUDA

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

#endif  // FASTGIST_WITH_CUDA

}  // namespace
}  // namespace fastgist

STABLE_TORCH_LIBRARY(fastgist_native, m) {
  m.def(
      "bidirectional_kl_fwd(Tensor logits, Tensor other_logits, Tensor? mask, float temperature, Tensor(a!) row_loss, "
      "Tensor(b!) stats) -> ()");
  m.def(
      "bidirectional_kl_bwd(Tensor logits, Tensor other_logits, Tensor? mask, Tensor stats, Tensor row_grad, "
      "float temperature, Tensor(c!)? grad_logits, Tensor(d!)? grad_other) -> ()");
  m.def(
      "gist_loss_fwd(Tensor logits, Tensor gist_logits, Tensor target, float alpha, float beta, float temperature, "
      "float label_smoothing, int ignore_index, Tensor(a!) row_loss, Tensor(b!) stats) -> ()");
  m.def(
      "gist_loss_bwd(Tensor logits, Tensor gist_logits, Tensor target, Tensor stats, Tensor row_grad, float alpha, "
      "float beta, float temperature, float label_smoothing, int ignore_index, Tensor(c!)? grad_logits, "
      "Tensor(d!)? grad_gist) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgist_native, CPU, m) {
  m.impl("bidirectional_kl_fwd", TORCH_BOX(&fastgist::bidirectional_kl_fwd_cpu));
  m.impl("bidirectional_kl_bwd", TORCH_BOX(&fastgist::bidirectional_kl_bwd_cpu));
  m.impl("gist_loss_fwd", TORCH_BOX(&fastgist::gist_loss_fwd_cpu));
  m.impl("gist_loss_bwd", TORCH_BOX(&fastgist::gist_loss_bwd_cpu));
}

#ifdef FASTGIST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastgist_native, CUDA, m) {
  m.impl("bidirectional_kl_fwd", TORCH_BOX(&fastgist::bidirectional_kl_fwd_cuda));
  m.impl("bidirectional_kl_bwd", TORCH_BOX(&fastgist::bidirectional_kl_bwd_cuda));
}
#endif
