// adapter and dropout on CPUs without torch: values and gradients against the formula in long double, every format,
// with and without what is optional; by one thread and by three the same bits. (main: check_cpu.cpp.)
#include "../cpu/adapter.h"

#include <functional>

#include "../cpu/dropout.h"
#include "../cpu/philox.h"
#include "check.h"

namespace {

using namespace fastgist;
using namespace fastgist::check;

void check_philox() {
  // Known answers of philox4x32-10 as Random123 publishes them, for the counters that a mask uses: (low, high, 0, 0).
  uint32_t words[4 * cpu::kPhiloxLanes];
  cpu::philox_block(0, 0, words);
  const uint32_t wanted[] = {0x6627E8D5u, 0xE169C58Du, 0xBC57AC4Cu, 0x9B00DBD8u};
  for (int i = 0; i < 4; ++i) expect(words[i] == wanted[i], "philox", "uint32", i, words[i], wanted[i]);
}

// A (rows, columns) matrix of T with what it holds as doubles, in a buffer that ends with its last element.
template <typename T>
struct Numbers {
  int64_t rows, columns;
  Matrix<T> memory;
  std::vector<Real> exact;

  Numbers(int64_t rows, int64_t columns, int64_t stride_m, int64_t stride_n, std::mt19937& random, double spread)
      : rows(rows), columns(columns), memory(rows, columns, stride_m, stride_n), exact(rows * columns) {
    std::normal_distribution<double> normal(0.0, spread);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        using A = typename cpu::Accumulate<T>::type;
        cpu::store(static_cast<A>(normal(random)), memory.at(r, c));
        exact[r * columns + c] = cpu::load(memory.at(r, c));
      }
    }
  }
  MatrixView view(DType dtype) const { return {memory.buffer.get(), dtype, memory.stride_m, memory.stride_v}; }
  Real operator()(int64_t r, int64_t c) const { return exact[r * columns + c]; }
};

Real act(Activation kind, Real z) {
  switch (kind) {
    case Activation::kGelu:
      return z * std::erfc(-z / std::sqrt(Real(2))) / 2;
    case Activation::kGeluTanh:
      return z / 2 * (1 + std::tanh(std::sqrt(2 / Real(M_PI)) * (z + Real(0.044715) * z * z * z)));
    case Activation::kRelu:
      return z > 0 ? z : 0;
    case Activation::kSilu:
      return z / (1 + std::exp(-z));
    case Activation::kIdentity:
      return z;
  }
  return z;
}

// Central differences, exact to 1e-11 or so in long double.
Real slope(Activation kind, Real z) {
  if (kind == Activation::kRelu) return z > 0;
  const Real step = 1e-5L;
  return (act(kind, z + step) - act(kind, z - step)) / (2 * step);
}

struct Case {
  int64_t rows, inner, hidden, experts;
  bool norm, dropout, even;  // even: strides that need no copy
  Activation activation;
};

template <typename T>
void check_one(const char* type, DType dtype, double storage_eps, const Case& at) {
  using A = typename cpu::Accumulate<T>::type;
  std::mt19937 random(static_cast<unsigned>(at.rows * 1000 + at.hidden));
  const auto [rows, inner, hidden, experts, norm, dropout, even, activation] = at;
  const int64_t pad = even ? 0 : 3, step = even ? 1 : 2, biases = std::max<int64_t>(experts, 1);
  const auto make = [&](int64_t r, int64_t c, double spread) {
    return Numbers<T>(r, c, step * c + pad, step, random, spread);
  };
  const Numbers<T> x = make(rows, inner, 1), down = make(hidden, inner, 1 / std::sqrt(inner)), b = make(1, hidden, 1),
                   up = make(inner, hidden, 1 / std::sqrt(hidden)), ub = make(biases, inner, 1),
                   gate = make(rows, std::max<int64_t>(experts, 1), 1), nw = make(1, inner, 1), nb = make(1, inner, 1),
                   dy = make(rows, inner, 1);
  const int64_t seed = -12345678901234;
  AdapterInputs in = {};
  in.rows = rows, in.inner = in.out = inner, in.hidden = hidden, in.experts = experts, in.biases = biases;
  in.gated_biases = experts > 0;
  in.dtype = in.weight_dtype = dtype;
  in.x = in.residual = x.view(dtype), in.down_weight = down.view(dtype), in.down_bias = b.view(dtype);
  in.up_weight = up.view(dtype), in.up_bias = ub.view(dtype);
  if (experts > 0) in.gate = gate.view(dtype);
  if (norm) in.norm = true, in.norm_eps = 1e-5, in.norm_weight = nw.view(dtype), in.norm_bias = nb.view(dtype);
  if (dropout) in.seed = &seed, in.dropout_p = 0.25;
  in.activation = activation, in.scale = 0.7, in.residual_scale = -1.5;

  // The formula; kept hidden units from the rule itself, whose words check_philox has seen.
  std::vector<Real> a(rows * inner), z(rows * hidden), keep(rows * hidden, 1), h(rows * hidden), rstd(rows, 1),
      y(rows * inner);
  const cpu::Dropout rule(seed, 0.25, hidden);
  std::vector<uint32_t> words(rule.room(rows));
  rule.words(0, rows, words.data());
  const auto of_gate = [&](int64_t r, int64_t i) { return experts > 0 ? gate(r, i / (hidden / experts)) : Real(1); };
  for (int64_t r = 0; r < rows; ++r) {
    Real mean = 0, variance = 0;
    for (int64_t k = 0; k < inner; ++k) mean += x(r, k) / inner;
    for (int64_t k = 0; k < inner; ++k) variance += (x(r, k) - mean) * (x(r, k) - mean) / inner;
    if (norm) rstd[r] = 1 / std::sqrt(variance + Real(1e-5));
    for (int64_t k = 0; k < inner; ++k) {
      a[r * inner + k] = norm ? (x(r, k) - mean) * rstd[r] * nw(0, k) + nb(0, k) : x(r, k);
    }
    for (int64_t i = 0; i < hidden; ++i) {
      Real sum = b(0, i);
      for (int64_t k = 0; k < inner; ++k) sum += down(i, k) * a[r * inner + k];
      z[r * hidden + i] = sum;
      if (dropout) keep[r * hidden + i] = rule.keeps(words[r * 4 * rule.quads + i]) ? 1 / Real(0.75) : 0;
      h[r * hidden + i] = act(activation, sum) * of_gate(r, i) * keep[r * hidden + i];
    }
    for (int64_t k = 0; k < inner; ++k) {
      Real sum = 0;
      for (int64_t i = 0; i < hidden; ++i) sum += up(k, i) * h[r * hidden + i];
      for (int64_t e = 0; e < biases; ++e) sum += (experts > 0 ? gate(r, e) : 1) * ub(e, k);
      y[r * inner + k] = Real(0.7) * sum - Real(1.5) * x(r, k);
    }
  }
  std::vector<Real> dz(rows * hidden), dx(rows * inner), d_down(hidden * inner), d_b(hidden), d_up(inner * hidden),
      d_ub(biases * inner), d_gate(rows * biases), d_nw(inner), d_nb(inner);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t k = 0; k < inner; ++k) d_gate[r * biases + e] += Real(0.7) * dy(r, k) * ub(e, k);
    }
    for (int64_t i = 0; i < hidden; ++i) {
      Real sum = 0;
      for (int64_t k = 0; k < inner; ++k) {
        sum += Real(0.7) * dy(r, k) * up(k, i);
        d_up[k * hidden + i] += Real(0.7) * dy(r, k) * h[r * hidden + i];
      }
      sum *= keep[r * hidden + i];
      if (experts > 0) d_gate[r * biases + i / (hidden / experts)] += sum * act(activation, z[r * hidden + i]);
      dz[r * hidden + i] = sum * of_gate(r, i) * slope(activation, z[r * hidden + i]);
      d_b[i] += dz[r * hidden + i];
    }
    for (int64_t e = 0; e < biases; ++e) {
      for (int64_t k = 0; k < inner; ++k) d_ub[e * inner + k] += Real(0.7) * dy(r, k) * (experts > 0 ? gate(r, e) : 1);
    }
    std::vector<Real> da(inner), hat(inner);
    Real c1 = 0, c2 = 0;
    for (int64_t k = 0; k < inner; ++k) {
      for (int64_t i = 0; i < hidden; ++i) {
        da[k] += dz[r * hidden + i] * down(i, k);
        d_down[i * inner + k] += dz[r * hidden + i] * a[r * inner + k];
      }
      if (!norm) continue;
      hat[k] = nw(0, k) == 0 ? 0 : (a[r * inner + k] - nb(0, k)) / nw(0, k);
      d_nw[k] += da[k] * hat[k], d_nb[k] += da[k];
      da[k] *= nw(0, k);
      c1 += da[k] / inner, c2 += da[k] * hat[k] / inner;
    }
    for (int64_t k = 0; k < inner; ++k) dx[r * inner + k] = rstd[r] * (da[k] - c1 - hat[k] * c2) - Real(1.5) * dy(r, k);
  }

  const DType z_dtype = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const auto run = [&](int64_t count) {
    std::vector<std::unique_ptr<T[]>> out;
    for (int64_t n : {rows * inner, rows * inner, hidden * inner, hidden, inner * hidden, biases * inner, rows * biases,
                      inner, inner}) {
      out.emplace_back(new T[n]);
      for (int64_t i = 0; i < n; ++i) cpu::store(std::numeric_limits<A>::quiet_NaN(), out.back()[i]);
    }
    std::unique_ptr<A[]> kept(new A[rows * hidden]), stats(new A[2 * rows]);
    AdapterInputs back = in;
    cpu::adapter_fwd(in, {out[0].get(), kept.get(), z_dtype, norm ? stats.get() : nullptr}, threads(count));
    back.residual = {};
    cpu::adapter_bwd(back,
                     {dy.view(dtype),
                      {kept.get(), z_dtype, hidden, 1},
                      stats.get(),
                      true,
                      out[1].get(),
                      out[2].get(),
                      out[3].get(),
                      out[4].get(),
                      out[5].get(),
                      experts > 0 ? out[6].get() : nullptr,
                      norm ? out[7].get() : nullptr,
                      norm ? out[8].get() : nullptr},
                     threads(count));
    return out;
  };
  const auto ours = run(1), again = run(3);
  const std::vector<Real>* const exact[] = {&y, &dx, &d_down, &d_b, &d_up, &d_ub, &d_gate, &d_nw, &d_nb};
  const char* const names[] = {"y",         "dx",     "d down",        "d down bias", "d up",
                               "d up bias", "d gate", "d norm weight", "d norm bias"};
  for (int i = 0; i < 9; ++i) {
    if ((i == 6 && experts == 0) || (i > 6 && !norm)) continue;
    Real size = 0;
    for (Real value : *exact[i]) size = std::max(size, std::fabs(value));
    const double bound = static_cast<double>(size + 1) * (64 * std::numeric_limits<A>::epsilon() + storage_eps);
    for (size_t j = 0; j < exact[i]->size(); ++j) {
      const double got = cpu::load(ours[i][j]), wanted = static_cast<double>((*exact[i])[j]);
      expect(std::fabs(got - wanted) <= bound, names[i], type, hidden, got, wanted);
      expect(got == cpu::load(again[i][j]), "by three threads", type, hidden, cpu::load(again[i][j]), got);
    }
  }
}

template <typename T>
void check_dropout(const char* type, DType dtype, int64_t rows, int64_t columns) {
  std::mt19937 random(7);
  const Numbers<T> from(rows, columns, 2 * columns + 1, 2, random, 1);
  std::unique_ptr<T[]> to(new T[rows * columns]);
  cpu::dropout({rows, columns, from.view(dtype), to.get(), 99, 0.5}, threads(3));
  const cpu::Dropout rule(99, 0.5, columns);
  std::vector<uint32_t> words(rule.room(rows));
  rule.words(0, rows, words.data());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const double wanted = rule.keeps(words[r * 4 * rule.quads + c]) ? static_cast<double>(from(r, c)) * 2 : 0;
      const double got = cpu::load(to[r * columns + c]);
      expect(got == wanted, "dropout", type, columns, got, wanted);
    }
  }
}

}  // namespace

void check_adapter() {
  check_philox();
  const Case cases[] = {
      {1, 5, 1, 0, false, false, true, Activation::kGelu},
      {19, 64, 8, 0, true, false, true, Activation::kGelu},
      {37, 40, 6, 2, true, true, false, Activation::kSilu},
      {9, 33, 17, 0, false, true, false, Activation::kGeluTanh},
      {700, 32, 16, 4, false, false, true, Activation::kGelu},
      {530, 7, 33, 0, true, true, true, Activation::kIdentity},
      {21, 300, 4, 1, true, false, false, Activation::kRelu},
  };
  for (const Case& at : cases) {
    check_one<float>("float", DType::kFloat32, 0.0, at);
    check_one<double>("double", DType::kFloat64, 1e-9, at);  // the slope's differences
    check_one<cpu::BFloat16>("bfloat16", DType::kBFloat16, 0x1p-8, at);
    check_one<cpu::Half>("half", DType::kFloat16, 0x1p-10, at);
  }
  for (int64_t columns : {1, 3, 4, 31, 130}) {
    check_dropout<float>("float", DType::kFloat32, 21, columns);
    check_dropout<double>("double", DType::kFloat64, 21, columns);
    check_dropout<cpu::BFloat16>("bfloat16", DType::kBFloat16, 21, columns);
    check_dropout<cpu::Half>("half", DType::kFloat16, 21, columns);
  }
}
