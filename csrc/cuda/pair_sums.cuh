// What every kernel of the two losses stands on: numbers in their storage formats, and the online sums of a pair of
// rows. Host code too, so that tests run it without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace fastgist::cuda {

constexpr int kWarpSize = 32;
constexpr int kVectorBytes = 16;

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

__host__ __device__ __forceinline__ float load(float x) { return x; }
__host__ __device__ __forceinline__ double load(double x) { return x; }
__host__ __device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__host__ __device__ __forceinline__ float load(__half x) { return __half2float(x); }

__host__ __device__ __forceinline__ void store(float x, float& out) { out = x; }
__host__ __device__ __forceinline__ void store(double x, double& out) { out = x; }
__host__ __device__ __forceinline__ void store(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__host__ __device__ __forceinline__ void store(float x, __half& out) { out = __float2half_rn(x); }

// A product that the compiler does not fuse into what follows: p - q of equal logits must be zero.
__host__ __device__ __forceinline__ float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
__host__ __device__ __forceinline__ double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Vector {
  T lane[kVec];
};

// -- the online sums --------------------------------------------------------------------------------------------------

__host__ __device__ __forceinline__ float minus_infinity(float) { return -INFINITY; }
__host__ __device__ __forceinline__ double minus_infinity(double) { return -static_cast<double>(INFINITY); }
__host__ __device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }  // drops NaN
__host__ __device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__host__ __device__ __forceinline__ float power_of_two(float x) { return exp2f(x); }
__host__ __device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

// The point to centre on: 0 while a side has shown nothing but -inf.
template <typename A>
__host__ __device__ __forceinline__ A centre(A max) {
  return max == minus_infinity(A()) ? A(0) : max;
}

// Sums over a set of classes, about that set's maxima: s = sum p^ (q^), w = sum p^ d (q^ d), d not yet over T.
// Disjoint sets merge in any fixed order. `to_exp2` is log2(e) / T.
template <typename A>
struct OnlinePair {
  A m_z, m_o, s_p, s_q, w_p, w_q;
  int lone;  // classes that are -inf on one side only

  static __host__ __device__ __forceinline__ OnlinePair empty() {
    return {minus_infinity(A()), minus_infinity(A()), A(0), A(0), A(0), A(0), 0};
  }

  // Move the sums to maxima of at least (z, o). Maxima that rise by (a, b) shrink p^ by exp(-a / T) and d by a - b.
  __host__ __device__ __forceinline__ void raise(A z, A o, A to_exp2) {
    const A old_z = centre(m_z), old_o = centre(m_o);
    m_z = larger(m_z, z);
    m_o = larger(m_o, o);
    const A rise_z = old_z - centre(m_z), rise_o = old_o - centre(m_o);
    // Where the old centre 0 stood for -inf the rise may be positive; the sums are 0 there and must stay 0.
    const A alpha_p = power_of_two((rise_z > A(0) ? A(0) : rise_z) * to_exp2);
    const A alpha_q = power_of_two((rise_o > A(0) ? A(0) : rise_o) * to_exp2);
    // The factor first: the shift may be as large as a float, where a thread has seen nothing but masked classes.
    const A shift = rise_z - rise_o;
    w_p = alpha_p * w_p + (alpha_p * shift) * s_p;
    w_q = alpha_q * w_q + (alpha_q * shift) * s_q;
    s_p *= alpha_p;
    s_q *= alpha_q;
  }

  // Add one class; its logits must not exceed the maxima. A class at -inf on either side has d = 0.
  __host__ __device__ __forceinline__ void add(A z, A o, A to_exp2) {
    const bool no_z = z == minus_infinity(A()), no_o = o == minus_infinity(A());
    const A zc = z - centre(m_z), oc = o - centre(m_o);
    const A d = (no_z || no_o) ? A(0) : zc - oc;
    const A p = power_of_two(zc * to_exp2), q = power_of_two(oc * to_exp2);
    s_p += p;
    s_q += q;
    w_p += p * d;
    w_q += q * d;
    lone += no_z != no_o;
  }

  __host__ __device__ __forceinline__ void merge(OnlinePair other, A to_exp2) {
    raise(other.m_z, other.m_o, to_exp2);
    other.raise(m_z, m_o, to_exp2);
    s_p += other.s_p;
    s_q += other.s_q;
    w_p += other.w_p;
    w_q += other.w_q;
    lone += other.lone;
  }
};

// How near a mean of d a d is taken for the mean itself: within the rounding of sums that were moved to other centres,
// where one class has all of its row's mass (S = 1); nowhere else. That class's d less the mean is 0, but the mean
// comes out rounded otherwise than d, by as much as d is large. (Not 0 wherever p = 1: classes too small to show in S
// may have a d that shows in the mean.) Others so near have p < 2^-24, or 2^-53 in double.
__host__ __device__ __forceinline__ float nearness(float s, float e) { return s == 1.0f ? fabsf(e) * 0x1p-21f : 0.0f; }
__host__ __device__ __forceinline__ double nearness(double s, double e) { return s == 1.0 ? fabs(e) * 0x1p-50 : 0.0; }

// d less the mean of its row.
template <typename A>
__host__ __device__ __forceinline__ A about_mean(A d, A mean, A near) {
  const A x = d - mean;
  return fabs(x) <= near ? A(0) : x;
}

}  // namespace fastgist::cuda
