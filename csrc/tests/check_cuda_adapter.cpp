// The CUDA kernels of adapter for a few units, run on a CPU (emulate.h) against the formula in double. tests/aot/test_csrc.py
// builds and runs it.
#include "emulate.h"
//
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "../cuda/adapter.cuh"

namespace {

using namespace fastgist;
using namespace fastgist::cuda;
using T = __nv_bfloat16;

int failures = 0;
std::mt19937 generator(0);

// `rows` rows of `columns` numbers in precision T, `stride` apart; NaN between them.
struct Matrix {
  Matrix(int64_t rows, int64_t columns, int64_t stride, float spread = 1.0f)
      : columns(columns), stride(stride), data(rows * stride + 8) {
    std::normal_distribution<float> normal(0.0f, spread);
    for (T& x : data) x = __float2bfloat16_rn(NAN);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) at()[r * stride + c] = __float2bfloat16_rn(normal(generator));
    }
  }
  T* at() { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(data.data()) + 15) / 16 * 16); }
  double operator()(int64_t r, int64_t c) { return __bfloat162float(at()[r * stride + c]); }
  int64_t columns, stride;
  std::vector<T> data;
};

void expect(const char* what, double got, double wanted, double terms) {
  // float32 sums of products, then (for y and dx) one rounding to bfloat16
  const double slack = std::fabs(wanted) / 250 + terms * 2e-6;
  if (std::fabs(got - wanted) <= slack) return;
  if (++failures <= 20) std::printf("%s: got %.9g, want %.9g +- %.2g\n", what, got, wanted, slack);
}

double act(double z) { return 0.5 * z * std::erfc(-z / std::sqrt(2.0)); }
double slope(double z) {
  return 0.5 * std::erfc(-z / std::sqrt(2.0)) + z * std::exp(-0.5 * z * z) / std::sqrt(2 * M_PI);
}

template <int kUnits>
void check(int64_t rows, int64_t columns, bool float_weights, bool with_branch, bool own_residual, int64_t programs) {
  const int64_t stride = columns + 8;
  Matrix x(rows, columns, stride), grad(rows, columns, stride), branch(rows, columns, stride);
  Matrix other(rows, columns, stride);
  Matrix down(kUnits, columns, columns, 1 / std::sqrt(static_cast<float>(columns))), down_bias(1, kUnits, kUnits);
  Matrix up(columns, kUnits, kUnits), up_bias(1, columns, columns);
  std::vector<float> wide_down(kUnits * columns), wide_up(kUnits * columns), wide_bias(kUnits), wide_up_bias(columns);
  for (int64_t i = 0; i < kUnits * columns; ++i) {
    // a little off: the kernel must round them back
    wide_down[i] = __bfloat162float(down.at()[i]) * 1.0001f;
    wide_up[i] = __bfloat162float(up.at()[i]) * 1.0001f;
  }
  for (int h = 0; h < kUnits; ++h) wide_bias[h] = __bfloat162float(down_bias.at()[h]);
  for (int64_t c = 0; c < columns; ++c) wide_up_bias[c] = __bfloat162float(up_bias.at()[c]);

  std::vector<T> y(rows * columns), dx(rows * columns);
  AdapterForward args{};
  args.dtype = DType::kBFloat16;
  args.float_weights = float_weights;
  args.rows = rows, args.columns = columns, args.units = kUnits;
  args.activation = Activation::kGelu, args.scale = 0.7f, args.residual_scale = 0.6f;
  args.x = x.at(), args.x_stride = stride;
  args.down = float_weights ? static_cast<const void*>(wide_down.data()) : down.at();
  args.down_stride_h = columns, args.down_stride_d = 1;
  args.down_bias = float_weights ? static_cast<const void*>(wide_bias.data()) : down_bias.at();
  args.down_bias_stride = 1;
  args.up = float_weights ? static_cast<const void*>(wide_up.data()) : up.at();
  args.up_stride_n = kUnits, args.up_stride_h = 1;
  AdapterBackward back{};
  static_cast<AdapterArguments&>(back) = args;
  args.up_bias = float_weights ? static_cast<const void*>(wide_up_bias.data()) : up_bias.at();
  args.up_bias_stride = 1;
  args.residual = own_residual ? x.at() : other.at(), args.residual_stride = stride;
  args.branch = with_branch ? branch.at() : nullptr, args.branch_stride = stride;
  args.y = y.data();
  const unsigned threads = (columns / UnitTile<kUnits>::kCols + 31) / 32 * 32;
  constexpr int64_t kRows = UnitTile<kUnits>::kRows;
  const int64_t each = ((rows + kRows - 1) / kRows + programs - 1) / programs * kRows;
  emulate::launch(dim3(programs), dim3(threads), [&] { _adapter_units_fwd_kernel<T, kUnits>(args, each); });

  const int64_t width = (2 * kUnits + 1) * columns + kUnits;
  std::vector<float> part(programs * width, NAN);
  back.grad = grad.at(), back.grad_stride = stride;
  back.add_grad = own_residual;
  back.grad_x = dx.data(), back.part = part.data(), back.programs = programs;
  emulate::launch(dim3(programs), dim3(threads), [&] { _adapter_units_bwd_kernel<T, kUnits>(back, each); });
  std::vector<float> grad_down(kUnits * columns), grad_up(kUnits * columns), grad_bias(kUnits), grad_up_bias(columns);
  AdapterReduce reduce{DType::kFloat32,  part.data(),      programs,       columns,
                       kUnits,           grad_down.data(), grad_bias.data(), grad_up.data(),
                       grad_up_bias.data()};
  emulate::launch(dim3((width + 31) / 32), dim3(32, kReduceGroups), [&] { _adapter_units_reduce_kernel<float>(reduce); });

  std::vector<double> want_down(kUnits * columns), want_up(kUnits * columns), want_bias(kUnits), want_up_bias(columns);
  for (int64_t r = 0; r < rows; ++r) {
    double h[kUnits], dz[kUnits];
    for (int k = 0; k < kUnits; ++k) {
      double z = down_bias(0, k), dh = 0;
      for (int64_t c = 0; c < columns; ++c) z += x(r, c) * down(k, c), dh += grad(r, c) * up(c, k);
      h[k] = act(z), dz[k] = 0.7 * dh * slope(z);
      want_bias[k] += dz[k];
    }
    for (int64_t c = 0; c < columns; ++c) {
      double out = up_bias(0, c), in = 0;
      for (int k = 0; k < kUnits; ++k) {
        out += h[k] * up(c, k), in += dz[k] * down(k, c);
        want_down[k * columns + c] += dz[k] * x(r, c);
        want_up[c * kUnits + k] += 0.7 * h[k] * grad(r, c);
      }
      want_up_bias[c] += 0.7 * grad(r, c);
      const double added = (own_residual ? x(r, c) : other(r, c)) + (with_branch ? branch(r, c) : 0.0);
      expect("y", __bfloat162float(y[r * columns + c]), 0.7 * out + 0.6 * added, 10);
      expect("dx", __bfloat162float(dx[r * columns + c]), in + (own_residual ? 0.6 * grad(r, c) : 0.0), 20);
    }
  }
  const double terms = 10.0 * rows;
  for (int64_t i = 0; i < kUnits * columns; ++i) {
    expect("dD", grad_down[i], want_down[i], terms);
    expect("dU", grad_up[i], want_up[i], terms);
  }
  for (int k = 0; k < kUnits; ++k) expect("db_d", grad_bias[k], want_bias[k], 10 * terms);
  for (int64_t c = 0; c < columns; ++c) expect("db_u", grad_up_bias[c], want_up_bias[c], terms);
}

void check_activations() {
  for (double z = -9; z < 9; z += 0.37) {
    const auto x = static_cast<float>(z);
    const double s = 1 / (1 + std::exp(-z)), inner = std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z);
    const double half = 0.5 * (1 + std::tanh(inner));
    const double inner_slope = std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * z * z);
    expect("gelu", activate(x, Activation::kGelu), act(z), 0.5);
    expect("gelu'", activation_slope(x, Activation::kGelu), slope(z), 0.5);
    expect("gelu_tanh", activate(x, Activation::kGeluTanh), z * half, 0.5);
    expect("gelu_tanh'", activation_slope(x, Activation::kGeluTanh), half + 2 * z * half * (1 - half) * inner_slope, 1);
    expect("relu", activate(x, Activation::kRelu), z > 0 ? z : 0, 0.5);
    expect("relu'", activation_slope(x, Activation::kRelu), z > 0 ? 1 : 0, 0.5);
    expect("silu", activate(x, Activation::kSilu), z * s, 0.5);
    expect("silu'", activation_slope(x, Activation::kSilu), s * (1 + z * (1 - s)), 0.5);
    expect("identity'", activation_slope(x, Activation::kIdentity), 1, 0.5);
  }
  if (!std::isnan(activate(NAN, Activation::kRelu))) ++failures, std::printf("relu loses NaN\n");
}

}  // namespace

int main() {
  check_activations();
  check<4>(37, 104, false, true, true, 3);
  check<4>(9, 264, true, false, true, 2);
  check<1>(21, 64, true, true, false, 2);
  check<2>(13, 520, false, false, false, 1);
  check<3>(11, 72, true, true, true, 5);  // more programs than there is work for
  check<8>(17, 136, true, true, true, 2);
  check<5>(7, 64, false, true, false, 1);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
