// The arithmetic of a row of bidirectional_kl or gist_loss: sums, loss, gradients. The formulas are in
// ../bidirectional_kl.h and ../gist_loss.h. Host code too, so that tests run it without a GPU.
//
// Sums are taken in two steps. A thread adds a group of classes about maxima that it knows already (Group), without
// asking whether a logit is -inf: such a class leaves something that is not finite, and then the group is added once
// more, screened. Groups join the thread's online sums (RowSums), and those of threads, warps and blocks join by maxima
// first, sums after.
#pragma once

#include "../gist_loss.h"
#include "pair_sums.cuh"

namespace fastgist::cuda {

// Which loss, as a template argument (a number: it shows in the names of compiled kernels).
constexpr int kKl = 0;         // bidirectional_kl
constexpr int kGistCubed = 1;  // gist_loss at T = 3: the exponentials at temperature 1 are cubes
constexpr int kGistAny = 2;    // gist_loss at any T

constexpr double kLog2E = 1.4426950408889634;

// What is computed, of what, and what becomes of it. Scalars are worked out on the host.
template <typename A>
struct Arguments {
  LogitPair in;
  ClassTarget target;
  int target_bytes;  // of a soft target's element
  int64_t ignore_index;
  A inv_t, to_exp2;  // 1 / T, log2(e) / T
  A alpha, beta;
  A beta_in_gradients;  // of the sides that the divergence enters
  A keep, even;         // a class weighs keep * (one-hot or soft target) + even
  int power;            // exp(x) = exp(x / T)^power, or 0: another exponential
  bool kl_z, kl_o;      // whether the divergence enters each side's gradient
  bool dense;           // every class weighs something: soft targets or smoothing
  bool soft_chunks;     // soft targets may be read 16 bytes at a time, as the logits

  A scale;           // with divisor: what the sum of row losses is multiplied by
  const A* divisor;  // or null
  A* row_loss;
  A* stats;  // (kGistStats, rows): written by a forward alone, read by a backward alone
  const A* row_grad;
  int64_t row_grad_stride;
  void* grad_z;
  void* grad_o;
};

// 2^x; results under 2^-126 are 0. The device's own exp2f spends three more instructions on those.
__host__ __device__ __forceinline__ float exp2_flushed(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__host__ __device__ __forceinline__ double exp2_flushed(double x) { return exp2(x); }

// exp(xc), given at_t = exp(xc / T).
template <int kLoss, typename A>
__host__ __device__ __forceinline__ A exp_unit(A xc, A at_t, int power) {
  if constexpr (kLoss == kGistCubed) return at_t * at_t * at_t;
  if (power == 0) return exp2_flushed(xc * static_cast<A>(kLog2E));
  const A square = at_t * at_t;  // at_t, its square, cube or fourth power
  return (power % 2 == 1 ? at_t : square) * (power > 2 ? square : A(1));
}

// -- sums -------------------------------------------------------------------------------------------------------------

// Sums over a few classes about given centres.
template <typename A, int kLoss>
struct Group {
  A s_p = 0, s_q = 0, w_p = 0, w_q = 0, unit_z = 0, unit_o = 0;
  int lone = 0;

  template <bool kScreen>
  __host__ __device__ __forceinline__ void add(A z, A o, A c_z, A c_o, const Arguments<A>& args) {
    const A zc = z - c_z, oc = o - c_o;
    A d = zc - oc;
    if constexpr (kScreen) {
      const bool no_z = z == minus_infinity(A()), no_o = o == minus_infinity(A());
      d = no_z || no_o ? A(0) : d;
      lone += no_z != no_o;
    }
    const A p = exp2_flushed(zc * args.to_exp2), q = exp2_flushed(oc * args.to_exp2);
    s_p += p;
    s_q += q;
    w_p += p * d;
    w_q += q * d;
    if constexpr (kLoss != kKl) {
      unit_z += exp_unit<kLoss>(zc, p, args.power);
      unit_o += exp_unit<kLoss>(oc, q, args.power);
    }
  }

  // False wherever a class was -inf on any side (and for NaN and +inf, which screening does not change).
  __host__ __device__ __forceinline__ bool finite() const { return w_p - w_p == A(0) && w_q - w_q == A(0); }
};

// Dot products of the class weights with a few centred logits. A class of weight 0 counts 0 whatever its logits.
template <typename A>
struct Dots {
  A z, o, weight;

  __host__ __device__ __forceinline__ void add(A logit_z, A logit_o, A c_z, A c_o, A its_weight) {
    const bool absent = its_weight == A(0);
    z += absent ? A(0) : its_weight * (logit_z - c_z);
    o += absent ? A(0) : its_weight * (logit_o - c_o);
    weight += its_weight;
  }
};

// Sums over all that was seen, about the maxima seen.
template <typename A, int kLoss>
struct RowSums {
  OnlinePair<A> pair;
  A unit_z, unit_o;  // gist_loss alone, from here on
  Dots<A> dots;      // of the dense class weights

  static __host__ __device__ __forceinline__ RowSums empty() { return {OnlinePair<A>::empty(), A(0), A(0), {}}; }

  __host__ __device__ __forceinline__ void raise(A z, A o, A to_exp2) {
    if constexpr (kLoss != kKl) {
      const A rise_z = centre(pair.m_z) - centre(larger(pair.m_z, z));
      const A rise_o = centre(pair.m_o) - centre(larger(pair.m_o, o));
      // As in OnlinePair: where the old centre 0 stood for -inf the sums are 0 and must stay 0.
      unit_z *= power_of_two((rise_z > A(0) ? A(0) : rise_z) * static_cast<A>(kLog2E));
      unit_o *= power_of_two((rise_o > A(0) ? A(0) : rise_o) * static_cast<A>(kLog2E));
      dots.z += dots.weight == A(0) ? A(0) : dots.weight * rise_z;
      dots.o += dots.weight == A(0) ? A(0) : dots.weight * rise_o;
    }
    pair.raise(z, o, to_exp2);
  }

  // Classes that were added about the present maxima.
  __host__ __device__ __forceinline__ void take(const Group<A, kLoss>& group) {
    pair.s_p += group.s_p;
    pair.s_q += group.s_q;
    pair.w_p += group.w_p;
    pair.w_q += group.w_q;
    pair.lone += group.lone;
    if constexpr (kLoss != kKl) {
      unit_z += group.unit_z;
      unit_o += group.unit_o;
    }
  }
  __host__ __device__ __forceinline__ void take(const Dots<A>& group) {
    dots.z += group.z;
    dots.o += group.o;
    dots.weight += group.weight;
  }

  // Join with the sums of other lanes; partner(x, distance) is the x of the lane that far away. Lanes are a power of 2,
  // each adds in the same order and all end with the same numbers.
  template <typename Partner>
  __host__ __device__ __forceinline__ void join(int lanes, bool dense, A to_exp2, const Partner& partner) {
    A m_z = pair.m_z, m_o = pair.m_o;
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      m_z = larger(m_z, partner(m_z, distance));
      m_o = larger(m_o, partner(m_o, distance));
    }
    raise(m_z, m_o, to_exp2);
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      pair.s_p += partner(pair.s_p, distance);
      pair.s_q += partner(pair.s_q, distance);
      pair.w_p += partner(pair.w_p, distance);
      pair.w_q += partner(pair.w_q, distance);
      pair.lone += partner(pair.lone, distance);
      if constexpr (kLoss != kKl) {
        unit_z += partner(unit_z, distance);
        unit_o += partner(unit_o, distance);
        if (dense) {
          dots.z += partner(dots.z, distance);
          dots.o += partner(dots.o, distance);
          dots.weight += partner(dots.weight, distance);
        }
      }
    }
  }
};

// -- what a row comes to ----------------------------------------------------------------------------------------------

// Whether a row counts, and its class.
struct Standing {
  bool counts = true, valid = true;
  int64_t label = -1;  // none
};

template <int kLoss, typename A>
__host__ __device__ __forceinline__ Standing standing(const Arguments<A>& args, int64_t row) {
  Standing of;
  if constexpr (kLoss == kKl) {
    of.counts = args.in.mask == nullptr || args.in.mask[row * args.in.mask_stride];
  } else if (args.target.classes != nullptr) {
    const int64_t label = args.target.classes[row * args.target.stride_m];
    of.counts = label != args.ignore_index;
    of.valid = label >= 0 && label < args.in.classes;
    of.label = of.counts && of.valid ? label : -1;
  }
  of.counts = of.counts && args.in.classes > 0;
  return of;
}

// The row of statistics that a forward leaves (Stat, GistStat), but the means of d stay undivided by T: what must
// vanish in d - e then does.
template <typename A>
struct RowStats {
  A m_z, m_o, s_p, s_q, e_p, e_q, unit_z, unit_o, weight;
};

template <typename A>
__host__ __device__ __forceinline__ A cross_entropy(A weight, A unit_sum, A dot) {
  return (weight == A(0) ? A(0) : weight * static_cast<A>(log(unit_sum))) - dot;
}

// The row's loss, not yet scaled. z_label, o_label: the logits of the row's class, if it has one.
template <int kLoss, typename A>
__host__ __device__ __forceinline__ A row_loss(const RowSums<A, kLoss>& sums, bool valid, bool labelled, A z_label,
                                               A o_label, const Arguments<A>& args, RowStats<A>& stats) {
  const OnlinePair<A>& pair = sums.pair;
  stats = {centre(pair.m_z),    centre(pair.m_o), pair.s_p,    pair.s_q,        pair.w_p / pair.s_p,
           pair.w_q / pair.s_q, sums.unit_z,      sums.unit_o, sums.dots.weight};
  A divergence = (stats.e_p - stats.e_q) * args.inv_t;
  if (pair.lone > 0 && divergence == divergence) {
    divergence = -minus_infinity(A());
    stats.e_p = stats.e_q = divergence - divergence;  // NaN
  }
  if constexpr (kLoss == kKl) return divergence;
  Dots<A> dots = sums.dots;
  if (labelled) dots.add(z_label, o_label, stats.m_z, stats.m_o, args.keep);
  stats.weight = dots.weight;
  A loss = cross_entropy(dots.weight, sums.unit_z, dots.z);
  if (args.alpha != A(0)) loss += args.alpha * cross_entropy(dots.weight, sums.unit_o, dots.o);
  if (args.beta != A(0)) loss += args.beta * divergence;
  return valid ? loss : minus_infinity(A()) - minus_infinity(A());
}

// What the gradients of a row need beside its logits.
template <typename A>
struct About {
  A m_z, m_o, e_p, e_q;
  A near_p, near_q;    // a d that is this near to e_p (e_q) is taken for it
  A over_p, over_q;    // factor beta / (T S_p), and with S_q
  A over_z, over_o;    // factor W / sum exp(zc), factor alpha W / sum exp(oc)
  A factor, factor_o;  // what the row loss is multiplied by, and that times alpha
  A nothing;           // 0, or NaN in a row whose factor is
};

template <int kLoss, typename A>
__host__ __device__ __forceinline__ About<A> about(const RowStats<A>& stats, A factor, const Arguments<A>& args) {
  About<A> row;
  row.m_z = stats.m_z;
  row.m_o = stats.m_o;
  row.e_p = stats.e_p;
  row.e_q = stats.e_q;
  row.near_p = nearness(stats.s_p, stats.e_p);
  row.near_q = nearness(stats.s_q, stats.e_q);
  const A pair_factor = kLoss == kKl ? factor * args.inv_t : factor * args.beta_in_gradients * args.inv_t;
  // p = p^ / S_p, not exp2(. - log2 S_p): the rounding of that argument would grow with log S_p.
  row.over_p = pair_factor / stats.s_p;
  row.over_q = pair_factor / stats.s_q;
  row.factor = factor;
  row.factor_o = factor * args.alpha;
  row.over_z = row.factor * stats.weight / stats.unit_z;
  row.over_o = row.factor_o * stats.weight / stats.unit_o;
  row.nothing = factor * A(0);
  return row;
}

// The gradients at a class, but for its weight in the cross-entropies (less_weight).
template <int kLoss, typename A>
__host__ __device__ __forceinline__ void gradients(A z, A o, const About<A>& row, const Arguments<A>& args, A& grad_z,
                                                   A& grad_o) {
  const A zc = z - row.m_z, oc = o - row.m_o;
  // d is 0 where both sides are -inf. Where one is, e_p and e_q are NaN and take the whole row with them.
  const A d = z == minus_infinity(A()) ? A(0) : zc - oc;
  const A at_z = exp2_flushed(zc * args.to_exp2), at_o = exp2_flushed(oc * args.to_exp2);
  const A p = product(at_z, row.over_p), q = product(at_o, row.over_q);
  // Over T goes p, not d: where a class is masked by the least float, p is 0 and d / T may be infinite.
  const A kl_z = (p * args.inv_t) * about_mean(d, row.e_p, row.near_p) + (p - q);
  const A kl_o = (q - p) - (q * args.inv_t) * about_mean(d, row.e_q, row.near_q);
  if constexpr (kLoss == kKl) {
    grad_z = kl_z;
    grad_o = kl_o;
  } else {  // a term whose factor is 0 is absent, also where it is not finite
    grad_z = (args.kl_z ? kl_z : row.nothing) + exp_unit<kLoss>(zc, at_z, args.power) * row.over_z;
    grad_o = args.kl_o ? kl_o : row.nothing;
    if (args.alpha != A(0)) grad_o += exp_unit<kLoss>(oc, at_o, args.power) * row.over_o;
  }
}

template <typename A>
__host__ __device__ __forceinline__ void less_weight(A weight, const About<A>& row, const Arguments<A>& args, A& grad_z,
                                                     A& grad_o) {
  grad_z -= row.factor * weight;
  if (args.alpha != A(0)) grad_o -= row.factor_o * weight;
}

// scale / divisor, or NaN in a row whose target is no class.
template <typename A>
__host__ __device__ __forceinline__ A factor_of(const Arguments<A>& args, bool valid) {
  const A factor = args.divisor == nullptr ? args.scale : args.scale / *args.divisor;
  return valid ? factor : minus_infinity(A()) - minus_infinity(A());
}

}  // namespace fastgist::cuda
