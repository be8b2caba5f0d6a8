// Loops over a block of a row, a vector at a time. Sums have a place for each lane of a vector, which the compiler
// keeps in registers until the block's end, and the classes past the last whole vector are a masked vector of the same
// loop: with sums of their own they took a tenth of the time at 1,000 classes.
#pragma once

#include <type_traits>

#include "simd.h"

namespace fastgist::cpu {

template <int kBytes, typename A>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(A));

// body(part, at, left) for the elements from `at` on: a whole vector of them, or, where part() is true, only `left`,
// which is what lane < left asks. A lane that is out reads nothing and writes nothing.
template <int kWidth, typename Body>
FASTGIST_INLINE void by_vectors(int64_t n, const Body& body) {
  int64_t at = 0;
  for (; at + kWidth <= n; at += kWidth) body(std::false_type{}, at, kWidth);
  if (at < n) body(std::true_type{}, at, static_cast<int>(n - at));
}

// A sum a lane.
template <typename A, int kWidth>
struct Lanes {
  alignas(kWidth * sizeof(A)) A lane[kWidth];

  FASTGIST_INLINE explicit Lanes(A value = A(0)) {
#pragma omp simd
    for (int j = 0; j < kWidth; ++j) lane[j] = value;
  }
  FASTGIST_INLINE A& operator[](int j) { return lane[j]; }
  FASTGIST_INLINE A sum() const {
    A all = 0;
#pragma omp simd reduction(+ : all)
    for (int j = 0; j < kWidth; ++j) all += lane[j];
    return all;
  }
  FASTGIST_INLINE A largest() const {
    A most = lane[0];
#pragma omp simd reduction(max : most)
    for (int j = 0; j < kWidth; ++j) most = lane[j] > most ? lane[j] : most;
    return most;
  }
  FASTGIST_INLINE A smallest() const {
    A least = lane[0];
#pragma omp simd reduction(min : least)
    for (int j = 0; j < kWidth; ++j) least = lane[j] < least ? lane[j] : least;
    return least;
  }
};

}  // namespace fastgist::cpu
