// The CPU ops without torch or Python, for a build with sanitizers: every format, layout and length against the formula
// in long double; bidirectional_kl here, the others in check_gist_loss.cpp and check_adapter.cpp. Exits with 1 where
// something failed. tests/test_extension_build.py builds and runs it, once for each instruction set (FASTGIST_CPU_ISA).
#include "../cpu/bidirectional_kl.h"
#include "../cpu/dispatch.h"
#include "../cpu/pair_rows.h"
#include "check.h"

namespace {

using namespace fastgist;
using namespace fastgist::check;

// All three exponentials of every x, as the loops over rows take them, by the instructions that are dispatched to:
// fused where these have products that are.
struct Exponentials {
  template <bool kFma, int kBytes>
  static FASTGIST_INLINE void rows(const std::vector<float>& from, const cpu::ExpScale<float>& over_t,
                                   std::vector<float> (&to)[4], bool& fused) {
    fused = kFma;
    const float* x = from.data();
    float* nonpositive = to[0].data();
    const int64_t n = static_cast<int64_t>(from.size());
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) nonpositive[i] = cpu::exp_nonpositive<kFma>(x[i]);
    cpu::exponentials<kFma, kBytes>(x, n, 0.0f, over_t, to[1].data());
    cpu::OnlinePair<float> about;
    about.m_z = about.m_o = 0;
    about.sums_of<true, kFma, kBytes>(x, x, n, {x, x, 0}, over_t, to[2].data(), to[3].data());
  }
};

// The bounds that simd.h states, over all magnitudes whose exponential is a normal number.
void check_exp() {
  constexpr double kUlps = 1.2, kScaledUlps = 2.4;
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (double temperature : {0.3, 1.0, 1.7, 3.0}) {
    const cpu::ExpScale<float> scale(temperature);
    const float end = static_cast<float>(-87.3 * std::max(temperature, 1.0));
    std::vector<float> x = {scale.least_normal, 0.0f, -inf, -1e30f, nan};
    const size_t special = x.size();
    for (uint32_t bits = 0x80000000u; bits < cpu::bit_cast<uint32_t>(end); bits += 397) {
      x.push_back(cpu::bit_cast<float>(bits));
    }
    std::vector<float> found[4];
    for (auto& each : found) each.resize(x.size());
    bool fused = false;
    cpu::run_rows<Exponentials>(x, scale, found, fused);
    const auto& [nonpositive, scaled, normal, again] = found;
    double worst[2] = {}, beyond = 0;
    int64_t others = 0;
    const auto error = [](double at, float got) {
      const double exact = std::exp(at);
      return std::fabs(got - exact) / std::ldexp(1.0, std::ilogb(static_cast<float>(exact)) - 23);
    };
    for (size_t i = special; i < x.size(); ++i) {
      const double at = x[i] / temperature;
      if (x[i] > -87.3f) worst[0] = std::max(worst[0], error(x[i], nonpositive[i]));
      if (at <= -87.3) continue;
      // One rounding of the exponent of 2 more, half a unit in its last place, where products are not fused.
      const double rounding = fused || at == 0 ? 0 : std::log(2.0) * std::ldexp(1.0, std::ilogb(at / std::log(2.0)));
      const double ulps = error(at, scaled[i]);
      worst[1] = std::max(worst[1], ulps);
      beyond = std::max(beyond, ulps - rounding);
      others += x[i] >= scale.least_normal && (normal[i] != scaled[i] || again[i] != scaled[i]);
    }
    std::printf("%s, T = %g: exp_nonpositive %.3f ulp, exp_scaled %.3f (%.3f but for an exponent that is rounded)\n",
                cpu::name(cpu::isa()), temperature, worst[0], worst[1], beyond);
    expect(worst[0] <= kUlps, "exp_nonpositive, worst error in ulp", "float", 0, worst[0], kUlps);
    expect(beyond <= kScaledUlps, "exp_scaled, worst error in ulp", "float", 0, beyond, kScaledUlps);
    expect(worst[0] > 0.5 && worst[1] > 0.5, "errors were looked for", "float", 0, worst[1], 0.5);
    expect(others == 0, "numbers that exp_normal makes other than exp_scaled", "float", 0, others, 0);
    expect(normal[0] == scaled[0], "exp_normal(least_normal)", "float", 0, normal[0], scaled[0]);
    expect(scaled[0] >= std::numeric_limits<float>::min(), "exp_scaled(least_normal) is normal", "float", 0, scaled[0],
           std::numeric_limits<float>::min());
    for (const auto& each : {nonpositive, scaled}) {
      expect(each[1] == 1, "exp(0)", "float", 0, each[1], 1);
      expect(each[2] == 0, "exp(-inf)", "float", 0, each[2], 0);
      expect(each[3] == 0, "exp(-1e30)", "float", 0, each[3], 0);
      expect(std::isnan(each[4]), "exp(NaN)", "float", 0, each[4], nan);
    }
  }
}

template <typename T, bool kIsUnkind>
void check_bidirectional_kl(const char* type, DType dtype, double storage_eps, int64_t classes, int64_t stride_m,
                            int64_t stride_v) {
  using A = typename cpu::Accumulate<T>::type;
  constexpr int64_t kRows = kIsUnkind ? int64_t(kUnkind) : 4, kMasked = kNotRead;
  const double temperature = 3.0;
  const double eps = std::numeric_limits<A>::epsilon();
  Matrix<T> z(kRows, classes, stride_m, stride_v), o(kRows, classes, stride_m, stride_v);
  std::mt19937 random(static_cast<unsigned>(classes));
  std::normal_distribution<double> normal(0.0, 3.0);
  for (int64_t row = 0; row < kRows; ++row) {
    if (row == kMasked && stride_m != 0) continue;  // its NaN must not be seen
    for (int64_t v = 0; v < classes; ++v) {
      cpu::store(static_cast<A>(normal(random)), z.at(row, v));
      cpu::store(static_cast<A>(normal(random) + 100.0), o.at(row, v));
    }
    if (kIsUnkind) spoil(row, z, o, temperature);
  }
  std::unique_ptr<bool[]> mask(new bool[kRows]);
  for (int64_t row = 0; row < kRows; ++row) mask[row] = row != kMasked;
  const A nan = std::numeric_limits<A>::quiet_NaN();
  std::unique_ptr<A[]> row_loss(new A[kRows]), stats(new A[kStats * kRows]), row_grad(new A[kRows]);
  for (int64_t row = 0; row < kRows; ++row) row_loss[row] = nan, row_grad[row] = static_cast<A>(0.5 + row);
  for (int64_t i = 0; i < kStats * kRows; ++i) stats[i] = nan;
  Matrix<T> grad_z(kRows, classes, classes, 1), grad_o(kRows, classes, classes, 1);

  const LogitPair in = {dtype,    kRows,          classes,  temperature, z.buffer.get(), stride_m,
                        stride_v, o.buffer.get(), stride_m, stride_v,    mask.get(),     1};
  cpu::bidirectional_kl_fwd(in, {row_loss.get(), stats.get()}, threads(3));
  const BackwardArguments args = {stats.get(), row_grad.get(), 1, grad_z.buffer.get(), grad_o.buffer.get()};
  cpu::bidirectional_kl_bwd(in, args, threads(3));

  // Finished in the forward, by one thread and by three, and for one side alone: the same numbers.
  const double scale = 0.75;
  const A divisor = 2.5;
  const A factor = static_cast<A>(scale / divisor);
  A loss_of_one = nan, loss_of_three = nan;
  std::unique_ptr<A[]> finished_loss(new A[kRows]);
  Matrix<T> finished_z(kRows, classes, classes, 1), finished_o(kRows, classes, classes, 1);
  Matrix<T> again_z(kRows, classes, classes, 1), again_o(kRows, classes, classes, 1);
  const auto finish = [&](int64_t count, A* loss, T* to_z, T* to_o) {
    cpu::bidirectional_kl_fwd_bwd(in, {scale, &divisor, finished_loss.get(), loss, to_z, to_o}, threads(count));
  };
  finish(1, &loss_of_one, finished_z.buffer.get(), finished_o.buffer.get());
  finish(3, &loss_of_three, again_z.buffer.get(), nullptr);
  finish(3, &loss_of_three, nullptr, again_o.buffer.get());
  expect(same(loss_of_one, loss_of_three), "loss by three threads", type, classes, loss_of_three, loss_of_one);
  double sum = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    sum += finished_loss[row];
    const double wanted = static_cast<double>(row_loss[row]) * factor;
    const bool ok =
        same(finished_loss[row], wanted) || std::fabs(finished_loss[row] - wanted) <= 2 * eps * std::fabs(wanted);
    expect(ok, "finished row loss", type, classes, finished_loss[row], wanted);
  }
  const bool summed = same(loss_of_one, sum) || std::fabs(loss_of_one - sum) <= 2 * eps * std::fabs(sum);
  expect(summed, "finished loss", type, classes, loss_of_one, sum);

  for (int64_t row = 0; row < kRows; ++row) {
    if (row == kMasked) {
      expect(row_loss[row] == 0, "masked loss", type, classes, row_loss[row], 0);
      for (int64_t v = 0; v < classes; ++v) {
        expect(cpu::load(grad_z.at(row, v)) == 0, "masked grad_z", type, classes, cpu::load(grad_z.at(row, v)), 0);
        expect(cpu::load(grad_o.at(row, v)) == 0, "masked grad_o", type, classes, cpu::load(grad_o.at(row, v)), 0);
        expect(cpu::load(finished_z.at(row, v)) == 0 && cpu::load(finished_o.at(row, v)) == 0, "masked finished", type,
               classes, cpu::load(finished_z.at(row, v)), 0);
      }
      continue;
    }
    std::vector<Real> of_z, of_o;
    for (int64_t v = 0; v < classes; ++v) {
      of_z.push_back(cpu::load(z.at(row, v)));
      of_o.push_back(cpu::load(o.at(row, v)));
    }
    const Divergence exact(of_z, of_o, temperature);
    const std::vector<Real>&p = exact.p, &q = exact.q, &d = exact.d;
    const Real e_p = exact.e_p, e_q = exact.e_q, terms = exact.terms;
    const double loss = static_cast<double>(exact.loss);
    const bool near =
        same(row_loss[row], loss) || std::fabs(row_loss[row] - loss) <= 16 * eps * static_cast<double>(terms);
    expect(near, "loss", type, classes, row_loss[row], loss);
    const Real of_row = row_grad[row] / temperature;
    for (int64_t v = 0; v < classes; ++v) {
      const double g_z = static_cast<double>(of_row * (p[v] * (d[v] - e_p) + p[v] - q[v]));
      const double g_o = static_cast<double>(of_row * (q[v] * (e_q - d[v]) + q[v] - p[v]));
      const Real size = of_row * ((p[v] + q[v]) * (1 + std::fabs(d[v]) + terms));
      const auto within = [&](const char* what, T got, Real wanted, Real size) {
        // Exponentials that are no normal numbers are 0: a part in 1e30 of anything else here.
        const double bound = static_cast<double>(size) * (16 * eps + storage_eps) + (storage_eps > eps ? 1e-7
                                                                                     : kIsUnkind       ? 1e-30
                                                                                                       : 0);
        const double w = static_cast<double>(wanted);
        expect(same(cpu::load(got), w) || std::fabs(cpu::load(got) - w) <= bound, what, type, classes, cpu::load(got),
               w);
      };
      within("grad_z", grad_z.at(row, v), g_z, size);
      within("grad_o", grad_o.at(row, v), g_o, size);
      const Real other = factor / row_grad[row];
      within("finished grad_z", finished_z.at(row, v), g_z * other, size * other);
      within("finished grad_o", finished_o.at(row, v), g_o * other, size * other);
      within("finished grad_z alone", again_z.at(row, v), cpu::load(finished_z.at(row, v)), 0);
      within("finished grad_o alone", again_o.at(row, v), cpu::load(finished_o.at(row, v)), 0);
    }
  }
}

}  // namespace

void check_adapter();
void check_gist_loss();

int main() {
  check_exp();
  everywhere([]<typename T>(auto... arguments) { check_bidirectional_kl<T, false>(arguments...); });
  everywhere_unkind([]<typename T>(auto... arguments) { check_bidirectional_kl<T, true>(arguments...); });
  check_gist_loss();
  check_adapter();
  std::printf("%s: %d failures\n", cpu::name(cpu::isa()), failures);
  return failures == 0 ? 0 : 1;
}
