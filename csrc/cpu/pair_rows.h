// What the ops over two rows of logits share: the online sums of the divergence, and the scalars behind its gradients.
// Formulas and the rules for -inf are in ../bidirectional_kl.h.
#pragma once

#include <algorithm>
#include <utility>

#include "../bidirectional_kl.h"
#include "simd.h"

namespace fastgist::cpu {

template <typename A>
constexpr A kInf = std::numeric_limits<A>::infinity();

// The point to centre on: 0 while a side has shown nothing but -inf.
template <typename A>
FASTGIST_INLINE A centre(A max) {
  return max == -kInf<A> ? A(0) : max;
}

// Lanes of the widest vectors of floats. A block whose length is no multiple ends in kLanes classes that are looked at
// once more where they have been already, and not in a loop over single ones: those took a sixth of the time at 1000.
constexpr int64_t kLanes = 16;

// The maxima of a block's two sides, and the least of all its logits.
template <typename A>
struct Extremes {
  A m_z = -kInf<A>, m_o = -kInf<A>, least = kInf<A>;

  FASTGIST_INLINE void look(const A* z, const A* o, int64_t n) {
    // NaN never wins a comparison, so it stays out of these and shows in the sums.
    A max_z = m_z, max_o = m_o, min = least;
#pragma omp simd reduction(max : max_z, max_o) reduction(min : min)
    for (int64_t i = 0; i < n; ++i) {
      max_z = z[i] > max_z ? z[i] : max_z;
      max_o = o[i] > max_o ? o[i] : max_o;
      const A lower = z[i] < o[i] ? z[i] : o[i];
      min = lower < min ? lower : min;
    }
    m_z = max_z, m_o = max_o, least = min;
  }
};

template <typename A>
FASTGIST_INLINE Extremes<A> extremes(const A* z, const A* o, int64_t n) {
  Extremes<A> seen;
  if (n < kLanes) {
    seen.look(z, o, n);
    return seen;
  }
  seen.look(z, o, n & -kLanes);
  if (n % kLanes != 0) seen.look(z + n - kLanes, o + n - kLanes, kLanes);
  return seen;
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

  FASTGIST_INLINE bool here() const { return p != nullptr; }
  FASTGIST_INLINE Parked from(int64_t start) const { return here() ? Parked{p + start, q + start} : Parked{}; }
};

template <typename A>
struct Centres {
  A z, o;
};

// Sums over the classes seen so far, about the maxima seen so far. w is the sum of p^ d (q^ d) with d not yet over T;
// unit is the sum of the exponentials at temperature 1. A block is summed in A, many lanes wide; the blocks add up in
// double, or fifty of them would cost fifty roundings.
template <typename A>
struct OnlinePair {
  A m_z = -kInf<A>, m_o = -kInf<A>;
  double s_p = 0, s_q = 0, w_p = 0, w_q = 0, unit_z = 0, unit_o = 0;
  bool lone = false;  // some class is -inf on one side only

  struct Rise {  // old centres less new ones
    A z, o;
  };

  // Move the sums to new maxima. When the maxima rise by (a, b), p^ shrinks by exp(-a / T) and d by a - b.
  template <bool kUnit, bool kFma>
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
    const double shift = (static_cast<double>(old_z) - centre(m_z)) - (static_cast<double>(old_o) - centre(m_o));
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

  // Add classes whose maxima are in already, and leave p^ and q^. kScreen: some are -inf, where d is 0 by definition.
  // kPart: the first `before` have been added already.
  template <bool kScreen, bool kPart, bool kFma>
  FASTGIST_INLINE void add_lanes(const A* z, const A* o, int64_t n, int64_t before, const ExpScale<A>& over_t, A* p_hat,
                                 A* q_hat) {
    const A c_z = centre(m_z), c_o = centre(m_o);
    A sum_p = 0, sum_q = 0, sum_pd = 0, sum_qd = 0;
    int lone_classes = 0;
#pragma omp simd reduction(+ : sum_p, sum_q, sum_pd, sum_qd, lone_classes)
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
      p_hat[i] = p;
      q_hat[i] = q;
      const bool added = kPart && i < before;
      sum_p += added ? A(0) : p;
      sum_q += added ? A(0) : q;
      sum_pd = added ? sum_pd : multiply_add<kFma>(p, d, sum_pd);
      sum_qd = added ? sum_qd : multiply_add<kFma>(q, d, sum_qd);
    }
    s_p += sum_p;
    s_q += sum_q;
    w_p += sum_pd;
    w_q += sum_qd;
    lone = lone || lone_classes != 0;
  }

  template <bool kScreen, bool kFma>
  FASTGIST_INLINE void add(const A* z, const A* o, int64_t n, const ExpScale<A>& over_t, A* p_hat, A* q_hat) {
    if (n < kLanes) return add_lanes<kScreen, false, kFma>(z, o, n, 0, over_t, p_hat, q_hat);
    const int64_t whole = n & -kLanes, last = n - kLanes;
    add_lanes<kScreen, false, kFma>(z, o, whole, 0, over_t, p_hat, q_hat);
    if (whole == n) return;
    add_lanes<kScreen, true, kFma>(z + last, o + last, kLanes, whole - last, over_t, p_hat + last, q_hat + last);
  }

  // The same, screened or not as the block's least logit asks.
  template <bool kFma>
  FASTGIST_INLINE void add(const A* z, const A* o, int64_t n, const ExpScale<A>& over_t, A least, A* p_hat, A* q_hat) {
    if (least > -kInf<A>) return add<false, kFma>(z, o, n, over_t, p_hat, q_hat);
    add<true, kFma>(z, o, n, over_t, p_hat, q_hat);
  }

  // The block's exponentials at temperature 1, from those at T that add() left.
  template <int kPower, bool kFma>
  FASTGIST_INLINE void add_unit(const A* z, const A* o, const A* p_hat, const A* q_hat, int64_t n) {
    const A c_z = centre(m_z), c_o = centre(m_o);
    A sum_z = 0, sum_o = 0;
#pragma omp simd reduction(+ : sum_z, sum_o)
    for (int64_t i = 0; i < n; ++i) {
      sum_z += exp_unit<kPower, kFma>(z[i] - c_z, p_hat[i]);
      sum_o += exp_unit<kPower, kFma>(o[i] - c_o, q_hat[i]);
    }
    unit_z += sum_z;
    unit_o += sum_o;
  }

  // Take in the sums over the classes that follow. Returns how far either's centres had to move.
  template <bool kUnit, bool kFma>
  FASTGIST_INLINE std::pair<Rise, Rise> merge(OnlinePair next, const ExpScale<A>& over_t) {
    const Rise ours = raise<kUnit, kFma>(next.m_z, next.m_o, over_t);
    const Rise theirs = next.template raise<kUnit, kFma>(m_z, m_o, over_t);
    s_p += next.s_p;
    s_q += next.s_q;
    w_p += next.w_p;
    w_q += next.w_q;
    unit_z += next.unit_z;
    unit_o += next.unit_o;
    lone = lone || next.lone;
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
template <bool kFma, typename A>
FASTGIST_INLINE void exponentials(const A* x, int64_t n, A c, const ExpScale<A>& over_t, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp_scaled<kFma>(x[i] - c, over_t);
}

// What takes exponentials about `from` to those about the row's centre, which is no smaller.
template <bool kFma, typename A>
FASTGIST_INLINE A moved(A from, A to, const ExpScale<A>& over_t) {
  // min: `from` is 0 where it stands for -inf; the exponentials are 0 there and stay 0.
  return from == to ? A(1) : exp_scaled<kFma>(std::min(from - to, A(0)), over_t);
}

// z - m_z less o - m_o: 0 where both are -inf. Where one is, e_p and e_q are NaN and take the whole row with them.
// It stays undivided by T, and so do e_p and e_q: what must vanish in d - e_p then does; and where a class is masked by
// the least float, p is 0 and d / T may be infinite. Over T^2 goes what all of a gradient is multiplied by.
template <typename A>
FASTGIST_INLINE A gap(A z, A o, A m_z, A m_o) {
  return z == -kInf<A> ? A(0) : (z - m_z) - (o - m_o);
}

}  // namespace fastgist::cpu
