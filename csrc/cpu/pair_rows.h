// What the kernels over two rows of logits share: reading a block, the online sums of the divergence, and the terms of
// its gradients. Formulas and the rules for -inf are in ../bidirectional_kl.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../bidirectional_kl.h"
#include "simd.h"

namespace fastgist::cpu {

// Classes a block: two float blocks of inputs and two of outputs are 16 KiB, half of a first-level cache. The forward
// looks for a block's maxima and then takes its exponentials, so the second look finds the block there.
constexpr int64_t kBlock = 1024;

template <typename A>
constexpr A kInf = std::numeric_limits<A>::infinity();

// A block of a row in the accumulation type: the row's own memory where it is that already, else converted into
// `buffer`.
template <typename T, typename A>
FASTGIST_INLINE const A* load_block(const T* x, int64_t stride, int64_t n, A* buffer) {
  if (stride == 1) {
    if constexpr (std::is_same_v<T, A>) return x;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<A>(load(x[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<A>(load(x[i * stride]));
  }
  return buffer;
}

// The point to centre on: 0 while a side has shown nothing but -inf.
template <typename A>
FASTGIST_INLINE A centre(A max) {
  return max == -kInf<A> ? A(0) : max;
}

// The maxima of a block's two sides, and the least of all its logits.
template <typename A>
struct Extremes {
  A m_z = -kInf<A>, m_o = -kInf<A>, least = kInf<A>;
};

template <typename A>
FASTGIST_INLINE Extremes<A> extremes(const A* z, const A* o, int64_t n) {
  // NaN never wins a comparison, so it stays out of these and shows in the sums.
  A m_z = -kInf<A>, m_o = -kInf<A>, least = kInf<A>;
#pragma omp simd reduction(max : m_z, m_o) reduction(min : least)
  for (int64_t i = 0; i < n; ++i) {
    m_z = z[i] > m_z ? z[i] : m_z;
    m_o = o[i] > m_o ? o[i] : m_o;
    const A lower = z[i] < o[i] ? z[i] : o[i];
    least = lower < least ? lower : least;
  }
  return {m_z, m_o, least};
}

// How exponentials at temperature 1 follow from those at temperature T: not wanted, taken anew, or the T-th power.
constexpr int kNoUnit = -1, kUnitAnew = 0;

// exp(xc), given at_t = exp(xc / T).
template <int kPower, bool kFma, typename A>
FASTGIST_INLINE A exp_unit(A xc, A at_t) {
  if constexpr (kPower == 1) return at_t;
  if constexpr (kPower == 2) return at_t * at_t;
  if constexpr (kPower == 3) return at_t * at_t * at_t;
  if constexpr (kPower == 4) return (at_t * at_t) * (at_t * at_t);
  return exp_nonpositive<kFma>(xc);
}

// Sums over the classes seen so far, about the maxima seen so far. w is the sum of p^ d (q^ d) with d not yet over T;
// unit is the sum of the exponentials at temperature 1. A block is summed in A, many lanes wide; the blocks add up in
// double, or fifty of them would cost fifty roundings.
template <typename A, bool kFma>
struct OnlinePair {
  A m_z = -kInf<A>, m_o = -kInf<A>;
  double s_p = 0, s_q = 0, w_p = 0, w_q = 0, unit_z = 0, unit_o = 0;
  bool lone = false;  // some class is -inf on one side only

  struct Rise {  // old centres less new ones
    A z, o;
  };

  // Move the sums to new maxima. When the maxima rise by (a, b), p^ shrinks by exp(-a / T) and d by a - b.
  template <bool kUnit>
  FASTGIST_INLINE Rise raise(A block_m_z, A block_m_o, const ExpScale<A>& over_t) {
    if (!(block_m_z > m_z) && !(block_m_o > m_o)) return {A(0), A(0)};
    const bool nothing_yet = m_z == -kInf<A> && m_o == -kInf<A>;
    const A old_z = centre(m_z), old_o = centre(m_o);
    m_z = std::max(m_z, block_m_z);
    m_o = std::max(m_o, block_m_o);
    const A rise_z = old_z - centre(m_z), rise_o = old_o - centre(m_o);
    if (nothing_yet) return {rise_z, rise_o};  // the sums are 0 or NaN: no factor would change them
    // min: where the old centre 0 stood for -inf, rise may be positive; the sums are 0 there and stay 0.
    const A down_z = std::min(rise_z, A(0)), down_o = std::min(rise_o, A(0));
    const A alpha_p = exp_scaled<kFma>(down_z, over_t);
    const A alpha_q = exp_scaled<kFma>(down_o, over_t);
    const A shift = rise_z - rise_o;
    w_p = alpha_p * (w_p + shift * s_p);
    w_q = alpha_q * (w_q + shift * s_q);
    s_p *= alpha_p;
    s_q *= alpha_q;
    if constexpr (kUnit) {
      unit_z *= exp_nonpositive<kFma>(down_z);
      unit_o *= exp_nonpositive<kFma>(down_o);
    }
    return {rise_z, rise_o};
  }

  // Add a block whose maxima are in already. kScreen: the block holds -inf, where d is 0 by definition.
  template <int kPower, bool kScreen>
  FASTGIST_INLINE void add(const A* z, const A* o, int64_t n, const ExpScale<A>& over_t) {
    const A c_z = centre(m_z), c_o = centre(m_o);
    A sum_p = 0, sum_q = 0, sum_pd = 0, sum_qd = 0, sum_z = 0, sum_o = 0;
    int lone_classes = 0;
#pragma omp simd reduction(+ : sum_p, sum_q, sum_pd, sum_qd, sum_z, sum_o, lone_classes)
    for (int64_t i = 0; i < n; ++i) {
      const A zc = z[i] - c_z;
      const A oc = o[i] - c_o;
      A d = zc - oc;
      if constexpr (kScreen) {
        const bool no_z = z[i] == -kInf<A>, no_o = o[i] == -kInf<A>;
        d = (no_z | no_o) ? A(0) : d;
        lone_classes += no_z != no_o;
      }
      const A p = exp_scaled<kFma>(zc, over_t);
      const A q = exp_scaled<kFma>(oc, over_t);
      sum_p += p;
      sum_q += q;
      sum_pd = multiply_add<kFma>(p, d, sum_pd);
      sum_qd = multiply_add<kFma>(q, d, sum_qd);
      if constexpr (kPower != kNoUnit) {
        sum_z += exp_unit<kPower, kFma>(zc, p);
        sum_o += exp_unit<kPower, kFma>(oc, q);
      }
    }
    s_p += sum_p;
    s_q += sum_q;
    w_p += sum_pd;
    w_q += sum_qd;
    unit_z += sum_z;
    unit_o += sum_o;
    lone = lone || lone_classes != 0;
  }

  // The same, screened or not as the block's least logit asks.
  template <int kPower>
  FASTGIST_INLINE void add(const A* z, const A* o, int64_t n, const ExpScale<A>& over_t, A least) {
    if (least > -kInf<A>) {
      add<kPower, false>(z, o, n, over_t);
    } else {
      add<kPower, true>(z, o, n, over_t);
    }
  }

  struct Divergence {
    A loss, e_p, e_q;
  };

  FASTGIST_INLINE Divergence divergence(A inv_t) const {
    const A loss = static_cast<A>((w_p / s_p - w_q / s_q) * inv_t);
    if (lone && loss == loss) {
      constexpr A nan = std::numeric_limits<A>::quiet_NaN();
      return {kInf<A>, nan, nan};
    }
    return {loss, static_cast<A>(w_p / s_p * inv_t), static_cast<A>(w_q / s_q * inv_t)};
  }
};

// What the gradients of a row need beside its logits.
template <typename A>
struct RowScalars {
  A m_z, m_o;
  A inv_s_p, inv_s_q;  // p = p^ / S_p, not exp(. - log S_p): the rounding of that argument would grow with log S_p
  A e_p, e_q;
  A scale;  // row_grad / T
  A inv_t;
  ExpScale<A> over_t;
};

// A class of the two rows: centred logits, exponentials at temperature T, and the parts of the divergence's gradients.
template <typename A>
struct PairTerms {
  A zc, oc, p_hat, q_hat, p, q, d;

  template <bool kFma>
  FASTGIST_INLINE A grad_z(A e_p) const {
    return multiply_add<kFma>(p, d - e_p, p - q);
  }
  template <bool kFma>
  FASTGIST_INLINE A grad_o(A e_q) const {
    return multiply_add<kFma>(q, e_q - d, q - p);
  }
};

template <bool kFma, typename A>
FASTGIST_INLINE PairTerms<A> pair_terms(A z, A o, const RowScalars<A>& row) {
  PairTerms<A> at;
  at.zc = z - row.m_z;
  at.oc = o - row.m_o;
  // d is 0 where both sides are -inf. Where one is, e_p and e_q are NaN and take the whole row with them.
  at.d = z == -kInf<A> ? A(0) : (at.zc - at.oc) * row.inv_t;
  at.p_hat = exp_scaled<kFma>(at.zc, row.over_t);
  at.q_hat = exp_scaled<kFma>(at.oc, row.over_t);
  at.p = at.p_hat * row.inv_s_p;
  at.q = at.q_hat * row.inv_s_q;
  return at;
}

}  // namespace fastgist::cpu
