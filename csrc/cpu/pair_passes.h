// The passes of a loss over pairs of rows, and how they are spread over threads.
//
// A row is read in stretches and a stretch in blocks. A stretch has sums of its own, which are merged in order, so the
// result does not depend on which threads took the stretches. Where there are many rows a thread takes whole rows, and
// a forward that finishes the gradients finishes a row's while its exponentials are in cache. Where there are few long
// rows, threads take stretches, first for the sums and then, with the rows' sums merged, for the gradients.
//
// The exponentials of a forward that finishes wait in the gradients' own memory, about the centres that their block
// saw, or in scratch where that memory holds another type or is not there. Where neither has room, those of that side
// are taken again about the same centres: the same numbers.
//
// An op is a class with
//     A, Inputs, Sums (over a stretch), Scalars (behind a row's gradients), kStatRows, a constructor from Inputs
//     pair                                       the logits
//     counts(row)                                whether a row's logits are looked at at all
//     add<kFma, kBytes>(sums, block, p_hat, q_hat, buffer)    a block that was looked at, as BlockSums; its centres are
//                                                             then in sums.pair
//     merge(sums, next)                          the sums of the stretch that follows
//     summary(row, sums, stats)                  the row's loss; and into stats what its gradients need
//     scalars(row, stats, row_grad)              the same, ready for use
//     needs_p(of_z, of_o), needs_q(of_z, of_o)   which exponentials these gradients are made of
//     finish<kFma, kBytes>(block, scalars)       the gradients of a Block
#pragma once

#include <memory>
#include <vector>

#include "dispatch.h"
#include "pair_blocks.h"
#include "pair_rows.h"
#include "parallel.h"

namespace fastgist::cpu {

// Classes a stretch, whole blocks. A thread that is woken for less would not be worth it.
constexpr int64_t kStretch = 16 * kBlock;
// Elements that make it worth waking another thread: some 10 us of work.
constexpr int64_t kGrainElements = 16384;
// The longest rows whose exponentials wait in scratch: 256 KiB of float beside the rows in a second-level cache.
constexpr int64_t kScratchClasses = 32768;

template <typename A>
struct Buffers {
  alignas(64) A ahead_z[kBlock], ahead_o[kBlock];  // of a row that comes next
  alignas(64) A z[kBlock], o[kBlock], weights[kBlock], p[kBlock], q[kBlock], grad_z[kBlock], grad_o[kBlock];
};

// Classes [start, start + n) of a row: logits, exponentials about centres at which they are moved_p and moved_q times
// those about the row's own (where they are needed), and the places of the gradients (null: not wanted).
template <typename A>
struct Block {
  int64_t row, start, n;
  const A* z;
  const A* o;
  const A* p;
  const A* q;
  A moved_p, moved_q;
  A* grad_z;
  A* grad_o;
  bool plain;           // no class of the row is -inf
  Buffers<A>* buffers;  // weights, grad_z and grad_o are free
};

// All that the passes of one call share.
template <typename Op>
struct Job {
  using A = typename Op::A;

  Op op;
  A* row_loss = nullptr;
  A* stats = nullptr;  // (kStatRows, rows), or null: nobody wants them
  double factor = 1;   // of the row losses, and of the gradients that a forward finishes
  Sink<A> to_z = {}, to_o = {};
  const A* given_stats = nullptr;  // a backward's
  const A* row_grad = nullptr;
  int64_t row_grad_stride = 0;
  // Where threads take stretches: what the first pass leaves for the second.
  std::vector<typename Op::Sums> sums;  // (rows, stretches)
  std::vector<Centres<A>> centres;      // (rows, blocks)
  std::vector<double> kept_stats;       // (rows, kStatRows)

  explicit Job(const typename Op::Inputs& in) : op(in) {}

  const LogitPair& pair() const { return op.pair; }
  bool finishes() const { return to_z.wanted() || to_o.wanted(); }
  int64_t stretches() const { return std::max<int64_t>(1, (pair().classes + kStretch - 1) / kStretch); }
  int64_t blocks() const { return (pair().classes + kBlock - 1) / kBlock; }

  // Of a row that does not count.
  void clear(int64_t row, int64_t begin, int64_t end) const {
    to_z.clear(row * pair().classes + begin, end - begin);
    to_o.clear(row * pair().classes + begin, end - begin);
  }

  void leave(int64_t row, const double* of_row) const {
    if (stats == nullptr) return;
    for (int64_t which = 0; which < Op::kStatRows; ++which) {
      stats[which * pair().rows + row] = static_cast<A>(of_row[which]);
    }
  }

  // Where those of a row's exponentials wait that its gradients are made of. `scratch` is null or has room for a row of
  // each side.
  FASTGIST_INLINE Parked<A> parked(int64_t row, A* scratch) const {
    const auto place = [&](bool needed, const Sink<A>& to, int64_t at) -> A* {
      if (!needed) return nullptr;
      return to.direct() ? to.at(row * pair().classes) : scratch == nullptr ? nullptr : scratch + at;
    };
    return {place(op.needs_p(to_z.wanted(), to_o.wanted()), to_z, 0),
            place(op.needs_q(to_z.wanted(), to_o.wanted()), to_o, pair().classes)};
  }
  bool wants_scratch() const {
    return finishes() && !(to_z.direct() && to_o.direct()) && pair().classes <= kScratchClasses;
  }
};

// Classes [start, start + n) of a row, and what a first look at them saw.
template <typename A>
struct Looked {
  int64_t row = -1, start = 0, n = 0;
  const A* z = nullptr;
  const A* o = nullptr;
  Extremes<A> seen;
  Upcoming<A> next = {nullptr, nullptr, 0};
};

// What follows a block in memory: more of its row, or the next row. Where there are no more rows, where classes are not
// neighbours, and of half precision, which is converted block by block: nothing new. Only a row of one block is looked
// at beforehand: longer ones come from further away, and there all that is waited for has to be asked for a block
// ahead.
template <typename A>
Upcoming<A> upcoming(const LogitPair& in, const Looked<A>& block) {
  const bool direct =
      (in.dtype == DType::kFloat32 || in.dtype == DType::kFloat64) && in.z_stride_v == 1 && in.o_stride_v == 1;
  const int64_t end = block.start + block.n;
  if (direct && end < in.classes) return {block.z + block.n, block.o + block.n, 0};
  if (!direct || block.row + 1 >= in.rows) return {block.z, block.o, 0};
  const int64_t looked_at = in.classes <= kBlock ? in.classes : 0;
  return {block.z - block.start + in.z_stride_m, block.o - block.start + in.o_stride_m, looked_at};
}

// The next row's block, once its extremes are known.
template <typename A>
Looked<A> after(const LogitPair& in, const Looked<A>& block, const Extremes<A>& seen) {
  Looked<A> found = {block.row + 1, 0, block.next.n, block.next.z, block.next.o, seen};
  found.next = upcoming(in, found);
  return found;
}

template <typename Op>
struct Look {
  using A = typename Op::A;

  template <bool, int kBytes>
  static FASTGIST_INLINE void rows(const Op& op, int64_t row, int64_t start, int64_t n, A* buffer_z, A* buffer_o,
                                   Looked<A>& block) {
    const A* z = load_z(op.pair, row, start, n, buffer_z);
    const A* o = load_o(op.pair, row, start, n, buffer_o);
    block = {row, start, n, z, o, extremes<kBytes>(z, o, n)};
    block.next = upcoming(op.pair, block);
  }
};

// The sums over classes [begin, end) of a row, a stretch; the centres that each of its blocks saw go into `centres`.
// `ahead` may be the first block, looked at already, and may be left as the one behind the last.
template <typename Op>
struct AddStretch {
  using A = typename Op::A;

  template <bool kFma, int kBytes>
  static FASTGIST_INLINE void rows(const Op& op, int64_t row, int64_t begin, int64_t end, Looked<A>& ahead,
                                   const Parked<A>& parked, Centres<A>* centres, Buffers<A>& buffers,
                                   typename Op::Sums& sums) {
    for (int64_t start = begin; start < end; start += kBlock) {
      if (ahead.row != row || ahead.start != start) {
        const int64_t n = std::min(kBlock, end - start);
        Look<Op>::template rows<kFma, kBytes>(op, row, start, n, buffers.z, buffers.o, ahead);
      }
      const Looked<A> block = ahead;
      const Parked<A> hats = parked.from(start, {buffers.p, buffers.q});
      const BlockSums<A> added = op.template add<kFma, kBytes>(sums, block, hats.p, hats.q, buffers.weights);
      if (added.looked) ahead = after(op.pair, block, added.upcoming);
      centres[start / kBlock] = {centre(sums.pair.m_z), centre(sums.pair.m_o)};
    }
  }
};

// The gradients of classes [begin, end) of a row. `centres`: those of the row's blocks, or null: the row's own.
// `plain`: the sums were, of a row that is all known.
template <typename Op>
struct FinishStretch {
  using A = typename Op::A;

  template <bool kFma, int kBytes>
  static FASTGIST_INLINE void rows(const Job<Op>& job, int64_t row, int64_t begin, int64_t end, const double* stats,
                                   double row_grad, const Parked<A>& parked, const Centres<A>* centres, bool plain,
                                   Buffers<A>& buffers) {
    const Op& op = job.op;
    const auto scalars = op.scalars(row, stats, row_grad);
    const Centres<A> of_row = {static_cast<A>(stats[kMaxZ]), static_cast<A>(stats[kMaxO])};
    const bool needs_p = op.needs_p(job.to_z.wanted(), job.to_o.wanted());
    const bool needs_q = op.needs_q(job.to_z.wanted(), job.to_o.wanted());
    for (int64_t start = begin; start < end; start += kBlock) {
      const int64_t n = std::min(kBlock, end - start);
      const int64_t offset = row * op.pair.classes + start;
      const A* z = load_z(op.pair, row, start, n, buffers.z);
      const A* o = load_o(op.pair, row, start, n, buffers.o);
      const Centres<A> about = centres == nullptr ? of_row : centres[start / kBlock];
      const Parked<A> hats = parked.from(start, {buffers.p, buffers.q});
      if (needs_p && parked.p == nullptr) exponentials<kFma, kBytes>(z, n, about.z, op.over_t, hats.p);
      if (needs_q && parked.q == nullptr) exponentials<kFma, kBytes>(o, n, about.o, op.over_t, hats.q);
      const Block<A> block = {row,
                              start,
                              n,
                              z,
                              o,
                              hats.p,
                              hats.q,
                              moved(about.z, of_row.z, op.over_t),
                              moved(about.o, of_row.o, op.over_t),
                              job.to_z.place(offset, buffers.grad_z),
                              job.to_o.place(offset, buffers.grad_o),
                              plain,
                              &buffers};
      op.template finish<kFma, kBytes>(block, scalars);
      job.to_z.put(offset, n, buffers.grad_z);
      job.to_o.put(offset, n, buffers.grad_o);
    }
  }
};

// Where one class has all of its row's mass, its d less the mean of d is 0. But the sums that this mean comes from
// moved to other centres from block to block, and it is rounded otherwise than that class's d about the last ones: an
// error that grows with d, in a row whose gradients are 1 or 0. So the mean is that d, unless they differ by more than
// rounding: classes too small to show in S = 1 may show in the mean. Once a row, and looked for in none but those, in
// the block whose centre is the first to be the row's.
template <typename A>
void settle_means(const LogitPair& in, int64_t row, const Centres<A>* centres, double* stats) {
  if (in.classes <= kBlock) return;  // one block: its centres are the row's
  const A m_z = static_cast<A>(stats[kMaxZ]), m_o = static_cast<A>(stats[kMaxO]);
  alignas(64) A buffer[kBlock];
  for (const bool of_z : {true, false}) {
    if (static_cast<A>(stats[of_z ? kSumP : kSumQ]) != A(1)) continue;
    int64_t top = -1;
    for (int64_t start = 0; start < in.classes && top < 0; start += kBlock) {
      const Centres<A>& seen = centres[start / kBlock];
      if ((of_z ? seen.z : seen.o) != (of_z ? m_z : m_o)) continue;
      const int64_t n = std::min(kBlock, in.classes - start);
      const A* x = of_z ? load_z(in, row, start, n, buffer) : load_o(in, row, start, n, buffer);
      const A most = of_z ? m_z : m_o;
      int at = -1;
#pragma omp simd reduction(max : at)
      for (int i = 0; i < static_cast<int>(n); ++i) {
        const int here = x[i] == most ? i : -1;
        at = here > at ? here : at;
      }
      if (at >= 0) top = start + at;
    }
    if (top < 0) continue;
    A z = 0, o = 0;
    const A d = gap(*load_z(in, row, top, 1, &z), *load_o(in, row, top, 1, &o), m_z, m_o);
    double& mean = stats[of_z ? kMeanP : kMeanQ];
    if (std::fabs(mean - d) <= 4 * std::numeric_limits<A>::epsilon() * std::fabs(d)) mean = d;
  }
}

// A row whose sums are complete: its loss, and what its gradients and statistics need.
template <typename Op>
void sum_up(const Job<Op>& job, int64_t row, const typename Op::Sums& sums, const Centres<typename Op::A>* centres,
            double* stats) {
  using A = typename Op::A;
  job.row_loss[row] = static_cast<A>(job.op.summary(row, sums, stats) * job.factor);
  if (job.finishes() || job.stats != nullptr) settle_means(job.pair(), row, centres, stats);
}

// A forward, by whole rows.
template <typename Op>
void whole_rows(const Job<Op>& job, int64_t row_begin, int64_t row_end) {
  using A = typename Op::A;
  const int64_t classes = job.pair().classes;
  Buffers<A> buffers;
  const std::unique_ptr<Centres<A>[]> centres(new Centres<A>[job.blocks()]);
  const std::unique_ptr<A[]> scratch(job.wants_scratch() ? new A[2 * classes] : nullptr);
  // The next row's first block is looked at before this row's gradients, which wait for long divisions: at 1,000
  // classes a row is one block, and neither its maxima nor its sums are then waited for.
  Looked<A> ahead;
  for (int64_t row = row_begin; row < row_end; ++row) {
    double stats[Op::kStatRows] = {};
    job.row_loss[row] = 0;
    if (job.op.counts(row)) {
      const Parked<A> parked = job.parked(row, scratch.get());
      typename Op::Sums sums;
      for (int64_t begin = 0; begin < classes; begin += kStretch) {
        const int64_t end = std::min(begin + kStretch, classes);
        typename Op::Sums next;
        typename Op::Sums& of_stretch = begin == 0 ? sums : next;
        run_rows<AddStretch<Op>>(job.op, row, begin, end, ahead, parked, centres.get(), buffers, of_stretch);
        if (begin != 0) job.op.merge(sums, next);
      }
      const bool known = ahead.row == row + 1 && ahead.start == 0;
      if (!known && row + 1 < row_end && job.op.counts(row + 1)) {
        run_rows<Look<Op>>(job.op, row + 1, 0, std::min(kBlock, classes), buffers.ahead_z, buffers.ahead_o, ahead);
      }
      sum_up(job, row, sums, centres.get(), stats);
      if (job.finishes()) {
        run_rows<FinishStretch<Op>>(job, row, 0, classes, stats, job.factor, parked, centres.get(), sums.pair.plain,
                                    buffers);
      }
    } else {
      job.clear(row, 0, classes);
    }
    job.leave(row, stats);
  }
}

// A forward's first pass by stretches: task t is stretch t % stretches of row t / stretches.
template <typename Op>
void stretch_sums(Job<Op>& job, int64_t task_begin, int64_t task_end) {
  using A = typename Op::A;
  Buffers<A> buffers;
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t row = task / job.stretches(), begin = task % job.stretches() * kStretch;
    if (!job.op.counts(row)) continue;
    const int64_t end = std::min(begin + kStretch, job.pair().classes);
    Looked<A> ahead;
    run_rows<AddStretch<Op>>(job.op, row, begin, end, ahead, job.parked(row, nullptr), &job.centres[row * job.blocks()],
                             buffers, job.sums[task]);
  }
}

// Between the passes: each row's sums.
template <typename Op>
void merge_rows(Job<Op>& job) {
  const int64_t stretches = job.stretches();
  for (int64_t row = 0; row < job.pair().rows; ++row) {
    double* const stats = &job.kept_stats[row * Op::kStatRows];
    job.row_loss[row] = 0;
    if (job.op.counts(row)) {
      typename Op::Sums& sums = job.sums[row * stretches];
      for (int64_t s = 1; s < stretches; ++s) {
        job.op.merge(sums, job.sums[row * stretches + s]);
      }
      sum_up(job, row, sums, &job.centres[row * job.blocks()], stats);
    }
    job.leave(row, stats);
  }
}

// The gradients by stretches: a forward's second pass, or a backward.
template <typename Op>
void stretch_gradients(const Job<Op>& job, int64_t task_begin, int64_t task_end) {
  using A = typename Op::A;
  const bool second = !job.centres.empty();
  Buffers<A> buffers;
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t row = task / job.stretches(), begin = task % job.stretches() * kStretch;
    const int64_t end = std::min(begin + kStretch, job.pair().classes);
    if (!job.op.counts(row)) {
      job.clear(row, begin, end);
    } else if (second) {
      run_rows<FinishStretch<Op>>(job, row, begin, end, &job.kept_stats[row * Op::kStatRows], job.factor,
                                  job.parked(row, nullptr), &job.centres[row * job.blocks()],
                                  job.sums[row * job.stretches()].pair.plain, buffers);
    } else {
      double stats[Op::kStatRows];
      for (int64_t which = 0; which < Op::kStatRows; ++which) {
        stats[which] = job.given_stats[which * job.pair().rows + row];
      }
      const double row_grad = job.row_grad[row * job.row_grad_stride];
      const Centres<A>* const none = nullptr;
      run_rows<FinishStretch<Op>>(job, row, begin, end, stats, row_grad, Parked<A>{}, none, false, buffers);
    }
  }
}

template <typename Op>
int64_t stretch_grain(const Job<Op>& job) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, std::min(job.pair().classes, kStretch)));
}

template <typename Op>
void run_forward(Job<Op>& job, const Parallel& parallel) {
  const int64_t rows = job.pair().rows, threads = parallel.threads;
  // Whole rows leave threads idle, for more than an eighth of the time, where few of them divide badly.
  const bool few = threads > 1 && rows < 8 * threads && rows % threads != 0;
  if (!few || job.stretches() == 1) {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, job.pair().classes));
    parallel.each(rows, grain, [&](int64_t begin, int64_t end) { whole_rows(job, begin, end); });
    return;
  }
  const int64_t tasks = rows * job.stretches();
  job.sums.resize(tasks);
  job.centres.resize(rows * job.blocks());
  job.kept_stats.resize(rows * Op::kStatRows);
  parallel.each(tasks, 1, [&](int64_t begin, int64_t end) { stretch_sums(job, begin, end); });
  merge_rows(job);
  if (!job.finishes()) return;
  parallel.each(tasks, 1, [&](int64_t begin, int64_t end) { stretch_gradients(job, begin, end); });
}

template <typename Op>
void forward(const typename Op::Inputs& in, const ForwardOutputs& out, const Parallel& parallel) {
  using A = typename Op::A;
  Job<Op> job(in);
  job.row_loss = static_cast<A*>(out.row_loss);
  job.stats = static_cast<A*>(out.stats);
  run_forward(job, parallel);
}

template <typename Op>
void backward(const typename Op::Inputs& in, const BackwardArguments& args, const Parallel& parallel) {
  using A = typename Op::A;
  Job<Op> job(in);
  job.given_stats = static_cast<const A*>(args.stats);
  job.row_grad = static_cast<const A*>(args.row_grad);
  job.row_grad_stride = args.row_grad_stride;
  job.to_z = {job.pair().dtype, args.grad_z};
  job.to_o = {job.pair().dtype, args.grad_o};
  if (!job.finishes()) return;
  parallel.each(job.pair().rows * job.stretches(), stretch_grain(job),
                [&](int64_t begin, int64_t end) { stretch_gradients(job, begin, end); });
}

template <typename Op>
void forward_backward(const typename Op::Inputs& in, const FinishedOutputs& out, const Parallel& parallel) {
  using A = typename Op::A;
  Job<Op> job(in);
  const double divisor = out.divisor == nullptr ? 1.0 : static_cast<double>(*static_cast<const A*>(out.divisor));
  job.factor = out.scale / divisor;
  job.row_loss = static_cast<A*>(out.row_loss);
  job.to_z = {job.pair().dtype, out.grad_z};
  job.to_o = {job.pair().dtype, out.grad_o};
  run_forward(job, parallel);
  double sum = 0;
  for (int64_t row = 0; row < job.pair().rows; ++row) sum += job.row_loss[row];
  *static_cast<A*>(out.loss) = static_cast<A>(sum);
}

}  // namespace fastgist::cpu
