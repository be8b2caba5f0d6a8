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

  template <bool kFma, int kBytes>
  FASTGIST_INLINE BlockSums<A> add(Sums& sums, const Looked<A>& block, A* p_hat, A* q_hat, A*) const {
    sums.pair.template raise<false>(block.seen.m_z, block.seen.m_o, over_t);
    return sums.pair.template add<kFma, kBytes>(block.z, block.o, block.n, block.next, over_t, block.seen.least, p_hat,
                                                q_hat);
  }

  FASTGIST_INLINE void merge(Sums& sums, const Sums& next) const { sums.pair.template merge<false>(next.pair, over_t); }

  A summary(int64_t, const Sums& sums, double* stats) const {
    const auto of_row = sums.pair.divergence(inv_t);
    sums.pair.store(of_row, stats);
    return of_row.loss;
  }

  Scalars scalars(int64_t, const double* stats, double row_grad) const {
    const double scale = row_grad / pair.temperature / pair.temperature;
    return {static_cast<A>(stats[kMaxZ]),        static_cast<A>(stats[kMaxO]),     static_cast<A>(stats[kMeanP]),
            static_cast<A>(stats[kMeanQ]),       static_cast<A>(pair.temperature), static_cast<A>(scale / stats[kSumP]),
            static_cast<A>(scale / stats[kSumQ])};
  }

  FASTGIST_INLINE bool needs_p(bool of_z, bool of_o) const { return of_z || of_o; }
  FASTGIST_INLINE bool needs_q(bool of_z, bool of_o) const { return of_z || of_o; }

  template <bool kFma, int kBytes>
  FASTGIST_INLINE void finish(const Block<A>& block, const Scalars& row) const {
    if (block.grad_z != nullptr && block.grad_o != nullptr && block.plain) {
      finish<kFma, kBytes, true, true, true>(block, row);
    } else if (block.grad_z != nullptr && block.grad_o != nullptr) {
      finish<kFma, kBytes, true, true>(block, row);
    } else if (block.grad_z != nullptr) {
      finish<kFma, kBytes, true, false>(block, row);
    } else {
      finish<kFma, kBytes, false, true>(block, row);
    }
  }

#if FASTGIST_X86_DISPATCH
  template <bool kGradZ, bool kGradO, bool kPlain>
  static FASTGIST_TARGET_AVX512 void finish_avx512(const Block<A>& block, const Scalars& row, A over_p, A over_q) {
    A *const grad_z = block.grad_z, *const grad_o = block.grad_o;
    const __m512 m_z = _mm512_set1_ps(row.m_z), m_o = _mm512_set1_ps(row.m_o);
    const __m512 e_p = _mm512_set1_ps(row.e_p), e_q = _mm512_set1_ps(row.e_q), t = _mm512_set1_ps(row.t);
    const __m512 of_p = _mm512_set1_ps(over_p), of_q = _mm512_set1_ps(over_q);
    by_quads(block.z, block.o, block.p, block.q, block.n, {row.m_z, row.m_o},
             [&](const Quad512& x, int64_t at, __mmask16 in) FASTGIST_TARGET_AVX512 FASTGIST_INLINE_BODY {
               const __m512 d = gap512<kPlain>(x, m_z, m_o);
               const __m512 p = _mm512_mul_ps(x.p, of_p), q = _mm512_mul_ps(x.q, of_q);
               const __m512 t_gap = _mm512_mul_ps(_mm512_sub_ps(p, q), t);
               if (kGradZ) {
                 _mm512_mask_storeu_ps(grad_z + at, in, _mm512_fmadd_ps(p, _mm512_sub_ps(d, e_p), t_gap));
               }
               if (kGradO) {
                 _mm512_mask_storeu_ps(grad_o + at, in, _mm512_fmsub_ps(q, _mm512_sub_ps(e_q, d), t_gap));
               }
             });
  }
#endif

  template <bool kFma, int kBytes, bool kGradZ, bool kGradO, bool kPlain = false>
  static FASTGIST_INLINE void finish(const Block<A>& block, const Scalars& row) {
    constexpr int kWidth = kLanes<kBytes, A>;
    const A *z = block.z, *o = block.o, *p_hat = block.p, *q_hat = block.q;
    A *grad_z = block.grad_z, *grad_o = block.grad_o;
    const A of_p = row.of_p * block.moved_p, of_q = row.of_q * block.moved_q;
    const A m_z = row.m_z, m_o = row.m_o, e_p = row.e_p, e_q = row.e_q, t = row.t;
#if FASTGIST_X86_DISPATCH
    if constexpr (kBytes == 64 && std::is_same_v<A, float>) {
      return finish_avx512<kGradZ, kGradO, kPlain>(block, row, of_p, of_q);
    }
#endif
    by_vectors<kWidth>(block.n, [&](auto part, int64_t at, int left) FASTGIST_INLINE_BODY {
#pragma omp simd
      for (int j = 0; j < kWidth; ++j) {
        const bool in = !part() || j < left;
        const int64_t i = at + j;
        const A d = gap<kPlain>(in ? z[i] : m_z, in ? o[i] : m_o, m_z, m_o);
        const A p = (in ? p_hat[i] : A(0)) * of_p, q = (in ? q_hat[i] : A(0)) * of_q;
        const A t_gap = (p - q) * t;
        if (kGradZ && in) grad_z[i] = multiply_add<kFma>(p, d - e_p, t_gap);
        if (kGradO && in) grad_o[i] = multiply_add<kFma>(q, e_q - d, -t_gap);
      }
    });
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
