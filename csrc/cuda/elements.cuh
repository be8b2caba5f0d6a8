// Elements in memory and in registers: what kernels of every operation use unchanged.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastgist::cuda {

constexpr int kWarpSize = 32;
constexpr int kVectorBytes = 16;

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float load(__half x) { return __half2float(x); }

__device__ __forceinline__ void store(float x, float& out) { out = x; }
__device__ __forceinline__ void store(double x, double& out) { out = x; }
__device__ __forceinline__ void store(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(float x, __half& out) { out = __float2half_rn(x); }

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Vector {
  T lane[kVec];
};

}  // namespace fastgist::cuda
