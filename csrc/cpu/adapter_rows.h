// What the adapter's forward and backward share: rows of the operands on their way into cache, weights in panels, rows
// of the results on their way out.
#pragma once

#include <algorithm>
#include <cstring>

#include "adapter.h"
#include "pair_blocks.h"
#include "tiles.h"

namespace fastgist::cpu {

// Rows that go through all of an adapter together.
constexpr int64_t kFew = 8;

template <typename A>
FASTGIST_INLINE constexpr bool holds(DType dtype) {
  return dtype == (std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32);
}

// A matrix or a part of one in the accumulation type, its rows contiguous.
template <typename A>
struct Rows {
  const A* data;
  int64_t ld;
};

// `rows` rows of a (.., columns) matrix from `row` on, in its own memory if that will do, else in `buffer` (rows, ld).
// Where ld is more than the columns, what is past them is 0.
template <typename A>
FASTGIST_INLINE Rows<A> load_rows(const MatrixView& from, int64_t row, int64_t rows, int64_t columns, int64_t ld,
                                  A* buffer) {
  if (holds<A>(from.dtype) && from.stride_n == 1 && ld == columns) {
    return {static_cast<const A*>(from.data) + row * from.stride_m, from.stride_m};
  }
  for (int64_t r = 0; r < rows; ++r) {
    A* const to = buffer + r * ld;
    const A* const found = load_any(from.dtype, from.data, (row + r) * from.stride_m, from.stride_n, columns, to);
    if (found != to) std::copy_n(found, columns, to);
    std::fill(to + columns, to + ld, A(0));
  }
  return {buffer, ld};
}

template <typename A, typename T>
FASTGIST_INLINE void store_as(const A* from, T* to, int64_t n) {
  if constexpr (std::is_same_v<A, T>) {
    if (from != to) std::copy_n(from, n, to);
  } else if constexpr (std::is_same_v<A, float> && !std::is_same_v<T, double>) {
    store_block(from, to, n);
  }
}

// n results into a contiguous tensor of any format, from element `offset` on.
template <typename A>
FASTGIST_INLINE void store_any(DType dtype, const A* from, void* to, int64_t offset, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return store_as(from, static_cast<float*>(to) + offset, n);
    case DType::kFloat64:
      return store_as(from, static_cast<double*>(to) + offset, n);
    case DType::kBFloat16:
      return store_as(from, static_cast<BFloat16*>(to) + offset, n);
    case DType::kFloat16:
      return store_as(from, static_cast<Half*>(to) + offset, n);
  }
}

template <typename T>
FASTGIST_INLINE void round_block(float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T narrow;
    store(x[i], narrow);
    x[i] = load(narrow);
  }
}

// Elements start .. start + n - 1 of a weight's row, rounded to x's format where that is the narrower one.
template <typename A>
const A* load_weight(const AdapterInputs& in, const MatrixView& from, int64_t row, int64_t start, int64_t n,
                     A* buffer) {
  const A* const found =
      load_any(from.dtype, from.data, row * from.stride_m + start * from.stride_n, from.stride_n, n, buffer);
  if constexpr (std::is_same_v<A, float>) {
    if (in.dtype != from.dtype && (in.dtype == DType::kBFloat16 || in.dtype == DType::kFloat16)) {
      if (found != buffer) std::copy_n(found, n, buffer);
      in.dtype == DType::kBFloat16 ? round_block<BFloat16>(buffer, n) : round_block<Half>(buffer, n);
      return buffer;
    }
  }
  return found;
}

// A weight on its way into panels. `scaled` (null: none) multiplies the weight's columns.
template <typename A>
class Packed {
 public:
  Packed(int64_t inner, int64_t columns, int64_t width)
      : inner_(inner), width_(width), memory_(inner * round_up(columns, width)) {
    if (columns % width != 0) {  // the last panel
      std::fill_n(memory_.get() + columns / width * inner * width, inner * width, A(0));
    }
  }
  Panels<A> panels() const { return {memory_.get(), width_, inner_ * width_}; }

  // Rows of the weight become rows of the panels, from `first` on.
  void rows(const AdapterInputs& in, const MatrixView& weight, int64_t count, int64_t columns, int64_t first,
            const A* scaled) {
    Buffer<A> buffer(width_);
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t start = 0; start < columns; start += width_) {
        const int64_t n = std::min(width_, columns - start);
        const A* const found = load_weight(in, weight, row, start, n, buffer.get());
        A* const to = memory_.get() + (start / width_ * inner_ + first + row) * width_;
        for (int64_t i = 0; i < n; ++i) to[i] = scaled == nullptr ? found[i] : found[i] * scaled[start + i];
      }
    }
  }

  // `count` rows of the weight, `length` long, become columns of the panels, from `first` on.
  void columns(const AdapterInputs& in, const MatrixView& weight, int64_t count, int64_t length, int64_t first,
               const A* scaled) {
    constexpr int64_t kPart = 128;  // the panel's lines that a part of a row goes to stay in cache for the next row
    A buffer[kPart];
    for (int64_t start = 0; start < length; start += kPart) {
      const int64_t n = std::min(kPart, length - start);
      for (int64_t row = 0; row < count; ++row) {
        const A* const found = load_weight(in, weight, row, start, n, buffer);
        const int64_t column = first + row;
        A* const to = memory_.get() + (column / width_ * inner_ + start) * width_ + column % width_;
        for (int64_t i = 0; i < n; ++i) to[i * width_] = scaled == nullptr ? found[i] : found[i] * scaled[start + i];
      }
    }
  }

 private:
  int64_t inner_, width_;
  Buffer<A> memory_;
};

// The widths of panels, in elements: as wide as two vectors, or one or half a one where the columns fit it.
template <typename A>
int64_t vector_width() {
  return vector_bytes() / static_cast<int64_t>(sizeof(A));
}
template <typename A>
int64_t panel_width(int64_t columns) {
  const int64_t width = vector_width<A>();
  return columns <= width / 2 ? width / 2 : columns <= width ? width : 2 * width;
}

// A vector in the accumulation type, or the same number everywhere where there is none.
template <typename A>
void load_vector(const MatrixView& from, int64_t n, A otherwise, A* to) {
  if (from.data == nullptr) {
    std::fill_n(to, n, otherwise);
    return;
  }
  const A* const found = load_any(from.dtype, from.data, 0, from.stride_n, n, to);
  if (found != to) std::copy_n(found, n, to);
}

// What z starts with, b_d, and what a LayerNorm in front adds: its weight, D b on top of b_d, and the sums over D w.
template <typename A>
struct Start {
  Buffer<A> bias, weight, sums;

  explicit Start(const AdapterInputs& in) : bias(in.hidden), weight(in.norm ? in.inner : 0), sums(in.hidden) {
    if (in.down_bias.data == nullptr) {
      std::fill_n(bias.get(), in.hidden, A(0));
    } else {
      const A* const found = load_weight(in, in.down_bias, 0, 0, in.hidden, bias.get());
      if (found != bias.get()) std::copy_n(found, in.hidden, bias.get());
    }
    if (!in.norm) return;
    Buffer<A> of_norm(in.inner), buffer(in.inner);
    load_vector(in.norm_weight, in.inner, A(1), weight.get());
    load_vector(in.norm_bias, in.inner, A(0), of_norm.get());
    for (int64_t h = 0; h < in.hidden; ++h) {
      const A* const d = load_weight(in, in.down_weight, h, 0, in.inner, buffer.get());
      double of_weight = 0, of_bias = 0;
      for (int64_t k = 0; k < in.inner; ++k) {
        of_weight += static_cast<double>(d[k]) * static_cast<double>(weight[k]);
        of_bias += static_cast<double>(d[k]) * static_cast<double>(of_norm[k]);
      }
      sums[h] = static_cast<A>(of_weight);
      bias[h] += static_cast<A>(of_bias);
    }
  }
};

template <typename A>
FASTGIST_INLINE void normalise(const A* x, int64_t n, A mean, A rstd, A* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = (x[i] - mean) * rstd;
}

// Sums of a tile: plus a vector, or times a number; into rows of a matrix.
template <int kWidth, typename A>
struct AddTo {
  A* to;
  int64_t ld;
  const A* added;
  FASTGIST_INLINE void operator()(int64_t row, int64_t column, const A* sums) const {
#pragma omp simd
    for (int j = 0; j < kWidth; ++j) to[row * ld + column + j] = sums[j] + added[column + j];
  }
};
template <int kWidth, typename A>
struct Scale {
  A* to;
  int64_t ld;
  A scale;
  FASTGIST_INLINE void operator()(int64_t row, int64_t column, const A* sums) const {
#pragma omp simd
    for (int j = 0; j < kWidth; ++j) to[row * ld + column + j] = sums[j] * scale;
  }
};
// scale sums + added_scale added.
template <int kWidth, bool kFma, typename A>
struct AddRows {
  A* to;
  int64_t ld;
  A scale;
  const A* added;  // or null
  int64_t ld_added;
  A added_scale;
  FASTGIST_INLINE void operator()(int64_t row, int64_t column, const A* sums) const {
    A* const at = to + row * ld + column;
    if (added == nullptr) {
#pragma omp simd
      for (int j = 0; j < kWidth; ++j) at[j] = sums[j] * scale;
      return;
    }
    const A* const from = added + row * ld_added + column;
#pragma omp simd
    for (int j = 0; j < kWidth; ++j) at[j] = multiply_add<kFma>(scale, sums[j], added_scale * from[j]);
  }
};

// A product with panels as wide as panel_width() has it.
template <bool kFma, int kBytes, template <int, typename> typename Finish, typename A, typename... Last>
FASTGIST_INLINE void multiply_narrow(const Rows<A>& a, const Panels<A>& b, int64_t rows, int64_t columns, int64_t n,
                                     A* to, int64_t ld, Last... last) {
  constexpr int kWidth = kBytes / static_cast<int>(sizeof(A)), kHalf = kWidth / 2;
  if (columns <= kHalf) {
    multiply<kTileRows<kBytes>, kHalf, kFma>(a.data, a.ld, int64_t(1), b, rows, columns, n,
                                             Finish<kHalf, A>{to, ld, last...});
  } else if (columns <= kWidth) {
    multiply<kTileRows<kBytes>, kWidth, kFma>(a.data, a.ld, int64_t(1), b, rows, columns, n,
                                              Finish<kWidth, A>{to, ld, last...});
  } else {
    multiply<kTileRows<kBytes>, 2 * kWidth, kFma>(a.data, a.ld, int64_t(1), b, rows, columns, n,
                                                  Finish<2 * kWidth, A>{to, ld, last...});
  }
}

}  // namespace fastgist::cpu
