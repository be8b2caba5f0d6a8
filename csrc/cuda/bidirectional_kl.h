// bidirectional_kl on CUDA memory. Launches on `stream` (a cudaStream_t) of the current device and does not wait.
// Returns null, or what CUDA says is wrong with the launch.
#pragma once

#include "../bidirectional_kl.h"

namespace fastgist::cuda {

const char* bidirectional_kl_fwd(const LogitPair& in, const ForwardOutputs& out, void* stream);
const char* bidirectional_kl_bwd(const LogitPair& in, const BackwardArguments& args, void* stream);
const char* bidirectional_kl_fwd_bwd(const LogitPair& in, const FinishedOutputs& out, void* stream);

}  // namespace fastgist::cuda
