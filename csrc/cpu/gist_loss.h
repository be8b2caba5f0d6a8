// gist_loss on CPU memory, called as bidirectional_kl.h says.
#pragma once

#include "../gist_loss.h"
#include "parallel.h"

namespace fastgist::cpu {

void gist_loss_fwd(const GistLossInputs& in, const ForwardOutputs& out, const Parallel& parallel);
void gist_loss_bwd(const GistLossInputs& in, const BackwardArguments& args, const Parallel& parallel);
void gist_loss_fwd_bwd(const GistLossInputs& in, const FinishedOutputs& out, const Parallel& parallel);

}  // namespace fastgist::cpu
