// The adapter's activations and their derivatives, of a run of numbers at a time.
#pragma once

#include "../adapter.h"
#include "simd.h"

namespace fastgist::cpu {

template <typename A>
struct Activated {
  A value, slope;
};

// z Phi(z). Up to |z| = 1, Phi is 1/2 and an odd polynomial. Beyond, Phi(-u) e^(u^2 / 2) is one in t = 1 / (1 + 0.34
// u), so the tail keeps its digits and the derivative needs no second exponential. (Fits of least greatest error, 1e-9
// and 3e-8 of the value.)
template <bool kFma>
FASTGIST_INLINE Activated<float> gelu(float z) {
  const float square = z * z;
  float e = exp_nonpositive<kFma>(-0.5f * square);
  if constexpr (kFma) {  // what rounding the square took from it
    const float lost = std::fma(z, z, -square);
    e = square < 256 ? std::fma(e, -0.5f * lost, e) : e;
  }
  const float t = 1.0f / multiply_add<kFma>(0.34f, std::fabs(z), 1.0f);
  float q = -0x1.abf630p-6f;
  q = multiply_add<kFma>(q, t, 0x1.1db272p-3f);
  q = multiply_add<kFma>(q, t, -0x1.17b09ap-2f);
  q = multiply_add<kFma>(q, t, 0x1.9e12f0p-3f);
  q = multiply_add<kFma>(q, t, -0x1.6e57c0p-5f);
  q = multiply_add<kFma>(q, t, 0x1.d88348p-4f);
  q = multiply_add<kFma>(q, t, 0x1.d7d968p-4f);
  q = multiply_add<kFma>(q, t, 0x1.16c200p-3f);
  q = multiply_add<kFma>(q, t, 0x1.15c034p-3f);
  const float tail = q * t * e;
  float p = -0x1.00d524p-17f;
  p = multiply_add<kFma>(p, square, 0x1.dbff10p-14f);
  p = multiply_add<kFma>(p, square, -0x1.36fd42p-10f);
  p = multiply_add<kFma>(p, square, 0x1.46ce4cp-7f);
  p = multiply_add<kFma>(p, square, -0x1.105832p-4f);
  p = multiply_add<kFma>(p, square, 0x1.988454p-2f);
  const float outer = z < 0 ? tail : 1.0f - tail;
  const float below = square < 1 ? multiply_add<kFma>(p, z, 0.5f) : outer;
  return {z * below, multiply_add<kFma>(z * e, 0x1.988454p-2f, below)};  // 1 / sqrt(2 pi)
}

template <bool kFma>
FASTGIST_INLINE Activated<double> gelu(double z) {
  const double below = 0.5 * std::erfc(z * -0x1.6a09e667f3bcdp-1);
  return {z * below, below + z * std::exp(-0.5 * z * z) * 0x1.9884533d43651p-2};
}

// z sigma(s), s's derivative given.
template <bool kFma, typename A>
FASTGIST_INLINE Activated<A> gated(A z, A s, A of_s) {
  const A e = exp_nonpositive<kFma>(-std::fabs(s));
  const A d = A(1) / (A(1) + e);
  const A sigma = s < 0 ? e * d : d;
  return {(s < 0 ? z * e : z) / (A(1) + e), multiply_add<kFma>(z * (e * d * d), of_s, sigma)};
}

template <bool kFma, Activation kKind, typename A>
FASTGIST_INLINE Activated<A> activated(A z) {
  if constexpr (kKind == Activation::kGelu) return gelu<kFma>(z);
  if constexpr (kKind == Activation::kGeluTanh) {  // (1 + tanh(s / 2)) / 2 = sigma(s)
    constexpr A kLinear = static_cast<A>(1.5957691216057307118), kCubic = static_cast<A>(0.071354816272600250);
    const A square = z * z;
    return gated<kFma>(z, z * multiply_add<kFma>(kCubic, square, kLinear),
                       multiply_add<kFma>(3 * kCubic, square, kLinear));
  }
  if constexpr (kKind == Activation::kRelu) return {z <= 0 ? A(0) : z, z <= 0 ? A(0) : A(1)};
  if constexpr (kKind == Activation::kSilu) return gated<kFma>(z, z, A(1));
  return {z, A(1)};
}

template <bool kFma, Activation kKind, typename A>
FASTGIST_INLINE void activate_as(const A* z, int64_t n, A* value, A* slope) {
  if (slope == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) value[i] = activated<kFma, kKind>(z[i]).value;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Activated<A> at = activated<kFma, kKind>(z[i]);
      value[i] = at.value;
      slope[i] = at.slope;
    }
  }
}

// act(z), and act'(z) where `slope` is not null.
template <bool kFma, typename A>
FASTGIST_INLINE void activate(Activation kind, const A* z, int64_t n, A* value, A* slope) {
  switch (kind) {
    case Activation::kGelu:
      return activate_as<kFma, Activation::kGelu>(z, n, value, slope);
    case Activation::kGeluTanh:
      return activate_as<kFma, Activation::kGeluTanh>(z, n, value, slope);
    case Activation::kRelu:
      return activate_as<kFma, Activation::kRelu>(z, n, value, slope);
    case Activation::kSilu:
      return activate_as<kFma, Activation::kSilu>(z, n, value, slope);
    case Activation::kIdentity:
      return activate_as<kFma, Activation::kIdentity>(z, n, value, slope);
  }
}

}  // namespace fastgist::cpu
