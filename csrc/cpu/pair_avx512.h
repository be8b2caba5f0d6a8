// The loops of pair_rows.h that take exponentials of float, in AVX-512. The compiler's own (lanes.h) are bound by fused
// products, eight an exponential. Here 2^(i / 32) comes out of a table that two registers hold, so the rest is within
// 1 / 64 and a polynomial of degree 2 does: six. No loop that a compiler vectorises reads a table in registers. Nor
// does it load what it needs turns ahead: by_quads() does, for the gradients.
#pragma once

#include "../bidirectional_kl.h"
#include "pair_sums.h"
#include "simd.h"

#if FASTGIST_X86_DISPATCH

#include <immintrin.h>

namespace fastgist::cpu {

#define FASTGIST_AVX512_INLINE FASTGIST_TARGET_AVX512 FASTGIST_INLINE

// All lanes. gcc 12 warns of the unmasked forms of some intrinsics, which leave undefined what no lane takes.
constexpr __mmask16 kAll = 0xFFFF;

template <int kBits>
FASTGIST_AVX512_INLINE __m512i shift_left(__m512i x) {
  return _mm512_maskz_slli_epi32(kAll, x, kBits);
}

// e^(x / T) = 2^(n / 32 + r) with |r| <= 1 / 64. The polynomial is within 0.9 * 2^-24 of 2^r and exact at 0; with the
// table's rounding and the last product's that is 2 ulp.
class Exp512 {
  __m512 head_, tail_, least_, round_, first_, second_;
  __m512i low_, high_;  // of 2^(i / 32) the bits, less i << 18: what adding n << 18 puts right

 public:
  FASTGIST_AVX512_INLINE explicit Exp512(const ExpScale<float>& scale)
      : head_(_mm512_set1_ps(scale.head)),
        tail_(_mm512_set1_ps(scale.tail)),
        least_(_mm512_set1_ps(scale.least)),
        round_(_mm512_set1_ps(0x1.8p18f)),  // adding it leaves the nearest 32nd in the low mantissa bits
        first_(_mm512_set1_ps(0x1.62e584p-1f)),
        second_(_mm512_set1_ps(0x1.ebfbdep-3f)) {
    alignas(64) static constexpr uint32_t kTable[32] = {
        0x3F800000u, 0x3F7ECD87u, 0x3F7DAAC3u, 0x3F7C980Fu, 0x3F7B95C2u, 0x3F7AA43Au, 0x3F79C3D3u, 0x3F78F4F0u,
        0x3F7837F0u, 0x3F778D3Au, 0x3F76F532u, 0x3F767043u, 0x3F75FED7u, 0x3F75A15Bu, 0x3F75583Fu, 0x3F7523F6u,
        0x3F7504F3u, 0x3F74FBAFu, 0x3F7508A4u, 0x3F752C4Du, 0x3F75672Au, 0x3F75B9BEu, 0x3F76248Cu, 0x3F76A81Eu,
        0x3F7744FDu, 0x3F77FBB8u, 0x3F78CCDFu, 0x3F79B907u, 0x3F7AC0C7u, 0x3F7BE4BAu, 0x3F7D257Du, 0x3F7E83B3u};
    low_ = _mm512_load_si512(kTable);
    high_ = _mm512_load_si512(kTable + 16);
  }

  // The fraction's factor less 1, and n in the low bits of `shifted`.
  FASTGIST_AVX512_INLINE __m512 rest(__m512 x, __m512i& shifted) const {
    const __m512 rounded = _mm512_fmadd_ps(x, head_, round_);
    shifted = _mm512_castps_si512(rounded);
    __m512 r = _mm512_fmadd_ps(x, head_, _mm512_sub_ps(round_, rounded));
    r = _mm512_fmadd_ps(x, tail_, r);
    return _mm512_mul_ps(_mm512_fmadd_ps(second_, r, first_), r);
  }

  // For x from scale.least_normal to 0; of NaN NaN.
  FASTGIST_AVX512_INLINE __m512 normal(__m512 x) const {
    __m512i shifted;
    const __m512 more = rest(x, shifted);
    const __m512i of_table = _mm512_permutex2var_epi32(low_, shifted, high_);
    const __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(of_table, shift_left<18>(shifted)));
    return _mm512_fmadd_ps(power, more, power);
  }

  // For x <= 0, -inf or NaN: the same numbers, and 0 where the result would be below 2^-126 or so.
  FASTGIST_AVX512_INLINE __m512 any(__m512 x) const {
    __m512i shifted;
    const __m512 more = rest(_mm512_maskz_max_ps(kAll, least_, x), shifted);  // of NaN x
    const __m512i low_bits = shift_left<18>(shifted);
    const __m512i part = _mm512_and_si512(low_bits, _mm512_set1_epi32(0x007C0000));  // i << 18
    const __m512i of_table = _mm512_add_epi32(_mm512_permutex2var_epi32(low_, shifted, high_), part);
    const __m512 power = _mm512_castsi512_ps(of_table);
    const __m512i factor = _mm512_sub_epi32(_mm512_add_epi32(low_bits, _mm512_set1_epi32(127 << 23)), part);
    return _mm512_mul_ps(_mm512_fmadd_ps(power, more, power), _mm512_castsi512_ps(factor));
  }
};

// Halves of a vector. (Intrinsics that fold one leave lanes undefined too.)
FASTGIST_AVX512_INLINE __m256 low(__m512 x) { return _mm512_maskz_extractf32x8_ps(0xFF, x, 0); }
FASTGIST_AVX512_INLINE __m256 high(__m512 x) { return _mm512_maskz_extractf32x8_ps(0xFF, x, 1); }

FASTGIST_AVX512_INLINE double sum(__m512 x) {
  const __m512d halves =
      _mm512_maskz_add_pd(0xFF, _mm512_maskz_cvtps_pd(0xFF, low(x)), _mm512_maskz_cvtps_pd(0xFF, high(x)));
  const __m256d four =
      _mm256_add_pd(_mm512_maskz_extractf64x4_pd(0xF, halves, 0), _mm512_maskz_extractf64x4_pd(0xF, halves, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

FASTGIST_AVX512_INLINE float largest(__m512 x) {
  const __m256 eight = _mm256_max_ps(low(x), high(x));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

FASTGIST_AVX512_INLINE float smallest(__m512 x) {
  const __m256 eight = _mm256_min_ps(low(x), high(x));
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}

FASTGIST_AVX512_INLINE __mmask16 lanes_left(int64_t left) {
  return left >= 16 ? kAll : static_cast<__mmask16>((1u << left) - 1);
}

// A vector of each side's logits.
struct Pair512 {
  __m512 z, o;
};

FASTGIST_AVX512_INLINE Pair512 load_pair(const float* z, const float* o, int64_t at) {
  return {_mm512_loadu_ps(z + at), _mm512_loadu_ps(o + at)};
}

// Extremes a lane. As extremes() has them: NaN never wins.
class Seen512 {
  __m512 m_z_ = _mm512_set1_ps(-kInf<float>), m_o_ = m_z_, least_ = _mm512_set1_ps(kInf<float>);

 public:
  FASTGIST_AVX512_INLINE Seen512() {}
  FASTGIST_AVX512_INLINE void add(const Pair512& x) {
    m_z_ = _mm512_maskz_max_ps(kAll, x.z, m_z_);
    m_o_ = _mm512_maskz_max_ps(kAll, x.o, m_o_);
    least_ = _mm512_maskz_min_ps(kAll, _mm512_maskz_min_ps(kAll, x.z, x.o), least_);
  }
  FASTGIST_AVX512_INLINE void add_some(const float* z, const float* o, int64_t at, __mmask16 in) {
    const __m512 a = _mm512_mask_loadu_ps(m_z_, in, z + at), b = _mm512_mask_loadu_ps(m_o_, in, o + at);
    m_z_ = _mm512_maskz_max_ps(kAll, a, m_z_);
    m_o_ = _mm512_maskz_max_ps(kAll, b, m_o_);
    least_ = _mm512_mask_min_ps(least_, in, _mm512_maskz_min_ps(kAll, a, b), least_);
  }
  FASTGIST_AVX512_INLINE Extremes<float> all() const { return {largest(m_z_), largest(m_o_), smallest(least_)}; }
};

// Vectors are loaded three turns before their own. A processor takes a load for one of what was just stored where the
// addresses agree in their last twelve bits, whatever is above these, and lets it wait for the store: where gradients
// lie some vectors behind the logits, as an allocator has them, each turn would wait for the one before.
constexpr int64_t kTurnsAhead = 3;
// What is asked for ahead of a look at it: four lines, since memory's own prefetching is good at what is further.
constexpr int64_t kFetchAhead = 64;

// The upcoming block's maxima are looked for in the same loop, since a loop of its own would be as long for its loads
// and comparisons as these are for free beside fused products.
template <bool kNormal>
FASTGIST_TARGET_AVX512 BlockSums<float> sums_avx512(const float* z, const float* o, int64_t n, Centres<float> about,
                                                    const Upcoming<float>& upcoming, const ExpScale<float>& over_t,
                                                    float* p_hat, float* q_hat) {
  const Exp512 exp(over_t);
  const __m512 c_z = _mm512_set1_ps(about.z), c_o = _mm512_set1_ps(about.o);
  const __m512 infinite = _mm512_set1_ps(-kInf<float>);
  __m512 sum_p = _mm512_setzero_ps(), sum_q = sum_p, sum_pd = sum_p, sum_qd = sum_p;
  unsigned lone = 0;
  const auto step = [&](Pair512 x, int64_t at, __mmask16 in) FASTGIST_TARGET_AVX512 FASTGIST_INLINE_BODY {
    const __m512 zc = _mm512_sub_ps(x.z, c_z), oc = _mm512_sub_ps(x.o, c_o);
    __m512 d = _mm512_sub_ps(zc, oc), p, q;
    if constexpr (kNormal) {
      p = exp.normal(zc);
      q = exp.normal(oc);
    } else {
      const __mmask16 no_z = _mm512_cmp_ps_mask(x.z, infinite, _CMP_EQ_OQ);
      const __mmask16 no_o = _mm512_cmp_ps_mask(x.o, infinite, _CMP_EQ_OQ);
      d = _mm512_maskz_mov_ps(static_cast<__mmask16>(~(no_z | no_o)), d);
      lone |= no_z ^ no_o;
      p = exp.any(zc);
      q = exp.any(oc);
    }
    _mm512_mask_storeu_ps(p_hat + at, in, p);
    _mm512_mask_storeu_ps(q_hat + at, in, q);
    sum_p = _mm512_mask_add_ps(sum_p, in, sum_p, p);
    sum_q = _mm512_mask_add_ps(sum_q, in, sum_q, q);
    sum_pd = _mm512_fmadd_ps(p, d, sum_pd);  // a lane that is out stands at the centres: its d is 0
    sum_qd = _mm512_fmadd_ps(q, d, sum_qd);
  };
  // Where nothing is to be looked at, the block itself is once more: nobody wants what is seen.
  const bool looks = upcoming.n >= n;
  const float *const next_z = looks ? upcoming.z : z, *const next_o = looks ? upcoming.o : o;
  const int64_t next_n = looks ? upcoming.n : 0, ahead = looks ? kFetchAhead : 0;
  const Upcoming<float> next = upcoming;  // its own: what p_hat points to might be the caller's
  Seen512 seen;
  int64_t at = 0;
  if (n >= 16 * (kTurnsAhead + 1)) {
    Pair512 first = load_pair(z, o, 0), second = load_pair(z, o, 16), third = load_pair(z, o, 32);
    for (; at + 16 * (kTurnsAhead + 1) <= n; at += 16) {
      const Pair512 fourth = load_pair(z, o, at + 16 * kTurnsAhead);
      next.fetch(at + ahead);
      seen.add(load_pair(next_z, next_o, at));
      step(first, at, kAll);
      first = second;
      second = third;
      third = fourth;
    }
  }
  int64_t looked_at = at;
  for (; at + 16 <= n; at += 16) step(load_pair(z, o, at), at, kAll);
  if (at < n) {
    const __mmask16 in = lanes_left(n - at);
    step({_mm512_mask_loadu_ps(c_z, in, z + at), _mm512_mask_loadu_ps(c_o, in, o + at)}, at, in);
  }
  for (; looked_at + 16 <= next_n; looked_at += 16) seen.add(load_pair(next_z, next_o, looked_at));
  if (looked_at < next_n) seen.add_some(next_z, next_o, looked_at, lanes_left(next_n - looked_at));
  return {sum(sum_p), sum(sum_q), sum(sum_pd), sum(sum_qd), lone != 0, looks, seen.all()};
}

// Four vectors of a block: both sides' logits and exponentials. Lanes that are out hold `m_z`, `m_o`, 0 and 0.
struct Quad512 {
  __m512 z, o, p, q;
};

// gap() of pair_rows.h.
template <bool kPlain>
FASTGIST_AVX512_INLINE __m512 gap512(const Quad512& x, __m512 m_z, __m512 m_o) {
  const __m512 d = _mm512_sub_ps(_mm512_sub_ps(x.z, m_z), _mm512_sub_ps(x.o, m_o));
  if constexpr (kPlain) return d;
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.z, _mm512_set1_ps(-kInf<float>), _CMP_NEQ_UQ), d);
}

// step(quad, at, lanes) for all of a block, whose results may be stored where the exponentials lie. What a step loads
// besides, as class weights, it may have to wait for: see kTurnsAhead.
template <typename Step>
FASTGIST_AVX512_INLINE void by_quads(const float* z, const float* o, const float* p, const float* q, int64_t n,
                                     Centres<float> m, const Step& step) {
  const __m512 m_z = _mm512_set1_ps(m.z), m_o = _mm512_set1_ps(m.o);
  const auto whole = [&](int64_t at) FASTGIST_TARGET_AVX512 FASTGIST_INLINE_BODY {
    return Quad512{_mm512_loadu_ps(z + at), _mm512_loadu_ps(o + at), _mm512_loadu_ps(p + at), _mm512_loadu_ps(q + at)};
  };
  int64_t at = 0;
  if (n >= 16 * (kTurnsAhead + 1)) {
    Quad512 first = whole(0), second = whole(16), third = whole(32);
    for (; at + 16 * (kTurnsAhead + 1) <= n; at += 16) {
      const Quad512 fourth = whole(at + 16 * kTurnsAhead);
      step(first, at, kAll);
      first = second;
      second = third;
      third = fourth;
    }
  }
  for (; at + 16 <= n; at += 16) step(whole(at), at, kAll);
  if (at < n) {
    const __mmask16 in = lanes_left(n - at);
    step(Quad512{_mm512_mask_loadu_ps(m_z, in, z + at), _mm512_mask_loadu_ps(m_o, in, o + at),
                 _mm512_maskz_loadu_ps(in, p + at), _mm512_maskz_loadu_ps(in, q + at)},
         at, in);
  }
}

// e^((x - c) / T).
FASTGIST_TARGET_AVX512 inline void exponentials_avx512(const float* x, int64_t n, float c,
                                                       const ExpScale<float>& over_t, float* out) {
  const Exp512 exp(over_t);
  const __m512 centre = _mm512_set1_ps(c);
  for (int64_t at = 0; at < n; at += 16) {
    const __mmask16 in = lanes_left(n - at);
    _mm512_mask_storeu_ps(out + at, in, exp.any(_mm512_sub_ps(_mm512_maskz_loadu_ps(in, x + at), centre)));
  }
}

}  // namespace fastgist::cpu

#endif  // FASTGIST_X86_DISPATCH
