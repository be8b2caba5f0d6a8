// What the loops over a block of two rows are given and leave.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fastgist::cpu {

template <typename A>
struct Centres {
  A z, o;
};

// The logits that come after a block's, which are asked for while its exponentials are taken.
template <typename A>
struct Upcoming {
  const A* z;
  const A* o;

  FASTGIST_INLINE void fetch(int64_t at) const {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(z + at);
    __builtin_prefetch(o + at);
#endif
  }
};

// Of one block: sums of p^, q^, p^ d and q^ d, and whether some class is -inf on one side only.
template <typename A>
struct BlockSums {
  A p, q, pd, qd;
  bool lone;
};

}  // namespace fastgist::cpu
