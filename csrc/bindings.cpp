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
#ifdef FASTGIST_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/adapter.h"
#include "cuda/bidirectional_kl.h"
#endif

namespace fastgist {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that make it worth waking another thread: some 10 us of work.
constexpr int64_t kGrainElements = 16384;

DType dtype_of(const Tensor& x, const char* op) {
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
      STD_TORCH_CHECK(false, op, ": logits must be float32, float64, bfloat16 or float16, got ",
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

LogitPair check_logits(const char* op, const Tensor& logits, const Tensor& other, const std::optional<Tensor>& mask,
                       double temperature) {
  LogitPair in;
  in.dtype = dtype_of(logits, op);
  STD_TORCH_CHECK(logits.dim() == 2, op, ": expected logits of shape (M, V), got ", logits.dim(), " dimension(s)");
  in.rows = logits.size(0);
  in.classes = logits.size(1);
  check_matrix(op, "other_logits", other, in.rows, in.classes);
  check_dtype(op, "other_logits", other, logits.scalar_type());
  check_device(op, "other_logits", other, logits);
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

void check_stats(const char* op, const Tensor& stats, const Tensor& logits) {
  check_matrix(op, "stats", stats, kStats, logits.size(0));
  check_dtype(op, "stats", stats, accumulation_type(logits));
  check_device(op, "stats", stats, logits);
  check_contiguous(op, "stats", stats);
}

ForwardOutputs check_outputs(const char* op, const Tensor& logits, const Tensor& row_loss, const Tensor& stats) {
  check_vector(op, "row_loss", row_loss, logits.size(0));
  check_dtype(op, "row_loss", row_loss, accumulation_type(logits));
  check_device(op, "row_loss", row_loss, logits);
  check_contiguous(op, "row_loss", row_loss);
  check_stats(op, stats, logits);
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
                                 const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_other) {
  check_stats(op, stats, logits);
  check_vector(op, "row_grad", row_grad, logits.size(0));
  check_dtype(op, "row_grad", row_grad, accumulation_type(logits));
  check_device(op, "row_grad", row_grad, logits);
  return {stats.data_ptr(), row_grad.data_ptr(), row_grad.stride(0), check_grad(op, "grad_logits", grad_logits, logits),
          check_grad(op, "grad_other", grad_other, logits)};
}

// Rows a task, so that small problems stay on the calling thread.
int64_t grain_rows(const LogitPair& in) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, in.classes));
}

constexpr const char* kFwd = "fastgist_native::bidirectional_kl_fwd";
constexpr const char* kBwd = "fastgist_native::bidirectional_kl_bwd";

void bidirectional_kl_fwd_cpu(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                              double temperature, const Tensor& row_loss, const Tensor& stats) {
  const LogitPair in = check_logits(kFwd, logits, other_logits, mask, temperature);
  const ForwardOutputs out = check_outputs(kFwd, logits, row_loss, stats);
  // torch's own thread pool: it honours torch.set_num_threads and there is no second OpenMP runtime to compete with it.
  torch::stable::parallel_for(0, in.rows, grain_rows(in),
                              [&](int64_t begin, int64_t end) { cpu::bidirectional_kl_fwd(in, out, begin, end); });
}

void bidirectional_kl_bwd_cpu(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                              const Tensor& stats, const Tensor& row_grad, double temperature,
                              const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_other) {
  const LogitPair in = check_logits(kBwd, logits, other_logits, mask, temperature);
  const BackwardArguments args = check_backward(kBwd, logits, stats, row_grad, grad_logits, grad_other);
  torch::stable::parallel_for(0, in.rows, grain_rows(in),
                              [&](int64_t begin, int64_t end) { cpu::bidirectional_kl_bwd(in, args, begin, end); });
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
  const LogitPair in = check_logits(kFwd, logits, other_logits, mask, temperature);
  const ForwardOutputs out = check_outputs(kFwd, logits, row_loss, stats);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(kFwd, cuda::bidirectional_kl_fwd(in, out, current_stream(logits)));
}

void bidirectional_kl_bwd_cuda(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                               const Tensor& stats, const Tensor& row_grad, double temperature,
                               const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_other) {
  const LogitPair in = check_logits(kBwd, logits, other_logits, mask, temperature);
  const BackwardArguments args = check_backward(kBwd, logits, stats, row_grad, grad_logits, grad_other);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(kBwd, cuda::bidirectional_kl_bwd(in, args, current_stream(logits)));
}

// -- adapter with a few hidden units -----------------------------------------------------------------------------------

constexpr const char* kAdapterFwd = "fastgist_native::adapter_fwd";
constexpr const char* kAdapterBwd = "fastgist_native::adapter_bwd";

// Rows that 16-byte accesses are right for.
void check_rows(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_matrix(op, name, t, x.size(0), x.size(1));
  check_dtype(op, name, t, x.scalar_type());
  check_device(op, name, t, x);
  const bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  STD_TORCH_CHECK(t.stride(1) == 1 && t.stride(0) % 8 == 0 && aligned, op, ": rows of ", name,
                  " must be contiguous and aligned to 16 bytes");
}

void check_weight(const char* op, const char* name, const Tensor& t, const Tensor& down) {
  check_dtype(op, name, t, down.scalar_type());
  check_device(op, name, t, down);
}

void set_weights(AdapterArguments& args, const char* op, const Tensor& x, const Tensor& down,
                 const std::optional<Tensor>& down_bias, const Tensor& up, int64_t activation, double scale,
                 double residual_scale) {
  args.dtype = dtype_of(x, op);
  STD_TORCH_CHECK(args.dtype == DType::kBFloat16 || args.dtype == DType::kFloat16, op,
                  ": x must be bfloat16 or float16");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 8 == 0, op, ": expected x of shape (M, D), 8 dividing D");
  args.rows = x.size(0);
  args.columns = x.size(1);
  STD_TORCH_CHECK(down.dim() == 2 && down.size(0) >= 1 && down.size(0) <= kMostUnits, op, ": expected 1 to ", kMostUnits,
                  " hidden units");
  args.units = static_cast<int>(down.size(0));
  STD_TORCH_CHECK(args.columns <= (args.units <= 2 ? 2048 : 1024), op, ": D is too wide for ", args.units, " units");
  check_matrix(op, "down_weight", down, args.units, args.columns);
  check_matrix(op, "up_weight", up, args.columns, args.units);
  args.float_weights = down.scalar_type() == ScalarType::Float;
  if (!args.float_weights) check_dtype(op, "down_weight", down, x.scalar_type());
  check_device(op, "down_weight", down, x);
  check_weight(op, "up_weight", up, down);
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::kIdentity), op,
                  ": unknown activation ", activation);
  args.activation = static_cast<Activation>(activation);
  args.scale = static_cast<float>(scale);
  args.residual_scale = static_cast<float>(residual_scale);
  check_rows(op, "x", x, x);
  args.x = x.data_ptr();
  args.x_stride = x.stride(0);
  args.down = down.data_ptr();
  args.down_stride_h = down.stride(0);
  args.down_stride_d = down.stride(1);
  args.up = up.data_ptr();
  args.up_stride_n = up.stride(0);
  args.up_stride_h = up.stride(1);
  if (down_bias.has_value()) {
    check_vector(op, "down_bias", *down_bias, args.units);
    check_weight(op, "down_bias", *down_bias, down);
    args.down_bias = down_bias->data_ptr();
    args.down_bias_stride = down_bias->stride(0);
  }
}

void adapter_fwd_cuda(const Tensor& x, const Tensor& down, const std::optional<Tensor>& down_bias, const Tensor& up,
                      const std::optional<Tensor>& up_bias, const std::optional<Tensor>& residual,
                      const std::optional<Tensor>& branch, int64_t activation, double scale, double residual_scale,
                      const Tensor& y) {
  AdapterForward args{};
  set_weights(args, kAdapterFwd, x, down, down_bias, up, activation, scale, residual_scale);
  if (up_bias.has_value()) {
    check_vector(kAdapterFwd, "up_bias", *up_bias, args.columns);
    check_weight(kAdapterFwd, "up_bias", *up_bias, down);
    args.up_bias = up_bias->data_ptr();
    args.up_bias_stride = up_bias->stride(0);
  }
  if (residual.has_value()) {
    check_rows(kAdapterFwd, "residual", *residual, x);
    args.residual = residual->data_ptr();
    args.residual_stride = residual->stride(0);
  }
  if (branch.has_value()) {
    STD_TORCH_CHECK(residual.has_value(), kAdapterFwd, ": a branch is added to a residual, and there is none");
    check_rows(kAdapterFwd, "branch", *branch, x);
    args.branch = branch->data_ptr();
    args.branch_stride = branch->stride(0);
  }
  check_rows(kAdapterFwd, "y", y, x);
  check_contiguous(kAdapterFwd, "y", y);
  args.y = y.data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(kAdapterFwd, cuda::adapter_fwd(args, current_stream(x)));
}

// A gradient of a weight or bias, contiguous in the weights' dtype and of `elements` elements; null where not wanted.
void* check_weight_grad(const char* name, const std::optional<Tensor>& grad, const Tensor& down, int64_t elements) {
  if (!grad.has_value()) return nullptr;
  STD_TORCH_CHECK(grad->numel() == elements, kAdapterBwd, ": expected ", name, " of ", elements, " elements, got ",
                  grad->numel());
  check_weight(kAdapterBwd, name, *grad, down);
  check_contiguous(kAdapterBwd, name, *grad);
  return grad->data_ptr();
}

void adapter_bwd_cuda(const Tensor& grad, const Tensor& x, const Tensor& down, const std::optional<Tensor>& down_bias,
                      const Tensor& up, int64_t activation, double scale, double residual_scale, bool residual_is_x,
                      const Tensor& part, const std::optional<Tensor>& grad_x,
                      const std::optional<Tensor>& grad_down, const std::optional<Tensor>& grad_down_bias,
                      const std::optional<Tensor>& grad_up, const std::optional<Tensor>& grad_up_bias) {
  AdapterBackward args{};
  set_weights(args, kAdapterBwd, x, down, down_bias, up, activation, scale, residual_scale);
  check_rows(kAdapterBwd, "grad", grad, x);
  args.grad = grad.data_ptr();
  args.grad_stride = grad.stride(0);
  args.add_grad = residual_is_x;
  if (grad_x.has_value()) {
    check_rows(kAdapterBwd, "grad_x", *grad_x, x);
    check_contiguous(kAdapterBwd, "grad_x", *grad_x);
    args.grad_x = grad_x->data_ptr();
  }
  AdapterReduce reduce{};
  reduce.dtype = args.float_weights ? DType::kFloat32 : args.dtype;
  reduce.columns = args.columns;
  reduce.units = args.units;
  reduce.grad_down = check_weight_grad("grad_down", grad_down, down, args.units * args.columns);
  reduce.grad_down_bias = check_weight_grad("grad_down_bias", grad_down_bias, down, args.units);
  reduce.grad_up = check_weight_grad("grad_up", grad_up, down, args.units * args.columns);
  reduce.grad_up_bias = check_weight_grad("grad_up_bias", grad_up_bias, down, args.columns);
  STD_TORCH_CHECK(part.dim() == 2 && part.size(0) >= 1, kAdapterBwd, ": expected part of a row or more");
  check_matrix(kAdapterBwd, "part", part, part.size(0), (2 * args.units + 1) * args.columns + args.units);
  check_dtype(kAdapterBwd, "part", part, ScalarType::Float);
  check_device(kAdapterBwd, "part", part, x);
  check_contiguous(kAdapterBwd, "part", part);
  args.part = static_cast<float*>(part.data_ptr());
  args.programs = part.size(0);
  reduce.part = args.part;
  reduce.programs = args.programs;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(kAdapterBwd, cuda::adapter_bwd(args, current_stream(x)));
  check_launch(kAdapterBwd, cuda::adapter_reduce(reduce, current_stream(x)));
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
      "adapter_fwd(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? residual, "
      "Tensor? branch, int activation, float scale, float residual_scale, Tensor(a!) y) -> ()");
  m.def(
      "adapter_bwd(Tensor grad, Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, int activation, "
      "float scale, float residual_scale, bool residual_is_x, Tensor(a!) part, Tensor(b!)? grad_x, "
      "Tensor(c!)? grad_down, Tensor(d!)? grad_down_bias, Tensor(e!)? grad_up, Tensor(f!)? grad_up_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgist_native, CPU, m) {
  m.impl("bidirectional_kl_fwd", TORCH_BOX(&fastgist::bidirectional_kl_fwd_cpu));
  m.impl("bidirectional_kl_bwd", TORCH_BOX(&fastgist::bidirectional_kl_bwd_cpu));
}

#ifdef FASTGIST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastgist_native, CUDA, m) {
  m.impl("bidirectional_kl_fwd", TORCH_BOX(&fastgist::bidirectional_kl_fwd_cuda));
  m.impl("bidirectional_kl_bwd", TORCH_BOX(&fastgist::bidirectional_kl_bwd_cuda));
  m.impl("adapter_fwd", TORCH_BOX(&fastgist::adapter_fwd_cuda));
  m.impl("adapter_bwd", TORCH_BOX(&fastgist::adapter_bwd_cuda));
}
#endif
