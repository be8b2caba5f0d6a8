// gist_loss on CUDA memory. Launches on `stream` (a cudaStream_t) of the current device and does not wait. Returns
// null, or what CUDA says is wrong with the launch. Where beta_z and beta_o are both not 0 they must be the same.
#pragma once

#include "../gist_loss.h"

namespace fastgist::cuda {

// The statistics kMeanP and kMeanQ are not over T: a forward's are for this backward alone.
const char* gist_loss_fwd(const GistLossInputs& in, const ForwardOutputs& out, void* stream);
const char* gist_loss_bwd(const GistLossInputs& in, const BackwardArguments& args, void* stream);
const char* gist_loss_fwd_bwd(const GistLossInputs& in, const FinishedOutputs& out, void* stream);

}  // namespace fastgist::cuda
