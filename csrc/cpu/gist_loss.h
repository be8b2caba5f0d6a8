// gist_loss on CPU memory, called as bidirectional_kl.h says: rows [row_begin, row_end) on the calling thread.
#pragma once

#include "../gist_loss.h"

namespace fastgist::cpu {

void gist_loss_fwd(const GistLossInputs& in, const ForwardOutputs& out, int64_t row_begin, int64_t row_end);
void gist_loss_bwd(const GistLossInputs& in, const BackwardArguments& args, int64_t row_begin, int64_t row_end);

}  // namespace fastgist::cpu
