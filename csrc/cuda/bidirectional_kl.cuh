// Device code of bidirectional_kl; the formulas are in ../bidirectional_kl.h.
//
// A row belongs to kWarps warps: one (small V, four rows a block) or eight (one row a block). Forward reads each logit
// once, 2 M V b bytes: a thread keeps the sums of its classes about its own maxima (OnlinePair), and the threads' sums
// are merged by shuffles and through shared memory in an order that depends on V alone, so reruns are bitwise equal.
// Backward reads and writes each element once, 4 M V b.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../bidirectional_kl.h"
#include "device.cuh"
#include "pair_sums.cuh"

namespace fastgist::cuda {

template <typename A>
__device__ __forceinline__ OnlinePair<A> shuffle_xor(const OnlinePair<A>& x, int lane_mask) {
  OnlinePair<A> y;
  y.m_z = __shfl_xor_sync(0xFFFFFFFFu, x.m_z, lane_mask);
  y.m_o = __shfl_xor_sync(0xFFFFFFFFu, x.m_o, lane_mask);
  y.s_p = __shfl_xor_sync(0xFFFFFFFFu, x.s_p, lane_mask);
  y.s_q = __shfl_xor_sync(0xFFFFFFFFu, x.s_q, lane_mask);
  y.w_p = __shfl_xor_sync(0xFFFFFFFFu, x.w_p, lane_mask);
  y.w_q = __shfl_xor_sync(0xFFFFFFFFu, x.w_q, lane_mask);
  y.lone = __shfl_xor_sync(0xFFFFFFFFu, x.lone, lane_mask);
  return y;
}

// -- tiles ------------------------------------------------------------------------------------------------------------

// How a row's classes fall to its threads: kUnroll vectors of kVec neighbours a thread and tile, neighbouring threads
// on neighbouring vectors. kVec = 1 is also the path for strided or unaligned rows.
template <typename T, bool kVectorised, int kWarps>
struct Tile {
  static constexpr int kVec = kVectorised ? kVectorBytes / sizeof(T) : 1;
  static constexpr int kUnroll = sizeof(T) == 8 ? 1 : (kVectorised ? 8 : 4) / kVec;  // doubles spill with more
  static constexpr int kItems = kVec * kUnroll;
  static constexpr int kThreads = kWarps * kWarpSize;  // a row
  static constexpr int kRows = kWarps == 1 ? 4 : 1;    // a block
  static constexpr int kClasses = kThreads * kItems;
  static constexpr int kBlock = kThreads * kRows;                         // threads
  static constexpr int kBlocks = (sizeof(T) == 8 ? 512 : 1024) / kBlock;  // a multiprocessor, at least

  // First class of this thread's vector u in the tile that starts at class 0.
  static __device__ __forceinline__ int64_t first(int u) {
    return (static_cast<int64_t>(u) * kThreads + threadIdx.x) * kVec;
  }
};

// One vector of a row, -inf past its end. Vectorised rows have a multiple of kVec classes.
template <typename T, int kVec, typename A>
__device__ __forceinline__ void load_vector(const T* row, int64_t stride, int64_t v, int64_t classes, A (&out)[kVec]) {
  if (v < classes) {
    if constexpr (kVec == 1) {
      out[0] = load(row[v * stride]);
    } else {
      const Vector<T, kVec> x = *reinterpret_cast<const Vector<T, kVec>*>(row + v);
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] = load(x.lane[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = minus_infinity(A());
  }
}

template <typename T, int kVec, typename A>
__device__ __forceinline__ void store_vector(T* row, int64_t v, int64_t classes, const A (&x)[kVec]) {
  if (v >= classes) return;
  Vector<T, kVec> y;
#pragma unroll
  for (int i = 0; i < kVec; ++i) store(x[i], y.lane[i]);
  if constexpr (sizeof y == kVectorBytes) {
    store_whole(row + v, y);
  } else {
    row[v] = y.lane[0];
  }
}

// -- kernels ----------------------------------------------------------------------------------------------------------

template <typename T, bool kVectorised, int kWarps>
__global__ void __launch_bounds__(Tile<T, kVectorised, kWarps>::kBlock, Tile<T, kVectorised, kWarps>::kBlocks)
    _bidirectional_kl_fwd_kernel(LogitPair in, ForwardOutputs out) {
  using A = typename Accumulate<T>::type;
  using Tile = Tile<T, kVectorised, kWarps>;
  const A inv_t = static_cast<A>(1.0 / in.temperature);
  const A to_exp2 = static_cast<A>(1.4426950408889634 / in.temperature);
  A* row_loss = static_cast<A*>(out.row_loss);
  A* stats = static_cast<A*>(out.stats);
  __shared__ OnlinePair<A> of_warp[kWarps];

  const int64_t step = static_cast<int64_t>(gridDim.x) * Tile::kRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Tile::kRows + threadIdx.y; row < in.rows; row += step) {
    const bool counts = in.classes > 0 && (in.mask == nullptr || in.mask[row * in.mask_stride]);
    OnlinePair<A> sums = OnlinePair<A>::empty();
    if (counts) {
      const T* z_row = static_cast<const T*>(in.z) + row * in.z_stride_m;
      const T* o_row = static_cast<const T*>(in.o) + row * in.o_stride_m;
      for (int64_t start = 0; start < in.classes; start += Tile::kClasses) {
        A z[Tile::kUnroll][Tile::kVec], o[Tile::kUnroll][Tile::kVec];
#pragma unroll
        for (int u = 0; u < Tile::kUnroll; ++u) {
          const int64_t v = start + Tile::first(u);
          load_vector<T, Tile::kVec>(z_row, in.z_stride_v, v, in.classes, z[u]);
          load_vector<T, Tile::kVec>(o_row, in.o_stride_v, v, in.classes, o[u]);
        }
        A m_z = z[0][0], m_o = o[0][0];
#pragma unroll
        for (int i = 1; i < Tile::kItems; ++i) {
          m_z = larger(m_z, z[i / Tile::kVec][i % Tile::kVec]);
          m_o = larger(m_o, o[i / Tile::kVec][i % Tile::kVec]);
        }
        sums.raise(m_z, m_o, to_exp2);
#pragma unroll
        for (int i = 0; i < Tile::kItems; ++i) {
          sums.add(z[i / Tile::kVec][i % Tile::kVec], o[i / Tile::kVec][i % Tile::kVec], to_exp2);
        }
      }
#pragma unroll
      for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) sums.merge(shuffle_xor(sums, lanes), to_exp2);
      if constexpr (kWarps > 1) {  // a block has one row then, so all its threads come here
        const int warp = threadIdx.x / kWarpSize;
        if (threadIdx.x % kWarpSize == 0) of_warp[warp] = sums;
        __syncthreads();
        if (threadIdx.x == 0) {
#pragma unroll 1
          for (int w = 1; w < kWarps; ++w) sums.merge(of_warp[w], to_exp2);
        }
        __syncthreads();  // before the next row overwrites of_warp
      }
    }
    if (threadIdx.x == 0) {
      A e_p = counts ? sums.w_p / sums.s_p : A(0);
      A e_q = counts ? sums.w_q / sums.s_q : A(0);
      A loss = (e_p - e_q) * inv_t;
      if (sums.lone > 0 && loss == loss) {
        loss = -minus_infinity(A());
        e_p = e_q = loss - loss;  // NaN
      }
      row_loss[row] = loss;
      stats[kMaxZ * in.rows + row] = counts ? centre(sums.m_z) : A(0);
      stats[kMaxO * in.rows + row] = counts ? centre(sums.m_o) : A(0);
      stats[kSumP * in.rows + row] = sums.s_p;
      stats[kSumQ * in.rows + row] = sums.s_q;
      stats[kMeanP * in.rows + row] = e_p;
      stats[kMeanQ * in.rows + row] = e_q;
    }
  }
}

// Grid: rows in x, stretches of tiles of a row in y.
template <typename T, bool kVectorised, int kWarps>
__global__ void __launch_bounds__(Tile<T, kVectorised, kWarps>::kBlock, Tile<T, kVectorised, kWarps>::kBlocks)
    _bidirectional_kl_bwd_kernel(LogitPair in, BackwardArguments args) {
  using A = typename Accumulate<T>::type;
  using Tile = Tile<T, kVectorised, kWarps>;
  const A inv_t = static_cast<A>(1.0 / in.temperature);
  const A to_exp2 = static_cast<A>(1.4426950408889634 / in.temperature);
  const A* stats = static_cast<const A*>(args.stats);
  const A* row_grad = static_cast<const A*>(args.row_grad);

  const int64_t step = static_cast<int64_t>(gridDim.x) * Tile::kRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Tile::kRows + threadIdx.y; row < in.rows; row += step) {
    const bool counts = in.mask == nullptr || in.mask[row * in.mask_stride];
    const T* z_row = static_cast<const T*>(in.z) + row * in.z_stride_m;
    const T* o_row = static_cast<const T*>(in.o) + row * in.o_stride_m;
    const A m_z = stats[kMaxZ * in.rows + row], m_o = stats[kMaxO * in.rows + row];
    // p = p^ / S_p, not exp2(. - log2 S_p): the rounding of that argument would grow with log S_p.
    const A inv_s_p = A(1) / stats[kSumP * in.rows + row], inv_s_q = A(1) / stats[kSumQ * in.rows + row];
    const A e_p = stats[kMeanP * in.rows + row], e_q = stats[kMeanQ * in.rows + row];
    const A near_p = nearness(stats[kSumP * in.rows + row], e_p), near_q = nearness(stats[kSumQ * in.rows + row], e_q);
    const A scale = row_grad[row * args.row_grad_stride] * inv_t;

    for (int64_t start = static_cast<int64_t>(blockIdx.y) * Tile::kClasses; start < in.classes;
         start += static_cast<int64_t>(gridDim.y) * Tile::kClasses) {
      A z[Tile::kUnroll][Tile::kVec], o[Tile::kUnroll][Tile::kVec];
      const int64_t readable = counts ? in.classes : 0;
#pragma unroll
      for (int u = 0; u < Tile::kUnroll; ++u) {
        const int64_t v = start + Tile::first(u);
        load_vector<T, Tile::kVec>(z_row, in.z_stride_v, v, readable, z[u]);
        load_vector<T, Tile::kVec>(o_row, in.o_stride_v, v, readable, o[u]);
      }
#pragma unroll
      for (int i = 0; i < Tile::kItems; ++i) {
        A& x = z[i / Tile::kVec][i % Tile::kVec];  // the gradients take the logits' registers
        A& y = o[i / Tile::kVec][i % Tile::kVec];
        const A zc = x - m_z, oc = y - m_o;
        // d is 0 where both sides are -inf. Where one is, e_p and e_q are NaN and take the whole row with them.
        const A d = x == minus_infinity(A()) ? A(0) : zc - oc;
        const A p = product(power_of_two(zc * to_exp2), inv_s_p), q = product(power_of_two(oc * to_exp2), inv_s_q);
        x = counts ? scale * ((p * inv_t) * about_mean(d, e_p, near_p) + (p - q)) : A(0);
        y = counts ? scale * ((q - p) - (q * inv_t) * about_mean(d, e_q, near_q)) : A(0);
      }
#pragma unroll
      for (int u = 0; u < Tile::kUnroll; ++u) {
        const int64_t v = start + Tile::first(u);
        if (args.grad_z != nullptr) {
          store_vector<T, Tile::kVec>(static_cast<T*>(args.grad_z) + row * in.classes, v, in.classes, z[u]);
        }
        if (args.grad_o != nullptr) {
          store_vector<T, Tile::kVec>(static_cast<T*>(args.grad_o) + row * in.classes, v, in.classes, o[u]);
        }
      }
    }
  }
}

}  // namespace fastgist::cuda
