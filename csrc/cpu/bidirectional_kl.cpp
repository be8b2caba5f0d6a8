#include "bidirectional_kl.h"

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace fastgist::cpu {
namespace {

// Classes a block: two float blocks of inputs and two of outputs are 16 KiB, half of a first-level cache. The forward
// looks for a block's maxima and then takes its exponentials, so the second look finds the block there.
constexpr int64_t kBlock = 1024;

template <typename A>
constexpr A kInf = std::numeric_limits<A>::infinity();

// A block of a row in the accumulation type: the row's own memory where it is that already, else converted into
// `buffer`.
template <typename T, typename A>
FASTGIST_INLINE const A* load_block(const T* x, int64_t stride, int64_t n, A* buffer) {
  if (stride == 1) {
    if constexpr (std::is_same_v<T, A>) return x;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = load(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = load(x[i * stride]);
  }
  return buffer;
}

// The point to centre on: 0 while a side has shown nothing but -inf.
template <typename A>
FASTGIST_INLINE A centre(A max) {
  return max == -kInf<A> ? A(0) : max;
}

// Sums over the classes seen so far, about the maxima seen so far. w is the sum of p^ d (q^ d) with d not yet over T.
// A block is summed in A, many lanes wide; the blocks add up in double, or fifty of them would cost fifty roundings.
template <typename A, bool kFma>
struct OnlinePair {
  A m_z = -kInf<A>, m_o = -kInf<A>;
  double s_p = 0, s_q = 0, w_p = 0, w_q = 0;
  bool lone = false;  // some class is -inf on one side only

  // Move the sums to new maxima. When the maxima rise by (a, b), p^ shrinks by exp(-a / T) and d by a - b.
  FASTGIST_INLINE void raise(A block_m_z, A block_m_o, A inv_t) {
    if (!(block_m_z > m_z) && !(block_m_o > m_o)) return;
    const A old_z = centre(m_z), old_o = centre(m_o);
    m_z = std::max(m_z, block_m_z);
    m_o = std::max(m_o, block_m_o);
    const A rise_z = old_z - centre(m_z), rise_o = old_o - centre(m_o);
    // min: where the old centre 0 stood for -inf, rise may be positive; the sums are 0 there and stay 0.
    const A alpha_p = exp_nonpositive<kFma>(std::min(rise_z, A(0)) * inv_t);
    const A alpha_q = exp_nonpositive<kFma>(std::min(rise_o, A(0)) * inv_t);
    const A shift = rise_z - rise_o;
    w_p = alpha_p * (w_p + shift * s_p);
    w_q = alpha_q * (w_q + shift * s_q);
    s_p *= alpha_p;
    s_q *= alpha_q;
  }

  // Add a block whose maxima are in already. kScreen: the block holds -inf, where d is 0 by definition.
  template <bool kScreen>
  FASTGIST_INLINE void add(const A* z, const A* o, int64_t n, A inv_t) {
    const A c_z = centre(m_z), c_o = centre(m_o);
    A sum_p = 0, sum_q = 0, sum_pd = 0, sum_qd = 0;
    int lone_classes = 0;
#pragma omp simd reduction(+ : sum_p, sum_q, sum_pd, sum_qd, lone_classes)
    for (int64_t i = 0; i < n; ++i) {
      const A zc = z[i] - c_z;
      const A oc = o[i] - c_o;
      A d = zc - oc;
      if constexpr (kScreen) {
        const bool no_z = z[i] == -kInf<A>, no_o = o[i] == -kInf<A>;
        d = (no_z | no_o) ? A(0) : d;
        lone_classes += no_z != no_o;
      }
      const A p = exp_nonpositive<kFma>(zc * inv_t);
      const A q = exp_nonpositive<kFma>(oc * inv_t);
      sum_p += p;
      sum_q += q;
      sum_pd = multiply_add<kFma>(p, d, sum_pd);
      sum_qd = multiply_add<kFma>(q, d, sum_qd);
    }
    s_p += sum_p;
    s_q += sum_q;
    w_p += sum_pd;
    w_q += sum_qd;
    lone = lone || lone_classes != 0;
  }
};

template <typename T, bool kFma>
FASTGIST_INLINE void forward_rows(const LogitPair& in, const ForwardOutputs& out, int64_t row_begin, int64_t row_end) {
  using A = typename Accumulate<T>::type;
  alignas(64) A z_buffer[kBlock];
  alignas(64) A o_buffer[kBlock];
  const A inv_t = static_cast<A>(1.0 / in.temperature);
  A* row_loss = static_cast<A*>(out.row_loss);
  A* stats = static_cast<A*>(out.stats);

  for (int64_t row = row_begin; row < row_end; ++row) {
    A loss = 0, e_p = 0, e_q = 0;
    OnlinePair<A, kFma> sums;
    const bool counts = in.classes > 0 && (in.mask == nullptr || in.mask[row * in.mask_stride]);
    if (counts) {
      const T* z = static_cast<const T*>(in.z) + row * in.z_stride_m;
      const T* o = static_cast<const T*>(in.o) + row * in.o_stride_m;
      for (int64_t start = 0; start < in.classes; start += kBlock) {
        const int64_t n = std::min(kBlock, in.classes - start);
        const A* z_block = load_block(z + start * in.z_stride_v, in.z_stride_v, n, z_buffer);
        const A* o_block = load_block(o + start * in.o_stride_v, in.o_stride_v, n, o_buffer);
        // NaN never wins a comparison, so it stays out of these and shows in the sums.
        A m_z = -kInf<A>, m_o = -kInf<A>, least = kInf<A>;
#pragma omp simd reduction(max : m_z, m_o) reduction(min : least)
        for (int64_t i = 0; i < n; ++i) {
          m_z = z_block[i] > m_z ? z_block[i] : m_z;
          m_o = o_block[i] > m_o ? o_block[i] : m_o;
          const A lower = z_block[i] < o_block[i] ? z_block[i] : o_block[i];
          least = lower < least ? lower : least;
        }
        sums.raise(m_z, m_o, inv_t);
        if (least > -kInf<A>) {
          sums.template add<false>(z_block, o_block, n, inv_t);
        } else {
          sums.template add<true>(z_block, o_block, n, inv_t);
        }
      }
      e_p = static_cast<A>(sums.w_p / sums.s_p * inv_t);
      e_q = static_cast<A>(sums.w_q / sums.s_q * inv_t);
      loss = static_cast<A>((sums.w_p / sums.s_p - sums.w_q / sums.s_q) * inv_t);
      if (sums.lone && loss == loss) {
        loss = kInf<A>;
        e_p = e_q = std::numeric_limits<A>::quiet_NaN();
      }
    }
    row_loss[row] = loss;
    stats[kMaxZ * in.rows + row] = counts ? centre(sums.m_z) : A(0);
    stats[kMaxO * in.rows + row] = counts ? centre(sums.m_o) : A(0);
    stats[kSumP * in.rows + row] = static_cast<A>(sums.s_p);
    stats[kSumQ * in.rows + row] = static_cast<A>(sums.s_q);
    stats[kMeanP * in.rows + row] = e_p;
    stats[kMeanQ * in.rows + row] = e_q;
  }
}

// What the gradients of a row need beside its logits.
template <typename A>
struct RowScalars {
  A m_z, m_o;
  A inv_s_p, inv_s_q;  // p = p^ / S_p, not exp(. - log S_p): the rounding of that argument would grow with log S_p
  A e_p, e_q;
  A scale;  // row_grad / T
  A inv_t;
};

template <bool kFma, bool kGradZ, bool kGradO, typename T, typename A>
FASTGIST_INLINE void backward_block(const A* z, const A* o, int64_t n, const RowScalars<A>& row, T* grad_z, T* grad_o) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A zc = z[i] - row.m_z;
    const A oc = o[i] - row.m_o;
    // d is 0 where both sides are -inf. Where one is, e_p and e_q are NaN and take the whole row with them.
    const A d = z[i] == -kInf<A> ? A(0) : (zc - oc) * row.inv_t;
    const A p = exp_nonpositive<kFma>(zc * row.inv_t) * row.inv_s_p;
    const A q = exp_nonpositive<kFma>(oc * row.inv_t) * row.inv_s_q;
    if constexpr (kGradZ) store(row.scale * multiply_add<kFma>(p, d - row.e_p, p - q), grad_z[i]);
    if constexpr (kGradO) store(row.scale * multiply_add<kFma>(q, row.e_q - d, q - p), grad_o[i]);
  }
}

template <typename T, bool kFma>
FASTGIST_INLINE void backward_rows(const LogitPair& in, const BackwardArguments& args, int64_t row_begin,
                                   int64_t row_end) {
  using A = typename Accumulate<T>::type;
  alignas(64) A z_buffer[kBlock];
  alignas(64) A o_buffer[kBlock];
  const A inv_t = static_cast<A>(1.0 / in.temperature);
  const A* stats = static_cast<const A*>(args.stats);
  const A* row_grad = static_cast<const A*>(args.row_grad);
  T* const grad_z = static_cast<T*>(args.grad_z);
  T* const grad_o = static_cast<T*>(args.grad_o);

  for (int64_t row = row_begin; row < row_end; ++row) {
    T* const out_z = grad_z == nullptr ? nullptr : grad_z + row * in.classes;
    T* const out_o = grad_o == nullptr ? nullptr : grad_o + row * in.classes;
    if (in.mask != nullptr && !in.mask[row * in.mask_stride]) {
      if (out_z != nullptr) std::memset(static_cast<void*>(out_z), 0, in.classes * sizeof(T));
      if (out_o != nullptr) std::memset(static_cast<void*>(out_o), 0, in.classes * sizeof(T));
      continue;
    }
    const T* z = static_cast<const T*>(in.z) + row * in.z_stride_m;
    const T* o = static_cast<const T*>(in.o) + row * in.o_stride_m;
    const auto stat = [&](Stat which) { return stats[which * in.rows + row]; };
    const RowScalars<A> about = {stat(kMaxZ),
                                 stat(kMaxO),
                                 A(1) / stat(kSumP),
                                 A(1) / stat(kSumQ),
                                 stat(kMeanP),
                                 stat(kMeanQ),
                                 row_grad[row * args.row_grad_stride] * inv_t,
                                 inv_t};
    for (int64_t start = 0; start < in.classes; start += kBlock) {
      const int64_t n = std::min(kBlock, in.classes - start);
      const A* z_block = load_block(z + start * in.z_stride_v, in.z_stride_v, n, z_buffer);
      const A* o_block = load_block(o + start * in.o_stride_v, in.o_stride_v, n, o_buffer);
      T* const block_z = out_z == nullptr ? nullptr : out_z + start;
      T* const block_o = out_o == nullptr ? nullptr : out_o + start;
      if (out_z != nullptr && out_o != nullptr) {
        backward_block<kFma, true, true>(z_block, o_block, n, about, block_z, block_o);
      } else if (out_z != nullptr) {
        backward_block<kFma, true, false>(z_block, o_block, n, about, block_z, block_o);
      } else if (out_o != nullptr) {
        backward_block<kFma, false, true>(z_block, o_block, n, about, block_z, block_o);
      }
    }
  }
}

// One copy of each function an instruction set: the bodies above are inlined into these and compiled for it.
template <typename T>
void forward_portable(const LogitPair& in, const ForwardOutputs& out, int64_t begin, int64_t end) {
  forward_rows<T, kPortableFma>(in, out, begin, end);
}
template <typename T>
void backward_portable(const LogitPair& in, const BackwardArguments& args, int64_t begin, int64_t end) {
  backward_rows<T, kPortableFma>(in, args, begin, end);
}
template <typename T>
FASTGIST_TARGET_AVX2 void forward_avx2(const LogitPair& in, const ForwardOutputs& out, int64_t begin, int64_t end) {
  forward_rows<T, true>(in, out, begin, end);
}
template <typename T>
FASTGIST_TARGET_AVX2 void backward_avx2(const LogitPair& in, const BackwardArguments& args, int64_t begin,
                                        int64_t end) {
  backward_rows<T, true>(in, args, begin, end);
}
template <typename T>
FASTGIST_TARGET_AVX512 void forward_avx512(const LogitPair& in, const ForwardOutputs& out, int64_t begin, int64_t end) {
  forward_rows<T, true>(in, out, begin, end);
}
template <typename T>
FASTGIST_TARGET_AVX512 void backward_avx512(const LogitPair& in, const BackwardArguments& args, int64_t begin,
                                            int64_t end) {
  backward_rows<T, true>(in, args, begin, end);
}

template <typename T>
void forward(const LogitPair& in, const ForwardOutputs& out, int64_t begin, int64_t end) {
  switch (isa()) {
    case Isa::kAvx512:
      return forward_avx512<T>(in, out, begin, end);
    case Isa::kAvx2:
      return forward_avx2<T>(in, out, begin, end);
    case Isa::kPortable:
      return forward_portable<T>(in, out, begin, end);
  }
}

template <typename T>
void backward(const LogitPair& in, const BackwardArguments& args, int64_t begin, int64_t end) {
  switch (isa()) {
    case Isa::kAvx512:
      return backward_avx512<T>(in, args, begin, end);
    case Isa::kAvx2:
      return backward_avx2<T>(in, args, begin, end);
    case Isa::kPortable:
      return backward_portable<T>(in, args, begin, end);
  }
}

}  // namespace

void bidirectional_kl_fwd(const LogitPair& in, const ForwardOutputs& out, int64_t row_begin, int64_t row_end) {
  switch (in.dtype) {
    case DType::kFloat32:
      return forward<float>(in, out, row_begin, row_end);
    case DType::kFloat64:
      return forward<double>(in, out, row_begin, row_end);
    case DType::kBFloat16:
      return forward<BFloat16>(in, out, row_begin, row_end);
    case DType::kFloat16:
      return forward<Half>(in, out, row_begin, row_end);
  }
}

void bidirectional_kl_bwd(const LogitPair& in, const BackwardArguments& args, int64_t row_begin, int64_t row_end) {
  switch (in.dtype) {
    case DType::kFloat32:
      return backward<float>(in, args, row_begin, row_end);
    case DType::kFloat64:
      return backward<double>(in, args, row_begin, row_end);
    case DType::kBFloat16:
      return backward<BFloat16>(in, args, row_begin, row_end);
    case DType::kFloat16:
      return backward<Half>(in, args, row_begin, row_end);
  }
}

}  // namespace fastgist::cpu
