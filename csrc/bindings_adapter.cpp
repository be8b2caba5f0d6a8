// Registers adapter's ops and dropout for CPU tensors, as bindings.cpp does the losses'.
#include <torch/csrc/stable/library.h>

#include <string>

#include "bindings.h"
#include "cpu/adapter.h"
#include "cpu/dispatch.h"
#include "cpu/dropout.h"

namespace fastgist {
namespace {

constexpr const char* kAdapterFwd = "fastgist_native::adapter_fwd";
constexpr const char* kAdapterBwd = "fastgist_native::adapter_bwd";
constexpr const char* kDropout = "fastgist_native::dropout";

using Optional = std::optional<Tensor>;

MatrixView matrix_view(const char* op, const char* name, const Optional& x, int64_t rows, int64_t columns,
                       ScalarType type) {
  if (!x.has_value()) return {};
  check_matrix(op, name, *x, rows, columns);
  check_dtype(op, name, *x, type);
  STD_TORCH_CHECK(x->is_cpu(), op, ": ", name, " is not on the CPU");
  return {x->data_ptr(), dtype_of(*x, op, name), x->stride(0), x->stride(1)};
}

MatrixView vector_view(const char* op, const char* name, const Optional& x, int64_t size, ScalarType type) {
  if (!x.has_value()) return {};
  STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == size, op, ": expected ", name, " of shape (", size, ",), got ",
                  x->dim(), " dimension(s) and ", x->numel(), " element(s)");
  check_dtype(op, name, *x, type);
  STD_TORCH_CHECK(x->is_cpu(), op, ": ", name, " is not on the CPU");
  return {x->data_ptr(), dtype_of(*x, op, name), 0, x->stride(0)};
}

// A contiguous result of `dims` dimensions, or null.
void* result(const char* op, const char* name, const Optional& x, int64_t elements, int64_t dims, ScalarType type) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(x->dim() == dims && x->numel() == elements, op, ": expected ", name, " of ", dims,
                  " dimension(s) and ", elements, " element(s), got ", x->dim(), " and ", x->numel());
  check_dtype(op, name, *x, type);
  STD_TORCH_CHECK(x->is_cpu(), op, ": ", name, " is not on the CPU");
  check_contiguous(op, name, *x);
  return x->data_ptr();
}

Activation activation_of(const char* op, const std::string& name) {
  const char* const names[] = {"gelu", "gelu_tanh", "relu", "silu", "identity"};
  for (int i = 0; i < 5; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  STD_TORCH_CHECK(false, op, ": no activation named ", name.c_str());
}

const int64_t* seed_of(const char* op, const Optional& seed, double dropout_p) {
  if (!seed.has_value()) return nullptr;
  STD_TORCH_CHECK(seed->numel() == 1, op, ": seed must hold one number, got ", seed->numel());
  check_dtype(op, "seed", *seed, ScalarType::Long);
  STD_TORCH_CHECK(seed->is_cpu(), op, ": seed is not on the CPU");
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": expected 0 <= dropout_p < 1, got ", dropout_p);
  return static_cast<const int64_t*>(seed->data_ptr());
}

void weights(const char* op, AdapterInputs& in, const Optional& down_weight, const Optional& down_bias,
             const Optional& up_weight, const Optional& up_bias, const Optional& norm_weight, const Optional& norm_bias,
             ScalarType type) {
  in.down_weight = matrix_view(op, "down_weight", down_weight, in.hidden, in.inner, type);
  in.down_bias = vector_view(op, "down_bias", down_bias, in.hidden, type);
  in.up_weight = matrix_view(op, "up_weight", up_weight, in.out, in.hidden, type);
  in.norm_weight = vector_view(op, "norm_weight", norm_weight, in.inner, type);
  in.norm_bias = vector_view(op, "norm_bias", norm_bias, in.inner, type);
  in.biases = 0;
  in.gated_biases = up_bias.has_value() && up_bias->dim() == 2;
  if (in.gated_biases) {
    STD_TORCH_CHECK(in.experts > 0, op, ": up_bias of 2 dimensions without a gate");
    in.biases = in.experts;
    in.up_bias = matrix_view(op, "up_bias", up_bias, in.experts, in.out, type);
  } else if (up_bias.has_value()) {
    in.biases = 1;
    in.up_bias = vector_view(op, "up_bias", up_bias, in.out, type);
  }
}

void gate_of(const char* op, AdapterInputs& in, const Optional& gate, ScalarType type) {
  in.experts = 0;
  if (!gate.has_value()) return;
  STD_TORCH_CHECK(gate->dim() == 2, op, ": expected gate of shape (", in.rows, ", E), got ", gate->dim(),
                  " dimension(s)");
  in.experts = gate->size(1);
  STD_TORCH_CHECK(in.experts > 0 && in.hidden % in.experts == 0, op, ": the gate's ", in.experts,
                  " columns must divide the ", in.hidden, " hidden units");
  in.gate = matrix_view(op, "gate", gate, in.rows, in.experts, type);
}

void adapter_fwd_cpu(const Tensor& x, const Tensor& down_weight, const Optional& down_bias, const Tensor& up_weight,
                     const Optional& up_bias, const Optional& residual, const Optional& branch, const Optional& gate,
                     const Optional& norm_weight, const Optional& norm_bias, const Optional& seed,
                     const std::string& activation, double scale, double residual_scale,
                     const std::optional<double>& norm_eps, double dropout_p, const Tensor& y, const Optional& z,
                     const Optional& stats) {
  const char* const op = kAdapterFwd;
  AdapterInputs in = {};
  STD_TORCH_CHECK(x.dim() == 2, op, ": expected x of shape (M, D), got ", x.dim(), " dimension(s)");
  STD_TORCH_CHECK(down_weight.dim() == 2 && up_weight.dim() == 2, op, ": the weights must have 2 dimensions");
  in.rows = x.size(0), in.inner = x.size(1), in.hidden = down_weight.size(0), in.out = up_weight.size(0);
  STD_TORCH_CHECK(in.inner > 0 && in.hidden > 0 && in.out > 0, op, ": a weight has an empty side");
  const ScalarType type = x.scalar_type();
  in.dtype = dtype_of(x, op, "x");
  in.weight_dtype = dtype_of(down_weight, op, "down_weight");
  in.x = matrix_view(op, "x", x, in.rows, in.inner, type);
  gate_of(op, in, gate, type);
  weights(op, in, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, down_weight.scalar_type());
  in.residual = matrix_view(op, "residual", residual, in.rows, in.out, type);
  in.branch = matrix_view(op, "branch", branch, in.rows, in.out, type);
  STD_TORCH_CHECK(residual.has_value() || !branch.has_value(), op, ": a branch without a residual");
  in.norm = norm_eps.has_value();
  in.norm_eps = norm_eps.value_or(0.0);
  in.seed = seed_of(op, seed, dropout_p);
  in.dropout_p = dropout_p;
  in.activation = activation_of(op, activation);
  in.scale = scale, in.residual_scale = residual_scale;
  AdapterOutputs out = {};
  out.y = result(op, "y", y, in.rows * in.out, 2, type);
  if (z.has_value()) {
    out.z = result(op, "z", z, in.rows * in.hidden, 2, z->scalar_type());
    out.z_dtype = dtype_of(*z, op, "z");
    STD_TORCH_CHECK((out.z_dtype == DType::kFloat64) == (in.dtype == DType::kFloat64), op,
                    ": z must be float64 where x is, and only there");
  }
  out.stats = result(op, "stats", stats, 2 * in.rows, 2, accumulation_type(x));
  cpu::adapter_fwd(in, out, threads());
}

void adapter_bwd_cpu(const Tensor& grad, const Optional& x, const Optional& down_weight, const Optional& down_bias,
                     const Optional& up_weight, const Optional& up_bias, const Optional& gate, const Optional& z,
                     const Optional& norm_weight, const Optional& norm_bias, const Optional& stats,
                     const Optional& seed, const std::string& activation, double scale, double residual_scale,
                     bool residual_is_x, double dropout_p, const Optional& grad_x, const Optional& grad_down_weight,
                     const Optional& grad_down_bias, const Optional& grad_up_weight, const Optional& grad_up_bias,
                     const Optional& grad_gate, const Optional& grad_norm_weight, const Optional& grad_norm_bias) {
  const char* const op = kAdapterBwd;
  AdapterInputs in = {};
  STD_TORCH_CHECK(grad.dim() == 2, op, ": expected grad of shape (M, D'), got ", grad.dim(), " dimension(s)");
  in.rows = grad.size(0), in.out = grad.size(1);
  const ScalarType type = grad.scalar_type();
  in.dtype = dtype_of(grad, op, "grad");
  // What no wanted gradient needs is not there: sizes come from what is.
  for (const auto& [t, side] : {std::pair{&z, 1}, {&up_weight, 1}, {&down_weight, 0}}) {
    if (t->has_value() && (*t)->dim() == 2) in.hidden = (*t)->size(side);
  }
  for (const Optional* t : {&x, &down_weight, &grad_x}) {
    if (t->has_value() && (*t)->dim() == 2) in.inner = (*t)->size(1);
  }
  ScalarType weight_type = type;
  for (const Optional* t : {&up_bias, &up_weight, &down_weight, &grad_down_weight, &grad_down_bias}) {
    if (t->has_value()) weight_type = (*t)->scalar_type();
  }
  STD_TORCH_CHECK((weight_type == ScalarType::Double) == (type == ScalarType::Double), op,
                  ": weights must be float64 where grad is, and only there");
  in.x = matrix_view(op, "x", x, in.rows, in.inner, type);
  gate_of(op, in, gate, type);
  weights(op, in, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, weight_type);
  in.norm = stats.has_value();
  in.seed = seed_of(op, seed, dropout_p);
  in.dropout_p = dropout_p;
  in.activation = activation_of(op, activation);
  in.scale = scale, in.residual_scale = residual_scale;

  AdapterGradients out = {};
  out.grad = matrix_view(op, "grad", grad, in.rows, in.out, type);
  if (z.has_value()) {
    out.z = matrix_view(op, "z", z, in.rows, in.hidden, z->scalar_type());
    check_contiguous(op, "z", *z);
    STD_TORCH_CHECK((out.z.dtype == DType::kFloat64) == (in.dtype == DType::kFloat64), op,
                    ": z must be float64 where grad is, and only there");
  }
  out.stats = result(op, "stats", stats, 2 * in.rows, 2, accumulation_type(grad));
  out.residual_is_x = residual_is_x;
  out.x = result(op, "grad_x", grad_x, in.rows * in.inner, 2, type);
  if (grad_down_weight.has_value()) {
    in.weight_dtype = dtype_of(*grad_down_weight, op, "grad_down_weight");
    weight_type = grad_down_weight->scalar_type();
  }
  for (const Optional* t : {&grad_norm_bias, &grad_norm_weight, &grad_up_bias, &grad_up_weight, &grad_down_bias}) {
    if (t->has_value()) weight_type = (*t)->scalar_type(), in.weight_dtype = dtype_of(**t, op, "a gradient");
  }
  out.down_weight = result(op, "grad_down_weight", grad_down_weight, in.hidden * in.inner, 2, weight_type);
  out.down_bias = result(op, "grad_down_bias", grad_down_bias, in.hidden, 1, weight_type);
  out.up_weight = result(op, "grad_up_weight", grad_up_weight, in.out * in.hidden, 2, weight_type);
  out.up_bias = result(op, "grad_up_bias", grad_up_bias, in.biases * in.out, in.gated_biases ? 2 : 1, weight_type);
  out.gate = result(op, "grad_gate", grad_gate, in.rows * in.experts, 2, type);
  out.norm_weight = result(op, "grad_norm_weight", grad_norm_weight, in.inner, 1, weight_type);
  out.norm_bias = result(op, "grad_norm_bias", grad_norm_bias, in.inner, 1, weight_type);

  const auto ask = [&](bool needed, const Optional& t, const char* name) {
    STD_TORCH_CHECK(!needed || t.has_value(), op, ": the wanted gradients need ", name);
  };
  const bool of_norm = out.norm_weight != nullptr || out.norm_bias != nullptr;
  const bool of_z = out.x != nullptr || out.down_weight != nullptr || out.down_bias != nullptr || of_norm;
  ask(of_z || out.up_weight != nullptr || out.gate != nullptr, z, "z");
  ask(of_z || out.gate != nullptr, up_weight, "up_weight");
  ask(out.x != nullptr || of_norm, down_weight, "down_weight");
  ask(out.down_weight != nullptr || out.norm_weight != nullptr || (in.norm && out.x != nullptr), x, "x");
  ask(out.gate != nullptr, gate, "the gate");
  ask(of_norm, stats, "stats");
  STD_TORCH_CHECK(!residual_is_x || out.x == nullptr || in.inner == in.out, op, ": the residual is x, whose width ",
                  in.inner, " is not grad's, ", in.out);
  cpu::adapter_bwd(in, out, threads());
}

void dropout_cpu(const Tensor& h, const Tensor& seed, double dropout_p, const Tensor& out) {
  STD_TORCH_CHECK(h.dim() == 2, kDropout, ": expected h of shape (M, R), got ", h.dim(), " dimension(s)");
  const MatrixView from = matrix_view(kDropout, "h", h, h.size(0), h.size(1), h.scalar_type());
  void* const to = result(kDropout, "out", out, h.numel(), 2, h.scalar_type());
  check_matrix(kDropout, "out", out, h.size(0), h.size(1));
  cpu::dropout({h.size(0), h.size(1), from, to, *seed_of(kDropout, seed, dropout_p), dropout_p}, threads());
}

int64_t vector_bytes() { return cpu::vector_bytes(); }

}  // namespace
}  // namespace fastgist

STABLE_TORCH_LIBRARY_FRAGMENT(fastgist_native, m) {
  m.def(
      "adapter_fwd(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
      "Tensor? residual, Tensor? branch, Tensor? gate, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed, "
      "str activation, float scale, float residual_scale, float? norm_eps, float dropout_p, Tensor(a!) y, "
      "Tensor(b!)? z, Tensor(c!)? stats) -> ()");
  m.def(
      "adapter_bwd(Tensor grad, Tensor? x, Tensor? down_weight, Tensor? down_bias, Tensor? up_weight, Tensor? up_bias, "
      "Tensor? gate, Tensor? z, Tensor? norm_weight, Tensor? norm_bias, Tensor? stats, Tensor? seed, str activation, "
      "float scale, float residual_scale, bool residual_is_x, float dropout_p, Tensor(a!)? grad_x, "
      "Tensor(b!)? grad_down_weight, Tensor(c!)? grad_down_bias, Tensor(d!)? grad_up_weight, Tensor(e!)? grad_up_bias, "
      "Tensor(f!)? grad_gate, Tensor(g!)? grad_norm_weight, Tensor(h!)? grad_norm_bias) -> ()");
  m.def("dropout(Tensor h, Tensor seed, float dropout_p, Tensor(a!) out) -> ()");
  m.def("vector_bytes() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastgist_native, CPU, m) {
  m.impl("adapter_fwd", TORCH_BOX(&fastgist::adapter_fwd_cpu));
  m.impl("adapter_bwd", TORCH_BOX(&fastgist::adapter_bwd_cpu));
  m.impl("dropout", TORCH_BOX(&fastgist::dropout_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(fastgist_native, CompositeExplicitAutograd, m) {
  m.impl("vector_bytes", TORCH_BOX(&fastgist::vector_bytes));
}
