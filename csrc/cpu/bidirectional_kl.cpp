#include "bidirectional_kl.h"

#include "pair_passes.h"

namespace fastgist::cpu {
namespace {

template <typename T>
struct BidirectionalKl {
  using A = T;
  using Inputs = LogitPair;
  static constexpr int64_t kStatRows = kStats;

  struct Sums {
    OnlinePair<A> pair;
  };
  struct Scalars {
    A m_z, m_o, e_p, e_q, t;
    A of_p, of_q;  // row_grad / T^2 over S_p, S_q. (Not exp(. - log S_p): the rounding of that argument would grow.)
  };

  const LogitPair& pair;
  const A inv_t;
  const ExpScale<A> over_t;

  explicit BidirectionalKl(const LogitPair& in)
      : pair(in), inv_t(static_cast<A>(1.0 / in.temperature)), over_t(in.temperature) {}

  FASTGIST_INLINE bool counts(int64_t row) const {
    return pair.classes > 0 && (pair.mask == nullptr || pair.mask[row * pair.mask_stride]);
  }

  template <bool kFma>
  FASTGIST_INLINE void add(Sums& sums, int64_t, int64_t, int64_t n, const A* z, const A* o, A* p_hat, A* q_hat,
                           A*) const {
    const Extremes<A> seen = extremes(z, o, n);
    sums.pair.template raise<false, kFma>(seen.m_z, seen.m_o, over_t);
    sums.pair.template add<kFma>(z, o, n, over_t, seen.least, p_hat, q_hat);
  }

  template <bool kFma>
  FASTGIST_INLINE void merge(Sums& sums, const Sums& next) const {
    sums.pair.template merge<false, kFma>(next.pair, over_t);
  }

  A summary(int64_t, const Sums& sums, double* stats) const {
    const auto of_row = sums.pair.divergence(inv_t);
    sums.pair.store(of_row, stats);
    return of_row.loss;
  }

  Scalars scalars(int64_t, const double* stats, double row_grad) const {
    const double scale = row_grad / pair.temperature / pair.temperature;
    return {static_cast<A>(stats[kMaxZ]),
            static_cast<A>(stats[kMaxO]),
            static_cast<A>(stats[kMeanP]),
            static_cast<A>(stats[kMeanQ]),
            static_cast<A>(pair.temperature),
            static_cast<A>(scale / stats[kSumP]),
            static_cast<A>(scale / stats[kSumQ])};
  }

  FASTGIST_INLINE bool needs_p(bool of_z, bool of_o) const { return of_z || of_o; }
  FASTGIST_INLINE bool needs_q(bool of_z, bool of_o) const { return of_z || of_o; }

  template <bool kFma>
  FASTGIST_INLINE void finish(const Block<A>& block, const Scalars& row) const {
    if (block.grad_z != nullptr && block.grad_o != nullptr) {
      finish<kFma, true, true>(block, row);
    } else if (block.grad_z != nullptr) {
      finish<kFma, true, false>(block, row);
    } else {
      finish<kFma, false, true>(block, row);
    }
  }

  template <bool kFma, bool kGradZ, bool kGradO>
  static FASTGIST_INLINE void finish(const Block<A>& block, const Scalars& row) {
    const A *z = block.z, *o = block.o, *p_hat = block.p, *q_hat = block.q;
    A *grad_z = block.grad_z, *grad_o = block.grad_o;
    const A of_p = row.of_p * block.moved_p, of_q = row.of_q * block.moved_q;
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) {
      const A d = gap(z[i], o[i], row.m_z, row.m_o);
      const A p = p_hat[i] * of_p, q = q_hat[i] * of_q;
      const A t_gap = (p - q) * row.t;
      if constexpr (kGradZ) grad_z[i] = multiply_add<kFma>(p, d - row.e_p, t_gap);
      if constexpr (kGradO) grad_o[i] = multiply_add<kFma>(q, row.e_q - d, -t_gap);
    }
  }
};

}  // namespace

void bidirectional_kl_fwd(const LogitPair& in, const ForwardOutputs& out, const Parallel& parallel) {
  if (in.dtype == DType::kFloat64) return forward<BidirectionalKl<double>>(in, out, parallel);
  forward<BidirectionalKl<float>>(in, out, parallel);
}

void bidirectional_kl_bwd(const LogitPair& in, const BackwardArguments& args, const Parallel& parallel) {
  if (in.dtype == DType::kFloat64) return backward<BidirectionalKl<double>>(in, args, parallel);
  backward<BidirectionalKl<float>>(in, args, parallel);
}

void bidirectional_kl_fwd_bwd(const LogitPair& in, const FinishedOutputs& out, const Parallel& parallel) {
  if (in.dtype == DType::kFloat64) return forward_backward<BidirectionalKl<double>>(in, out, parallel);
  forward_backward<BidirectionalKl<float>>(in, out, parallel);
}

}  // namespace fastgist::cpu
