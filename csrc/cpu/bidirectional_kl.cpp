#include "bidirectional_kl.h"

#include "dispatch.h"
#include "pair_rows.h"

namespace fastgist::cpu {
namespace {

template <typename T>
struct Forward {
  using A = typename Accumulate<T>::type;

  template <bool kFma>
  static FASTGIST_INLINE void rows(const LogitPair& in, const ForwardOutputs& out, int64_t row_begin, int64_t row_end) {
    alignas(64) A z_buffer[kBlock];
    alignas(64) A o_buffer[kBlock];
    const A inv_t = static_cast<A>(1.0 / in.temperature);
    const ExpScale<A> over_t(in.temperature);
    A* row_loss = static_cast<A*>(out.row_loss);
    A* stats = static_cast<A*>(out.stats);

    for (int64_t row = row_begin; row < row_end; ++row) {
      typename OnlinePair<A, kFma>::Divergence of_row = {0, 0, 0};
      OnlinePair<A, kFma> sums;
      const bool counts = in.classes > 0 && (in.mask == nullptr || in.mask[row * in.mask_stride]);
      if (counts) {
        const T* z = static_cast<const T*>(in.z) + row * in.z_stride_m;
        const T* o = static_cast<const T*>(in.o) + row * in.o_stride_m;
        for (int64_t start = 0; start < in.classes; start += kBlock) {
          const int64_t n = std::min(kBlock, in.classes - start);
          const A* z_block = load_block(z + start * in.z_stride_v, in.z_stride_v, n, z_buffer);
          const A* o_block = load_block(o + start * in.o_stride_v, in.o_stride_v, n, o_buffer);
          const Extremes<A> seen = extremes(z_block, o_block, n);
          sums.template raise<false>(seen.m_z, seen.m_o, over_t);
          sums.template add<kNoUnit>(z_block, o_block, n, over_t, seen.least);
        }
        of_row = sums.divergence(inv_t);
      }
      row_loss[row] = of_row.loss;
      stats[kMaxZ * in.rows + row] = counts ? centre(sums.m_z) : A(0);
      stats[kMaxO * in.rows + row] = counts ? centre(sums.m_o) : A(0);
      stats[kSumP * in.rows + row] = static_cast<A>(sums.s_p);
      stats[kSumQ * in.rows + row] = static_cast<A>(sums.s_q);
      stats[kMeanP * in.rows + row] = of_row.e_p;
      stats[kMeanQ * in.rows + row] = of_row.e_q;
    }
  }
};

template <bool kFma, bool kGradZ, bool kGradO, typename T, typename A>
FASTGIST_INLINE void backward_block(const A* z, const A* o, int64_t n, const RowScalars<A>& row, T* grad_z, T* grad_o) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const PairTerms<A> at = pair_terms<kFma>(z[i], o[i], row);
    if constexpr (kGradZ) store(row.scale * at.template grad_z<kFma>(row.e_p), grad_z[i]);
    if constexpr (kGradO) store(row.scale * at.template grad_o<kFma>(row.e_q), grad_o[i]);
  }
}

template <typename T>
struct Backward {
  using A = typename Accumulate<T>::type;

  template <bool kFma>
  static FASTGIST_INLINE void rows(const LogitPair& in, const BackwardArguments& args, int64_t row_begin,
                                   int64_t row_end) {
    alignas(64) A z_buffer[kBlock];
    alignas(64) A o_buffer[kBlock];
    const A inv_t = static_cast<A>(1.0 / in.temperature);
    const ExpScale<A> over_t(in.temperature);
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
                                   inv_t,
                                   over_t};
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
};

template <template <typename> typename Kernel, typename... Args>
void run(DType dtype, const Args&... args) {
  switch (dtype) {
    case DType::kFloat32:
      return run_rows<Kernel<float>>(args...);
    case DType::kFloat64:
      return run_rows<Kernel<double>>(args...);
    case DType::kBFloat16:
      return run_rows<Kernel<BFloat16>>(args...);
    case DType::kFloat16:
      return run_rows<Kernel<Half>>(args...);
  }
}

}  // namespace

void bidirectional_kl_fwd(const LogitPair& in, const ForwardOutputs& out, int64_t row_begin, int64_t row_end) {
  run<Forward>(in.dtype, in, out, row_begin, row_end);
}

void bidirectional_kl_bwd(const LogitPair& in, const BackwardArguments& args, int64_t row_begin, int64_t row_end) {
  run<Backward>(in.dtype, in, args, row_begin, row_end);
}

}  // namespace fastgist::cpu
