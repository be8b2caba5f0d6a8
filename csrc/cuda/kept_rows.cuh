// The losses' forward that finishes the gradients, with the pair of rows kept in shared memory between the sums and the
// gradients: each logit is read once from memory and each gradient written once, 4 M V b bytes in all.
//
// A row belongs to one warp (short rows, four a block), to a block of sixteen warps, or to the blocks of a cluster,
// each of which keeps a slice. A thread copies, sums and turns into gradients the same chunks, so it never waits for
// other threads' copies: only for its own, a quarter at a time, and the sums run behind the reading. When a chunk has
// become gradients, the copy of the next row's chunk into its place is started: reading of the next row, arithmetic and
// writing of this one overlap. The threads' sums meet once a row, in an order that depends on shape and layout alone.
//
// Not run on a GPU so far.
#pragma once

#include "chunks.cuh"

namespace fastgist::cuda {

template <int kWarps>
struct Kept {
  static constexpr int kThreads = kWarps * kWarpSize;  // a row (and block of a cluster)
  static constexpr int kRows = kWarps == 1 ? 4 : 1;    // a block
  static constexpr int kBlock = kThreads * kRows;
  static constexpr int kBlocks = (kWarps == 1 ? 640 : 1024) / kBlock;  // a multiprocessor, at least
  static constexpr int kQuarters = 4;                                  // groups of copies a row
};

// The blocks that registers must leave room for. One for gist_loss in float32 on sm_80, where half the registers spill.
template <typename T, int kLoss, int kWarps>
constexpr int kept_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (kWarps > 1 && sizeof(T) == 4 && kLoss != kKl) return 1;
#endif
  return Kept<kWarps>::kBlocks;
}

// A row as the copies see it.
template <typename T>
struct KeptRow {
  const uint4* z;  // first chunk
  const uint4* o;
  int head;      // classes before the row in its first chunk
  int chunks;    // of the row
  int readable;  // chunks, or 0 where the row does not count
  int label;     // its class, or -1
  bool valid;

  __device__ __forceinline__ bool counts() const { return readable > 0; }
  // Start the copies of chunk j, if there is one to read; of the row's last no more than belongs to it.
  __device__ __forceinline__ void copy(int j, int classes, uint4* z_to, uint4* o_to) const {
    if (j >= readable) return;
    const int left = head + classes - j * Chunk<T>::kLanes;
    const int bytes = left < Chunk<T>::kLanes ? left * static_cast<int>(sizeof(T)) : kVectorBytes;
    copy_async(z_to, z + j, bytes);
    copy_async(o_to, o + j, bytes);
  }
};

template <int kLoss, typename T, typename A>
__device__ __forceinline__ KeptRow<T> kept_row(const Arguments<A>& args, int64_t row) {
  KeptRow<T> out = {nullptr, nullptr, 0, 0, 0, -1, false};
  if (row >= args.in.rows) return out;
  const T* z = static_cast<const T*>(args.in.z) + row * args.in.z_stride_m;
  const T* o = static_cast<const T*>(args.in.o) + row * args.in.o_stride_m;
  const Standing of = standing<kLoss>(args, row);
  out.valid = of.valid;
  out.label = static_cast<int>(of.label);
  out.head = head_of(z);
  out.chunks = static_cast<int>((out.head + args.in.classes + Chunk<T>::kLanes - 1) / Chunk<T>::kLanes);
  out.readable = of.counts ? out.chunks : 0;
  out.z = reinterpret_cast<const uint4*>(z - out.head);
  out.o = reinterpret_cast<const uint4*>(o - out.head);
  return out;
}

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int least(int a, int b, int c) { return least(least(a, b), c); }

// `slice`: chunks of a row that a block (or warp) keeps.
template <typename T, int kLoss, int kWarps>
__global__ void __launch_bounds__(Kept<kWarps>::kBlock, (kept_blocks<T, kLoss, kWarps>()))
    _kept_rows_kernel(const Arguments<float> args, int slice) {
  using A = float;
  using Layout = Kept<kWarps>;
  constexpr int kLanes = Chunk<T>::kLanes;
  const int blocks = kWarps == 1 ? 1 : cluster_size(), rank = kWarps == 1 ? 0 : cluster_rank();
  const int64_t first_row = kWarps == 1 ? block_x() * Layout::kRows + thread_y() : block_x() / blocks;
  const int64_t step = kWarps == 1 ? grid_x() * Layout::kRows : grid_x() / blocks;
  uint4* const z_kept = dynamic_shared() + thread_y() * 2 * slice;
  uint4* const o_kept = z_kept + slice;
  // Partial sums of warps and of the block, two sets: a row's may still be read while the next row's are written.
  auto* const partial = reinterpret_cast<RowSums<A, kLoss>*>(dynamic_shared() + Layout::kRows * 2 * slice);

  const int thread = thread_x(), base = rank * slice, lane = thread % kWarpSize;
  const int turns = (slice + Layout::kThreads - 1) / Layout::kThreads;
  const int quarter = (turns + Layout::kQuarters - 1) / Layout::kQuarters;
  const bool leads = thread == 0 && rank == 0;
  const int classes = static_cast<int>(args.in.classes);
  int set = 0;

  KeptRow<T> next = kept_row<kLoss, T>(args, first_row);
#pragma unroll 1
  for (int part = 0; part < Layout::kQuarters; ++part) {
    for (int turn = part * quarter; turn < (part + 1) * quarter; ++turn) {
      const int slot = thread + turn * Layout::kThreads;
      if (slot < slice) next.copy(base + slot, classes, z_kept + slot, o_kept + slot);
    }
    commit_copies();
  }

#pragma unroll 1
  for (int64_t row = first_row; row < args.in.rows; row += step) {
    const KeptRow<T> now = next;
    next = kept_row<kLoss, T>(args, row + step);
    About<A> row_about = {};
    if (now.counts()) {
      A z_label = 0, o_label = 0;
      if (kLoss != kKl && leads && now.label >= 0) {
        z_label = load(static_cast<const T*>(args.in.z)[row * args.in.z_stride_m + now.label]);
        o_label = load(static_cast<const T*>(args.in.o)[row * args.in.o_stride_m + now.label]);
      }
      RowSums<A, kLoss> sums = RowSums<A, kLoss>::empty();
#pragma unroll 1
      for (int part = 0; part < Layout::kQuarters; ++part) {
        wait_copies(Layout::kQuarters - 1 - part);
        // This thread's chunks of the quarter: slots [begin, end) in steps of kThreads.
        const int begin = thread + part * quarter * Layout::kThreads;
        const int end = least(begin + quarter * Layout::kThreads, slice, now.readable - base);
        ChunkMax<T> m_z, m_o;
#pragma unroll 1
        for (int slot = begin; slot < end; slot += Layout::kThreads) {
          auto& z = reinterpret_cast<Chunk<T>&>(z_kept[slot]);
          auto& o = reinterpret_cast<Chunk<T>&>(o_kept[slot]);
          const int first = (base + slot) * kLanes - now.head;
          blank_outside(z, first, classes);
          blank_outside(o, first, classes);
          m_z.take(z);
          m_o.take(o);
        }
        sums.raise(m_z.of_all(), m_o.of_all(), args.to_exp2);
        const A c_z = centre(sums.pair.m_z), c_o = centre(sums.pair.m_o);
        Group<A, kLoss> group;
#pragma unroll 1
        for (int slot = begin; slot < end; slot += Layout::kThreads) {
          const Chunk<T> z = reinterpret_cast<const Chunk<T>&>(z_kept[slot]);
          const Chunk<T> o = reinterpret_cast<const Chunk<T>&>(o_kept[slot]);
#pragma unroll
          for (int i = 0; i < kLanes; ++i) {
            group.template add<false>(load(z.lane[i]), load(o.lane[i]), c_z, c_o, args);
          }
        }
        if (!group.finite()) {
          group = {};
#pragma unroll 1
          for (int slot = begin; slot < end; slot += Layout::kThreads) {
            const T* const z = reinterpret_cast<const T*>(z_kept + slot);
            const T* const o = reinterpret_cast<const T*>(o_kept + slot);
#pragma unroll 2
            for (int i = 0; i < kLanes; ++i) group.template add<true>(load(z[i]), load(o[i]), c_z, c_o, args);
          }
        }
        sums.take(group);
        if constexpr (kLoss != kKl) {
          if (args.dense) {
            Dots<A> dots = {};
#pragma unroll 1
            for (int slot = begin; slot < end; slot += Layout::kThreads) {
              const Chunk<T> z = reinterpret_cast<const Chunk<T>&>(z_kept[slot]);
              const Chunk<T> o = reinterpret_cast<const Chunk<T>&>(o_kept[slot]);
              A weights[kLanes];
              dense_weights<T>(args, row, (base + slot) * kLanes - now.head, weights);
#pragma unroll
              for (int i = 0; i < kLanes; ++i) dots.add(load(z.lane[i]), load(o.lane[i]), c_z, c_o, weights[i]);
            }
            sums.take(dots);
          }
        }
      }

      const auto partner = [](auto x, int distance) { return shuffle_xor(x, distance); };
      sums.join(kWarpSize, args.dense, args.to_exp2, partner);
      if constexpr (kWarps > 1) {
        RowSums<A, kLoss>* const of_warp = partial + set * (kWarps + 1);
        if (lane == 0) of_warp[thread / kWarpSize] = sums;
        sync_block();
        sums = of_warp[lane % kWarps];
        sums.join(kWarps, args.dense, args.to_exp2, partner);
        if (blocks > 1) {
          RowSums<A, kLoss>* const of_block = of_warp + kWarps;
          if (thread == 0) *of_block = sums;
          sync_cluster();
          sums = *of_rank(of_block, lane % blocks);
          sums.join(blocks, args.dense, args.to_exp2, partner);
        }
        set = 1 - set;
      }
      RowStats<A> stats;
      const A loss = row_loss(sums, now.valid, now.label >= 0, z_label, o_label, args, stats);
      const A factor = factor_of(args, now.valid);
      if (leads) args.row_loss[row] = loss * factor;  // no other thread has the class's logits: its loss is not right
      row_about = about<kLoss>(stats, factor, args);
    } else if (leads) {
      args.row_loss[row] = A(0);
    }

    const int64_t at = row * args.in.classes;
#pragma unroll 1
    for (int part = 0; part < Layout::kQuarters; ++part) {
      const int begin = thread + part * quarter * Layout::kThreads;
      const int end = least(begin + quarter * Layout::kThreads, slice);
#pragma unroll 1
      for (int slot = begin; slot < end; slot += Layout::kThreads) {
        if (base + slot < now.chunks) {
          const int first = (base + slot) * kLanes - now.head;
          A z[kLanes], o[kLanes];
          if (now.counts()) {
            const Chunk<T> z_chunk = reinterpret_cast<const Chunk<T>&>(z_kept[slot]);
            const Chunk<T> o_chunk = reinterpret_cast<const Chunk<T>&>(o_kept[slot]);
#pragma unroll
            for (int i = 0; i < kLanes; ++i) {
              z[i] = load(z_chunk.lane[i]);
              o[i] = load(o_chunk.lane[i]);
            }
            gradients_at<T, kLoss>(z, o, row, first, now.label, row_about, args);
          } else {
#pragma unroll
            for (int i = 0; i < kLanes; ++i) z[i] = o[i] = A(0);
          }
          if (args.grad_z != nullptr) store_chunk(static_cast<T*>(args.grad_z) + at, first, classes, z);
          if (args.grad_o != nullptr) store_chunk(static_cast<T*>(args.grad_o) + at, first, classes, o);
        }
        next.copy(base + slot, classes, z_kept + slot, o_kept + slot);
      }
      commit_copies();
    }
  }
  if (kWarps > 1 && blocks > 1) sync_cluster();  // no block may be gone while another reads its sums
}

}  // namespace fastgist::cuda
