// The gradients of gist_loss over a block, from its exponentials.
#pragma once

#include "pair_passes.h"

namespace fastgist::cpu {

// What one side's gradient needs beside its logits.
template <typename A>
struct GistSide {
  A centre;
  A of_hat;    // row_grad over the sum at temperature T: takes p^ to row_grad p
  A mean;      // of the other side's: the mean of own less other under the own distribution
  A of_unit;   // row_grad W over the sum at temperature 1, times the cross-entropy's factor
  A row_grad;  // of the class weights: row_grad times that factor
  A beta_tt;   // the divergence's weight over T^2
  bool has_ce, has_kl;

  GistSide(double centre, double sum, double mean, double over_unit, double row_grad, double factor, double beta_tt)
      : centre(static_cast<A>(centre)),
        of_hat(static_cast<A>(row_grad / sum)),
        mean(static_cast<A>(mean)),
        of_unit(static_cast<A>(row_grad * factor * over_unit)),
        row_grad(static_cast<A>(row_grad * factor)),
        beta_tt(static_cast<A>(beta_tt)),
        has_ce(factor != 0),
        has_kl(beta_tt != 0) {}
};

template <typename A>
struct GistScalars {
  GistSide<A> z, o;
  A t;        // T
  A nothing;  // the gradient of a side without a term: 0, but NaN where the row's target is no class
};

#if FASTGIST_X86_DISPATCH
template <int kPower>
FASTGIST_AVX512_INLINE __m512 exp_unit512(__m512 at_t) {
  const __m512 squared = _mm512_mul_ps(at_t, at_t);
  if constexpr (kPower == 1) return at_t;
  if constexpr (kPower == 3) return _mm512_mul_ps(squared, at_t);
  if constexpr (kPower == 4) return _mm512_mul_ps(squared, squared);
  return squared;
}

// finish_both() below for floats in AVX-512, where the exponentials at temperature 1 are powers of those that there
// are.
template <int kPower, bool kEven, bool kPlain>
FASTGIST_TARGET_AVX512 void finish_both_avx512(const Block<float>& block, const GistScalars<float>& row,
                                               const float* weights, float over_p, float over_q, float over_unit_p,
                                               float over_unit_q) {
  float *const grad_z = block.grad_z, *const grad_o = block.grad_o;
  const __m512 m_z = _mm512_set1_ps(row.z.centre), m_o = _mm512_set1_ps(row.o.centre);
  const __m512 of_p = _mm512_set1_ps(over_p), of_q = _mm512_set1_ps(over_q), t = _mm512_set1_ps(row.t);
  const __m512 unit_p = _mm512_set1_ps(over_unit_p), unit_q = _mm512_set1_ps(over_unit_q);
  const __m512 mean_z = _mm512_set1_ps(row.z.mean), less_mean_o = _mm512_set1_ps(-row.o.mean);
  const __m512 beta_z = _mm512_set1_ps(row.z.beta_tt), beta_o = _mm512_set1_ps(row.o.beta_tt);
  const __m512 given_z = _mm512_set1_ps(kEven ? row.z.row_grad * weights[0] : row.z.row_grad);
  const __m512 given_o = _mm512_set1_ps(kEven ? row.o.row_grad * weights[0] : row.o.row_grad);
  by_quads(block.z, block.o, block.p, block.q, block.n, {row.z.centre, row.o.centre},
           [&](const Quad512& x, int64_t at, __mmask16 in) FASTGIST_TARGET_AVX512 FASTGIST_INLINE_BODY {
             const __m512 d = gap512<kPlain>(x, m_z, m_o);
             const __m512 p = _mm512_mul_ps(x.p, of_p), q = _mm512_mul_ps(x.q, of_q);
             const __m512 t_gap = _mm512_mul_ps(_mm512_sub_ps(p, q), t);
             const __m512 kl_z = _mm512_fmadd_ps(p, _mm512_sub_ps(d, mean_z), t_gap);
             const __m512 kl_o = _mm512_fmsub_ps(q, _mm512_sub_ps(less_mean_o, d), t_gap);
             __m512 t_z = given_z, t_o = given_o;
             if constexpr (!kEven) {
               const __m512 each = _mm512_maskz_loadu_ps(in, weights + at);
               t_z = _mm512_mul_ps(given_z, each);
               t_o = _mm512_mul_ps(given_o, each);
             }
             const __m512 ce_z = _mm512_fmsub_ps(exp_unit512<kPower>(x.p), unit_p, t_z);
             const __m512 ce_o = _mm512_fmsub_ps(exp_unit512<kPower>(x.q), unit_q, t_o);
             _mm512_mask_storeu_ps(grad_z + at, in, _mm512_fmadd_ps(beta_z, kl_z, ce_z));
             _mm512_mask_storeu_ps(grad_o + at, in, _mm512_fmadd_ps(beta_o, kl_o, ce_o));
           });
}
#endif

// Both sides with both terms. kEven: the weights of the block's classes are all weights[0]. kPlain: no class is -inf.
template <int kPower, bool kEven, bool kPlain, bool kFma, int kBytes, typename A>
FASTGIST_INLINE void finish_both(const Block<A>& block, const GistScalars<A>& row, const A* weights) {
  const A *z = block.z, *o = block.o, *p_hat = block.p, *q_hat = block.q;
  A *grad_z = block.grad_z, *grad_o = block.grad_o;
  const A of_p = row.z.of_hat * block.moved_p, of_q = row.o.of_hat * block.moved_q;
  const A unit_p = row.z.of_unit * exp_power<kPower>(block.moved_p);
  const A unit_q = row.o.of_unit * exp_power<kPower>(block.moved_q);
  const A even_z = row.z.row_grad * weights[0], even_o = row.o.row_grad * weights[0];
  const GistSide<A> of_z = row.z, of_o = row.o;
  const A t = row.t;
#if FASTGIST_X86_DISPATCH
  if constexpr (kBytes == 64 && std::is_same_v<A, float> && kPower != kUnitAnew) {
    return finish_both_avx512<kPower, kEven, kPlain>(block, row, weights, of_p, of_q, unit_p, unit_q);
  }
#endif
  constexpr int kWidth = kLanes<kBytes, A>;
  by_vectors<kWidth>(block.n, [&](auto part, int64_t at, int left) FASTGIST_INLINE_BODY {
#pragma omp simd
    for (int j = 0; j < kWidth; ++j) {
      const bool in = !part() || j < left;
      const int64_t i = at + j;
      const A a = in ? z[i] : of_z.centre, b = in ? o[i] : of_o.centre;
      const A own_p = in ? p_hat[i] : A(0), own_q = in ? q_hat[i] : A(0);
      const A zc = a - of_z.centre, oc = b - of_o.centre;
      const A d = kPlain || a != -kInf<A> ? zc - oc : A(0);
      const A p = own_p * of_p, q = own_q * of_q;
      const A t_gap = (p - q) * t;
      const A kl_z = multiply_add<kFma>(p, d - of_z.mean, t_gap);
      const A kl_o = multiply_add<kFma>(q, -of_o.mean - d, -t_gap);
      const A each = kEven || !in ? A(0) : weights[i];
      const A t_z = kEven ? even_z : of_z.row_grad * each;
      const A t_o = kEven ? even_o : of_o.row_grad * each;
      const A ce_z = multiply_add<kFma>(exp_unit<kPower, kFma>(zc, own_p), unit_p, -t_z);
      const A ce_o = multiply_add<kFma>(exp_unit<kPower, kFma>(oc, own_q), unit_q, -t_o);
      if (in) grad_z[i] = multiply_add<kFma>(of_z.beta_tt, kl_z, ce_z);
      if (in) grad_o[i] = multiply_add<kFma>(of_o.beta_tt, kl_o, ce_o);
    }
  });
}

// One side of the block: x and its exponentials, y and its.
template <typename A>
struct OneSide {
  const A* x;
  const A* y;
  const A* x_hat;
  const A* y_hat;
  A moved_x, moved_y;
  A* grad;
};

// One side with its cross-entropy, and with the divergence or without: then nothing of the other side is looked at.
template <int kPower, bool kKl, bool kFma, typename A>
FASTGIST_INLINE void finish_side(const OneSide<A>& at, int64_t n, const GistSide<A>& own, const GistSide<A>& other, A t,
                                 const A* weights) {
  const A *x = at.x, *y = at.y, *x_hat = at.x_hat, *y_hat = at.y_hat;
  A* grad = at.grad;
  const A of_x = own.of_hat * at.moved_x, of_y = other.of_hat * at.moved_y;
  const A unit = own.of_unit * exp_power<kPower>(at.moved_x);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A xc = x[i] - own.centre;
    const A weight = own.row_grad * weights[i];
    const A ce = multiply_add<kFma>(exp_unit<kPower, kFma>(xc, x_hat[i]), unit, -weight);
    if constexpr (kKl) {
      const A d = gap(x[i], y[i], own.centre, other.centre);
      const A p = x_hat[i] * of_x, q = y_hat[i] * of_y;
      const A kl = multiply_add<kFma>(p, d - own.mean, (p - q) * t);
      grad[i] = multiply_add<kFma>(own.beta_tt, kl, ce);
    } else {
      grad[i] = ce;
    }
  }
}

// One side with the divergence alone.
template <bool kFma, typename A>
FASTGIST_INLINE void finish_divergence(const OneSide<A>& at, int64_t n, const GistSide<A>& own,
                                       const GistSide<A>& other, A t) {
  const A *x = at.x, *y = at.y, *x_hat = at.x_hat, *y_hat = at.y_hat;
  A* grad = at.grad;
  const A of_x = own.of_hat * at.moved_x, of_y = other.of_hat * at.moved_y;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A d = gap(x[i], y[i], own.centre, other.centre);
    const A p = x_hat[i] * of_x, q = y_hat[i] * of_y;
    grad[i] = own.beta_tt * multiply_add<kFma>(p, d - own.mean, (p - q) * t);
  }
}

template <int kPower, bool kFma, typename A>
FASTGIST_INLINE void finish_terms(const OneSide<A>& at, int64_t n, const GistSide<A>& own, const GistSide<A>& other,
                                  const GistScalars<A>& row, const A* weights) {
  if (own.has_ce && own.has_kl) {
    finish_side<kPower, true, kFma>(at, n, own, other, row.t, weights);
  } else if (own.has_ce) {
    finish_side<kPower, false, kFma>(at, n, own, other, row.t, weights);
  } else if (own.has_kl) {
    finish_divergence<kFma>(at, n, own, other, row.t);
  } else {
    std::fill_n(at.grad, n, row.nothing);
  }
}

// `weights`: of each class, or the one that all have.
template <int kPower, bool kFma, int kBytes, typename A>
FASTGIST_INLINE void finish_gist(const Block<A>& block, const GistScalars<A>& row, const A* weights, bool even) {
  const int64_t n = block.n;
  const bool both = block.grad_z != nullptr && block.grad_o != nullptr;
  if (both && row.z.has_kl && row.o.has_kl && row.o.has_ce) {
    if (even && block.plain) return finish_both<kPower, true, true, kFma, kBytes>(block, row, weights);
    if (even) return finish_both<kPower, true, false, kFma, kBytes>(block, row, weights);
    return finish_both<kPower, false, false, kFma, kBytes>(block, row, weights);
  }
  if (even) weights = std::fill_n(block.buffers->weights, n, weights[0]) - n;
  // The first gradient may stand where the exponentials are that the second one needs: it waits in a buffer.
  A* const first = both ? block.buffers->grad_z : block.grad_z;
  const OneSide<A> sides[] = {{block.z, block.o, block.p, block.q, block.moved_p, block.moved_q, first},
                              {block.o, block.z, block.q, block.p, block.moved_q, block.moved_p, block.grad_o}};
  for (int side = 0; side < 2; ++side) {  // one loop, so that the code is there once
    if (sides[side].grad == nullptr) continue;
    finish_terms<kPower, kFma>(sides[side], n, side == 0 ? row.z : row.o, side == 0 ? row.o : row.z, row, weights);
  }
  if (both && first != block.grad_z) std::copy_n(first, n, block.grad_z);
}

template <bool kFma, int kBytes, typename A>
FASTGIST_INLINE void finish_gist(int power, const Block<A>& block, const GistScalars<A>& row, const A* weights,
                                 bool even) {
  switch (power) {
    case 1:
      return finish_gist<1, kFma, kBytes>(block, row, weights, even);
    case 2:
      return finish_gist<2, kFma, kBytes>(block, row, weights, even);
    case 3:
      return finish_gist<3, kFma, kBytes>(block, row, weights, even);
    case 4:
      return finish_gist<4, kFma, kBytes>(block, row, weights, even);
    default:
      return finish_gist<kUnitAnew, kFma, kBytes>(block, row, weights, even);
  }
}

}  // namespace fastgist::cpu
