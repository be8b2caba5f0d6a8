// Device code of adapter for a few hidden units; the formulas are in ../adapter.h.
//
// A block walks its rows, kRows at a time. Each thread owns kCols neighbouring columns: their weights, and in the backward
// the sums of their weights' gradients, stay in its registers, so that x and dy are read once, 3 M D b bytes. What crosses
// threads are the kRows sums over a row for each unit, all folded at once: a warp's 32 lanes end with one sum each after 31
// shuffles, then the warps meet in shared memory. Every order is fixed by the shape, so reruns are bitwise equal.
//
// Matrix units would be idle at this: of a bottleneck of 4 they take 16, and ten instructions a byte do not.
#pragma once

#include <cstdint>

#include "../adapter.h"
#include "elements.cuh"

namespace fastgist::cuda {

template <int kUnits>
struct UnitTile {
  static constexpr int kPadded = kUnits <= 1 ? 1 : kUnits <= 2 ? 2 : kUnits <= 4 ? 4 : 8;
  static constexpr int kCols = kPadded <= 2 ? 8 : 4;  // weights and sums of 2 kUnits kCols columns fit the registers
  static constexpr int kRows = kPadded <= 4 ? 4 : 2;
  static constexpr int kMostWarps = 8;
};

// -- activations ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

__device__ __forceinline__ float tanh_argument(float z) { return 1.5957691216057308f * (z + 0.044715f * z * z * z); }

__device__ __forceinline__ float activate(float z, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
    case Activation::kGeluTanh:
      return z * sigmoid(tanh_argument(z));
    case Activation::kRelu:
      return z > 0.0f || z != z ? z : 0.0f;
    case Activation::kSilu:
      return z * sigmoid(z);
    default:
      return z;
  }
}

__device__ __forceinline__ float activation_slope(float z, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5f * (1.0f + erff(z * 0.7071067811865476f)) + z * 0.3989422804014327f * expf(-0.5f * z * z);
    case Activation::kGeluTanh: {
      const float s = sigmoid(tanh_argument(z));
      return s + z * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * z * z);
    }
    case Activation::kRelu:
      return z <= 0.0f ? 0.0f : 1.0f;
    case Activation::kSilu: {
      const float s = sigmoid(z);
      return s * (1.0f + z * (1.0f - s));
    }
    default:
      return 1.0f;
  }
}

// -- weights, rows ----------------------------------------------------------------------------------------------------

// One weight, in the precision of T.
template <typename T>
__device__ __forceinline__ float weight(const void* data, int64_t index, bool float_weights) {
  if (!float_weights) return load(static_cast<const T*>(data)[index]);
  T rounded;
  store(static_cast<const float*>(data)[index], rounded);
  return load(rounded);
}

// The columns of a thread, in rows `row` ... of a matrix; zeros past the last row.
template <typename T, int kRows, int kCols>
__device__ __forceinline__ void load_rows(const void* data, int64_t stride, int64_t row, int64_t end, int64_t column,
                                          Vector<T, kCols> (&out)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (row + r < end) {
      const T* at = static_cast<const T*>(data) + (row + r) * stride + column;
      out[r] = *reinterpret_cast<const Vector<T, kCols>*>(at);
    } else {
#pragma unroll
      for (int c = 0; c < kCols; ++c) store(0.0f, out[r].lane[c]);
    }
  }
}

template <typename T, int kCols>
__device__ __forceinline__ void store_row(void* data, int64_t stride, int64_t row, int64_t column,
                                          const float (&x)[kCols]) {
  Vector<T, kCols> y;
#pragma unroll
  for (int c = 0; c < kCols; ++c) store(x[c], y.lane[c]);
  *reinterpret_cast<Vector<T, kCols>*>(static_cast<T*>(data) + row * stride + column) = y;
}

// -- sums over a row --------------------------------------------------------------------------------------------------

// v[i] of all lanes summed, for each i: lane l ends with the sum of index l / (32 / kValues) in v[0]. Of kValues sums a lane
// hands half to the lane kDistance away and keeps the other half.
template <int kValues, int kDistance = kWarpSize / 2>
__device__ __forceinline__ void fold(float* v, int lane) {
  static_assert(kValues <= 2 * kDistance || kDistance == 0);
  if constexpr (kValues > 1) {
    const bool upper = (lane & kDistance) != 0;
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      const float given = upper ? v[i] : v[i + kValues / 2];
      const float kept = upper ? v[i + kValues / 2] : v[i];
      v[i] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, kDistance);
    }
    fold<kValues / 2, kDistance / 2>(v, lane);
  } else if constexpr (kDistance > 0) {
    v[0] += __shfl_xor_sync(0xFFFFFFFFu, v[0], kDistance);
    fold<1, kDistance / 2>(v, lane);
  }
}

// -- kernels ----------------------------------------------------------------------------------------------------------

// Blocks of whole warps, kCols columns a thread; threads past the last column carry zeros.
template <typename T, int kUnits>
__global__ void __launch_bounds__(256) _adapter_units_fwd_kernel(AdapterForward args, int64_t rows_a_block) {
  using Tile = UnitTile<kUnits>;
  constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kPadded = Tile::kPadded;
  constexpr int kValues = kRows * kPadded;  // (row, unit)
  __shared__ float of_warp[2][Tile::kMostWarps][kValues];
  __shared__ float hidden[Tile::kMostWarps][kValues];

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  const int64_t column = static_cast<int64_t>(threadIdx.x) * kCols;
  const bool active = column < args.columns;
  float down[kUnits][kCols] = {}, up[kUnits][kCols] = {}, up_bias[kCols] = {};
  if (active) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
#pragma unroll
      for (int h = 0; h < kUnits; ++h) {
        const int64_t d = (column + c) * args.down_stride_d + h * args.down_stride_h;
        const int64_t u = (column + c) * args.up_stride_n + h * args.up_stride_h;
        down[h][c] = weight<T>(args.down, d, args.float_weights);
        up[h][c] = weight<T>(args.up, u, args.float_weights);
      }
      if (args.up_bias != nullptr) {
        up_bias[c] = weight<T>(args.up_bias, (column + c) * args.up_bias_stride, args.float_weights);
      }
    }
  }
  const int unit = lane % kPadded;
  float down_bias = 0.0f;
  if (args.down_bias != nullptr && unit < kUnits) {
    down_bias = weight<T>(args.down_bias, unit * args.down_bias_stride, args.float_weights);
  }

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * rows_a_block;
  const int64_t end = begin + rows_a_block < args.rows ? begin + rows_a_block : args.rows;
  Vector<T, kCols> next_x[kRows];
  load_rows(args.x, args.x_stride, begin, active ? end : begin, column, next_x);
  int turn = 0;
  for (int64_t row = begin; row < end; row += kRows, turn ^= 1) {
    const int64_t readable = active ? end : row;
    Vector<T, kCols> x[kRows], residual[kRows], branch[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) x[r] = next_x[r];
    load_rows(args.x, args.x_stride, row + kRows, active ? end : row + kRows, column, next_x);
    const bool own = args.residual == args.x && args.residual_stride == args.x_stride;
    if (args.residual != nullptr && !own) load_rows(args.residual, args.residual_stride, row, readable, column, residual);
    if (args.branch != nullptr) load_rows(args.branch, args.branch_stride, row, readable, column, branch);

    float sums[kValues] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        const float value = load(x[r].lane[c]);
#pragma unroll
        for (int h = 0; h < kUnits; ++h) sums[r * kPadded + h] += value * down[h][c];
      }
    }
    fold<kValues>(sums, lane);
    if (lane % (kWarpSize / kValues) == 0) of_warp[turn][warp][lane / (kWarpSize / kValues)] = sums[0];
    __syncthreads();  // the next turn writes the other half of of_warp, and the one after comes behind this barrier again
    if (lane < kValues) {  // each warp for itself
      float z = down_bias;
      for (int w = 0; w < warps; ++w) z += of_warp[turn][w][lane];
      hidden[warp][lane] = activate(z, args.activation);
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!active || row + r >= end) break;
      float y[kCols];
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        float sum = up_bias[c];
#pragma unroll
        for (int h = 0; h < kUnits; ++h) sum += hidden[warp][r * kPadded + h] * up[h][c];
        y[c] = sum * args.scale;
        if (args.residual != nullptr) {
          float added = load(own ? x[r].lane[c] : residual[r].lane[c]);
          if (args.branch != nullptr) added += load(branch[r].lane[c]);
          y[c] += added * args.residual_scale;
        }
      }
      store_row<T>(args.y, args.columns, row + r, column, y);
    }
    __syncwarp();
  }
}

template <typename T, int kUnits>
__global__ void __launch_bounds__(256) _adapter_units_bwd_kernel(AdapterBackward args, int64_t rows_a_block) {
  using Tile = UnitTile<kUnits>;
  constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kPadded = Tile::kPadded;
  constexpr int kPairs = kRows * kPadded;  // (row, unit)
  constexpr int kValues = 2 * kPairs;      // of z, then of dh
  __shared__ float of_warp[2][Tile::kMostWarps][kValues];
  __shared__ float of_unit[Tile::kMostWarps][kValues];  // the hidden units, then dz

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  const int64_t column = static_cast<int64_t>(threadIdx.x) * kCols;
  const bool active = column < args.columns;
  float down[kUnits][kCols] = {}, up[kUnits][kCols] = {};
  float grad_down[kUnits][kCols] = {}, grad_up[kUnits][kCols] = {}, grad_up_bias[kCols] = {};
  if (active) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
#pragma unroll
      for (int h = 0; h < kUnits; ++h) {
        const int64_t d = (column + c) * args.down_stride_d + h * args.down_stride_h;
        const int64_t u = (column + c) * args.up_stride_n + h * args.up_stride_h;
        down[h][c] = weight<T>(args.down, d, args.float_weights);
        up[h][c] = weight<T>(args.up, u, args.float_weights);
      }
    }
  }
  const int unit = lane % kPadded;
  float down_bias = 0.0f, grad_down_bias = 0.0f;
  if (args.down_bias != nullptr && unit < kUnits) {
    down_bias = weight<T>(args.down_bias, unit * args.down_bias_stride, args.float_weights);
  }

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * rows_a_block;
  const int64_t end = begin + rows_a_block < args.rows ? begin + rows_a_block : args.rows;
  Vector<T, kCols> next_x[kRows], next_grad[kRows];
  load_rows(args.x, args.x_stride, begin, active ? end : begin, column, next_x);
  load_rows(args.grad, args.grad_stride, begin, active ? end : begin, column, next_grad);
  int turn = 0;
  for (int64_t row = begin; row < end; row += kRows, turn ^= 1) {
    Vector<T, kCols> x[kRows], grad[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      x[r] = next_x[r];
      grad[r] = next_grad[r];
    }
    const int64_t readable = active ? end : row + kRows;
    load_rows(args.x, args.x_stride, row + kRows, readable, column, next_x);
    load_rows(args.grad, args.grad_stride, row + kRows, readable, column, next_grad);

    float sums[kValues] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        const float value = load(x[r].lane[c]), incoming = load(grad[r].lane[c]);
#pragma unroll
        for (int h = 0; h < kUnits; ++h) {
          sums[r * kPadded + h] += value * down[h][c];
          sums[kPairs + r * kPadded + h] += incoming * up[h][c];
        }
      }
    }
    fold<kValues>(sums, lane);
    if (lane % (kWarpSize / kValues) == 0) of_warp[turn][warp][lane / (kWarpSize / kValues)] = sums[0];
    __syncthreads();  // the next turn writes the other half of of_warp, and the one after comes behind this barrier again
    if (lane < kPairs) {  // each warp for itself
      float z = down_bias, dh = 0.0f;
      for (int w = 0; w < warps; ++w) {
        z += of_warp[turn][w][lane];
        dh += of_warp[turn][w][kPairs + lane];
      }
      const float dz = dh * args.scale * activation_slope(z, args.activation);
      of_unit[warp][lane] = activate(z, args.activation);
      of_unit[warp][kPairs + lane] = dz;
      grad_down_bias += dz;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!active || row + r >= end) break;
      float dx[kCols];
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        const float value = load(x[r].lane[c]), incoming = load(grad[r].lane[c]);
        dx[c] = args.add_grad ? args.residual_scale * incoming : 0.0f;
        grad_up_bias[c] += incoming;
#pragma unroll
        for (int h = 0; h < kUnits; ++h) {
          const float dz = of_unit[warp][kPairs + r * kPadded + h];
          dx[c] += dz * down[h][c];
          grad_down[h][c] += dz * value;
          grad_up[h][c] += of_unit[warp][r * kPadded + h] * incoming;
        }
      }
      if (args.grad_x != nullptr) store_row<T>(args.grad_x, args.columns, row + r, column, dx);
    }
    __syncwarp();
  }
  float* part = args.part + blockIdx.x * ((2 * kUnits + 1) * args.columns + kUnits);
  if (active) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
#pragma unroll
      for (int h = 0; h < kUnits; ++h) {
        part[h * args.columns + column + c] = grad_down[h][c];
        part[(kUnits + h) * args.columns + column + c] = grad_up[h][c] * args.scale;
      }
      part[2 * kUnits * args.columns + column + c] = grad_up_bias[c] * args.scale;
    }
  }
  if (warp == 0) {
#pragma unroll
    for (int distance = kPadded; distance < kPairs; distance *= 2) {
      grad_down_bias += __shfl_xor_sync(0xFFFFFFFFu, grad_down_bias, distance);
    }
    if (lane < kUnits) part[(2 * kUnits + 1) * args.columns + lane] = grad_down_bias;
  }
}

constexpr int kReduceGroups = 8;

// A warp's lanes stand on neighbouring columns of part, the block's kReduceGroups warps share its rows.
template <typename W>
__global__ void __launch_bounds__(kWarpSize* kReduceGroups) _adapter_units_reduce_kernel(AdapterReduce args) {
  __shared__ float of_group[kReduceGroups][kWarpSize];
  const int64_t units = args.units, products = units * args.columns, width = 2 * products + args.columns + units;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  float sum = 0.0f;
  if (at < width) {
    for (int64_t p = threadIdx.y; p < args.programs; p += kReduceGroups) sum += args.part[p * width + at];
  }
  of_group[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || at >= width) return;
  for (int g = 1; g < kReduceGroups; ++g) sum += of_group[g][threadIdx.x];
  if (at < products) {
    if (args.grad_down != nullptr) store(sum, static_cast<W*>(args.grad_down)[at]);
  } else if (at < 2 * products) {
    const int64_t h = (at - products) / args.columns, n = (at - products) % args.columns;
    if (args.grad_up != nullptr) store(sum, static_cast<W*>(args.grad_up)[n * units + h]);
  } else if (at < 2 * products + args.columns) {
    if (args.grad_up_bias != nullptr) store(sum, static_cast<W*>(args.grad_up_bias)[at - 2 * products]);
  } else if (args.grad_down_bias != nullptr) {
    store(sum, static_cast<W*>(args.grad_down_bias)[at - 2 * products - args.columns]);
  }
}

}  // namespace fastgist::cuda
