#include "gist_loss.h"

#include "gist_finish.h"
#include "pair_passes.h"

namespace fastgist::cpu {
namespace {

// The exponent k that takes exp(x / T) to exp(x), or kUnitAnew.
int unit_power(double temperature) {
  for (int k = 1; k <= 4; ++k) {
    if (temperature == k) return k;
  }
  return kUnitAnew;
}

// What stands in a row's place in the target. The label is counted from the first class of the logits, and may be
// outside them.
struct RowTarget {
  int64_t label = 0;
  bool counts = true, valid = true;

  RowTarget(const GistLossInputs& in, int64_t row) {
    if (in.target.classes == nullptr) return;
    label = in.target.classes[row * in.target.stride_m];
    counts = label != in.ignore_index;
    valid = label >= 0 && label < in.every_class;
    if (valid) label -= in.first_class;
  }
};

// Class weights of a block of soft targets.
template <typename A>
FASTGIST_INLINE const A* load_weights(const GistLossInputs& in, int64_t row, int64_t start, int64_t n, A* buffer) {
  const ClassTarget& target = in.target;
  const int64_t offset = row * target.stride_m + start * target.stride_v;
  const A* given = load_any(target.dtype, target.weights, offset, target.stride_v, n, buffer);
  if (in.label_smoothing == 0) return given;
  const A keep = static_cast<A>(1 - in.label_smoothing);
  const A smooth = static_cast<A>(in.label_smoothing / in.every_class);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = given[i] * keep + smooth;
  return buffer;
}

// sum t zc and sum t oc about the maxima seen so far, and W.
template <typename A>
struct TargetSums {
  double dot_z = 0, dot_o = 0, weight = 0;

  // Centres that rise by x make every zc smaller by x. (A weight of 0 also where the rise is not finite.)
  FASTGIST_INLINE void raise(const typename OnlinePair<A>::Rise& rise) {
    if (weight == 0) return;
    dot_z += weight * rise.z;
    dot_o += weight * rise.o;
  }

  // A block of soft targets.
  template <int kBytes>
  FASTGIST_INLINE void add(const A* z, const A* o, const A* weights, int64_t n, A c_z, A c_o) {
    constexpr int kWidth = kLanes<kBytes, A>;
    Lanes<A, kWidth> sum_z, sum_o, sum;
    by_vectors<kWidth>(n, [&](auto part, int64_t at, int left) FASTGIST_INLINE_BODY {
#pragma omp simd
      for (int j = 0; j < kWidth; ++j) {
        const bool in = !part() || j < left;
        const A each = in ? weights[at + j] : A(0);
        const bool absent = each == A(0);
        sum_z[j] += absent ? A(0) : each * ((in ? z[at + j] : c_z) - c_z);
        sum_o[j] += absent ? A(0) : each * ((in ? o[at + j] : c_o) - c_o);
        sum[j] += each;
      }
    });
    dot_z += sum_z.sum();
    dot_o += sum_o.sum();
    weight += sum.sum();
  }

  // A block of classes that all weigh the same.
  template <int kBytes>
  FASTGIST_INLINE void add_even(const A* z, const A* o, double each, int64_t n, A c_z, A c_o) {
    constexpr int kWidth = kLanes<kBytes, A>;
    Lanes<A, kWidth> sum_z, sum_o;
    by_vectors<kWidth>(n, [&](auto part, int64_t at, int left) FASTGIST_INLINE_BODY {
#pragma omp simd
      for (int j = 0; j < kWidth; ++j) {
        const bool in = !part() || j < left;
        sum_z[j] += (in ? z[at + j] : c_z) - c_z;
        sum_o[j] += (in ? o[at + j] : c_o) - c_o;
      }
    });
    dot_z += each * sum_z.sum();
    dot_o += each * sum_o.sum();
    weight += each * n;
  }

  FASTGIST_INLINE void add_class(A z, A o, double its_weight, A c_z, A c_o) {
    if (its_weight == 0) return;
    dot_z += its_weight * (static_cast<double>(z) - c_z);
    dot_o += its_weight * (static_cast<double>(o) - c_o);
    weight += its_weight;
  }
};

FASTGIST_INLINE double cross_entropy(double weight, double unit_sum, double dot) {
  return (weight == 0 ? 0 : weight * std::log(unit_sum)) - dot;
}

template <typename T>
struct GistLoss {
  using A = T;
  using Inputs = GistLossInputs;
  using Scalars = GistScalars<A>;
  static constexpr int64_t kStatRows = kGistStats;

  struct Sums {
    OnlinePair<A> pair;
    TargetSums<A> dots;
  };

  const GistLossInputs& in;
  const LogitPair& pair;
  const A inv_t;
  const ExpScale<A> over_t;
  const int power;
  const bool soft;

  explicit GistLoss(const GistLossInputs& in)
      : in(in),
        pair(in.logits),
        inv_t(static_cast<A>(1.0 / pair.temperature)),
        over_t(pair.temperature),
        power(unit_power(pair.temperature)),
        soft(in.target.classes == nullptr) {}

  FASTGIST_INLINE bool counts(int64_t row) const { return RowTarget(in, row).counts; }

  template <bool kFma, int kBytes>
  FASTGIST_INLINE BlockSums<A> add(Sums& sums, const Looked<A>& block, A* p_hat, A* q_hat, A* buffer) const {
    const A *z = block.z, *o = block.o;
    const int64_t n = block.n;
    sums.dots.raise(sums.pair.template raise<true>(block.seen.m_z, block.seen.m_o, over_t));
    const BlockSums<A> added =
        sums.pair.template add<kFma, kBytes>(z, o, n, block.next, over_t, block.seen.least, p_hat, q_hat);
    switch (power) {
      case 1:
        sums.pair.template add_unit<1, kFma, kBytes>(added, z, o, p_hat, q_hat, n);
        break;
      case 2:
        sums.pair.template add_unit<2, kFma, kBytes>(added, z, o, p_hat, q_hat, n);
        break;
      case 3:
        sums.pair.template add_unit<3, kFma, kBytes>(added, z, o, p_hat, q_hat, n);
        break;
      case 4:
        sums.pair.template add_unit<4, kFma, kBytes>(added, z, o, p_hat, q_hat, n);
        break;
      default:
        sums.pair.template add_unit<kUnitAnew, kFma, kBytes>(added, z, o, p_hat, q_hat, n);
    }
    const A c_z = centre(sums.pair.m_z), c_o = centre(sums.pair.m_o);
    if (soft) {
      sums.dots.template add<kBytes>(z, o, load_weights(in, block.row, block.start, n, buffer), n, c_z, c_o);
    } else if (in.label_smoothing != 0) {
      sums.dots.template add_even<kBytes>(z, o, in.label_smoothing / in.every_class, n, c_z, c_o);
    }
    return added;
  }

  FASTGIST_INLINE void merge(Sums& sums, Sums next) const {
    const auto [ours, theirs] = sums.pair.template merge<true>(next.pair, over_t);
    sums.dots.raise(ours);
    next.dots.raise(theirs);
    sums.dots.dot_z += next.dots.dot_z;
    sums.dots.dot_o += next.dots.dot_o;
    sums.dots.weight += next.dots.weight;
  }

  A summary(int64_t row, const Sums& sums, double* stats) const {
    const RowTarget target(in, row);
    TargetSums<A> dots = sums.dots;
    if (!soft && target.valid) {
      A z = 0, o = 0;
      z = *load_z(pair, row, target.label, 1, &z);
      o = *load_o(pair, row, target.label, 1, &o);
      dots.add_class(z, o, 1 - in.label_smoothing, centre(sums.pair.m_z), centre(sums.pair.m_o));
    }
    const auto divergence = sums.pair.divergence(inv_t);
    sums.pair.store(divergence, stats);
    stats[kUnitZ] = sums.pair.unit_z;
    stats[kUnitO] = sums.pair.unit_o;
    stats[kWeight] = dots.weight;
    double loss = cross_entropy(dots.weight, sums.pair.unit_z, dots.dot_z);
    if (in.alpha != 0) loss += in.alpha * cross_entropy(dots.weight, sums.pair.unit_o, dots.dot_o);
    if (in.beta != 0) loss += in.beta * divergence.loss;
    return target.valid ? static_cast<A>(loss) : std::numeric_limits<A>::quiet_NaN();
  }

  Scalars scalars(int64_t row, const double* stats, double row_grad) const {
    const double given = RowTarget(in, row).valid ? row_grad : std::numeric_limits<double>::quiet_NaN();
    const double t = pair.temperature;
    return {GistSide<A>(stats[kMaxZ], stats[kSumP], stats[kMeanP], stats[kWeight] / stats[kUnitZ], given, 1.0,
                        in.beta_z / t / t),
            GistSide<A>(stats[kMaxO], stats[kSumQ], -stats[kMeanQ], stats[kWeight] / stats[kUnitO], given, in.alpha,
                        in.beta_o / t / t),
            static_cast<A>(t), static_cast<A>(given * 0)};
  }

  FASTGIST_INLINE bool needs_p(bool of_z, bool of_o) const { return of_z || (of_o && in.beta_o != 0); }
  FASTGIST_INLINE bool needs_q(bool of_z, bool of_o) const {
    return (of_z && in.beta_z != 0) || (of_o && (in.beta_o != 0 || in.alpha != 0));
  }

  template <bool kFma, int kBytes>
  FASTGIST_INLINE void finish(const Block<A>& block, const Scalars& row) const {
    const A smooth = static_cast<A>(in.label_smoothing / in.every_class);
    const A* weights = soft ? load_weights(in, block.row, block.start, block.n, block.buffers->weights) : &smooth;
    finish_gist<kFma, kBytes>(power, block, row, weights, !soft);
    if (soft) return;
    // The label's own weight, so that no loop compares indices.
    const RowTarget target(in, block.row);
    const int64_t i = target.label - block.start;
    if (!target.valid || i < 0 || i >= block.n) return;
    const A own = static_cast<A>(1 - in.label_smoothing);
    if (block.grad_z != nullptr) block.grad_z[i] -= row.z.row_grad * own;
    if (block.grad_o != nullptr && row.o.has_ce) block.grad_o[i] -= row.o.row_grad * own;
  }
};

}  // namespace

void gist_loss_fwd(const GistLossInputs& in, const ForwardOutputs& out, const Parallel& parallel) {
  if (in.logits.dtype == DType::kFloat64) return forward<GistLoss<double>>(in, out, parallel);
  forward<GistLoss<float>>(in, out, parallel);
}

void gist_loss_bwd(const GistLossInputs& in, const BackwardArguments& args, const Parallel& parallel) {
  if (in.logits.dtype == DType::kFloat64) return backward<GistLoss<double>>(in, args, parallel);
  backward<GistLoss<float>>(in, args, parallel);
}

void gist_loss_fwd_bwd(const GistLossInputs& in, const FinishedOutputs& out, const Parallel& parallel) {
  if (in.logits.dtype == DType::kFloat64) return forward_backward<GistLoss<double>>(in, out, parallel);
  forward_backward<GistLoss<float>>(in, out, parallel);
}

}  // namespace fastgist::cpu
