// The row kernels of csrc/cuda, run on a CPU by emulated_device.h, against their formulas in long double: every path,
// clusters of every size, rows that begin anywhere, several rows a block, what does not count, what is not finite.
// tests/aot/test_csrc.py runs it where the CUDA headers are.
#include "emulated_device.h"

// After it: device.cuh is taken.
#include <cmath>
#include <limits>
#include <random>

#include "../cuda/again_rows.cuh"
#include "../cuda/arguments.cuh"
#include "../cuda/bidirectional_kl.cuh"
#include "../cuda/kept_rows.cuh"
#include "../cuda/total.cuh"

namespace {

using namespace fastgist;
using namespace fastgist::cuda;
using Real = long double;

int failures = 0, checks = 0;
const char* where = "";

void expect(bool ok, const char* what, int64_t row, int64_t v, double got, double wanted) {
  ++checks;
  if (ok) return;
  if (++failures <= 30) {
    std::printf("%s: %s at (%lld, %lld): got %.9g, want %.9g\n", where, what, static_cast<long long>(row),
                static_cast<long long>(v), got, wanted);
  }
}

template <typename T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<double> = DType::kFloat64;
template <>
constexpr DType kDType<__nv_bfloat16> = DType::kBFloat16;
template <>
constexpr DType kDType<__half> = DType::kFloat16;
template <typename T>
constexpr double kRounding = 0;
template <>
constexpr double kRounding<__nv_bfloat16> = 0x1p-8;
template <>
constexpr double kRounding<__half> = 0x1p-11;

template <typename T>
constexpr double kLeast = -3.3e38;
template <>
constexpr double kLeast<__half> = -6.5e4;

// A (rows, classes) matrix whose row r begins `offset + r * stride_m` elements after a 16-byte boundary. What is not in
// it is NaN, and must stay as it is.
template <typename T>
struct Matrix {
  int64_t rows, classes, offset, stride_m, stride_v;
  std::vector<uint4> memory;

  Matrix(int64_t rows, int64_t classes, int64_t offset, int64_t stride_m, int64_t stride_v)
      : rows(rows), classes(classes), offset(offset), stride_m(stride_m), stride_v(stride_v) {
    const int64_t size = offset + (rows - 1) * stride_m + (classes - 1) * stride_v + 1;
    memory.resize((size * sizeof(T) + 15) / 16);
    emulated::poison(memory.data(), memory.size());
  }
  T* data() { return reinterpret_cast<T*>(memory.data()) + offset; }
  T& at(int64_t row, int64_t v) { return data()[row * stride_m + v * stride_v]; }
  bool neighbours_untouched() {
    std::vector<bool> inside(memory.size() * 16 / sizeof(T));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t v = 0; v < classes; ++v) inside[offset + row * stride_m + v * stride_v] = true;
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(memory.data());
    for (size_t i = 0; i < inside.size(); ++i) {
      for (size_t b = 0; b < sizeof(T) && !inside[i]; ++b) {
        if (bytes[i * sizeof(T) + b] != 0xFF) return false;
      }
    }
    return true;
  }
};

struct Options {
  enum Target { kNone, kClasses, kSoft, kSoftFloat } target = kNone;  // kNone: bidirectional_kl
  double temperature = 3, alpha = 0.5, beta = 0.75, smoothing = 0;
  bool detach_z = false, detach_o = false;  // from the divergence
  bool want_z = true, want_o = true;
  bool unkind = false;  // rows with -inf, NaN, a class that is none
  bool masked = false;  // the first half of a row by the least number on one side, by -1e4 on the other
  double peak = 0;      // one class has all of a row's mass, the first on one side and the last on the other
  bool equal = false;   // both sides the same
  bool empty = false;   // the first row all -inf on one side, the last on both
  bool none_count = false;
  bool swapped = false;  // the sides, drawn as ever, in each other's place
  bool divisor = false;
  int64_t offset_z = 0, offset_o = 0, offset_grad = 0, pad = 0, stride_v = 1;
};

// The formula for one row.
struct Exact {
  std::vector<Real> grad_z, grad_o, size;
  Real loss = 0, terms = 0;

  Exact(const std::vector<Real>& z, const std::vector<Real>& o, const std::vector<Real>& t, const Options& with) {
    const size_t n = z.size();
    const Real inf = std::numeric_limits<Real>::infinity(), T = with.temperature;
    const bool gist = !t.empty();
    const Real beta = gist ? Real(with.beta) : Real(1), alpha = with.alpha;
    const auto largest = [&](const std::vector<Real>& x) {
      Real m = -inf;
      for (Real v : x) m = v > m || std::isnan(v) ? v : m;
      return m == -inf ? Real(0) : m;
    };
    const Real m_z = largest(z), m_o = largest(o);
    std::vector<Real> p(n), q(n), d(n), ez(n), eo(n);
    Real s_p = 0, s_q = 0, unit_z = 0, unit_o = 0, weight = 0, e_p = 0, e_q = 0;
    bool lone = false;
    for (size_t v = 0; v < n; ++v) {
      p[v] = std::exp((z[v] - m_z) / T), q[v] = std::exp((o[v] - m_o) / T);
      ez[v] = std::exp(z[v] - m_z), eo[v] = std::exp(o[v] - m_o);
      const bool no_z = z[v] == -inf, no_o = o[v] == -inf;
      d[v] = no_z || no_o ? 0 : ((z[v] - m_z) - (o[v] - m_o)) / T;
      lone = lone || no_z != no_o;
      s_p += p[v], s_q += q[v], unit_z += ez[v], unit_o += eo[v];
      if (gist) weight += t[v];
    }
    for (size_t v = 0; v < n; ++v) {
      p[v] /= s_p, q[v] /= s_q;
      e_p += p[v] * d[v], e_q += q[v] * d[v];
      if (!gist || beta != 0) terms += (p[v] + q[v]) * std::fabs(d[v]);
    }
    Real divergence = e_p - e_q;
    if (lone && !std::isnan(divergence)) divergence = inf, e_p = e_q = std::numeric_limits<Real>::quiet_NaN();
    if (!gist) loss = divergence;
    for (size_t v = 0; gist && v < n; ++v) {
      if (t[v] == 0) continue;
      const Real ce_z = t[v] * (std::log(unit_z) - (z[v] - m_z)), ce_o = t[v] * (std::log(unit_o) - (o[v] - m_o));
      loss += ce_z + (alpha == 0 ? 0 : alpha * ce_o);
      terms += std::fabs(ce_z) + (alpha == 0 ? 0 : alpha * std::fabs(ce_o));
    }
    if (gist && beta != 0) loss += beta * divergence;
    for (size_t v = 0; v < n; ++v) {
      Real of_z = beta / T * (p[v] * (d[v] - e_p) + p[v] - q[v]), of_o = beta / T * (q[v] * (e_q - d[v]) + q[v] - p[v]);
      Real at_size = beta / T * (p[v] + q[v]) * (5 + std::fabs(d[v]) + std::fabs(e_p) + std::fabs(e_q));
      // Where a part is NaN, a gradient that is not does without it.
      const auto number = [](Real x) { return std::isfinite(x) ? x : Real(0); };
      at_size = number(at_size);
      if (gist) {
        if (with.detach_z || beta == 0) of_z = 0;
        if (with.detach_o || beta == 0) of_o = 0;
        of_z += weight * ez[v] / unit_z - t[v];
        if (alpha != 0) of_o += alpha * (weight * eo[v] / unit_o - t[v]);
        const Real far = 5 + (ez[v] > 0 ? m_z - z[v] : 0) + (eo[v] > 0 ? m_o - o[v] : 0);
        at_size += weight * (number(ez[v] / unit_z) + number(eo[v] / unit_o)) * number(far) + t[v];
      }
      grad_z.push_back(of_z), grad_o.push_back(of_o), size.push_back(at_size);
    }
  }
};

template <typename T, int kLoss, typename A>
void run(const Plan& plan, const Arguments<A>& args, Pass pass) {
  const auto go = [&](const auto& body, int64_t stretches) {
    emulated::launch(plan.blocks, stretches, plan.cluster, plan.threads, plan.rows, plan.bytes, body);
  };
  const int64_t stretches = pass == Pass::kBackward ? 3 : 1;
  if constexpr (sizeof(T) < 8) {
    if (plan.path == Path::kWarp) return go([&] { _kept_rows_kernel<T, kLoss, 1>(args, plan.slice); }, 1);
    if (plan.path == Path::kKept) return go([&] { _kept_rows_kernel<T, kLoss, kBlockWarps>(args, plan.slice); }, 1);
    if (plan.path == Path::kAgain && plan.threads == kWarpSize) {
      return go([&] { _again_rows_kernel<T, kLoss, true, 1>(args, pass); }, stretches);
    }
    if (plan.path == Path::kAgain) {
      return go([&] { _again_rows_kernel<T, kLoss, true, kAgainWarps>(args, pass); }, stretches);
    }
  }
  go([&] { _again_rows_kernel<T, kLoss, false, kAgainWarps>(args, pass); }, stretches);
}

// bidirectional_kl's two kernels for row losses and float16, in a grid with fewer blocks than rows ask for, and the
// backward with several stretches of each row.
template <typename T, bool kVectorised, int kWarps>
void in_own_kernels(const LogitPair& in, const ForwardOutputs& out, const BackwardArguments& back) {
  using Tile = Tile<T, kVectorised, kWarps>;
  const auto go = [&](int64_t stretches, const auto& body) {
    emulated::launch(2, stretches, 1, Tile::kThreads, Tile::kRows, 0, body);
  };
  go(1, [&] { _bidirectional_kl_fwd_kernel<T, kVectorised, kWarps>(in, out); });
  go(2, [&] { _bidirectional_kl_bwd_kernel<T, kVectorised, kWarps>(in, back); });
}

// Row losses and gradients, in that order, as they were found.
using Found = std::vector<std::vector<double>>;

template <typename T, int kLoss>
Found check(int64_t rows, int64_t classes, const Device& device, Path path, int cluster, const Options& with,
            bool in_two_calls = false) {
  using A = typename Accumulate<T>::type;
  char name[160];
  std::snprintf(name, sizeof(name), "loss %d, %d bytes, %lld x %lld, path %d, cluster %d, target %d", kLoss,
                static_cast<int>(sizeof(T)), static_cast<long long>(rows), static_cast<long long>(classes),
                static_cast<int>(path), cluster, static_cast<int>(with.target));
  where = name;
  const A nan = std::numeric_limits<A>::quiet_NaN(), inf = std::numeric_limits<A>::infinity();
  const double eps = std::numeric_limits<A>::epsilon();
  const int64_t stride_m = classes * with.stride_v + with.pad;
  Matrix<T> z(rows, classes, with.offset_z, stride_m, with.stride_v);
  Matrix<T> o(rows, classes, with.offset_o, stride_m, with.stride_v);
  Matrix<T> soft(rows, classes, with.offset_z, stride_m, with.stride_v);
  Matrix<float> soft_float(rows, classes, 1, classes + 1, 1);
  Matrix<T> grad_z(rows, classes, with.offset_grad, classes, 1), grad_o(rows, classes, with.offset_grad, classes, 1);
  std::mt19937 random(static_cast<unsigned>(classes * 31 + rows));
  std::normal_distribution<double> normal(0.0, 3.0);
  std::unique_ptr<bool[]> mask(new bool[rows]);
  std::vector<int64_t> labels(rows);
  const int64_t lone = with.unkind ? rows - 1 : -1, bad = with.unkind ? rows - 2 : -1,
                none = with.unkind ? rows - 3 : -1;
  for (int64_t row = 0; row < rows; ++row) {
    labels[row] = row == 1 || with.none_count ? -100 : row == none ? classes : static_cast<int64_t>(random() % classes);
    mask[row] = row != 1 && !with.none_count;
    if ((row == 1 || with.none_count) && with.target != Options::kSoft && with.target != Options::kSoftFloat)
      continue;  // its NaN is not read
    for (int64_t v = 0; v < classes; ++v) {
      const bool absent = with.unkind && v % 7 == 3;
      store(absent ? -inf : static_cast<A>(normal(random)), z.at(row, v));
      store(absent ? -inf : static_cast<A>(normal(random) + 20.0), o.at(row, v));
      const float weight = absent || random() % 3 ? 0.0f : 0.25f;
      store(static_cast<A>(weight), soft.at(row, v));
      soft_float.at(row, v) = weight;
    }
    for (int64_t v = 0; with.masked && v < classes / 2; ++v) {
      store(static_cast<A>(kLeast<T>), z.at(row, v));
      store(A(-1e4), o.at(row, v));
      store(A(0), soft.at(row, v)), soft_float.at(row, v) = 0;
    }
    if (with.peak > 0) {
      store(A(with.peak) + load(z.at(row, 0)), z.at(row, 0));
      store(A(with.peak) + load(o.at(row, classes - 1)), o.at(row, classes - 1));
    }
    for (int64_t v = 0; v < classes; ++v) {
      if (with.equal) o.at(row, v) = z.at(row, v);
      if (with.empty && (row == 0 || row == rows - 1)) store(-inf, z.at(row, v));
      if (with.empty && row == rows - 1) store(-inf, o.at(row, v));
      if (with.swapped) std::swap(z.at(row, v), o.at(row, v));
    }
    if (with.masked && labels[row] >= 0) labels[row] = classes - 1;
    if (row == lone) store(-inf, z.at(row, classes / 2 - (classes / 2 % 7 == 3)));
    if (row == bad) store(row % 2 ? inf : nan, o.at(row, classes - 1));
    if (labels[row] >= 0 && labels[row] < classes && labels[row] % 7 == 3) labels[row] -= 1;
  }
  std::vector<A> row_loss(rows, nan), stats(kGistStats * rows, nan);
  A loss = nan;
  const A divisor = 7;
  const double scale = 0.5;

  Arguments<A> args;
  const LogitPair pair = {kDType<T>,
                          rows,
                          classes,
                          with.temperature,
                          z.data(),
                          stride_m,
                          with.stride_v,
                          o.data(),
                          stride_m,
                          with.stride_v,
                          kLoss == kKl ? mask.get() : nullptr,
                          1};
  if constexpr (kLoss == kKl) {
    args = arguments_of<A>(pair);
  } else {
    GistLossInputs in;
    in.logits = pair;
    in.target = {labels.data(), nullptr, DType::kFloat32, 1, 0};
    if (with.target == Options::kSoft) in.target = {nullptr, soft.data(), kDType<T>, stride_m, with.stride_v};
    if (with.target == Options::kSoftFloat) in.target = {nullptr, soft_float.data(), DType::kFloat32, classes + 1, 1};
    in.alpha = with.alpha, in.beta = with.beta, in.label_smoothing = with.smoothing, in.ignore_index = -100;
    in.first_class = 0, in.every_class = classes;
    in.beta_z = with.detach_z ? 0 : with.beta, in.beta_o = with.detach_o ? 0 : with.beta;
    args = arguments_of<A>(in);
    expect(kLoss == kGistAny || args.power == 3, "power", 0, 0, args.power, 3);
  }
  void* const to_z = with.want_z ? grad_z.data() : nullptr;
  void* const to_o = with.want_o ? grad_o.data() : nullptr;
  std::vector<A> row_grad(rows, static_cast<A>(with.divisor ? scale / divisor : scale));
  if constexpr (kLoss == kKl) {
    if (in_two_calls) {
      const ForwardOutputs out = {row_loss.data(), stats.data()};
      const BackwardArguments back = {stats.data(), row_grad.data(), 1, to_z, to_o};
      const auto vectorises = [&](int64_t stride) {
        constexpr int64_t kVec = kVectorBytes / sizeof(T);
        return with.stride_v == 1 && stride % kVec == 0 && classes % kVec == 0;
      };
      const bool wide = vectorises(stride_m) && with.offset_z == 0 && with.offset_o == 0 && with.offset_grad == 0;
      const bool short_rows = classes <= 1024;
      if (wide) {
        short_rows ? in_own_kernels<T, true, 1>(pair, out, back) : in_own_kernels<T, true, 8>(pair, out, back);
      } else {
        short_rows ? in_own_kernels<T, false, 1>(pair, out, back) : in_own_kernels<T, false, 8>(pair, out, back);
      }
      for (int64_t row = 0; row < rows; ++row) row_loss[row] *= row_grad[row];
    }
  } else if (in_two_calls) {
    args.row_loss = row_loss.data(), args.stats = stats.data();
    const Plan forward = choose(rows_of(args), {}, false);
    expect(forward.path == path, "path of the forward", 0, 0, static_cast<int>(forward.path), static_cast<int>(path));
    run<T, kLoss>(forward, args, Pass::kForward);
    for (int64_t row = 0; row < rows; ++row) row_loss[row] *= row_grad[row];  // as the other way leaves them
    args.row_grad = row_grad.data(), args.row_grad_stride = 1, args.grad_z = to_z, args.grad_o = to_o;
    run<T, kLoss>(choose(rows_of(args), {}, false), args, Pass::kBackward);
  }
  if (!in_two_calls) {
    finish_into(args, {scale, with.divisor ? &divisor : nullptr, row_loss.data(), &loss, to_z, to_o});
    const Plan plan = choose(rows_of(args), device, true);
    expect(plan.path == path, "path", 0, 0, static_cast<int>(plan.path), static_cast<int>(path));
    expect(plan.cluster == cluster, "cluster", 0, 0, plan.cluster, cluster);
    run<T, kLoss>(plan, args, Pass::kFinish);
    emulated::launch(1, 1, 1, kTotalThreads, 1, 0, [&] { _total_kernel<A>(row_loss.data(), rows, &loss); });
  }

  const double factor = with.divisor ? scale / divisor : scale;
  Real sum = 0;
  const auto same = [&](const char* what, int64_t row, int64_t v, double got, Real wanted, Real size) {
    const double w = static_cast<double>(wanted);
    if (std::isnan(w)) return expect(std::isnan(got), what, row, v, got, w);
    if (std::isinf(w)) return expect(got == w, what, row, v, got, w);
    expect(std::fabs(got - w) <= static_cast<double>(size), what, row, v, got, w);
  };
  for (int64_t row = 0; row < rows; ++row) {
    const bool soft_target = with.target == Options::kSoft || with.target == Options::kSoftFloat;
    if ((row == 1 || with.none_count) && !soft_target) {
      expect(row_loss[row] == 0, "loss of a row that does not count", row, 0, row_loss[row], 0);
      for (int64_t v = 0; v < classes; ++v) {
        if (with.want_z) same("grad_z that does not count", row, v, load(grad_z.at(row, v)), 0, 0);
        if (with.want_o) same("grad_o that does not count", row, v, load(grad_o.at(row, v)), 0, 0);
      }
      continue;
    }
    std::vector<Real> of_z, of_o, t;
    for (int64_t v = 0; v < classes; ++v) {
      of_z.push_back(load(z.at(row, v)));
      of_o.push_back(load(o.at(row, v)));
      if (kLoss == kKl) continue;
      const Real given = soft_target ? Real(load(soft.at(row, v))) : v == labels[row] ? 1 : 0;
      t.push_back(given * (1 - Real(with.smoothing)) + Real(with.smoothing) / classes);
    }
    Exact exact(of_z, of_o, t, with);
    if (with.equal && kLoss == kKl) expect(row_loss[row] == 0, "loss of equal sides", row, 0, row_loss[row], 0);
    const bool invalid = kLoss != kKl && row == none && !soft_target;
    if (invalid) exact.loss = nan;
    sum += exact.loss * factor;
    same("row loss", row, 0, row_loss[row], exact.loss * factor, factor * 16 * eps * (1 + exact.terms));
    for (int64_t v = 0; v < classes; ++v) {
      // A peaked row's gradients are of size 1, and exact: no error may grow with its d.
      const Real terms = with.peak > 0 ? Real(4) : exact.size[v];
      const Real size = factor * terms * (16 * eps + kRounding<T>)+1e-7 * (kRounding<T> > 0);
      const auto nan_if = [&](Real x) { return invalid ? Real(nan) : x * factor; };
      if (with.want_z) same("grad_z", row, v, load(grad_z.at(row, v)), nan_if(exact.grad_z[v]), size);
      if (with.want_o) same("grad_o", row, v, load(grad_o.at(row, v)), nan_if(exact.grad_o[v]), size);
    }
  }
  if (!in_two_calls) same("loss", 0, 0, loss, sum, 64 * eps * (1 + std::fabs(sum)));
  expect(z.neighbours_untouched() || with.stride_v > 0, "logits", 0, 0, 0, 0);
  expect(grad_z.neighbours_untouched() && grad_o.neighbours_untouched(), "what is beside a gradient", 0, 0, 0, 0);
  Found found(3);
  for (int64_t row = 0; row < rows; ++row) {
    found[0].push_back(row_loss[row]);
    for (int64_t v = 0; v < classes; ++v) {
      found[1].push_back(load(grad_z.at(row, v)));
      found[2].push_back(load(grad_o.at(row, v)));
    }
  }
  return found;
}

// A device whose blocks have room for so many classes of a pair, two blocks at once, two processors.
Device room_for(int64_t classes, int bytes, int largest_cluster) {
  const int block = static_cast<int>((classes * bytes + 15) / 16) * 32 + shared_bytes(Path::kKept, 0);
  return {2, block, 2 * (block + kSharedReserved), largest_cluster};
}

template <typename T, int kLoss>
void check_loss(double temperature, size_t first_way, bool thorough = false) {
  const int bytes = sizeof(T);
  const int64_t lanes = 16 / bytes;
  Options plain;
  plain.temperature = temperature;
  plain.target = kLoss == kKl ? Options::kNone : Options::kClasses;
  std::vector<Options> ways(1, plain);
  const auto way = [&](auto change) {
    ways.push_back(plain);
    change(ways.back());
  };
  way([&](Options& w) { w.unkind = true, w.divisor = true; });
  way([&](Options& w) { w.offset_z = w.offset_o = w.offset_grad = lanes - 1, w.want_z = false; });
  way([&](Options& w) { w.offset_z = w.offset_o = w.offset_grad = 1, w.pad = 2 * lanes, w.want_o = false; });
  way([&](Options& w) { w.masked = true; });
  way([&](Options& w) { w.peak = 1e4; });
  if (kLoss != kKl) {
    way([&](Options& w) { w.target = Options::kSoft, w.offset_z = w.offset_o = w.offset_grad = 1; });
    way([&](Options& w) { w.target = Options::kSoftFloat, w.smoothing = 0.1; });
    way([&](Options& w) { w.smoothing = 0.2; });
    way([&](Options& w) { w.peak = 1e4, w.smoothing = 0.2, w.offset_z = w.offset_o = w.offset_grad = 1; });
    way([&](Options& w) { w.detach_z = true, w.unkind = true; });
    way([&](Options& w) { w.detach_o = true, w.alpha = 0; });
    way([&](Options& w) { w.alpha = w.beta = 0, w.unkind = true, w.divisor = true; });
  }
  // Every way on every path takes minutes: the ways walk past the paths, all of them where `thorough`.
  size_t turn = first_way;
  const auto next_way = [&]() -> const Options& { return ways[turn++ % ways.size()]; };
  for (size_t round = 0; round < (thorough ? ways.size() : 2); ++round, ++turn) {
    for (int64_t classes : {2, 5, 127, 1000, 1024}) {
      const Options& with = next_way();
      if (!with.unkind || classes >= 5) check<T, kLoss>(11, classes, room_for(8, bytes, 1), Path::kWarp, 1, with);
    }
    check<T, kLoss>(7, 1030, room_for(1100, bytes, 1), Path::kKept, 1, next_way());
    check<T, kLoss>(5, 3001, room_for(3100, bytes, 1), Path::kKept, 1, next_way());
    check<T, kLoss>(5, 3001, room_for(1600, bytes, 16), Path::kKept, 2, next_way());
    check<T, kLoss>(5, 2999, room_for(800, bytes, 16), Path::kKept, 4, next_way());
    if (thorough && round == 1) {
      check<T, kLoss>(5, 5003, room_for(700, bytes, 16), Path::kKept, 8, next_way());
      check<T, kLoss>(4, 5003, room_for(400, bytes, 16), Path::kKept, 16, next_way());
    }
    check<T, kLoss>(4, 5003, room_for(300, bytes, 16), Path::kAgain, 1, next_way());
    Options strided = next_way();
    strided.stride_v = 3, strided.offset_o = 2;
    check<T, kLoss>(4, 1501, room_for(1600, bytes, 16), Path::kStrided, 1, strided);
    Options unlike = next_way();
    unlike.offset_o = unlike.offset_z + 1;
    check<T, kLoss>(4, 130, room_for(1600, bytes, 16), Path::kStrided, 1, unlike);
    if constexpr (kLoss != kKl) {
      check<T, kLoss>(7, 130, {}, Path::kAgain, 1, next_way(), true);
      check<T, kLoss>(4, 5003, {}, Path::kAgain, 1, next_way(), true);
      check<T, kLoss>(4, 1501, {}, Path::kStrided, 1, strided, true);
    }
  }
}

// Hard cases 12, 13, 15 and 16 where the ways above do not come: on every path, at few shapes.
template <typename T, int kLoss>
void check_hard(double temperature) {
  const int bytes = sizeof(T);
  Options plain;
  plain.temperature = temperature;
  plain.target = kLoss == kKl ? Options::kNone : Options::kClasses;
  std::vector<Options> ways(6, plain);
  ways[0].equal = true;
  ways[1].peak = 320;
  ways[2].peak = sizeof(T) == 2 ? 6e4 : 3e4;
  ways[3].empty = true;
  ways[4].none_count = true;
  for (const Options& with : ways) {
    check<T, kLoss>(5, 127, room_for(8, bytes, 1), Path::kWarp, 1, with);
    check<T, kLoss>(3, 3001, room_for(1600, bytes, 16), Path::kKept, 2, with);
    check<T, kLoss>(3, 2003, room_for(300, bytes, 1), Path::kAgain, 1, with);
    if (sizeof(T) == 2 || kLoss == kKl) check<T, kLoss>(5, 128, {}, Path::kAgain, 1, with, true);
    if (kLoss == kKl) check<T, kLoss>(3, 2000, {}, Path::kAgain, 1, with, true);
  }
  for (int64_t rows : {1, 3}) {
    for (int64_t classes : {1, 2}) {
      check<T, kLoss>(rows, classes, room_for(8, bytes, 1), Path::kWarp, 1, plain);
      check<T, kLoss>(rows, classes, {}, Path::kAgain, 1, plain, true);
    }
  }
  // Symmetric but for the label's weight: alpha 1.
  plain.alpha = 1;
  for (const int64_t classes : {127, 3001}) {
    const Device device = classes == 127 ? room_for(8, bytes, 1) : room_for(1600, bytes, 16);
    const auto go = [&] {
      return check<T, kLoss>(5, classes, device, classes == 127 ? Path::kWarp : Path::kKept, classes == 127 ? 1 : 2,
                             plain);
    };
    plain.swapped = false;
    const Found found = go();
    plain.swapped = true;
    const Found swapped = go();
    const auto alike = [&](const std::vector<double>& a, const std::vector<double>& b) {
      for (size_t i = 0; i < a.size(); ++i) {
        const double few = 8 * std::numeric_limits<float>::epsilon() * (1 + std::fabs(b[i])) + kRounding<T>;
        expect(std::fabs(a[i] - b[i]) <= few, "the sides swapped", 0, static_cast<int64_t>(i), a[i], b[i]);
      }
    };
    alike(swapped[0], found[0]), alike(swapped[1], found[2]), alike(swapped[2], found[1]);
  }
}

template <int kLoss>
void check_double(double temperature) {
  Options with;
  with.temperature = temperature;
  with.target = kLoss == kKl ? Options::kNone : Options::kClasses;
  check<double, kLoss>(5, 700, room_for(700, 8, 16), Path::kStrided, 1, with);
  with.unkind = true;
  check<double, kLoss>(5, 1100, room_for(700, 8, 16), Path::kStrided, 1, with);
  if constexpr (kLoss != kKl) check<double, kLoss>(5, 1100, {}, Path::kStrided, 1, with, true);
}

}  // namespace

int main() {
  check_loss<float, kKl>(3.0, 0, true);
  check_loss<__nv_bfloat16, kKl>(1.0, 1);
  check_loss<__half, kKl>(0.7, 2);
  check_loss<float, kKl>(0.7, 4);
  check_double<kKl>(3.0);
  check_loss<__nv_bfloat16, kGistCubed>(3.0, 0, true);
  check_loss<float, kGistCubed>(3.0, 3);
  check_loss<float, kGistAny>(1.0, 5);
  check_loss<float, kGistAny>(1.7, 7);
  check_loss<__half, kGistAny>(2.0, 9);
  check_loss<__nv_bfloat16, kGistAny>(4.0, 1);
  check_double<kGistAny>(3.0);
  check_hard<float, kKl>(3.0);
  check_hard<__half, kKl>(0.5);
  check_hard<__half, kGistCubed>(3.0);
  check_hard<float, kGistAny>(1.7);
  Options one;
  check<float, kKl>(1, 131073, room_for(300, 4, 16), Path::kAgain, 1, one);
  check<float, kKl>(1, 131073, {}, Path::kAgain, 1, one, true);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
