// What the loops over a block of two rows are given and leave.
#pragma once

#include <cstdint>
#include <limits>

#include "simd.h"

namespace fastgist::cpu {

template <typename A>
struct Centres {
  A z, o;
};

template <typename A>
constexpr A kInf = std::numeric_limits<A>::infinity();

// The maxima of a block's two sides, and the least of all its logits. NaN never wins a comparison, so it stays out of
// these and shows in the sums.
template <typename A>
struct Extremes {
  A m_z = -kInf<A>, m_o = -kInf<A>, least = kInf<A>;
};

// The block that comes after one, whose logits are asked for, or looked at, while the one's exponentials are taken.
template <typename A>
struct Upcoming {
  const A* z;
  const A* o;
  int64_t n;  // how many of its classes may be looked at; 0: they are asked for alone

  FASTGIST_INLINE void fetch(int64_t at) const {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(z + at);
    __builtin_prefetch(o + at);
#endif
  }
};

// Of one block: sums of p^, q^, p^ d and q^ d, and whether some class is -inf on one side only; and what was seen of
// the upcoming block, where that was looked at.
template <typename A>
struct BlockSums {
  double p, q, pd, qd;
  bool lone;
  bool looked = false;
  Extremes<A> upcoming = {};
};

}  // namespace fastgist::cpu
