// What the ops over two rows of logits share: the online sums of the divergence, and the scalars behind its gradients.
// Formulas and the rules for -inf are in ../bidirectional_kl.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "../bidirectional_kl.h"
#include "lanes.h"
#include "pair_avx512.h"
#include "pair_sums.h"
#include "simd.h"

namespace fastgist::cpu {

// The point to centre on: 0 while a side has shown nothing but -inf.
template <typename A>
FASTGIST_INLINE A centre(A max) {
  return max == -kInf<A> ? A(0) : max;
}

template <int kBytes, typename A>
FASTGIST_INLINE Extremes<A> extremes(const A* z, const A* o, int64_t n) {
  constexpr int kWidth = kLanes<kBytes, A>;
  Lanes<A, kWidth> max_z(-kInf<A>), max_o(-kInf<A>), min(kInf<A>);
  by_vectors<kWidth>(n, [&](auto part, int64_t at, int left) FASTGIST_INLINE_BODY {
#pragma omp simd
    for (int j = 0; j < kWidth; ++j) {
      const bool in = !part() || j < left;
      const A a = in ? z[at + j] : -kInf<A>, b = in ? o[at + j] : -kInf<A>;
      max_z[j] = a > max_z[j] ? a : max_z[j];
      max_o[j] = b > max_o[j] ? b : max_o[j];
      const A lower = a < b ? a : b;
      min[j] = in && lower < min[j] ? lower : min[j];
    }
  });
  return {max_z.largest(), max_o.largest(), min.smallest()};
}

// How exponentials at temperature 1 follow from those at temperature T: taken anew, or as the T-th power.
constexpr int kUnitAnew = 0;

// exp(xc), given at_t = exp(xc / T).
template <int kPower, bool kFma, typename A>
FASTGIST_INLINE A exp_unit(A xc, A at_t) {
  if constexpr (kPower == 1) return at_t;
  if constexpr (kPower == 2) return at_t * at_t;
  if constexpr (kPower == 3) return at_t * at_t * at_t;
  if constexpr (kPower == 4) return (at_t * at_t) * (at_t * at_t);
  return exp_nonpositive<kFma>(xc);
}

// The same of a factor of exponentials at temperature T; those that are taken anew need none.
template <int kPower, typename A>
FASTGIST_INLINE A exp_power(A factor) {
  if constexpr (kPower == kUnitAnew) return A(1);
  return exp_unit<kPower, false>(A(0), factor);
}

// Where p^ and q^ of a row or a block wait for the row's sums: about the centres that their block saw. Null: nowhere.
template <typename A>
struct Parked {
  A* p = nullptr;
  A* q = nullptr;

  // From a class on, with what has no place of its own in that of `other`.
  FASTGIST_INLINE Parked from(int64_t start, const Parked& other) const {
    return {p == nullptr ? other.p : p + start, q == nullptr ? other.q : q + start};
  }
};

// Sums over the classes seen so far, about the maxima seen so far. w is the sum of p^ d (q^ d) with d not yet over T;
// unit is the sum of the exponentials at temperature 1. A block is summed in A, many lanes wide; the blocks add up in
// double, or fifty of them would cost fifty roundings.
template <typename A>
struct OnlinePair {
  A m_z = -kInf<A>, m_o = -kInf<A>;
  double s_p = 0, s_q = 0, w_p = 0, w_q = 0, unit_z = 0, unit_o = 0;
  bool lone = false;  // some class is -inf on one side only
  bool plain = true;  // all exponentials so far are normal numbers: no class is -inf, none NaN

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
    // In double: where maxima rise all along a row, as many factors come together as it has blocks.
    const double alpha_p = std::exp(down_z * over_t.inv_t), alpha_q = std::exp(down_o * over_t.inv_t);
    const double shift = (static_cast<double>(old_z) - centre(m_z)) - (static_cast<double>(old_o) - centre(m_o));
    w_p = alpha_p * (w_p + shift * s_p);
    w_q = alpha_q * (w_q + shift * s_q);
    s_p *= alpha_p;
    s_q *= alpha_q;
    if constexpr (kUnit) {
      unit_z *= std::exp(static_cast<double>(down_z));
      unit_o *= std::exp(static_cast<double>(down_o));
    }
    return {rise_z, rise_o};
  }

  // Add classes whose maxima are in already, and leave p^ and q^. Returns the sums of these. kNormal: all p^ and q^ are
  // normal numbers. Otherwise some classes may be -inf, where d is 0 by definition.
  template <bool kNormal, bool kFma, int kBytes>
  FASTGIST_INLINE BlockSums<A> sums_of(const A* z, const A* o, int64_t n, const Upcoming<A>& upcoming,
                                       const ExpScale<A>& over_t, A* p_hat, A* q_hat) const {
    constexpr int kWidth = kLanes<kBytes, A>;
    const A c_z = centre(m_z), c_o = centre(m_o);
#if FASTGIST_X86_DISPATCH
    if constexpr (kBytes == 64 && std::is_same_v<A, float>) {
      return sums_avx512<kNormal>(z, o, n, {c_z, c_o}, upcoming, over_t, p_hat, q_hat);
    }
#endif
    const ExpScale<A> scale = over_t;  // its own: what p_hat points to might be the caller's
    const Upcoming<A> next = upcoming;
    Lanes<A, kWidth> sum_p, sum_q, sum_pd, sum_qd;
    Lanes<int, kWidth> lone_classes;
    by_vectors<kWidth>(n, [&](auto part, int64_t at, int left) FASTGIST_INLINE_BODY {
      if (!part()) next.fetch(at);
#pragma omp simd
      for (int j = 0; j < kWidth; ++j) {
        const bool in = !part() || j < left;
        const A a = in ? z[at + j] : c_z, b = in ? o[at + j] : c_o;
        const A zc = a - c_z, oc = b - c_o;
        A d = zc - oc, p, q;
        if constexpr (kNormal) {
          p = exp_normal<kFma>(zc, scale);
          q = exp_normal<kFma>(oc, scale);
        } else {
          const bool no_z = a == -kInf<A>, no_o = b == -kInf<A>;
          d = (no_z | no_o) ? A(0) : d;
          lone_classes[j] += no_z != no_o;
          p = exp_scaled<kFma>(zc, scale);
          q = exp_scaled<kFma>(oc, scale);
        }
        if (in) {
          p_hat[at + j] = p;
          q_hat[at + j] = q;
        }
        sum_p[j] += in ? p : A(0);
        sum_q[j] += in ? q : A(0);
        sum_pd[j] = multiply_add<kFma>(p, d, sum_pd[j]);  // a lane that is out stands at the centres: its d is 0
        sum_qd[j] = multiply_add<kFma>(q, d, sum_qd[j]);
      }
    });
    return {sum_p.sum(), sum_q.sum(), sum_pd.sum(), sum_qd.sum(), lone_classes.sum() != 0};
  }

  // The same into this, in the form that the block's least logit asks for.
  template <bool kFma, int kBytes>
  FASTGIST_INLINE BlockSums<A> add(const A* z, const A* o, int64_t n, const Upcoming<A>& next,
                                   const ExpScale<A>& over_t, A least, A* p_hat, A* q_hat) {
    bool normal = least - std::max(centre(m_z), centre(m_o)) >= over_t.least_normal;
    BlockSums<A> block;
    if (normal) {
      block = sums_of<true, kFma, kBytes>(z, o, n, next, over_t, p_hat, q_hat);
      normal = block.pd == block.pd;  // NaN is no least logit: it shows in d
    }
    if (!normal) block = sums_of<false, kFma, kBytes>(z, o, n, next, over_t, p_hat, q_hat);
    plain = plain && normal;
    s_p += block.p;
    s_q += block.q;
    w_p += block.pd;
    w_q += block.qd;
    lone = lone || block.lone;
    return block;
  }

  // The block's exponentials at temperature 1, from those at T that add() left.
  template <int kPower, bool kFma, int kBytes>
  FASTGIST_INLINE void add_unit(const BlockSums<A>& block, const A* z, const A* o, const A* p_hat, const A* q_hat,
                                int64_t n) {
    if constexpr (kPower == 1) {
      unit_z += block.p;
      unit_o += block.q;
    } else {
      constexpr int kWidth = kLanes<kBytes, A>;
      const A c_z = centre(m_z), c_o = centre(m_o);
      Lanes<A, kWidth> sum_z, sum_o;
      by_vectors<kWidth>(n, [&](auto part, int64_t at, int left) FASTGIST_INLINE_BODY {
#pragma omp simd
        for (int j = 0; j < kWidth; ++j) {
          const bool in = !part() || j < left;
          const A a = in ? z[at + j] : c_z, b = in ? o[at + j] : c_o;
          const A unit_p = exp_unit<kPower, kFma>(a - c_z, in ? p_hat[at + j] : A(1));
          const A unit_q = exp_unit<kPower, kFma>(b - c_o, in ? q_hat[at + j] : A(1));
          sum_z[j] += in ? unit_p : A(0);
          sum_o[j] += in ? unit_q : A(0);
        }
      });
      unit_z += sum_z.sum();
      unit_o += sum_o.sum();
    }
  }

  // Take in the sums over the classes that follow. Returns how far either's centres had to move.
  template <bool kUnit>
  FASTGIST_INLINE std::pair<Rise, Rise> merge(OnlinePair next, const ExpScale<A>& over_t) {
    const Rise ours = raise<kUnit>(next.m_z, next.m_o, over_t);
    const Rise theirs = next.template raise<kUnit>(m_z, m_o, over_t);
    s_p += next.s_p;
    s_q += next.s_q;
    w_p += next.w_p;
    w_q += next.w_q;
    unit_z += next.unit_z;
    unit_o += next.unit_o;
    lone = lone || next.lone;
    plain = plain && next.plain;
    return {ours, theirs};
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
    return {loss, static_cast<A>(w_p / s_p), static_cast<A>(w_q / s_q)};
  }

  // The divergence's part of a row's statistics.
  void store(const Divergence& of_row, double* stats) const {
    stats[kMaxZ] = centre(m_z);
    stats[kMaxO] = centre(m_o);
    stats[kSumP] = s_p;
    stats[kSumQ] = s_q;
    stats[kMeanP] = of_row.e_p;
    stats[kMeanQ] = of_row.e_q;
  }
};

// e^((x - c) / T) of a block.
template <bool kFma, int kBytes, typename A>
FASTGIST_INLINE void exponentials(const A* x, int64_t n, A c, const ExpScale<A>& over_t, A* out) {
#if FASTGIST_X86_DISPATCH
  if constexpr (kBytes == 64 && std::is_same_v<A, float>) return exponentials_avx512(x, n, c, over_t, out);
#endif
  const ExpScale<A> scale = over_t;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp_scaled<kFma>(x[i] - c, scale);
}

// What takes exponentials about `from` to those about the row's centre, which is no smaller.
template <typename A>
FASTGIST_INLINE A moved(A from, A to, const ExpScale<A>& over_t) {
  // min: `from` is 0 where it stands for -inf; the exponentials are 0 there and stay 0.
  return from == to ? A(1) : static_cast<A>(std::exp(std::min(from - to, A(0)) * over_t.inv_t));
}

// z - m_z less o - m_o: 0 where both are -inf. Where one is, e_p and e_q are NaN and take the whole row with them.
// It stays undivided by T, and so do e_p and e_q: what must vanish in d - e_p then does; and where a class is masked by
// the least float, p is 0 and d / T may be infinite. Over T^2 goes what all of a gradient is multiplied by.
// kPlain: no class is -inf.
template <bool kPlain = false, typename A>
FASTGIST_INLINE A gap(A z, A o, A m_z, A m_o) {
  const A d = (z - m_z) - (o - m_o);
  return kPlain || z != -kInf<A> ? d : A(0);
}

}  // namespace fastgist::cpu
