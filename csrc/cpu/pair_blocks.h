// Blocks of rows on their way into and out of the first-level cache. The loops over them see float or double alone:
// half precision is converted here, so there is one copy of the arithmetic and not one a format.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../bidirectional_kl.h"
#include "simd.h"

namespace fastgist::cpu {

// Classes a block: two float blocks of inputs and two of results are 16 KiB, half of a first-level cache or less. A
// block's maxima are looked for before its exponentials are taken, and the second look finds the block there.
constexpr int64_t kBlock = 1024;

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

template <typename A>
FASTGIST_INLINE const A* load_any(DType dtype, const void* x, int64_t offset, int64_t stride, int64_t n, A* buffer) {
  switch (dtype) {
    case DType::kFloat32:
      return load_block(static_cast<const float*>(x) + offset, stride, n, buffer);
    case DType::kFloat64:
      return load_block(static_cast<const double*>(x) + offset, stride, n, buffer);
    case DType::kBFloat16:
      return load_block(static_cast<const BFloat16*>(x) + offset, stride, n, buffer);
    case DType::kFloat16:
      return load_block(static_cast<const Half*>(x) + offset, stride, n, buffer);
  }
  return buffer;
}

template <typename A>
FASTGIST_INLINE const A* load_z(const LogitPair& in, int64_t row, int64_t start, int64_t n, A* buffer) {
  return load_any(in.dtype, in.z, row * in.z_stride_m + start * in.z_stride_v, in.z_stride_v, n, buffer);
}
template <typename A>
FASTGIST_INLINE const A* load_o(const LogitPair& in, int64_t row, int64_t start, int64_t n, A* buffer) {
  return load_any(in.dtype, in.o, row * in.o_stride_m + start * in.o_stride_v, in.o_stride_v, n, buffer);
}

template <typename T>
FASTGIST_INLINE void store_block(const float* from, T* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(from[i], to[i]);
}

// One of the two gradients: where a block of it is computed (the tensor itself, or a buffer), and its way from there
// into the tensor.
template <typename A>
struct Sink {
  DType dtype;
  void* tensor;  // or null: not wanted

  FASTGIST_INLINE bool wanted() const { return tensor != nullptr; }
  // Whether the tensor holds numbers of type A.
  FASTGIST_INLINE bool direct() const { return wanted() && (dtype == DType::kFloat32 || dtype == DType::kFloat64); }
  FASTGIST_INLINE A* at(int64_t offset) const { return static_cast<A*>(tensor) + offset; }
  FASTGIST_INLINE A* place(int64_t offset, A* buffer) const {
    return !wanted() ? nullptr : direct() ? at(offset) : buffer;
  }
  FASTGIST_INLINE void put(int64_t offset, int64_t n, const A* buffer) const {
    if (!wanted() || direct()) return;
    if constexpr (std::is_same_v<A, float>) {
      if (dtype == DType::kBFloat16) {
        store_block(buffer, static_cast<BFloat16*>(tensor) + offset, n);
      } else {
        store_block(buffer, static_cast<Half*>(tensor) + offset, n);
      }
    }
  }
  FASTGIST_INLINE void clear(int64_t offset, int64_t n) const {
    if (!wanted()) return;
    const int64_t size = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
    std::memset(static_cast<char*>(tensor) + offset * size, 0, n * size);
  }
};

}  // namespace fastgist::cpu
