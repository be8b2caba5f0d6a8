// What the CPU ops need beside the standard library: choosing an instruction set at run time, an exponential that
// vectorises, and the half-precision formats. Nothing here is written in intrinsics: the loops are plain C++ that gcc
// and clang vectorise (`#pragma omp simd`, -fopenmp-simd), compiled once per instruction set; pair_avx512.h alone has
// two that they could not make. Never compile with -ffast-math.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>

#if defined(__GNUC__) || defined(__clang__)
#define FASTGIST_INLINE inline __attribute__((always_inline))
#define FASTGIST_INLINE_BODY __attribute__((always_inline))  // behind a lambda's parameters
#else
#define FASTGIST_INLINE inline
#define FASTGIST_INLINE_BODY
#endif

// A function marked with one of these has its always-inline callees compiled for that instruction set.
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define FASTGIST_X86_DISPATCH 1
#define FASTGIST_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2")))
#if defined(__clang__)
#define FASTGIST_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")))
#else
#define FASTGIST_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")))
#endif
#else
#define FASTGIST_X86_DISPATCH 0
#define FASTGIST_TARGET_AVX2
#define FASTGIST_TARGET_AVX512
#endif

namespace fastgist::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

inline const char* name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable"; }

// The widest instruction set that this machine has. FASTGIST_CPU_ISA=portable|avx2|avx512 lowers it (tests run all).
inline Isa detect_isa() {
#if FASTGIST_X86_DISPATCH
  Isa best = Isa::kPortable;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
  if (const char* wanted = std::getenv("FASTGIST_CPU_ISA")) {
    for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
      if (std::strcmp(wanted, name(isa)) == 0 && isa < best) best = isa;
    }
  }
  return best;
#else
  return Isa::kPortable;
#endif
}

inline Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

template <typename To, typename From>
FASTGIST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between different sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// -- storage formats and the type that sums run in --------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

FASTGIST_INLINE float load(float x) { return x; }
FASTGIST_INLINE double load(double x) { return x; }
FASTGIST_INLINE float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
FASTGIST_INLINE float load(Half x) {
  const uint32_t w = static_cast<uint32_t>(x.bits) << 16;
  const uint32_t sign = w & 0x80000000u;
  const uint32_t twice = w + w;
  const float normal = bit_cast<float>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;  // inf and NaN come out right too
  const float subnormal = bit_cast<float>((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = bit_cast<uint32_t>(twice < (1u << 27) ? subnormal : normal);
  return bit_cast<float>(sign | magnitude);
}

// To the nearest, ties to even, as torch rounds. NaN stays NaN.
FASTGIST_INLINE void store(float x, float& out) { out = x; }
FASTGIST_INLINE void store(double x, double& out) { out = x; }
FASTGIST_INLINE void store(float x, BFloat16& out) {
  const uint32_t w = bit_cast<uint32_t>(x);
  const uint32_t rounded = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}
FASTGIST_INLINE void store(float x, Half& out) {
  const uint32_t w = bit_cast<uint32_t>(x);
  const uint32_t twice = w + w;
  const uint32_t sign = w & 0x80000000u;
  // Adding a power of two 13 bits above the last half bit makes the float adder round there; the first product takes
  // what is beyond half's range to inf.
  const float magnitude = (std::fabs(x) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t exponent = twice & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t bits = bit_cast<uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + magnitude);
  const uint32_t nonsign = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  out.bits = static_cast<uint16_t>((sign >> 16) | (x != x ? 0x7E00u : nonsign));
}

// -- fused multiply-add -----------------------------------------------------------------------------------------------

// Whether the baseline instruction set has one. The others are compiled for machines that do.
#if defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
constexpr bool kPortableFma = true;
#else
constexpr bool kPortableFma = false;
#endif

// a b + c, rounded once where kFma. The sources are compiled with -ffp-contract=off and say themselves where to fuse: a
// compiler that chose for itself would make p - q of equal logits not zero, and results depend on what is inlined
// where.
template <bool kFma>
FASTGIST_INLINE float multiply_add(float a, float b, float c) {
  if constexpr (kFma) {
    return std::fma(a, b, c);
  } else {
    return a * b + c;
  }
}
template <bool kFma>
FASTGIST_INLINE double multiply_add(double a, double b, double c) {
  if constexpr (kFma) {
    return std::fma(a, b, c);
  } else {
    return a * b + c;
  }
}

// -- exp --------------------------------------------------------------------------------------------------------------

// e^x for x <= 0, -inf or NaN. Within 1.2 ulp of the true value, flushed to 0 where the result would be below 2^-126 or
// so. Cody-Waite reduction to |r| <= ln(2) / 2 and the degree-6 minimax polynomial. csrc/tests/check_cpu.cpp measures
// all of these in the instructions that are dispatched to: 0.87 ulp with fused products, 1.14 without.
template <bool kFma>
FASTGIST_INLINE float exp_nonpositive(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low mantissa bits
  x = x < -88.0f ? -88.0f : x;         // n = -127 there, which the exponent bits below turn into a factor of 0
  const float shifted = multiply_add<kFma>(x, 0x1.715476p+0f, kRound);
  const float n = shifted - kRound;
  float r = multiply_add<kFma>(n, -0x1.62e400p-1f, x);  // 14-bit head of ln 2: exact products
  r = multiply_add<kFma>(n, -0x1.7f7d1cp-20f, r);
  float y = 0x1.6850e4p-10f;
  y = multiply_add<kFma>(y, r, 0x1.123bccp-7f);
  y = multiply_add<kFma>(y, r, 0x1.555b98p-5f);
  y = multiply_add<kFma>(y, r, 0x1.55548ep-3f);
  y = multiply_add<kFma>(y, r, 0x1.fffff8p-2f);
  y = multiply_add<kFma>(y, r, 1.0f);
  y = multiply_add<kFma>(y, r, 1.0f);
  return y * bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
}

template <bool kFma>
FASTGIST_INLINE double exp_nonpositive(double x) {
  return std::exp(x);
}

// What takes x to the exponent of 2 in exp(x / T).
template <typename A>
struct ExpScale;
template <>
struct ExpScale<float> {
  float head, tail;    // log2(e) / T in two parts: one alone would make of T another temperature, 3e-8 away
  float least;         // where the exponent is -127
  float least_normal;  // from where on exp_normal holds: the exponent is -125, above any rounding of it
  double inv_t;
  explicit ExpScale(double temperature) : inv_t(1.0 / temperature) {
    const double whole = 0x1.71547652b82fep+0 / temperature;
    head = static_cast<float>(whole);
    tail = static_cast<float>(whole - head);
    least = -127.0f / head;
    least_normal = -125.0f / head;
  }
};
template <>
struct ExpScale<double> {
  double inv_t;
  double least_normal;
  explicit ExpScale(double temperature) : inv_t(1.0 / temperature), least_normal(-700.0 * temperature) {}
};

// 2^(x / T log2(e) - n) for the n next to that exponent, and n in the low bits of `shifted`. The fraction comes out of
// fused products, so that dividing by T costs no rounding and the reduction two products less. The polynomial of degree
// 5, exact at 0, is within 1.54 * 2^-24 of 2^r; one of degree 6, ten times better than rounding, took a twentieth more
// of a loss's time and none of its results' errors.
template <bool kFma>
FASTGIST_INLINE float exp_fraction(float x, const ExpScale<float>& scale, float& shifted) {
  constexpr float kRound = 0x1.8p23f;
  shifted = multiply_add<kFma>(x, scale.head, kRound);
  float r = multiply_add<kFma>(x, scale.head, kRound - shifted);
  r = multiply_add<kFma>(x, scale.tail, r);
  float y = 0x1.5bba14p-10f;
  y = multiply_add<kFma>(y, r, 0x1.3cea88p-7f);
  y = multiply_add<kFma>(y, r, 0x1.c6b752p-5f);
  y = multiply_add<kFma>(y, r, 0x1.ebf9bcp-3f);
  y = multiply_add<kFma>(y, r, 0x1.62e42ap-1f);
  return multiply_add<kFma>(y, r, 1.0f);
}

// e^(x / T) for x <= 0, -inf or NaN, flushed to 0 as exp_nonpositive: within 2.4 ulp where products are fused (AVX2,
// AVX-512, NEON; 2.28 seen). Where they are not, the exponent of 2 is rounded once, which adds ln(2) 2^k ulp for an
// exponent between 2^k and 2^(k + 1): 0.7 at e^-1, 44 at e^-87, whose weight in a sum is as small.
template <bool kFma>
FASTGIST_INLINE float exp_scaled(float x, const ExpScale<float>& scale) {
  float shifted;
  const float y = exp_fraction<kFma>(x < scale.least ? scale.least : x, scale, shifted);
  return y * bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
}

// The same number for x from scale.least_normal to 0: 2^n goes straight into the exponent, which spares a product and
// the bound. Of NaN it makes anything.
template <bool kFma>
FASTGIST_INLINE float exp_normal(float x, const ExpScale<float>& scale) {
  float shifted;
  const float y = exp_fraction<kFma>(x, scale, shifted);
  return bit_cast<float>(bit_cast<uint32_t>(y) + (bit_cast<uint32_t>(shifted) << 23));
}

template <bool kFma>
FASTGIST_INLINE double exp_scaled(double x, const ExpScale<double>& scale) {
  return std::exp(x * scale.inv_t);
}
template <bool kFma>
FASTGIST_INLINE double exp_normal(double x, const ExpScale<double>& scale) {
  return std::exp(x * scale.inv_t);
}

}  // namespace fastgist::cpu
