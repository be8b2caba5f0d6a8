#include "dropout.h"

#include "adapter_rows.h"
#include "philox.h"

namespace fastgist::cpu {
namespace {

struct DropoutRows {
  template <bool kFma, typename A>
  static FASTGIST_INLINE void drop(const DropoutArguments& args, const Dropout& rule, int64_t begin, int64_t end) {
    const Buffer<uint32_t> words(rule.room(kFew));
    const Buffer<A> buffer(args.columns);
    const A keep = static_cast<A>(rule.keep);
    const uint32_t least = rule.least;
    for (int64_t row = begin; row < end; row += kFew) {
      const int64_t rows = std::min(kFew, end - row);
      rule.words(row, rows, words.get());
      for (int64_t r = 0; r < rows; ++r) {
        const uint32_t* const drawn = words.get() + r * 4 * rule.quads;
        const A* const h = load_any(args.from.dtype, args.from.data, (row + r) * args.from.stride_m, args.from.stride_n,
                                    args.columns, buffer.get());
        // Where the result holds numbers of type A it is written at once.
        A* const to = holds<A>(args.from.dtype) ? static_cast<A*>(args.to) + (row + r) * args.columns : buffer.get();
#pragma omp simd
        for (int64_t i = 0; i < args.columns; ++i) to[i] = (drawn[i] >> 1) >= least ? h[i] / keep : A(0);
        if (!holds<A>(args.from.dtype)) {
          store_any(args.from.dtype, static_cast<const A*>(to), args.to, (row + r) * args.columns, args.columns);
        }
      }
    }
  }

  template <bool kFma, int>
  static FASTGIST_INLINE void rows(const DropoutArguments& args, const Dropout& rule, int64_t begin, int64_t end) {
    args.from.dtype == DType::kFloat64 ? drop<kFma, double>(args, rule, begin, end)
                                       : drop<kFma, float>(args, rule, begin, end);
  }
};

}  // namespace

void dropout(const DropoutArguments& args, const Parallel& parallel) {
  const Dropout rule(args.seed, args.p, args.columns);
  const int64_t blocks = (args.rows + kFew - 1) / kFew;
  const int64_t grain = std::max<int64_t>(1, 2048 / std::max<int64_t>(1, args.columns));  // some 16,384 elements
  parallel.each(blocks, grain, [&](int64_t begin, int64_t end) {
    run_rows<DropoutRows>(args, rule, begin * kFew, std::min(end * kFew, args.rows));
  });
}

}  // namespace fastgist::cpu
