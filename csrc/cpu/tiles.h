// Small matrix products in vector registers: a tile of the result is a few rows by one or two vectors, and its sums
// stay in registers while the inner dimension runs. One operand is read as scalars with any strides, the other in
// panels as wide as the tile.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "dispatch.h"

namespace fastgist::cpu {

// Uninitialised memory that begins with a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(size), std::align_val_t(64)))) {}
  T* get() const { return data_.get(); }
  FASTGIST_INLINE T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

// A (inner, columns) matrix in panels of `width` columns: row k of panel p begins at data + p * step + k * ld. What is
// past the last column is 0.
template <typename A>
struct Panels {
  const A* data = nullptr;
  int64_t ld = 0;
  int64_t step = 0;
};

// Rows of a tile: with two vectors each, sixteen sums where there are 32 registers, eight where there are 16.
template <int kBytes>
constexpr int kTileRows = kBytes == 64 ? 8 : 4;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// sums = a panel, with a (kRows, n) and panel (n, kWidth).
template <int kRows, int kWidth, bool kFma, typename A>
FASTGIST_INLINE void multiply_part(const A* a, int64_t stride_m, int64_t stride_k, const A* panel, int64_t ld,
                                   int64_t n, A (&sums)[kRows][kWidth]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma omp simd
    for (int j = 0; j < kWidth; ++j) sums[r][j] = 0;
  }
  for (int64_t k = 0; k < n; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const A factor = a[r * stride_m + k * stride_k];
#pragma omp simd
      for (int j = 0; j < kWidth; ++j) sums[r][j] = multiply_add<kFma>(factor, panel[k * ld + j], sums[r][j]);
    }
  }
}

// Terms that are summed one after the other; longer sums are sums of such sums, whose rounding grows less.
constexpr int64_t kRun = 256;

template <int kRows, int kWidth, bool kFma, typename A>
FASTGIST_INLINE void multiply_tile(const A* a, int64_t stride_m, int64_t stride_k, const A* panel, int64_t ld,
                                   int64_t n, A (&sums)[kRows][kWidth]) {
  multiply_part<kRows, kWidth, kFma>(a, stride_m, stride_k, panel, ld, std::min(n, kRun), sums);
  for (int64_t k = kRun; k < n; k += kRun) {
    A part[kRows][kWidth];
    multiply_part<kRows, kWidth, kFma>(a + k * stride_k, stride_m, stride_k, panel + k * ld, ld, std::min(n - k, kRun),
                                       part);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma omp simd
      for (int j = 0; j < kWidth; ++j) sums[r][j] += part[r][j];
    }
  }
}

// What becomes of a tile's sums: `finish(row, column, sums)` for each of its rows, where `column` is a multiple of the
// width. `rows` rows of a times all panels; a's elements are a[row * stride_m + k * stride_k].
template <int kRows, int kWidth, bool kFma, typename A, typename Finish>
FASTGIST_INLINE void multiply_rows(const A* a, int64_t stride_m, int64_t stride_k, const Panels<A>& b, int64_t columns,
                                   int64_t n, int64_t row, const Finish& finish) {
  for (int64_t column = 0; column < columns; column += kWidth) {
    A sums[kRows][kWidth];
    multiply_tile<kRows, kWidth, kFma>(a + row * stride_m, stride_m, stride_k, b.data + column / kWidth * b.step, b.ld,
                                       n, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) finish(row + r, column, sums[r]);
  }
}

template <int kRows, int kWidth, bool kFma, typename A, typename Finish>
FASTGIST_INLINE void multiply(const A* a, int64_t stride_m, int64_t stride_k, const Panels<A>& b, int64_t rows,
                              int64_t columns, int64_t n, const Finish& finish) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    multiply_rows<kRows, kWidth, kFma>(a, stride_m, stride_k, b, columns, n, row, finish);
  }
  // The last ones one by one: few, and each row's sums run in the same order in any tile.
  for (; row < rows; ++row) multiply_rows<1, kWidth, kFma>(a, stride_m, stride_k, b, columns, n, row, finish);
}

}  // namespace fastgist::cpu
