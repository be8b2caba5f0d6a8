// The CPU ops without torch or Python, for a build with sanitizers: every format, layout and length against the formula
// in long double; bidirectional_kl here, the others in check_gist_loss.cpp and check_adapter.cpp. Exits with 1 where
// something failed. tests/test_extension.py builds and runs it, once for each instruction set (FASTGIST_CPU_ISA).
#include "../cpu/bidirectional_kl.h"
#include "check.h"

namespace {

using namespace fastgist;
using namespace fastgist::check;

// The plain form; the fused one is the same with fewer roundings and would need the instruction set that has it.
void check_exp() {
  constexpr bool kFma = cpu::kPortableFma;
  const auto exp = [](float x) { return cpu::exp_nonpositive<kFma>(x); };
  double worst = 0;
  for (uint32_t bits = 0x80000000u; bits < cpu::bit_cast<uint32_t>(-87.3f); bits += 997) {
    const float x = cpu::bit_cast<float>(bits);
    const double exact = std::exp(static_cast<double>(x));
    const double ulp = std::ldexp(1.0, std::ilogb(static_cast<float>(exact)) - 23);
    worst = std::max(worst, std::fabs(exp(x) - exact) / ulp);
  }
  expect(worst <= 1.5, "exp_nonpositive, worst error in ulp", "float", 0, worst, 1.5);
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  // Where the machine lacks fused products, those of a plain build round the exponent once more.
  for (double temperature : {0.3, 1.0, 3.0}) {
    const cpu::ExpScale<float> scale(temperature);
    const auto scaled = [&](float x) { return cpu::exp_scaled<kFma>(x, scale); };
    worst = 0;
    for (uint32_t bits = 0x80000000u; bits < cpu::bit_cast<uint32_t>(static_cast<float>(-87.3 * temperature));
         bits += 997) {
      const float x = cpu::bit_cast<float>(bits);
      const double exact = std::exp(static_cast<double>(x) / temperature);
      const double ulp = std::ldexp(1.0, std::ilogb(static_cast<float>(exact)) - 23);
      const double rounding = kFma ? 0 : std::fabs(x) / temperature;
      worst = std::max(worst, std::fabs(scaled(x) - exact) / ulp - rounding);
    }
    expect(worst <= 1.5, "exp_scaled, worst error in ulp", "float", 0, worst, 1.5);
    int64_t others = 0;
    for (uint32_t bits = 0x80000000u; bits <= cpu::bit_cast<uint32_t>(scale.least_normal); bits += 97) {
      const float x = cpu::bit_cast<float>(bits);
      others += cpu::exp_normal<kFma>(x, scale) != scaled(x);
    }
    others += cpu::exp_normal<kFma>(scale.least_normal, scale) != scaled(scale.least_normal);
    expect(others == 0, "numbers that exp_normal makes other than exp_scaled", "float", 0, others, 0);
    expect(scaled(scale.least_normal) >= std::numeric_limits<float>::min(), "exp_scaled(least_normal) is normal",
           "float", 0, scaled(scale.least_normal), std::numeric_limits<float>::min());
    expect(scaled(-inf) == 0, "exp_scaled(-inf)", "float", 0, scaled(-inf), 0);
    expect(scaled(-1e30f) == 0, "exp_scaled(-1e30)", "float", 0, scaled(-1e30f), 0);
    expect(scaled(0.0f) == 1, "exp_scaled(0)", "float", 0, scaled(0.0f), 1);
    expect(std::isnan(scaled(nan)), "exp_scaled(NaN)", "float", 0, scaled(nan), nan);
  }
  expect(exp(-inf) == 0, "exp_nonpositive(-inf)", "float", 0, exp(-inf), 0);
  expect(exp(-1e30f) == 0, "exp_nonpositive(-1e30)", "float", 0, exp(-1e30f), 0);
  expect(exp(0.0f) == 1, "exp_nonpositive(0)", "float", 0, exp(0.0f), 1);
  expect(std::isnan(exp(nan)), "exp_nonpositive(NaN)", "float", 0, exp(nan), nan);
}

template <typename T>
void check_bidirectional_kl(const char* type, DType dtype, double storage_eps, int64_t classes, int64_t stride_m,
                            int64_t stride_v) {
  using A = typename cpu::Accumulate<T>::type;
  constexpr int64_t kRows = 4, kMasked = 2;
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
  expect(loss_of_one == loss_of_three, "loss by three threads", type, classes, loss_of_three, loss_of_one);
  double sum = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    sum += finished_loss[row];
    const double wanted = static_cast<double>(row_loss[row]) * factor;
    expect(std::fabs(finished_loss[row] - wanted) <= 2 * eps * std::fabs(wanted), "finished row loss", type, classes,
           finished_loss[row], wanted);
  }
  expect(std::fabs(loss_of_one - sum) <= 2 * eps * std::fabs(sum), "finished loss", type, classes, loss_of_one, sum);

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
    Real m_z = -HUGE_VALL, m_o = -HUGE_VALL, s_p = 0, s_q = 0, e_p = 0, e_q = 0, terms = 0;
    for (int64_t v = 0; v < classes; ++v) {
      m_z = std::max(m_z, static_cast<Real>(cpu::load(z.at(row, v))));
      m_o = std::max(m_o, static_cast<Real>(cpu::load(o.at(row, v))));
    }
    std::vector<Real> p(classes), q(classes), d(classes);
    for (int64_t v = 0; v < classes; ++v) {
      const Real zc = cpu::load(z.at(row, v)) - m_z, oc = cpu::load(o.at(row, v)) - m_o;
      d[v] = (zc - oc) / temperature;
      s_p += p[v] = std::exp(zc / temperature);
      s_q += q[v] = std::exp(oc / temperature);
    }
    for (int64_t v = 0; v < classes; ++v) {
      e_p += (p[v] /= s_p) * d[v];
      e_q += (q[v] /= s_q) * d[v];
      terms += (p[v] + q[v]) * std::fabs(d[v]);
    }
    const double loss = static_cast<double>(e_p - e_q);
    expect(std::fabs(row_loss[row] - loss) <= 16 * eps * static_cast<double>(terms), "loss", type, classes,
           row_loss[row], loss);
    const Real of_row = row_grad[row] / temperature;
    for (int64_t v = 0; v < classes; ++v) {
      const double g_z = static_cast<double>(of_row * (p[v] * (d[v] - e_p) + p[v] - q[v]));
      const double g_o = static_cast<double>(of_row * (q[v] * (e_q - d[v]) + q[v] - p[v]));
      const Real size = of_row * ((p[v] + q[v]) * (1 + std::fabs(d[v]) + terms));
      const auto within = [&](const char* what, T got, Real wanted, Real size) {
        const double bound = static_cast<double>(size) * (16 * eps + storage_eps) + 1e-7 * (storage_eps > eps);
        expect(std::fabs(cpu::load(got) - static_cast<double>(wanted)) <= bound, what, type, classes, cpu::load(got),
               static_cast<double>(wanted));
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
  everywhere([]<typename T>(auto... arguments) { check_bidirectional_kl<T>(arguments...); });
  check_gist_loss();
  check_adapter();
  std::printf("%s: %d failures\n", cpu::name(cpu::isa()), failures);
  return failures == 0 ? 0 : 1;
}
