// bidirectional_kl on CPU memory. Each call works through rows [row_begin, row_end) on the calling thread; rows are
// independent, so the caller spreads them over its own threads. The result of a row does not depend on the split.
#pragma once

#include "../bidirectional_kl.h"

namespace fastgist::cpu {

void bidirectional_kl_fwd(const LogitPair& in, const ForwardOutputs& out, int64_t row_begin, int64_t row_end);
void bidirectional_kl_bwd(const LogitPair& in, const BackwardArguments& args, int64_t row_begin, int64_t row_end);

}  // namespace fastgist::cpu
