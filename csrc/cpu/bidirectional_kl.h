// bidirectional_kl on CPU memory, spread over the caller's threads. No result depends on their number.
#pragma once

#include "../bidirectional_kl.h"
#include "parallel.h"

namespace fastgist::cpu {

void bidirectional_kl_fwd(const LogitPair& in, const ForwardOutputs& out, const Parallel& parallel);
void bidirectional_kl_bwd(const LogitPair& in, const BackwardArguments& args, const Parallel& parallel);
void bidirectional_kl_fwd_bwd(const LogitPair& in, const FinishedOutputs& out, const Parallel& parallel);

}  // namespace fastgist::cpu
