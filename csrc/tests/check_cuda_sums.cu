// The CUDA kernels' online sums (OnlinePair), run as host code: no GPU is needed. Classes fall to many sets in every
// way, some of them empty, and the sets merge by a tree; the result must be the formula's. tests/aot/test_csrc.py runs
// it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "../cuda/bidirectional_kl.cuh"

namespace {

using namespace fastgist::cuda;
using Real = long double;

int failures = 0;

void expect(bool ok, const char* what, double got, double wanted) {
  if (ok) return;
  if (++failures <= 20) std::printf("%s: got %.9g, want %.9g\n", what, got, wanted);
}

// The sums over all classes: dealt to `sets` sets in turn, `block` classes a step, then merged pairwise.
template <typename A>
OnlinePair<A> sums_of(const std::vector<A>& z, const std::vector<A>& o, size_t sets, size_t block, A to_exp2) {
  std::vector<OnlinePair<A>> part(sets, OnlinePair<A>::empty());
  size_t step = 0;
  for (size_t start = 0; start < z.size(); start += block, ++step) {
    OnlinePair<A>& sums = part[step % sets];
    const size_t end = std::min(start + block, z.size());
    A m_z = z[start], m_o = o[start];
    for (size_t v = start; v < end; ++v) {
      m_z = larger(m_z, z[v]);
      m_o = larger(m_o, o[v]);
    }
    sums.raise(m_z, m_o, to_exp2);
    for (size_t v = start; v < end; ++v) sums.add(z[v], o[v], to_exp2);
  }
  for (size_t distance = 1; distance < sets; distance *= 2) {
    for (size_t s = 0; s + distance < sets; s += 2 * distance) part[s].merge(part[s + distance], to_exp2);
  }
  return part[0];
}

template <typename A>
void check_values(const char* what, size_t classes, double spread, double offset, bool sorted) {
  const A temperature = 3;
  const A to_exp2 = static_cast<A>(1.4426950408889634 / 3.0);
  std::mt19937 random(static_cast<unsigned>(classes));
  std::normal_distribution<double> normal(0.0, spread);
  std::vector<A> z(classes), o(classes);
  for (size_t v = 0; v < classes; ++v) {
    z[v] = static_cast<A>(normal(random));
    o[v] = static_cast<A>(normal(random) + offset);
  }
  if (sorted) std::sort(z.begin(), z.end());  // the maximum rises with every step
  const A inf = std::numeric_limits<A>::infinity();
  if (classes > 4) z[classes / 2] = o[classes / 2] = -inf;  // absent on both sides
  const Real m_z = *std::max_element(z.begin(), z.end()), m_o = *std::max_element(o.begin(), o.end());
  Real s_p = 0, s_q = 0, w_p = 0, w_q = 0, terms = 0;
  for (size_t v = 0; v < classes; ++v) {
    if (z[v] == -inf) continue;
    const Real d = (z[v] - m_z) - (o[v] - m_o);
    const Real p = std::exp((z[v] - m_z) / temperature), q = std::exp((o[v] - m_o) / temperature);
    s_p += p;
    s_q += q;
    w_p += p * d;
    w_q += q * d;
    terms += (p + q) * std::fabs(d);
  }
  const double eps = std::numeric_limits<A>::epsilon();
  for (size_t sets : {1, 3, 32, 256}) {
    for (size_t block : {1, 8, 64}) {
      const OnlinePair<A> sums = sums_of(z, o, sets, block, to_exp2);
      const double slack = 64 * eps * (1 + spread);
      expect(sums.lone == 0, what, sums.lone, 0);
      expect(sums.m_z == m_z && sums.m_o == m_o, what, sums.m_z, static_cast<double>(m_z));
      expect(std::fabs(sums.s_p - s_p) <= slack * s_p, what, sums.s_p, static_cast<double>(s_p));
      expect(std::fabs(sums.s_q - s_q) <= slack * s_q, what, sums.s_q, static_cast<double>(s_q));
      expect(std::fabs(sums.w_p - w_p) <= slack * terms, what, sums.w_p, static_cast<double>(w_p));
      expect(std::fabs(sums.w_q - w_q) <= slack * terms, what, sums.w_q, static_cast<double>(w_q));
    }
  }
}

template <typename A>
void check_special() {
  const A inf = std::numeric_limits<A>::infinity(), nan = std::numeric_limits<A>::quiet_NaN();
  const A to_exp2 = 1;
  const auto loss = [&](std::vector<A> z, std::vector<A> o, size_t sets) {
    const OnlinePair<A> s = sums_of(z, o, sets, 1, to_exp2);
    const A value = s.w_p / s.s_p - s.w_q / s.s_q;
    return s.lone > 0 && value == value ? inf : value;
  };
  for (size_t sets : {1, 4}) {
    expect(loss({1, -inf, 0}, {0, 1, 2}, sets) == inf, "one-sided -inf", loss({1, -inf, 0}, {0, 1, 2}, sets), inf);
    expect(std::isfinite(loss({-inf, -inf, 5, 3}, {-inf, -inf, 1, 2}, sets)), "both -inf first", 0, 0);
    expect(std::isnan(loss({-inf, -inf}, {0, 1}, sets)), "all -inf", loss({-inf, -inf}, {0, 1}, sets), nan);
    expect(std::isnan(loss({0, nan, 1}, {0, 1, 2}, sets)), "NaN", loss({0, nan, 1}, {0, 1, 2}, sets), nan);
    expect(std::isnan(loss({0, inf, 1}, {0, 1, 2}, sets)), "+inf", loss({0, inf, 1}, {0, 1, 2}, sets), nan);
    expect(std::isfinite(loss({-60000, 60000}, {60000, -60000}, sets)), "wide gaps", 0, 0);
  }
}

}  // namespace

int main() {
  for (size_t classes : {1, 2, 7, 33, 1000, 5000}) {
    check_values<float>("float", classes, 3, 0, false);
    check_values<float>("float, 100 apart", classes, 3, 100, false);
    check_values<float>("float, rising", classes, 30, 0, true);
    check_values<double>("double", classes, 3, 0, false);
    check_values<double>("double, rising", classes, 30, 0, true);
  }
  check_special<float>();
  check_special<double>();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
