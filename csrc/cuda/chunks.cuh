// Rows in chunks of 16 bytes. A row may begin anywhere: chunks lie on 16-byte boundaries, so the first and the last of
// a row may hold up to 15 bytes of its neighbours (or of the same 16 bytes of the allocation, which are never another
// page). Those lanes are replaced by -inf after reading and left out in writing. All matrices of a call must begin
// alike: then chunk j of one lies over chunk j of the others.
#pragma once

#include "device.cuh"
#include "loss_rows.cuh"

namespace fastgist::cuda {

template <typename T>
struct Chunk {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  alignas(kVectorBytes) T lane[kLanes];
};

// The number of classes that stand before a row in its first chunk.
template <typename T>
__host__ __device__ __forceinline__ int head_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(T));
}

// Classes are counted in an Index: int where rows are known to be short enough, else int64_t.

// Replace by -inf the lanes outside [0, classes); `first` is the class of lane 0.
template <typename T, typename Index>
__host__ __device__ __forceinline__ void blank_outside(Chunk<T>& chunk, Index first, Index classes) {
  if (first >= 0 && first + Chunk<T>::kLanes <= classes) return;
#pragma unroll
  for (int i = 0; i < Chunk<T>::kLanes; ++i) {
    if (first + i < 0 || first + i >= classes) store(minus_infinity(float()), chunk.lane[i]);
  }
}

// The chunk whose lane 0 is class `first`; `row` points at class 0. Nothing is read past the row's end, where lanes are
// 0.
template <typename T, typename Index>
__device__ __forceinline__ Chunk<T> read_chunk(const T* row, Index first, Index classes) {
  if (first + Chunk<T>::kLanes <= classes) return *reinterpret_cast<const Chunk<T>*>(row + first);
  Chunk<T> out = {};
#pragma unroll
  for (int i = 0; i < Chunk<T>::kLanes; ++i) {
    if (first + i < classes) out.lane[i] = row[first + i];
  }
  return out;
}

// Write the lanes inside [0, classes) of the chunk whose lane 0 is class `first`; `row` points at class 0.
template <typename T, typename A, typename Index>
__device__ __forceinline__ void store_chunk(T* row, Index first, Index classes, const A (&x)[Chunk<T>::kLanes]) {
  Chunk<T> y;
#pragma unroll
  for (int i = 0; i < Chunk<T>::kLanes; ++i) store(x[i], y.lane[i]);
  if (first >= 0 && first + Chunk<T>::kLanes <= classes) {
    store_whole(row + first, y);
    return;
  }
#pragma unroll
  for (int i = 0; i < Chunk<T>::kLanes; ++i) {
    if (first + i >= 0 && first + i < classes) row[first + i] = y.lane[i];
  }
}

// The larger lanes of chunks; half precision two at a time. NaN is dropped.
template <typename T>
struct ChunkMax {
  float lane[Chunk<T>::kLanes];

  __device__ __forceinline__ ChunkMax() {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kLanes; ++i) lane[i] = minus_infinity(float());
  }
  __device__ __forceinline__ void take(const Chunk<T>& x) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kLanes; ++i) lane[i] = larger(lane[i], load(x.lane[i]));
  }
  __device__ __forceinline__ float of_all() const {
    float m = lane[0];
#pragma unroll
    for (int i = 1; i < Chunk<T>::kLanes; ++i) m = larger(m, lane[i]);
    return m;
  }
};

template <typename T, typename Pair>
struct PackedMax {
  static constexpr int kPairs = Chunk<T>::kLanes / 2;
  Pair pair[kPairs];

  __device__ __forceinline__ PackedMax() {
    T least;
    store(minus_infinity(float()), least);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pair[i] = Pair{least, least};
  }
  __device__ __forceinline__ void take(const Chunk<T>& x) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pair[i] = __hmax2(pair[i], Pair{x.lane[2 * i], x.lane[2 * i + 1]});
  }
  __device__ __forceinline__ float of_all() const {
    Pair m = pair[0];
#pragma unroll
    for (int i = 1; i < kPairs; ++i) m = __hmax2(m, pair[i]);
    return larger(load(m.x), load(m.y));
  }
};
template <>
struct ChunkMax<__nv_bfloat16> : PackedMax<__nv_bfloat16, __nv_bfloat162> {};
template <>
struct ChunkMax<__half> : PackedMax<__half, __half2> {};

// -- class weights ----------------------------------------------------------------------------------------------------

template <typename A>
__device__ __forceinline__ A load_any(DType dtype, const char* x) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<A>(*reinterpret_cast<const float*>(x));
    case DType::kFloat64:
      return static_cast<A>(*reinterpret_cast<const double*>(x));
    case DType::kBFloat16:
      return static_cast<A>(load(*reinterpret_cast<const __nv_bfloat16*>(x)));
    default:
      return static_cast<A>(load(*reinterpret_cast<const __half*>(x)));
  }
}

// The dense weights of kLanes classes from `first` on; 0 outside [0, classes). A class's label is not in them.
template <typename T, int kLanes, typename A, typename Index>
__device__ __forceinline__ void dense_weights(const Arguments<A>& args, int64_t row, Index first,
                                              A (&weights)[kLanes]) {
  const Index classes = static_cast<Index>(args.in.classes);
  if (args.target.classes != nullptr) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) weights[i] = first + i >= 0 && first + i < classes ? args.even : A(0);
    return;
  }
  const int64_t offset = row * args.target.stride_m;
  if constexpr (kLanes == Chunk<T>::kLanes) {
    if (args.soft_chunks) {
      const T* of_row = static_cast<const T*>(args.target.weights) + offset;
      const Chunk<T> given = read_chunk(of_row, first, classes);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const bool inside = first + i >= 0 && first + i < classes;
        weights[i] = inside ? load(given.lane[i]) * args.keep + args.even : A(0);
      }
      return;
    }
  }
  // One address that moves on: an address a lane and type is more than there are registers.
  const int64_t step = args.target.stride_v * args.target_bytes;
  const char* at = static_cast<const char*>(args.target.weights) + offset * args.target_bytes + first * step;
#pragma unroll
  for (int i = 0; i < kLanes; ++i, at += step) {
    const bool inside = first + i >= 0 && first + i < classes;
    weights[i] = inside ? load_any<A>(args.target.dtype, at) * args.keep + args.even : A(0);
  }
}

// Gradients at kLanes neighbouring classes from `first` on, from their logits and in their place. `label`: the row's
// class or -1.
template <typename T, int kLoss, int kLanes, typename A, typename Index>
__device__ __forceinline__ void gradients_at(A (&z)[kLanes], A (&o)[kLanes], int64_t row, Index first, Index label,
                                             const About<A>& row_about, const Arguments<A>& args) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i) gradients<kLoss>(z[i], o[i], row_about, args, z[i], o[i]);
  if constexpr (kLoss != kKl) {
    if (args.dense) {
      A weights[kLanes];
      dense_weights<T>(args, row, first, weights);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) less_weight(weights[i], row_about, args, z[i], o[i]);
    }
    if (label >= first && label < first + kLanes && label >= 0) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        if (label == first + i) less_weight(args.keep, row_about, args, z[i], o[i]);
      }
    }
  }
}

}  // namespace fastgist::cuda
