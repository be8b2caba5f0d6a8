// gist_loss against its formula in long double. See check_cpu.cpp.
#include "../cpu/gist_loss.h"

#include "check.h"

namespace {

using namespace fastgist;
using namespace fastgist::check;

enum class Kind { kClasses, kSmoothed, kSoft };

// The formula for one row: class weights t about the two logits' divergence.
struct Row {
  Divergence kl;
  std::vector<Real> t, ez, eo;
  Real unit_z = 0, unit_o = 0, weight = 0, loss = 0, terms = 0;

  Row(const std::vector<Real>& z, const std::vector<Real>& o, const std::vector<Real>& t, Real alpha, Real beta,
      Real temperature)
      : kl(z, o, temperature), t(t) {
    for (size_t v = 0; v < t.size(); ++v) {
      ez.push_back(std::exp(kl.z[v])), eo.push_back(std::exp(kl.o[v]));
      unit_z += ez[v], unit_o += eo[v], weight += t[v];
    }
    terms = beta * kl.terms;
    for (size_t v = 0; v < t.size(); ++v) {
      if (t[v] == 0) continue;  // contributes 0 also where its logit is -inf
      const Real ce_z = t[v] * (std::log(unit_z) - kl.z[v]), ce_o = t[v] * (std::log(unit_o) - kl.o[v]);
      loss += ce_z + alpha * ce_o;
      terms += ce_z + alpha * ce_o;
    }
    loss += beta * kl.loss;
  }
  Real grad_z(size_t v, Real beta_t) const {
    const Real ce = weight * ez[v] / unit_z - t[v];
    return beta_t == 0 ? ce : ce + beta_t * (kl.p[v] * (kl.d[v] - kl.e_p) + kl.p[v] - kl.q[v]);
  }
  Real grad_o(size_t v, Real alpha, Real beta_t) const {
    const Real ce = alpha * (weight * eo[v] / unit_o - t[v]);
    return beta_t == 0 ? ce : ce + beta_t * (kl.q[v] * (kl.e_q - kl.d[v]) + kl.q[v] - kl.p[v]);
  }
};

template <typename T, bool kIsUnkind>
void check(Kind kind, double temperature, const char* type, DType dtype, double storage_eps, int64_t classes,
           int64_t stride_m, int64_t stride_v) {
  using A = typename cpu::Accumulate<T>::type;
  constexpr int64_t kRows = kIsUnkind ? int64_t(kUnkind) : 4, kIgnored = kNotRead;
  const double alpha = 0.5, beta = 0.75, smoothing = kind == Kind::kSmoothed ? 0.1 : 0.0;
  const double eps = std::numeric_limits<A>::epsilon();
  const A nan = std::numeric_limits<A>::quiet_NaN();
  const bool soft = kind == Kind::kSoft;
  Matrix<T> z(kRows, classes, stride_m, stride_v), o(kRows, classes, stride_m, stride_v);
  Matrix<T> weights(kRows, classes, stride_m, stride_v);
  std::mt19937 random(static_cast<unsigned>(classes));
  std::normal_distribution<double> normal(0.0, 3.0);
  std::unique_ptr<int64_t[]> labels(new int64_t[kRows]);
  for (int64_t row = 0; row < kRows; ++row) {
    labels[row] = !soft && row == kIgnored ? -100 : static_cast<int64_t>(random() % classes);
    if (kIsUnkind && row != kIgnored) labels[row] = 1;   // which is there in every row that has any
    if (labels[row] == -100 && stride_m != 0) continue;  // its NaN must not be seen
    for (int64_t v = 0; v < classes; ++v) {
      cpu::store(static_cast<A>(normal(random)), z.at(row, v));
      cpu::store(static_cast<A>(normal(random) + 100.0), o.at(row, v));
      cpu::store(static_cast<A>(random() % 3 ? 0.0 : 0.25), weights.at(row, v));
    }
    if (kIsUnkind) spoil(row, z, o, temperature);
  }
  std::unique_ptr<A[]> row_loss(new A[kRows]), stats(new A[kGistStats * kRows]), row_grad(new A[kRows]);
  for (int64_t row = 0; row < kRows; ++row) row_loss[row] = nan, row_grad[row] = static_cast<A>(0.5 + row);
  for (int64_t i = 0; i < kGistStats * kRows; ++i) stats[i] = nan;
  Matrix<T> grad_z(kRows, classes, classes, 1), grad_o(kRows, classes, classes, 1);
  Matrix<T> alone(kRows, classes, classes, 1);

  GistLossInputs in;
  in.logits = {dtype,    kRows,          classes,  temperature, z.buffer.get(), stride_m,
               stride_v, o.buffer.get(), stride_m, stride_v,    nullptr,        0};
  in.target = {soft ? nullptr : labels.get(), weights.buffer.get(), dtype, soft ? stride_m : 1, stride_v};
  in.alpha = alpha, in.beta = in.beta_z = in.beta_o = beta, in.label_smoothing = smoothing, in.ignore_index = -100;
  in.first_class = 0, in.every_class = classes;
  cpu::gist_loss_fwd(in, {row_loss.get(), stats.get()}, threads(3));
  const BackwardArguments both = {stats.get(), row_grad.get(), 1, grad_z.buffer.get(), grad_o.buffer.get()};
  cpu::gist_loss_bwd(in, both, threads(3));
  cpu::gist_loss_bwd(in, {stats.get(), row_grad.get(), 1, nullptr, alone.buffer.get()}, threads(1));

  // Finished in the forward, by one thread and by three, and for one side alone: the same numbers.
  const double scale = 0.75;
  const A divisor = 2.5;
  const A factor = static_cast<A>(scale / divisor);
  A loss_of_one = nan, loss_of_three = nan;
  std::unique_ptr<A[]> finished_loss(new A[kRows]);
  Matrix<T> finished_z(kRows, classes, classes, 1), finished_o(kRows, classes, classes, 1);
  Matrix<T> again_z(kRows, classes, classes, 1), again_o(kRows, classes, classes, 1);
  const auto finish = [&](int64_t count, A* loss, T* to_z, T* to_o) {
    cpu::gist_loss_fwd_bwd(in, {scale, &divisor, finished_loss.get(), loss, to_z, to_o}, threads(count));
  };
  finish(1, &loss_of_one, finished_z.buffer.get(), finished_o.buffer.get());
  finish(3, &loss_of_three, again_z.buffer.get(), nullptr);
  finish(3, &loss_of_three, nullptr, again_o.buffer.get());
  expect(same(loss_of_one, loss_of_three), "gist loss by three threads", type, classes, loss_of_three, loss_of_one);
  // The gist's side detached from the divergence: its cross-entropy alone. The other side's gradient is as it was.
  in.beta_o = 0;
  Matrix<T> attached(kRows, classes, classes, 1), detached(kRows, classes, classes, 1);
  finish(3, &loss_of_three, attached.buffer.get(), detached.buffer.get());

  const auto within = [&](const char* what, T got, Real wanted, Real size) {
    const double bound = static_cast<double>(size) * (16 * eps + storage_eps) + (storage_eps > eps ? 1e-7
                                                                                 : kIsUnkind       ? 1e-30
                                                                                                   : 0);
    const double w = static_cast<double>(wanted);
    expect(same(cpu::load(got), w) || std::fabs(cpu::load(got) - w) <= bound, what, type, classes, cpu::load(got), w);
  };
  for (int64_t row = 0; row < kRows; ++row) {
    if (labels[row] == -100) {
      expect(row_loss[row] == 0, "ignored loss", type, classes, row_loss[row], 0);
      for (int64_t v = 0; v < classes; ++v) {
        within("ignored grad_z", grad_z.at(row, v), 0, 0);
        within("ignored grad_o", grad_o.at(row, v), 0, 0);
        within("ignored finished grad_z", finished_z.at(row, v), 0, 0);
        within("ignored finished grad_o", finished_o.at(row, v), 0, 0);
      }
      continue;
    }
    std::vector<Real> of_z, of_o, t;
    for (int64_t v = 0; v < classes; ++v) {
      of_z.push_back(cpu::load(z.at(row, v)));
      of_o.push_back(cpu::load(o.at(row, v)));
      const Real hard = v == labels[row] ? 1 - smoothing : 0;
      t.push_back(soft ? static_cast<Real>(cpu::load(weights.at(row, v))) : hard + Real(smoothing) / classes);
    }
    const Row exact(of_z, of_o, t, alpha, beta, temperature);
    const auto near = [&](double got, double wanted, double size) {
      return same(got, wanted) || std::fabs(got - wanted) <= size;
    };
    const double finished = row_loss[row] * static_cast<double>(factor);
    expect(near(finished_loss[row], finished, 2 * eps * std::fabs(finished)), "finished gist loss", type, classes,
           finished_loss[row], finished);
    const double loss = static_cast<double>(exact.loss);
    expect(near(row_loss[row], loss, 16 * eps * (1 + static_cast<double>(exact.terms))), "gist loss", type, classes,
           row_loss[row], loss);
    const Real beta_t = beta / temperature;
    for (int64_t v = 0; v < classes; ++v) {
      // Where a part is NaN, a gradient that is not does without it.
      const auto number = [](Real x) { return std::isfinite(x) ? x : Real(0); };
      const Divergence& kl = exact.kl;
      const Real softmaxes = exact.weight * (number(exact.ez[v] / exact.unit_z) + number(exact.eo[v] / exact.unit_o));
      // A power of T of an exponential has T times its error, and the error of its argument grows with the argument.
      const Real far = 1 + number(std::fabs(kl.d[v])) + number(std::fabs(kl.e_p)) + number(std::fabs(kl.e_q));
      const Real both = number(kl.p[v] + kl.q[v]);
      const Real size = row_grad[row] * ((softmaxes + beta_t * both) * (far + 4) + exact.t[v]);
      within("gist grad_z", grad_z.at(row, v), row_grad[row] * exact.grad_z(v, beta_t), size);
      within("gist grad_o", grad_o.at(row, v), row_grad[row] * exact.grad_o(v, alpha, beta_t), size);
      within("gist grad_o alone", alone.at(row, v), cpu::load(grad_o.at(row, v)), 0);
      const Real other = factor / row_grad[row];
      within("gist finished grad_z", finished_z.at(row, v), factor * exact.grad_z(v, beta_t), size * other);
      within("gist finished grad_o", finished_o.at(row, v), factor * exact.grad_o(v, alpha, beta_t), size * other);
      within("gist finished grad_z alone", again_z.at(row, v), cpu::load(finished_z.at(row, v)), 0);
      within("gist finished grad_o alone", again_o.at(row, v), cpu::load(finished_o.at(row, v)), 0);
      within("gist attached grad_z", attached.at(row, v), cpu::load(finished_z.at(row, v)), 0);
      within("gist detached grad_o", detached.at(row, v), factor * exact.grad_o(v, alpha, 0), size * other);
    }
  }
}

}  // namespace

void check_gist_loss() {
  everywhere([]<typename T>(auto... arguments) {
    check<T, false>(Kind::kClasses, 3.0, arguments...);
    check<T, false>(Kind::kSmoothed, 1.0, arguments...);
    check<T, false>(Kind::kSoft, 1.7, arguments...);
  });
  everywhere_unkind([]<typename T>(auto... arguments) {
    check<T, true>(Kind::kClasses, 3.0, arguments...);
    check<T, true>(Kind::kSmoothed, 1.0, arguments...);
    check<T, true>(Kind::kSoft, 1.7, arguments...);
  });
}
