// What the checks of csrc/cpu without torch or Python share. Buffers have exactly the size they need, so an access past
// an end is seen.
#pragma once

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "../bidirectional_kl.h"
#include "../cpu/parallel.h"
#include "../cpu/simd.h"

namespace fastgist::check {

using cpu::BFloat16;
using cpu::Half;
using Real = long double;

inline int failures = 0;

inline void expect(bool ok, const char* what, const char* type, int64_t classes, double got, double wanted) {
  if (ok) return;
  if (++failures <= 20) {
    std::printf("%s (%s, %lld classes): got %.9g, want %.9g\n", what, type, static_cast<long long>(classes), got,
                wanted);
  }
}

// Calls as a number of threads would make them, one after the other and the last one first.
inline cpu::Parallel threads(int64_t count) {
  return {count, [](int64_t tasks, int64_t, const cpu::Range& body) {
            for (int64_t end = tasks; end > 0; end = end * 2 / 3) body(end * 2 / 3, end);
          }};
}

// A (rows, classes) matrix in a buffer of its own that ends with its last element.
template <typename T>
struct Matrix {
  int64_t rows, classes, stride_m, stride_v;
  std::unique_ptr<T[]> buffer;

  Matrix(int64_t rows, int64_t classes, int64_t stride_m, int64_t stride_v)
      : rows(rows), classes(classes), stride_m(stride_m), stride_v(stride_v) {
    const int64_t size = (rows - 1) * stride_m + (classes - 1) * stride_v + 1;
    buffer.reset(new T[size]);
    for (int64_t i = 0; i < size; ++i)
      cpu::store(std::numeric_limits<typename cpu::Accumulate<T>::type>::quiet_NaN(), buffer[i]);
  }
  T& at(int64_t row, int64_t v) { return buffer[row * stride_m + v * stride_v]; }
};

// Equal, or both NaN.
inline bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// The divergence of a row in long double, with the rules of bidirectional_kl.h for what is not finite.
struct Divergence {
  std::vector<Real> z, o;  // about the maxima
  std::vector<Real> p, q, d;
  Real s_p = 0, s_q = 0, e_p = 0, e_q = 0, terms = 0, loss = 0;

  Divergence(const std::vector<Real>& given_z, const std::vector<Real>& given_o, Real temperature) {
    constexpr Real inf = std::numeric_limits<Real>::infinity();
    const size_t n = given_z.size();
    Real m_z = -inf, m_o = -inf;
    for (size_t v = 0; v < n; ++v) m_z = std::max(m_z, given_z[v]), m_o = std::max(m_o, given_o[v]);
    m_z = m_z == -inf ? 0 : m_z, m_o = m_o == -inf ? 0 : m_o;
    bool lone = false;
    for (size_t v = 0; v < n; ++v) {
      z.push_back(given_z[v] - m_z), o.push_back(given_o[v] - m_o);
      const bool no_z = z[v] == -inf, no_o = o[v] == -inf;
      lone = lone || no_z != no_o;
      d.push_back(no_z || no_o ? 0 : (z[v] - o[v]) / temperature);
      p.push_back(std::exp(z[v] / temperature)), q.push_back(std::exp(o[v] / temperature));
      s_p += p[v], s_q += q[v];
    }
    for (size_t v = 0; v < n; ++v) {
      e_p += (p[v] /= s_p) * d[v];
      e_q += (q[v] /= s_q) * d[v];
      terms += (p[v] + q[v]) * std::fabs(d[v]);
    }
    loss = e_p - e_q;
    if (lone && loss == loss) loss = inf, e_p = e_q = std::numeric_limits<Real>::quiet_NaN();
  }
};

// What a row of an unkind matrix holds beside ordinary logits, by its number; row 2 is not to be read.
enum UnkindRow {
  kPlainRow,
  kLoneZ,
  kNotRead,
  kLoneO,
  kAbsent,
  kEmptyZ,
  kEmptyBoth,
  kNanRow,
  kInfRow,
  kFarRow,
  kUnkind
};

// One row of a pair with 16 classes or more. In a far row exponentials at temperature T underflow.
template <typename T>
void spoil(int64_t row, Matrix<T>& z, Matrix<T>& o, double temperature) {
  using A = typename cpu::Accumulate<T>::type;
  constexpr A inf = std::numeric_limits<A>::infinity();
  const int64_t last = z.classes - 1;
  const auto lower = [](T& x, double by) { cpu::store(static_cast<A>(cpu::load(x) - by), x); };
  if (row == kLoneZ) cpu::store(-inf, z.at(row, last));
  if (row == kLoneO) cpu::store(-inf, o.at(row, 0));
  if (row == kNanRow) cpu::store(std::numeric_limits<A>::quiet_NaN(), z.at(row, last / 2));
  if (row == kInfRow) cpu::store(inf, o.at(row, last));
  for (int64_t v = 0; v <= last; ++v) {
    const bool both = row == kEmptyBoth || (row == kAbsent && (v % 7 == 3 || v == last));
    if (both || row == kEmptyZ) cpu::store(-inf, z.at(row, v));
    if (both) cpu::store(-inf, o.at(row, v));
    if (row == kFarRow && v % 2 == 1) lower(z.at(row, v), v % 4 == 1 ? 100 * temperature : 1e4);
    if (row == kFarRow && v > last / 2) lower(o.at(row, v), v % 3 == 1 ? 88 * temperature : 500.0);
  }
}

// Every format, layout and length that a check is to see: check.template operator()<T>(name, dtype, what storing costs,
// classes, stride_m, stride_v).
template <typename Check>
void everywhere(const Check& check) {
  for (int64_t classes : {1, 2, 15, 16, 17, 127, 1000, 1023, 1024, 1025, 4097}) {
    const int64_t strides[][2] = {{classes, 1}, {classes + 3, 1}, {3 * classes, 3}, {1, 4}, {0, 1}};
    for (const auto& stride : strides) {
      check.template operator()<float>("float", DType::kFloat32, 0.0, classes, stride[0], stride[1]);
      check.template operator()<double>("double", DType::kFloat64, 0.0, classes, stride[0], stride[1]);
      check.template operator()<BFloat16>("bfloat16", DType::kBFloat16, 0x1p-8, classes, stride[0], stride[1]);
      check.template operator()<Half>("half", DType::kFloat16, 0x1p-11, classes, stride[0], stride[1]);
    }
  }
  // Several stretches, the last one short.
  check.template operator()<float>("float", DType::kFloat32, 0.0, 33001, 33001, 1);
  check.template operator()<Half>("half", DType::kFloat16, 0x1p-11, 33001, 33001, 1);
}

// The same for rows of what is not finite or far away, kUnkind of them.
template <typename Check>
void everywhere_unkind(const Check& check) {
  for (int64_t classes : {16, 17, 127, 1000, 1025, 4097}) {
    const int64_t strides[][2] = {{classes, 1}, {classes + 3, 1}, {1, kUnkind}};
    for (const auto& stride : strides) {
      check.template operator()<float>("float, unkind", DType::kFloat32, 0.0, classes, stride[0], stride[1]);
      check.template operator()<double>("double, unkind", DType::kFloat64, 0.0, classes, stride[0], stride[1]);
      check.template operator()<BFloat16>("bfloat16, unkind", DType::kBFloat16, 0x1p-8, classes, stride[0], stride[1]);
      check.template operator()<Half>("half, unkind", DType::kFloat16, 0x1p-11, classes, stride[0], stride[1]);
    }
  }
  check.template operator()<float>("float, unkind", DType::kFloat32, 0.0, 33001, 33001, 1);
  check.template operator()<Half>("half, unkind", DType::kFloat16, 0x1p-11, 33001, 33001, 1);
}

}  // namespace fastgist::check
