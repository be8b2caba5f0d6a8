// The adapter's backward. Rows go in stretches: first a few at a time from dy to the gradient of z and to dx, then, by
// columns, the stretch's part of the weights' gradients, while it is in cache. A sum over rows so runs in the order of
// the rows, in chunks whose length is fixed, whatever the threads are.
#include "activations.h"
#include "adapter_rows.h"
#include "philox.h"

namespace fastgist::cpu {
namespace {

constexpr int64_t kStretch = 512;  // rows, a multiple of kChunk
constexpr int64_t kChunk = 128;    // rows whose products are summed before they are added to the sums so far

template <typename A>
struct BackwardPlan {
  const AdapterInputs& in;
  const AdapterGradients& grads;
  bool need_hidden;  // for the gradients of U and the output's biases
  bool need_z;       // the gradient of z
  bool need_down;    // its product with x
  int64_t wide;      // of the hidden units and what multiplies the biases
  int64_t columns;   // of dh in panels
  int64_t z_columns;
  int64_t inner_columns, out_columns;
  std::unique_ptr<Start<A>> from;  // of z, for dx through a LayerNorm
  std::unique_ptr<Packed<A>> packed_up, packed_down;
  Panels<A> up;    // (out, H)
  Panels<A> down;  // (H, inner), times the norm's weight
  std::unique_ptr<Dropout> dropout;
  Buffer<A> biases;   // (experts, out): those that the gate multiplies, where its gradient is wanted
  Buffer<A> hidden;   // (kStretch, wide): the hidden units times scale
  Buffer<A> dz;       // (kStretch, H)
  Buffer<A> of_up;    // (wide, out_columns): the gradients of U^T and below it of the output's biases
  Buffer<A> of_bias;  // (H,): the gradient of down_bias
  Buffer<A> own_of_down;
  A* of_down;  // (H, inner_columns): dz^T times x or its LayerNorm

  BackwardPlan(const AdapterInputs& in, const AdapterGradients& grads)
      : in(in),
        grads(grads),
        need_hidden(grads.up_weight != nullptr || grads.up_bias != nullptr),
        need_z(grads.x != nullptr || grads.down_weight != nullptr || grads.down_bias != nullptr ||
               grads.norm_weight != nullptr || grads.norm_bias != nullptr),
        need_down(grads.down_weight != nullptr || grads.norm_weight != nullptr),
        wide(in.hidden + in.biases),
        columns(round_up(in.hidden, panel_width<A>(in.hidden))),
        z_columns(round_up(in.hidden, vector_width<A>())),
        inner_columns(round_up(in.inner, 2 * vector_width<A>())),
        out_columns(round_up(in.out, 2 * vector_width<A>())),
        biases(grads.gate != nullptr && in.gated_biases ? in.biases * in.out : 0),
        hidden(need_hidden ? std::min(in.rows, kStretch) * wide : 0),
        dz(need_z ? std::min(in.rows, kStretch) * in.hidden : 0),
        of_up(need_hidden ? wide * out_columns : 0),
        of_bias(in.hidden),
        own_of_down(need_down && !down_in_place() ? in.hidden * inner_columns : 0),
        of_down(down_in_place() ? static_cast<A*>(grads.down_weight) : own_of_down.get()) {
    if (grads.x != nullptr && in.norm) from = std::make_unique<Start<A>>(in);
    if (need_z || grads.gate != nullptr) pack_up();
    for (int64_t e = 0; grads.gate != nullptr && in.gated_biases && e < in.biases; ++e) {
      A* const to = biases.get() + e * in.out;
      const A* const found = load_weight(in, in.up_bias, e, 0, in.out, to);
      if (found != to) std::copy_n(found, in.out, to);
    }
    if (grads.x != nullptr) pack_down();
    if (in.seed != nullptr) dropout = std::make_unique<Dropout>(*in.seed, in.dropout_p, in.hidden);
    if (need_hidden) std::fill_n(of_up.get(), wide * out_columns, A(0));
    if (need_down) std::fill_n(of_down, in.hidden * inner_columns, A(0));
    std::fill_n(of_bias.get(), in.hidden, A(0));
  }

  // Whether the gradient of D can be summed where it is wanted.
  bool down_in_place() const {
    return grads.down_weight != nullptr && holds<A>(in.weight_dtype) && !in.norm && inner_columns == in.inner;
  }

  // A weight whose rows are the panels' rows is read where it is, if its type and width allow it.
  bool readable(const MatrixView& weight, int64_t columns, int64_t width) const {
    return holds<A>(weight.dtype) && weight.stride_n == 1 && columns % width == 0;
  }
  void pack_up() {
    const int64_t width = panel_width<A>(in.hidden);
    if (readable(in.up_weight, in.hidden, width)) {
      up = {static_cast<const A*>(in.up_weight.data), in.up_weight.stride_m, width};
      return;
    }
    packed_up = std::make_unique<Packed<A>>(in.out, in.hidden, width);
    packed_up->rows(in, in.up_weight, in.out, in.hidden, 0, nullptr);
    up = packed_up->panels();
  }
  void pack_down() {
    const int64_t width = 2 * vector_width<A>();
    if (!in.norm && readable(in.down_weight, in.inner, width)) {
      down = {static_cast<const A*>(in.down_weight.data), in.down_weight.stride_m, width};
      return;
    }
    packed_down = std::make_unique<Packed<A>>(in.hidden, in.inner, width);
    packed_down->rows(in, in.down_weight, in.hidden, in.inner, 0, in.norm ? from->weight.get() : nullptr);
    down = packed_down->panels();
  }
  const A* mean(int64_t row) const { return static_cast<const A*>(grads.stats) + row; }
  const A* rstd(int64_t row) const { return static_cast<const A*>(grads.stats) + in.rows + row; }
};

template <typename A>
struct BackwardScratch {
  Buffer<A> grad, padded, x, to, dh, z, value, slope, hidden, gate, gate_grad;
  Buffer<uint32_t> words;

  explicit BackwardScratch(const BackwardPlan<A>& plan)
      : grad(kFew * plan.in.out),
        padded(kFew * plan.out_columns),
        x(plan.in.norm ? kFew * plan.inner_columns : 0),
        to(kFew * plan.inner_columns),
        dh(kFew * plan.columns),
        z(kFew * plan.z_columns),
        value(kFew * plan.z_columns),
        slope(kFew * plan.z_columns),
        hidden(plan.in.hidden),
        gate(kFew * plan.in.experts),
        gate_grad(plan.in.experts),
        words(plan.dropout ? plan.dropout->room(kFew) : 0) {}
};

// Sums of a tile on their way to dx through the LayerNorm: rstd (sums - c1 - xhat c2) + scale added.
template <int kWidth, bool kFma, typename A>
struct ThroughNorm {
  A* to;
  int64_t ld;
  const A *x, *rstd, *c1, *c2;
  const A* added;  // or null
  int64_t ld_added;
  A scale;
  FASTGIST_INLINE void operator()(int64_t row, int64_t column, const A* sums) const {
    A* const at = to + row * ld + column;
    const A* const xhat = x + row * ld + column;
    const A r = rstd[row], first = c1[row], second = c2[row];
    if (added == nullptr) {
#pragma omp simd
      for (int j = 0; j < kWidth; ++j) at[j] = r * (sums[j] - multiply_add<kFma>(xhat[j], second, first));
      return;
    }
    const A* const from = added + row * ld_added + column;
#pragma omp simd
    for (int j = 0; j < kWidth; ++j) {
      at[j] = multiply_add<kFma>(scale, from[j], r * (sums[j] - multiply_add<kFma>(xhat[j], second, first)));
    }
  }
};

template <int kWidth, typename A>
struct Add {
  A* to;
  int64_t ld;
  FASTGIST_INLINE void operator()(int64_t row, int64_t column, const A* sums) const {
    A* const at = to + row * ld + column;
#pragma omp simd
    for (int j = 0; j < kWidth; ++j) at[j] += sums[j];
  }
};

// From dy to the gradient of z, to dx and to the gate's gradient; rows of one stretch, which begins at `start`.
struct BackwardRows {
  // Through one row's hidden units. `dh` comes as scale dy U and leaves as the gradient of z.
  template <typename A>
  static FASTGIST_INLINE void through(const BackwardPlan<A>& plan, int64_t row, const A* grad, const A* value,
                                      const A* slope, const A* gate, const uint32_t* words, A* dh, A* hidden,
                                      A* gate_grad) {
    const AdapterInputs& in = plan.in;
    const bool need_dh = plan.need_z || plan.grads.gate != nullptr;
    const int64_t width = in.experts > 0 ? in.hidden / in.experts : in.hidden;
    const A keep = plan.dropout ? static_cast<A>(plan.dropout->keep) : A(1);
    const uint32_t least = plan.dropout ? plan.dropout->least : 0;
    if (words != nullptr && need_dh) {
#pragma omp simd
      for (int64_t h = 0; h < in.hidden; ++h) dh[h] = (words[h] >> 1) >= least ? dh[h] / keep : A(0);
    }
    if (plan.grads.gate != nullptr) {
      for (int64_t e = 0; e < in.experts; ++e) {
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t h = e * width; h < (e + 1) * width; ++h) sum += dh[h] * value[h];
        gate_grad[e] = sum;
        if (!in.gated_biases) continue;
        const A* const bias = plan.biases.get() + e * in.out;
        A of_bias = 0;
#pragma omp simd reduction(+ : of_bias)
        for (int64_t k = 0; k < in.out; ++k) of_bias += grad[k] * bias[k];
        gate_grad[e] += of_bias * static_cast<A>(in.scale);
      }
      store_any(in.dtype, static_cast<const A*>(gate_grad), plan.grads.gate, row * in.experts, in.experts);
    }
    if (plan.need_z) {
      for (int64_t e = 0; e < in.experts; ++e) {
        for (int64_t h = e * width; h < (e + 1) * width; ++h) dh[h] *= gate[e];
      }
#pragma omp simd
      for (int64_t h = 0; h < in.hidden; ++h) dh[h] *= slope[h];
    }
    if (!plan.need_hidden) return;
    const A scale = static_cast<A>(in.scale);
    if (plan.grads.up_weight == nullptr) {
      std::fill_n(hidden, in.hidden, A(0));
    } else {
      std::copy_n(value, in.hidden, hidden);
      for (int64_t e = 0; e < in.experts; ++e) {
        for (int64_t h = e * width; h < (e + 1) * width; ++h) hidden[h] *= gate[e];
      }
      if (words != nullptr) {
#pragma omp simd
        for (int64_t h = 0; h < in.hidden; ++h) hidden[h] = (words[h] >> 1) >= least ? hidden[h] / keep : A(0);
      }
#pragma omp simd
      for (int64_t h = 0; h < in.hidden; ++h) hidden[h] *= scale;
    }
    for (int64_t e = 0; e < in.biases; ++e) hidden[in.hidden + e] = in.gated_biases ? gate[e] * scale : scale;
  }

  template <bool kFma, int kBytes, typename A>
  static FASTGIST_INLINE void input_gradient(const BackwardPlan<A>& plan, const BackwardScratch<A>& at, int64_t row,
                                             int64_t rows, const A* dz) {
    constexpr int kWidth = 2 * kBytes / static_cast<int>(sizeof(A));
    const AdapterInputs& in = plan.in;
    const bool direct = holds<A>(in.dtype) && plan.inner_columns == in.inner;
    A* const to = direct ? static_cast<A*>(plan.grads.x) + row * in.inner : at.to.get();
    Rows<A> added = {nullptr, 0};
    if (plan.grads.residual_is_x) {
      added = load_rows(plan.grads.grad, row, rows, in.inner, plan.inner_columns, at.padded.get());
    }
    const A residual_scale = static_cast<A>(in.residual_scale);
    if (in.norm) {
      const Rows<A> x = load_rows(in.x, row, rows, in.inner, plan.inner_columns, at.x.get());
      A c1[kFew], c2[kFew];
      for (int64_t r = 0; r < rows; ++r) {
        normalise(x.data + r * x.ld, plan.inner_columns, *plan.mean(row + r), *plan.rstd(row + r),
                  at.x.get() + r * plan.inner_columns);
        const A *d = dz + r * in.hidden, *z = at.z.get() + r * plan.z_columns;
        const A *sums = plan.from->sums.get(), *start = plan.from->bias.get();
        A first = 0, second = 0;
        for (int64_t h = 0; h < in.hidden; ++h) {
          first = multiply_add<kFma>(d[h], sums[h], first);  // as dz D w is summed: of one column they are the same
          second = multiply_add<kFma>(d[h], z[h] - start[h], second);
        }
        c1[r] = first / static_cast<A>(in.inner);
        c2[r] = second / static_cast<A>(in.inner);
      }
      multiply<kTileRows<kBytes>, kWidth, kFma>(
          dz, in.hidden, int64_t(1), plan.down, rows, plan.inner_columns, in.hidden,
          ThroughNorm<kWidth, kFma, A>{to, plan.inner_columns, at.x.get(), plan.rstd(row), c1, c2, added.data, added.ld,
                                       residual_scale});
    } else {
      multiply<kTileRows<kBytes>, kWidth, kFma>(
          dz, in.hidden, int64_t(1), plan.down, rows, plan.inner_columns, in.hidden,
          AddRows<kWidth, kFma, A>{to, plan.inner_columns, A(1), added.data, added.ld, residual_scale});
    }
    if (direct) return;
    for (int64_t r = 0; r < rows; ++r) {
      store_any(in.dtype, at.to.get() + r * plan.inner_columns, plan.grads.x, (row + r) * in.inner, in.inner);
    }
  }

  template <bool kFma, int kBytes, typename A>
  static FASTGIST_INLINE void rows(const BackwardPlan<A>& plan, int64_t start, int64_t begin, int64_t end) {
    const AdapterInputs& in = plan.in;
    const AdapterGradients& grads = plan.grads;
    const BackwardScratch<A> at(plan);
    const bool need_dh = plan.need_z || grads.gate != nullptr;
    const bool need_value = grads.up_weight != nullptr || grads.gate != nullptr;
    for (int64_t row = begin; row < end; row += kFew) {
      const int64_t rows = std::min(kFew, end - row);
      Rows<A> grad = {nullptr, 0};
      if (need_dh) {
        grad = load_rows(grads.grad, row, rows, in.out, in.out, at.grad.get());
        multiply_narrow<kFma, kBytes, Scale>(grad, plan.up, rows, plan.columns, in.out, at.dh.get(), plan.columns,
                                             static_cast<A>(in.scale));
      }
      if (plan.need_z || need_value) {
        const Rows<A> z = load_rows(grads.z, row, rows, in.hidden, plan.z_columns, at.z.get());
        if (z.data != at.z.get()) std::copy_n(z.data, rows * plan.z_columns, at.z.get());
        activate<kFma>(in.activation, static_cast<const A*>(at.z.get()), rows * plan.z_columns, at.value.get(),
                       plan.need_z ? at.slope.get() : nullptr);
      }
      Rows<A> gate = {nullptr, 0};
      if (in.experts > 0) gate = load_rows(in.gate, row, rows, in.experts, in.experts, at.gate.get());
      if (plan.dropout) plan.dropout->words(row, rows, at.words.get());
      A* const dz = plan.need_z ? plan.dz.get() + (row - start) * in.hidden : nullptr;
      for (int64_t r = 0; r < rows; ++r) {
        A* const dh = at.dh.get() + r * plan.columns;
        through<A>(plan, row + r, grad.data + r * grad.ld, at.value.get() + r * plan.z_columns,
                   at.slope.get() + r * plan.z_columns, gate.data == nullptr ? nullptr : gate.data + r * gate.ld,
                   plan.dropout ? at.words.get() + r * 4 * plan.dropout->quads : nullptr, dh,
                   plan.need_hidden ? plan.hidden.get() + (row - start + r) * plan.wide : nullptr, at.gate_grad.get());
        if (plan.need_z) std::copy_n(dh, in.hidden, dz + r * in.hidden);
      }
      if (grads.x != nullptr) input_gradient<kFma, kBytes, A>(plan, at, row, rows, dz);
    }
  }
};

// The part that a stretch of rows has in the sums over rows: factors^T times dy, or times x, a panel of columns a task.
struct BackwardColumns {
  template <bool kFma, int kBytes, typename A>
  static FASTGIST_INLINE void panel(const BackwardPlan<A>& plan, const MatrixView& from, bool normed, int64_t columns,
                                    int64_t column, int64_t start, int64_t rows, const A* factors, int64_t count, A* to,
                                    int64_t ld, A* buffer) {
    constexpr int kWidth = 2 * kBytes / static_cast<int>(sizeof(A));
    const int64_t n = std::min<int64_t>(kWidth, columns - column);
    MatrixView part = from;
    part.data = static_cast<const char*>(from.data) + column * from.stride_n *
                                                          (from.dtype == DType::kFloat64   ? 8
                                                           : from.dtype == DType::kFloat32 ? 4
                                                                                           : 2);
    for (int64_t row = 0; row < rows; row += kChunk) {
      const int64_t chunk = std::min(kChunk, rows - row);
      Rows<A> loaded = load_rows(part, start + row, chunk, n, kWidth, buffer);
      if (normed) {
        for (int64_t r = 0; r < chunk; ++r) {
          normalise(loaded.data + r * loaded.ld, kWidth, *plan.mean(start + row + r), *plan.rstd(start + row + r),
                    buffer + r * kWidth);
        }
        loaded = {buffer, kWidth};
      }
      const Panels<A> panels = {loaded.data, loaded.ld, 0};
      multiply<kTileRows<kBytes>, kWidth, kFma>(factors + row * count, int64_t(1), count, panels, count, kWidth, chunk,
                                                Add<kWidth, A>{to + column, ld});
    }
  }

  template <bool kFma, int kBytes, typename A>
  static FASTGIST_INLINE void rows(const BackwardPlan<A>& plan, int64_t start, int64_t rows, int64_t begin,
                                   int64_t end) {
    constexpr int kWidth = 2 * kBytes / static_cast<int>(sizeof(A));
    const AdapterInputs& in = plan.in;
    const Buffer<A> buffer(kChunk * kWidth);
    const int64_t of_up = plan.need_hidden ? plan.out_columns / kWidth : 0;
    for (int64_t task = begin; task < end; ++task) {
      if (task < of_up) {
        panel<kFma, kBytes, A>(plan, plan.grads.grad, false, in.out, task * kWidth, start, rows, plan.hidden.get(),
                               plan.wide, plan.of_up.get(), plan.out_columns, buffer.get());
      } else {
        panel<kFma, kBytes, A>(plan, in.x, in.norm, in.inner, (task - of_up) * kWidth, start, rows, plan.dz.get(),
                               in.hidden, plan.of_down, plan.inner_columns, buffer.get());
      }
    }
  }
};

// The gradients of the weights from the sums over rows.
template <typename A>
void finish(const BackwardPlan<A>& plan) {
  const AdapterInputs& in = plan.in;
  const AdapterGradients& grads = plan.grads;
  if (grads.down_bias != nullptr) {
    store_any(in.weight_dtype, static_cast<const A*>(plan.of_bias.get()), grads.down_bias, 0, in.hidden);
  }
  for (int64_t e = 0; grads.up_bias != nullptr && e < in.biases; ++e) {
    store_any(in.weight_dtype, plan.of_up.get() + (in.hidden + e) * plan.out_columns, grads.up_bias, e * in.out,
              in.out);
  }
  if (grads.up_weight != nullptr) {
    Buffer<A> line(in.hidden);
    for (int64_t k = 0; k < in.out; ++k) {
      for (int64_t h = 0; h < in.hidden; ++h) line[h] = plan.of_up[h * plan.out_columns + k];
      store_any(in.weight_dtype, static_cast<const A*>(line.get()), grads.up_weight, k * in.hidden, in.hidden);
    }
  }
  if (!plan.need_down && grads.norm_bias == nullptr) return;
  Buffer<A> line(in.inner), weight(in.inner), bias(in.inner);
  load_vector(in.norm_weight, in.inner, A(1), weight.get());
  load_vector(in.norm_bias, in.inner, A(0), bias.get());
  if (grads.down_weight != nullptr && !plan.down_in_place()) {
    for (int64_t h = 0; h < in.hidden; ++h) {
      const A* from = plan.of_down + h * plan.inner_columns;
      if (in.norm) {
        for (int64_t k = 0; k < in.inner; ++k) line[k] = from[k] * weight[k] + plan.of_bias[h] * bias[k];
        from = line.get();
      }
      store_any(in.weight_dtype, from, grads.down_weight, h * in.inner, in.inner);
    }
  }
  if (grads.norm_weight == nullptr && grads.norm_bias == nullptr) return;
  std::fill_n(weight.get(), in.inner, A(0));
  std::fill_n(bias.get(), in.inner, A(0));
  for (int64_t h = 0; h < in.hidden; ++h) {
    const A* const d = load_weight(in, in.down_weight, h, 0, in.inner, line.get());
    for (int64_t k = 0; grads.norm_weight != nullptr && k < in.inner; ++k) {
      weight[k] += d[k] * plan.of_down[h * plan.inner_columns + k];
    }
    for (int64_t k = 0; k < in.inner; ++k) bias[k] += d[k] * plan.of_bias[h];
  }
  if (grads.norm_weight != nullptr) {
    store_any(in.weight_dtype, static_cast<const A*>(weight.get()), grads.norm_weight, 0, in.inner);
  }
  if (grads.norm_bias != nullptr) {
    store_any(in.weight_dtype, static_cast<const A*>(bias.get()), grads.norm_bias, 0, in.inner);
  }
}

template <typename A>
void backward(const AdapterInputs& in, const AdapterGradients& grads, const Parallel& parallel) {
  const BackwardPlan<A> plan(in, grads);
  const int64_t width = 2 * vector_width<A>();
  const int64_t panels =
      (plan.need_hidden ? plan.out_columns / width : 0) + (plan.need_down ? plan.inner_columns / width : 0);
  const bool need_bias = grads.down_bias != nullptr || grads.norm_bias != nullptr || (in.norm && plan.need_down);
  const Buffer<A> sums(in.hidden);
  for (int64_t start = 0; start < in.rows; start += kStretch) {
    const int64_t rows = std::min(kStretch, in.rows - start);
    parallel.each((rows + kFew - 1) / kFew, 4, [&](int64_t begin, int64_t end) {
      run_rows<BackwardRows>(plan, start, start + begin * kFew, start + std::min(end * kFew, rows));
    });
    parallel.each(panels, 1,
                  [&](int64_t begin, int64_t end) { run_rows<BackwardColumns>(plan, start, rows, begin, end); });
    if (!need_bias) continue;
    std::fill_n(sums.get(), in.hidden, A(0));
    for (int64_t r = 0; r < rows; ++r) {
      const A* const dz = plan.dz.get() + r * in.hidden;
#pragma omp simd
      for (int64_t h = 0; h < in.hidden; ++h) sums[h] += dz[h];
    }
    for (int64_t h = 0; h < in.hidden; ++h) plan.of_bias[h] += sums[h];
  }
  finish(plan);
}

}  // namespace

void adapter_bwd(const AdapterInputs& in, const AdapterGradients& grads, const Parallel& parallel) {
  in.dtype == DType::kFloat64 ? backward<double>(in, grads, parallel) : backward<float>(in, grads, parallel);
}

}  // namespace fastgist::cpu
