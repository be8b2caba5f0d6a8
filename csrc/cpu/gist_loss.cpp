#include "gist_loss.h"

#include "dispatch.h"
#include "pair_rows.h"

namespace fastgist::cpu {
namespace {

// The loops below see float or double alone: half-precision blocks are converted on their way in and out of the
// first-level cache, so there is one copy of the arithmetic and not one a format.
template <typename A>
FASTGIST_INLINE const A* load_any(DType dtype, const void* x, int64_t offset, int64_t stride, int64_t n, A* buffer) {
  switch (dtype) {
    case DType::kFloat32:
      return load_block(static_cast<const float*>(x) + offset, stride, n, buffer);
    case DType::kFloat64:
      return load_block(static_cast<const double*>(x) + offset, stride, n, buffer);
    case DType::kBFloat16:
      return load_block(static_cast<const BFloat16*>(x) + offset, stride, n, buffer);
    case DType::kFloat16:
      return load_block(static_cast<const Half*>(x) + offset, stride, n, buffer);
  }
  return buffer;
}

template <typename T>
FASTGIST_INLINE void store_block(const float* from, T* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(from[i], to[i]);
}

// The exponent k that takes exp(x / T) to exp(x), or kUnitAnew.
int unit_power(double temperature) {
  for (int k = 1; k <= 4; ++k) {
    if (temperature == k) return k;
  }
  return kUnitAnew;
}

// What stands in a row's place in the target.
struct RowTarget {
  int64_t label = 0;
  bool counts = true, valid = true;

  RowTarget(const GistLossInputs& in, int64_t row) {
    if (in.target.classes == nullptr) return;
    label = in.target.classes[row * in.target.stride_m];
    counts = label != in.ignore_index;
    valid = label >= 0 && label < in.logits.classes;
  }
};

// Class weights of a block of soft targets.
template <typename A>
FASTGIST_INLINE const A* load_weights(const GistLossInputs& in, int64_t row, int64_t start, int64_t n, A* buffer) {
  const ClassTarget& target = in.target;
  const int64_t offset = row * target.stride_m + start * target.stride_v;
  const A* given = load_any(target.dtype, target.weights, offset, target.stride_v, n, buffer);
  if (in.label_smoothing == 0) return given;
  const A keep = static_cast<A>(1 - in.label_smoothing);
  const A smooth = static_cast<A>(in.label_smoothing / in.logits.classes);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = given[i] * keep + smooth;
  return buffer;
}

// sum t zc and sum t oc about the maxima seen so far, and W.
template <typename A>
struct TargetSums {
  double dot_z = 0, dot_o = 0, weight = 0;

  // Centres that rise by x make every zc smaller by x. (A weight of 0 also where the rise is not finite.)
  FASTGIST_INLINE void raise(A rise_z, A rise_o) {
    if (weight == 0) return;
    dot_z += weight * rise_z;
    dot_o += weight * rise_o;
  }

  // A block of soft targets.
  FASTGIST_INLINE void add(const A* z, const A* o, const A* weights, int64_t n, A c_z, A c_o) {
    A sum_z = 0, sum_o = 0, sum = 0;
#pragma omp simd reduction(+ : sum_z, sum_o, sum)
    for (int64_t i = 0; i < n; ++i) {
      const bool absent = weights[i] == A(0);
      sum_z += absent ? A(0) : weights[i] * (z[i] - c_z);
      sum_o += absent ? A(0) : weights[i] * (o[i] - c_o);
      sum += weights[i];
    }
    dot_z += sum_z;
    dot_o += sum_o;
    weight += sum;
  }

  // A block of classes that all weigh the same.
  FASTGIST_INLINE void add_even(const A* z, const A* o, double each, int64_t n, A c_z, A c_o) {
    A sum_z = 0, sum_o = 0;
#pragma omp simd reduction(+ : sum_z, sum_o)
    for (int64_t i = 0; i < n; ++i) {
      sum_z += z[i] - c_z;
      sum_o += o[i] - c_o;
    }
    dot_z += each * sum_z;
    dot_o += each * sum_o;
    weight += each * n;
  }

  FASTGIST_INLINE void add_class(A z, A o, double its_weight, A c_z, A c_o) {
    if (its_weight == 0) return;
    dot_z += its_weight * (static_cast<double>(z) - c_z);
    dot_o += its_weight * (static_cast<double>(o) - c_o);
    weight += its_weight;
  }
};

FASTGIST_INLINE double cross_entropy(double weight, double unit_sum, double dot) {
  return (weight == 0 ? 0 : weight * std::log(unit_sum)) - dot;
}

template <typename A>
struct Forward {
  template <bool kFma>
  static FASTGIST_INLINE void rows(const GistLossInputs& in, const ForwardOutputs& out, int64_t row_begin,
                                   int64_t row_end) {
    const LogitPair& pair = in.logits;
    alignas(64) A z_buffer[kBlock];
    alignas(64) A o_buffer[kBlock];
    alignas(64) A weight_buffer[kBlock];
    const A inv_t = static_cast<A>(1.0 / pair.temperature);
    const ExpScale<A> over_t(pair.temperature);
    const int power = unit_power(pair.temperature);
    const bool soft = in.target.classes == nullptr;
    A* row_loss = static_cast<A*>(out.row_loss);
    A* stats = static_cast<A*>(out.stats);

    for (int64_t row = row_begin; row < row_end; ++row) {
      const RowTarget target(in, row);
      if (!target.counts) {
        row_loss[row] = 0;
        for (int64_t which = 0; which < kGistStats; ++which) stats[which * pair.rows + row] = 0;
        continue;
      }
      OnlinePair<A, kFma> sums;
      TargetSums<A> dots;
      const auto load_z = [&](int64_t start, int64_t n) {
        const int64_t offset = row * pair.z_stride_m + start * pair.z_stride_v;
        return load_any(pair.dtype, pair.z, offset, pair.z_stride_v, n, z_buffer);
      };
      const auto load_o = [&](int64_t start, int64_t n) {
        const int64_t offset = row * pair.o_stride_m + start * pair.o_stride_v;
        return load_any(pair.dtype, pair.o, offset, pair.o_stride_v, n, o_buffer);
      };
      for (int64_t start = 0; start < pair.classes; start += kBlock) {
        const int64_t n = std::min(kBlock, pair.classes - start);
        const A* z = load_z(start, n);
        const A* o = load_o(start, n);
        const Extremes<A> seen = extremes(z, o, n);
        const auto rise = sums.template raise<true>(seen.m_z, seen.m_o, over_t);
        dots.raise(rise.z, rise.o);
        switch (power) {
          case 1:
            sums.template add<1>(z, o, n, over_t, seen.least);
            break;
          case 2:
            sums.template add<2>(z, o, n, over_t, seen.least);
            break;
          case 3:
            sums.template add<3>(z, o, n, over_t, seen.least);
            break;
          case 4:
            sums.template add<4>(z, o, n, over_t, seen.least);
            break;
          default:
            sums.template add<kUnitAnew>(z, o, n, over_t, seen.least);
        }
        const A c_z = centre(sums.m_z), c_o = centre(sums.m_o);
        if (soft) {
          dots.add(z, o, load_weights(in, row, start, n, weight_buffer), n, c_z, c_o);
        } else if (in.label_smoothing != 0) {
          dots.add_even(z, o, in.label_smoothing / pair.classes, n, c_z, c_o);
        }
      }
      const A c_z = centre(sums.m_z), c_o = centre(sums.m_o);
      if (!soft && target.valid) {
        dots.add_class(*load_z(target.label, 1), *load_o(target.label, 1), 1 - in.label_smoothing, c_z, c_o);
      }
      const auto divergence = sums.divergence(inv_t);
      double loss = cross_entropy(dots.weight, sums.unit_z, dots.dot_z);
      if (in.alpha != 0) loss += in.alpha * cross_entropy(dots.weight, sums.unit_o, dots.dot_o);
      if (in.beta != 0) loss += in.beta * divergence.loss;
      row_loss[row] = target.valid ? static_cast<A>(loss) : std::numeric_limits<A>::quiet_NaN();
      const auto set = [&](int64_t which, double value) { stats[which * pair.rows + row] = static_cast<A>(value); };
      set(kMaxZ, c_z);
      set(kMaxO, c_o);
      set(kSumP, sums.s_p);
      set(kSumQ, sums.s_q);
      set(kMeanP, divergence.e_p);
      set(kMeanQ, divergence.e_q);
      set(kUnitZ, sums.unit_z);
      set(kUnitO, sums.unit_o);
      set(kWeight, dots.weight);
    }
  }
};

// What the gradients of a row need beside its logits; pair.scale is beta_z / T here.
template <typename A>
struct GistScalars {
  RowScalars<A> pair;
  A over_z, over_o;  // W / sum exp(zc), W / sum exp(oc)
  A scale_o;         // beta_o / T
  A alpha;
  A row_grad;
};

// kEven: the weights of the block's classes are all weights[0].
template <int kPower, bool kEven, bool kFma, typename A>
FASTGIST_INLINE void backward_block(const A* z, const A* o, const A* weights, int64_t n, const GistScalars<A>& row,
                                    A* grad_z, A* grad_o) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const PairTerms<A> at = pair_terms<kFma>(z[i], o[i], row.pair);
    const A weight = kEven ? weights[0] : weights[i];
    const A ce_z = multiply_add<kFma>(exp_unit<kPower, kFma>(at.zc, at.p_hat), row.over_z, -weight);
    const A ce_o = multiply_add<kFma>(exp_unit<kPower, kFma>(at.oc, at.q_hat), row.over_o, -weight);
    const A kl_z = at.template grad_z<kFma>(row.pair.e_p);
    const A kl_o = at.template grad_o<kFma>(row.pair.e_q);
    // A detached side takes nothing of the divergence, not even NaN.
    grad_z[i] = row.row_grad * multiply_add<kFma>(row.pair.scale, row.pair.scale == A(0) ? A(0) : kl_z, ce_z);
    grad_o[i] = row.row_grad * multiply_add<kFma>(row.scale_o, row.scale_o == A(0) ? A(0) : kl_o, row.alpha * ce_o);
  }
}

// One side alone, where the divergence is absent and must not carry what is not finite across.
template <bool kEven, bool kFma, typename A>
FASTGIST_INLINE void cross_entropy_block(const A* x, const A* weights, int64_t n, A centre, A over, A factor, A* grad) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A weight = kEven ? weights[0] : weights[i];
    grad[i] = factor * multiply_add<kFma>(exp_nonpositive<kFma>(x[i] - centre), over, -weight);
  }
}

template <bool kEven, bool kFma, typename A>
FASTGIST_INLINE void backward_any(int power, const A* z, const A* o, const A* weights, int64_t n,
                                  const GistScalars<A>& row, A* grad_z, A* grad_o) {
  if (row.pair.scale == A(0) && row.scale_o == A(0)) {
    cross_entropy_block<kEven, kFma>(z, weights, n, row.pair.m_z, row.over_z, row.row_grad, grad_z);
    if (row.alpha == A(0)) {
      std::fill_n(grad_o, n, row.row_grad * A(0));
    } else {
      cross_entropy_block<kEven, kFma>(o, weights, n, row.pair.m_o, row.over_o, row.row_grad * row.alpha, grad_o);
    }
    return;
  }
  switch (power) {
    case 1:
      return backward_block<1, kEven, kFma>(z, o, weights, n, row, grad_z, grad_o);
    case 2:
      return backward_block<2, kEven, kFma>(z, o, weights, n, row, grad_z, grad_o);
    case 3:
      return backward_block<3, kEven, kFma>(z, o, weights, n, row, grad_z, grad_o);
    case 4:
      return backward_block<4, kEven, kFma>(z, o, weights, n, row, grad_z, grad_o);
    default:
      return backward_block<kUnitAnew, kEven, kFma>(z, o, weights, n, row, grad_z, grad_o);
  }
}

// Where a block's gradient is computed (the tensor itself, or a buffer), and its way from there into the tensor.
template <typename A>
struct Sink {
  DType dtype;
  void* tensor;  // or null: not wanted, and what is computed stays in the buffer
  A* buffer;

  FASTGIST_INLINE bool direct() const {
    return tensor != nullptr && (dtype == DType::kFloat32 || dtype == DType::kFloat64);
  }
  FASTGIST_INLINE A* place(int64_t offset) const { return direct() ? static_cast<A*>(tensor) + offset : buffer; }
  FASTGIST_INLINE void put(int64_t offset, int64_t n) const {
    if (tensor == nullptr || direct()) return;
    if constexpr (std::is_same_v<A, float>) {
      if (dtype == DType::kBFloat16) {
        store_block(buffer, static_cast<BFloat16*>(tensor) + offset, n);
      } else {
        store_block(buffer, static_cast<Half*>(tensor) + offset, n);
      }
    }
  }
  FASTGIST_INLINE void clear(int64_t offset, int64_t n) const {
    if (tensor == nullptr) return;
    const int64_t size = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
    std::memset(static_cast<char*>(tensor) + offset * size, 0, n * size);
  }
};

template <typename A>
struct Backward {
  template <bool kFma>
  static FASTGIST_INLINE void rows(const GistLossInputs& in, const BackwardArguments& args, int64_t row_begin,
                                   int64_t row_end) {
    const LogitPair& pair = in.logits;
    alignas(64) A z_buffer[kBlock];
    alignas(64) A o_buffer[kBlock];
    alignas(64) A weight_buffer[kBlock];
    alignas(64) A z_result[kBlock];
    alignas(64) A o_result[kBlock];
    const A inv_t = static_cast<A>(1.0 / pair.temperature);
    const ExpScale<A> over_t(pair.temperature);
    const int power = unit_power(pair.temperature);
    const bool soft = in.target.classes == nullptr;
    const A smooth = static_cast<A>(in.label_smoothing / pair.classes);
    const A of_label = static_cast<A>(in.label_smoothing / pair.classes + (1 - in.label_smoothing));
    const A* stats = static_cast<const A*>(args.stats);
    const A* row_grad = static_cast<const A*>(args.row_grad);
    const Sink<A> to_z = {pair.dtype, args.grad_z, z_result};
    const Sink<A> to_o = {pair.dtype, args.grad_o, o_result};

    for (int64_t row = row_begin; row < row_end; ++row) {
      const RowTarget target(in, row);
      const int64_t first = row * pair.classes;
      if (!target.counts) {
        to_z.clear(first, pair.classes);
        to_o.clear(first, pair.classes);
        continue;
      }
      const auto stat = [&](int64_t which) { return stats[which * pair.rows + row]; };
      const A given = target.valid ? row_grad[row * args.row_grad_stride] : std::numeric_limits<A>::quiet_NaN();
      const GistScalars<A> about = {{stat(kMaxZ), stat(kMaxO), A(1) / stat(kSumP), A(1) / stat(kSumQ), stat(kMeanP),
                                     stat(kMeanQ), static_cast<A>(in.beta_z / pair.temperature), inv_t, over_t},
                                    stat(kWeight) / stat(kUnitZ),
                                    stat(kWeight) / stat(kUnitO),
                                    static_cast<A>(in.beta_o / pair.temperature),
                                    static_cast<A>(in.alpha),
                                    given};
      for (int64_t start = 0; start < pair.classes; start += kBlock) {
        const int64_t n = std::min(kBlock, pair.classes - start);
        const int64_t z_offset = row * pair.z_stride_m + start * pair.z_stride_v;
        const int64_t o_offset = row * pair.o_stride_m + start * pair.o_stride_v;
        const A* z = load_any(pair.dtype, pair.z, z_offset, pair.z_stride_v, n, z_buffer);
        const A* o = load_any(pair.dtype, pair.o, o_offset, pair.o_stride_v, n, o_buffer);
        A* const grad_z = to_z.place(first + start);
        A* const grad_o = to_o.place(first + start);
        if (soft) {
          const A* weights = load_weights(in, row, start, n, weight_buffer);
          backward_any<false, kFma>(power, z, o, weights, n, about, grad_z, grad_o);
        } else {
          backward_any<true, kFma>(power, z, o, &smooth, n, about, grad_z, grad_o);
          const int64_t i = target.label - start;
          if (target.valid && i >= 0 && i < n) {  // once more, with its own weight
            backward_any<true, kFma>(power, z + i, o + i, &of_label, 1, about, grad_z + i, grad_o + i);
          }
        }
        to_z.put(first + start, n);
        to_o.put(first + start, n);
      }
    }
  }
};

}  // namespace

void gist_loss_fwd(const GistLossInputs& in, const ForwardOutputs& out, int64_t row_begin, int64_t row_end) {
  if (in.logits.dtype == DType::kFloat64) return run_rows<Forward<double>>(in, out, row_begin, row_end);
  run_rows<Forward<float>>(in, out, row_begin, row_end);
}

void gist_loss_bwd(const GistLossInputs& in, const BackwardArguments& args, int64_t row_begin, int64_t row_end) {
  if (in.logits.dtype == DType::kFloat64) return run_rows<Backward<double>>(in, args, row_begin, row_end);
  run_rows<Backward<float>>(in, args, row_begin, row_end);
}

}  // namespace fastgist::cpu
