// The adapter's forward: a few rows at a time go through all of it, while x, the hidden units and y are in cache.
#include "activations.h"
#include "adapter_rows.h"
#include "philox.h"

namespace fastgist::cpu {
namespace {

template <typename A>
struct ForwardPlan {
  const AdapterInputs& in;
  const AdapterOutputs& out;
  Start<A> from;
  Packed<A> down;  // (inner, H)
  Packed<A> up;    // (H + biases, out): below U^T the output's biases, which multiply the gate or ones
  Buffer<A> start;
  int64_t columns;      // of z in panels
  int64_t out_columns;  // of y in panels
  std::unique_ptr<Dropout> dropout;

  ForwardPlan(const AdapterInputs& in, const AdapterOutputs& out)
      : in(in),
        out(out),
        from(in),
        down(in.inner, in.hidden, panel_width<A>(in.hidden)),
        up(in.hidden + in.biases, in.out, 2 * vector_width<A>()),
        start(round_up(in.hidden, panel_width<A>(in.hidden))),
        columns(round_up(in.hidden, panel_width<A>(in.hidden))),
        out_columns(round_up(in.out, 2 * vector_width<A>())) {
    down.columns(in, in.down_weight, in.hidden, in.inner, 0, in.norm ? from.weight.get() : nullptr);
    up.columns(in, in.up_weight, in.out, in.hidden, 0, nullptr);
    up.rows(in, in.up_bias, in.biases, in.out, in.hidden, nullptr);
    std::fill_n(start.get(), columns, A(0));
    std::copy_n(from.bias.get(), in.hidden, start.get());
    if (in.seed != nullptr) dropout = std::make_unique<Dropout>(*in.seed, in.dropout_p, in.hidden);
  }
};

// Where the rows of a task are worked on.
template <typename A>
struct ForwardScratch {
  Buffer<A> x, added, branch, y, z, value, hidden, gate;
  Buffer<uint32_t> words;

  explicit ForwardScratch(const ForwardPlan<A>& plan)
      : x(kFew * plan.in.inner),
        added(kFew * plan.out_columns),
        branch(plan.in.out),
        y(kFew * plan.out_columns),
        z(kFew * plan.columns),
        value(kFew * plan.columns),
        hidden(kFew * (plan.in.hidden + plan.in.biases)),
        gate(kFew * plan.in.experts),
        words(plan.dropout ? plan.dropout->room(kFew) : 0) {}
};

struct Forward {
  // x or its LayerNorm before weight and bias, whose statistics are left for the backward.
  template <typename A>
  static FASTGIST_INLINE Rows<A> input(const ForwardPlan<A>& plan, int64_t row, int64_t rows, A* buffer) {
    const AdapterInputs& in = plan.in;
    Rows<A> x = load_rows(in.x, row, rows, in.inner, in.inner, buffer);
    if (!in.norm) return x;
    A* const stats = static_cast<A*>(plan.out.stats);
    const A count = static_cast<A>(in.inner);
    for (int64_t r = 0; r < rows; ++r) {
      const A* const from = x.data + r * x.ld;
      A sum = 0, rest = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < in.inner; ++i) sum += from[i];
      const A near = sum / count;  // but for rounding, which counts where a row is far from 0
#pragma omp simd reduction(+ : rest, squares)
      for (int64_t i = 0; i < in.inner; ++i) {
        const A d = from[i] - near;
        rest += d;
        squares += d * d;
      }
      const A off = rest / count, mean = near + off;
      const A variance = std::max(squares / count - off * off, A(0));
      const A rstd = A(1) / std::sqrt(variance + static_cast<A>(in.norm_eps));
      A* const to = buffer + r * in.inner;
#pragma omp simd
      for (int64_t i = 0; i < in.inner; ++i) to[i] = ((from[i] - near) - off) * rstd;
      if (stats != nullptr) stats[row + r] = mean, stats[in.rows + row + r] = rstd;
    }
    return {buffer, in.inner};
  }

  // What is added to y: the residual, or its sum with the branch.
  template <typename A>
  static FASTGIST_INLINE Rows<A> added(const ForwardPlan<A>& plan, int64_t row, int64_t rows,
                                       const ForwardScratch<A>& at) {
    const AdapterInputs& in = plan.in;
    if (in.residual.data == nullptr) return {nullptr, 0};
    const Rows<A> first = load_rows(in.residual, row, rows, in.out, plan.out_columns, at.added.get());
    if (in.branch.data == nullptr) return first;
    for (int64_t r = 0; r < rows; ++r) {
      const Rows<A> second = load_rows(in.branch, row + r, 1, in.out, in.out, at.branch.get());
      const A *a = first.data + r * first.ld, *b = second.data;
      A* const to = at.added.get() + r * plan.out_columns;
#pragma omp simd
      for (int64_t i = 0; i < in.out; ++i) to[i] = a[i] + b[i];
      std::fill(to + in.out, to + plan.out_columns, A(0));
    }
    return {at.added.get(), plan.out_columns};
  }

  // The hidden units of a row from act(z), and beside them what the output's biases are multiplied by.
  template <typename A>
  static FASTGIST_INLINE void hide(const ForwardPlan<A>& plan, const A* value, const A* gate, const uint32_t* words,
                                   A* hidden) {
    const AdapterInputs& in = plan.in;
    if (gate == nullptr) {
      std::copy_n(value, in.hidden, hidden);
    } else {
      const int64_t width = in.hidden / in.experts;
      for (int64_t e = 0; e < in.experts; ++e) {
        for (int64_t h = e * width; h < (e + 1) * width; ++h) hidden[h] = value[h] * gate[e];
      }
    }
    if (words != nullptr) {
      const A keep = static_cast<A>(plan.dropout->keep);
      const uint32_t least = plan.dropout->least;
#pragma omp simd
      for (int64_t h = 0; h < in.hidden; ++h) hidden[h] = (words[h] >> 1) >= least ? hidden[h] / keep : A(0);
    }
    for (int64_t e = 0; e < in.biases; ++e) hidden[in.hidden + e] = in.gated_biases ? gate[e] : A(1);
  }

  template <bool kFma, int kBytes, typename A>
  static FASTGIST_INLINE void rows(const ForwardPlan<A>& plan, int64_t begin, int64_t end) {
    constexpr int kWidth = 2 * kBytes / static_cast<int>(sizeof(A));
    const AdapterInputs& in = plan.in;
    const ForwardScratch<A> at(plan);
    const int64_t wide = in.hidden + in.biases;
    const bool direct = holds<A>(in.dtype) && plan.out_columns == in.out;
    const A scale = static_cast<A>(in.scale), residual_scale = static_cast<A>(in.residual_scale);
    for (int64_t row = begin; row < end; row += kFew) {
      const int64_t rows = std::min(kFew, end - row);
      const Rows<A> x = input(plan, row, rows, at.x.get());
      multiply_narrow<kFma, kBytes, AddTo>(x, plan.down.panels(), rows, plan.columns, in.inner, at.z.get(),
                                           plan.columns, static_cast<const A*>(plan.start.get()));
      if (plan.out.z != nullptr) {
        for (int64_t r = 0; r < rows; ++r) {
          store_any(plan.out.z_dtype, at.z.get() + r * plan.columns, plan.out.z, (row + r) * in.hidden, in.hidden);
        }
      }
      activate<kFma>(in.activation, static_cast<const A*>(at.z.get()), rows * plan.columns, at.value.get(),
                     static_cast<A*>(nullptr));
      Rows<A> gate = {nullptr, 0};
      if (in.experts > 0) gate = load_rows(in.gate, row, rows, in.experts, in.experts, at.gate.get());
      if (plan.dropout) plan.dropout->words(row, rows, at.words.get());
      for (int64_t r = 0; r < rows; ++r) {
        hide<A>(plan, at.value.get() + r * plan.columns, gate.data == nullptr ? nullptr : gate.data + r * gate.ld,
                plan.dropout ? at.words.get() + r * 4 * plan.dropout->quads : nullptr, at.hidden.get() + r * wide);
      }
      const Rows<A> other = added(plan, row, rows, at);
      A* const to = direct ? static_cast<A*>(plan.out.y) + row * in.out : at.y.get();
      multiply<kTileRows<kBytes>, kWidth, kFma>(
          static_cast<const A*>(at.hidden.get()), wide, int64_t(1), plan.up.panels(), rows, plan.out_columns, wide,
          AddRows<kWidth, kFma, A>{to, plan.out_columns, scale, other.data, other.ld, residual_scale});
      if (direct) continue;
      for (int64_t r = 0; r < rows; ++r) {
        store_any(in.dtype, at.y.get() + r * plan.out_columns, plan.out.y, (row + r) * in.out, in.out);
      }
    }
  }
};

template <typename A>
void forward(const AdapterInputs& in, const AdapterOutputs& out, const Parallel& parallel) {
  const ForwardPlan<A> plan(in, out);
  const int64_t blocks = (in.rows + kFew - 1) / kFew;
  parallel.each(blocks, 4, [&](int64_t begin, int64_t end) {
    run_rows<Forward>(plan, begin * kFew, std::min(end * kFew, in.rows));
  });
}

}  // namespace

void adapter_fwd(const AdapterInputs& in, const AdapterOutputs& out, const Parallel& parallel) {
  if (in.rows == 0) return;
  in.dtype == DType::kFloat64 ? forward<double>(in, out, parallel) : forward<float>(in, out, parallel);
}

}  // namespace fastgist::cpu
