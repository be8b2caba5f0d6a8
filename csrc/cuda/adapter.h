// adapter with a few hidden units on CUDA memory. Launches on `stream` (a cudaStream_t) of the current device and does not
// wait. Returns null, or what CUDA says is wrong with the launch.
#pragma once

#include "../adapter.h"

namespace fastgist::cuda {

const char* adapter_fwd(const AdapterForward& args, void* stream);
const char* adapter_bwd(const AdapterBackward& args, void* stream);
const char* adapter_reduce(const AdapterReduce& args, void* stream);

}  // namespace fastgist::cuda
