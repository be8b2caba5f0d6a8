// The losses on rows that are read twice: once for the sums and once for the gradients. Serves any V, layout, alignment
// and dtype: what kept_rows.cuh does not keep (rows longer than the cluster's shared memory, strided or unlike rows,
// float64, long rows on sm_80), and gist_loss's forward and backward as two calls. A block of eight warps a row, or a
// warp.
//
// Not run on a GPU so far.
#pragma once

#include "chunks.cuh"

namespace fastgist::cuda {

// What a launch does with its rows.
enum class Pass { kForward, kBackward, kFinish };

template <typename T, int kLoss, bool kChunks, int kWarps>
struct Again {
  using A = typename Accumulate<T>::type;
  static constexpr int kLanes = kChunks ? Chunk<T>::kLanes : 1;
  static constexpr int kUnroll = sizeof(T) == 8 ? 1 : (kChunks ? 8 : 4) / kLanes;  // doubles spill with more
  static constexpr int kItems = kLanes * kUnroll;
  static constexpr int kThreads = kWarps * kWarpSize;  // a row
  static constexpr int kRows = kWarps == 1 ? 4 : 1;    // a block
  static constexpr int kBlock = kThreads * kRows;
  static constexpr int kBlocks =
      (sizeof(T) == 8 || (kChunks && kLoss != kKl) ? 512 : 768) / kBlock;  // at once, at least

  // First class of this thread's lanes u of tile `tile`.
  static __device__ __forceinline__ int64_t first(int64_t tile, int u, int head) {
    return ((tile * kUnroll + u) * kThreads + thread_x()) * kLanes - head;
  }
  // kLanes classes of a row from `first` on, -inf outside it. False if all are outside.
  static __device__ __forceinline__ bool read(const T* row, int64_t stride, int64_t first, int64_t classes,
                                              A (&out)[kLanes]) {
    const bool any = first < classes;
    if constexpr (kChunks) {
      Chunk<T> chunk = read_chunk(row, first, classes);
      blank_outside(chunk, first, classes);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) out[i] = load(chunk.lane[i]);
    } else {
      out[0] = any ? load(row[first * stride]) : minus_infinity(A());
    }
    return any;
  }
  static __device__ __forceinline__ void write(void* grad, int64_t row, int64_t first, int64_t classes,
                                               const A (&x)[kLanes]) {
    if (grad == nullptr || first >= classes) return;
    T* const of_row = static_cast<T*>(grad) + row * classes;
    if constexpr (kChunks) {
      store_chunk(of_row, first, classes, x);
    } else {
      store(x[0], of_row[first]);
    }
  }
};

// Grid: rows in x; in y, for a backward alone, stretches of a row's tiles.
template <typename T, int kLoss, bool kChunks, int kWarps>
__global__ void __launch_bounds__(Again<T, kLoss, kChunks, kWarps>::kBlock, Again<T, kLoss, kChunks, kWarps>::kBlocks)
    _again_rows_kernel(const Arguments<typename Accumulate<T>::type> args, Pass pass) {
  using A = typename Accumulate<T>::type;
  using Layout = Again<T, kLoss, kChunks, kWarps>;
  constexpr int kLanes = Layout::kLanes, kUnroll = Layout::kUnroll;
  __shared__ RowSums<A, kLoss> of_warp[2][kWarps];  // two sets: one may still be read while the next row's are written
  const LogitPair& in = args.in;
  const int lane = thread_x() % kWarpSize;
  int set = 0;

  const int64_t step = grid_x() * Layout::kRows;
#pragma unroll 1
  for (int64_t row = block_x() * Layout::kRows + thread_y(); row < in.rows; row += step) {
    const Standing of = standing<kLoss>(args, row);
    const T* const z_row = static_cast<const T*>(in.z) + row * in.z_stride_m;
    const T* const o_row = static_cast<const T*>(in.o) + row * in.o_stride_m;
    const int head = kChunks ? head_of(z_row) : 0;
    const int64_t per_tile = static_cast<int64_t>(Layout::kThreads) * Layout::kItems;
    const int64_t tiles = (head + in.classes + per_tile - 1) / per_tile;
    RowStats<A> stats = {};

    if (of.counts && pass != Pass::kBackward) {
      RowSums<A, kLoss> sums = RowSums<A, kLoss>::empty();
#pragma unroll 1
      for (int64_t tile = 0; tile < tiles; ++tile) {
        A z[kUnroll][kLanes], o[kUnroll][kLanes];
        bool any = false;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t first = Layout::first(tile, u, head);
          any |= Layout::read(z_row, in.z_stride_v, first, in.classes, z[u]);
          Layout::read(o_row, in.o_stride_v, first, in.classes, o[u]);
        }
        if (!any) break;
        A m_z = z[0][0], m_o = o[0][0];
#pragma unroll
        for (int i = 1; i < Layout::kItems; ++i) {
          m_z = larger(m_z, z[i / kLanes][i % kLanes]);
          m_o = larger(m_o, o[i / kLanes][i % kLanes]);
        }
        sums.raise(m_z, m_o, args.to_exp2);
        const A c_z = centre(sums.pair.m_z), c_o = centre(sums.pair.m_o);
        Group<A, kLoss> group;
#pragma unroll
        for (int i = 0; i < Layout::kItems; ++i) {
          group.template add<true>(z[i / kLanes][i % kLanes], o[i / kLanes][i % kLanes], c_z, c_o, args);
        }
        sums.take(group);
        if constexpr (kLoss != kKl) {
          if (args.dense) {
            Dots<A> dots = {};
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
              A weights[kLanes];
              dense_weights<T>(args, row, Layout::first(tile, u, head), weights);
#pragma unroll
              for (int i = 0; i < kLanes; ++i) dots.add(z[u][i], o[u][i], c_z, c_o, weights[i]);
            }
            sums.take(dots);
          }
        }
      }
      const auto partner = [](auto x, int distance) { return shuffle_xor(x, distance); };
      sums.join(kWarpSize, args.dense, args.to_exp2, partner);
      if constexpr (kWarps > 1) {
        if (lane == 0) of_warp[set][thread_x() / kWarpSize] = sums;
        sync_block();
        sums = of_warp[set][lane % kWarps];
        sums.join(kWarps, args.dense, args.to_exp2, partner);
        set = 1 - set;
      }
      A z_label = 0, o_label = 0;
      if (kLoss != kKl && thread_x() == 0 && of.label >= 0) {
        z_label = load(z_row[of.label * in.z_stride_v]);
        o_label = load(o_row[of.label * in.o_stride_v]);
      }
      const A loss =
          row_loss(sums, of.valid, of.label >= 0, z_label, o_label, args, stats);  // right where thread_x() is 0
      if (thread_x() == 0) args.row_loss[row] = pass == Pass::kFinish ? loss * factor_of(args, of.valid) : loss;
    } else if (pass != Pass::kBackward && thread_x() == 0) {
      args.row_loss[row] = A(0);
    }
    if constexpr (kLoss != kKl) {
      if (pass == Pass::kForward) {
        if (thread_x() == 0) {
          const A all[] = {stats.m_z, stats.m_o,    stats.s_p,    stats.s_q,   stats.e_p,
                           stats.e_q, stats.unit_z, stats.unit_o, stats.weight};
#pragma unroll
          for (int i = 0; i < kGistStats; ++i) args.stats[i * in.rows + row] = all[i];
        }
        continue;
      }
      if (pass == Pass::kBackward && of.counts) {
        const auto stat = [&](int which) { return args.stats[which * in.rows + row]; };
        stats = {stat(kMaxZ),  stat(kMaxO),  stat(kSumP),  stat(kSumQ),  stat(kMeanP),
                 stat(kMeanQ), stat(kUnitZ), stat(kUnitO), stat(kWeight)};
      }
    }

    A factor = factor_of(args, of.valid);
    if (pass == Pass::kBackward && of.valid) factor = args.row_grad[row * args.row_grad_stride];
    const About<A> row_about = about<kLoss>(stats, factor, args);
    // From the end back: what was read last may still be in the cache.
#pragma unroll 1
    for (int64_t tile = tiles - 1 - block_y(); tile >= 0; tile -= grid_y()) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t first = Layout::first(tile, u, head);
        A z[kLanes], o[kLanes];
        if (of.counts) {
          Layout::read(z_row, in.z_stride_v, first, in.classes, z);
          Layout::read(o_row, in.o_stride_v, first, in.classes, o);
          gradients_at<T, kLoss>(z, o, row, first, of.label, row_about, args);
        } else {
#pragma unroll
          for (int i = 0; i < kLanes; ++i) z[i] = o[i] = A(0);
        }
        Layout::write(args.grad_z, row, first, in.classes, z);
        Layout::write(args.grad_o, row, first, in.classes, o);
      }
    }
  }
}

}  // namespace fastgist::cuda
