// What the registrations for CPU and CUDA tensors share: the checks of what would be read or written out of bounds, and
// tensors as the plain arguments of csrc/*.h. Stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>

#include "bidirectional_kl.h"
#include "cpu/parallel.h"
#include "gist_loss.h"

namespace fastgist {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr const char* kFwd = "fastgist_native::bidirectional_kl_fwd";
inline constexpr const char* kBwd = "fastgist_native::bidirectional_kl_bwd";
inline constexpr const char* kFwdBwd = "fastgist_native::bidirectional_kl_fwd_bwd";
inline constexpr const char* kGistFwd = "fastgist_native::gist_loss_fwd";
inline constexpr const char* kGistBwd = "fastgist_native::gist_loss_bwd";
inline constexpr const char* kGistBwdClasses = "fastgist_native::gist_loss_bwd_classes";
inline constexpr const char* kGistFwdBwd = "fastgist_native::gist_loss_fwd_bwd";

// torch's own thread pool: it honours torch.set_num_threads and there is no second OpenMP runtime to compete with it.
inline cpu::Parallel threads() {
  return {torch::stable::get_num_threads(), [](int64_t tasks, int64_t grain, const cpu::Range& body) {
            torch::stable::parallel_for(0, tasks, grain, body);
          }};
}

inline DType dtype_of(const Tensor& x, const char* op, const char* name) {
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

inline ScalarType accumulation_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dtype(const char* op, const char* name, const Tensor& x, ScalarType expected) {
  STD_TORCH_CHECK(x.scalar_type() == expected, op, ": ", name, " must be ", torch::headeronly::toString(expected),
                  ", got ", torch::headeronly::toString(x.scalar_type()));
}

inline void check_device(const char* op, const char* name, const Tensor& x, const Tensor& logits) {
  STD_TORCH_CHECK(x.is_cuda() == logits.is_cuda() && x.is_cpu() == logits.is_cpu() &&
                      x.get_device_index() == logits.get_device_index(),
                  op, ": ", name, " is on another device than logits");
}

inline void check_vector(const char* op, const char* name, const Tensor& x, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == rows, op, ": expected ", name, " of shape (", rows,
                  ",), one a row of logits, got ", x.dim(), " dimension(s) and ", x.numel(), " element(s)");
}

inline void check_matrix(const char* op, const char* name, const Tensor& x, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": expected ", name, " of shape (", rows, ", ", columns, "), got ", x.dim(),
                  " dimension(s)");
  STD_TORCH_CHECK(x.size(0) == rows && x.size(1) == columns, op, ": expected ", name, " of shape (", rows, ", ",
                  columns, "), got (", x.size(0), ", ", x.size(1), ")");
}

inline void check_contiguous(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline LogitPair check_logits(const char* op, const Tensor& logits, const char* other_name, const Tensor& other,
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

inline void check_stats(const char* op, const Tensor& stats, const Tensor& logits, int64_t count) {
  check_matrix(op, "stats", stats, count, logits.size(0));
  check_dtype(op, "stats", stats, accumulation_type(logits));
  check_device(op, "stats", stats, logits);
  check_contiguous(op, "stats", stats);
}

inline void check_row_loss(const char* op, const Tensor& row_loss, const Tensor& logits) {
  check_vector(op, "row_loss", row_loss, logits.size(0));
  check_dtype(op, "row_loss", row_loss, accumulation_type(logits));
  check_device(op, "row_loss", row_loss, logits);
  check_contiguous(op, "row_loss", row_loss);
}

inline ForwardOutputs check_outputs(const char* op, const Tensor& logits, const Tensor& row_loss, const Tensor& stats,
                                    int64_t count = kStats) {
  check_row_loss(op, row_loss, logits);
  check_stats(op, stats, logits, count);
  return {row_loss.data_ptr(), stats.data_ptr()};
}

inline void* check_grad(const char* op, const char* name, const std::optional<Tensor>& grad, const Tensor& logits) {
  if (!grad.has_value()) return nullptr;
  check_matrix(op, name, *grad, logits.size(0), logits.size(1));
  check_dtype(op, name, *grad, logits.scalar_type());
  check_device(op, name, *grad, logits);
  check_contiguous(op, name, *grad);
  return grad->data_ptr();
}

inline BackwardArguments check_backward(const char* op, const Tensor& logits, const Tensor& stats,
                                        const Tensor& row_grad, const std::optional<Tensor>& grad_logits,
                                        const char* other_name, const std::optional<Tensor>& grad_other,
                                        int64_t count = kStats) {
  check_stats(op, stats, logits, count);
  check_vector(op, "row_grad", row_grad, logits.size(0));
  check_dtype(op, "row_grad", row_grad, accumulation_type(logits));
  check_device(op, "row_grad", row_grad, logits);
  return {stats.data_ptr(), row_grad.data_ptr(), row_grad.stride(0), check_grad(op, "grad_logits", grad_logits, logits),
          check_grad(op, other_name, grad_other, logits)};
}

// Where a number () of the accumulation type is, or null where there is none.
inline void* check_number(const char* op, const char* name, const std::optional<Tensor>& x, const Tensor& logits) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(x->dim() == 0, op, ": expected ", name, " of shape (), got ", x->dim(), " dimension(s)");
  check_dtype(op, name, *x, accumulation_type(logits));
  check_device(op, name, *x, logits);
  return x->data_ptr();
}

inline FinishedOutputs check_finished(const char* op, const Tensor& logits, const std::optional<Tensor>& divisor,
                                      double scale, const Tensor& row_loss, const Tensor& loss,
                                      const std::optional<Tensor>& grad_logits, const char* other_name,
                                      const std::optional<Tensor>& grad_other) {
  check_row_loss(op, row_loss, logits);
  return {scale,
          check_number(op, "divisor", divisor, logits),
          row_loss.data_ptr(),
          check_number(op, "loss", loss, logits),
          check_grad(op, "grad_logits", grad_logits, logits),
          check_grad(op, other_name, grad_other, logits)};
}

inline GistLossInputs check_gist(const char* op, const Tensor& logits, const Tensor& gist_logits, const Tensor& target,
                                 double alpha, double beta, double beta_logits, double beta_gist, double temperature,
                                 double label_smoothing, int64_t ignore_index) {
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
  in.beta_z = beta_logits;
  in.beta_o = beta_gist;
  in.label_smoothing = label_smoothing;
  in.ignore_index = ignore_index;
  in.first_class = 0;
  in.every_class = in.logits.classes;
  return in;
}

}  // namespace fastgist
