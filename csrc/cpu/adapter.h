// adapter on CPU memory, spread over the caller's threads. No result depends on their number.
#pragma once

#include "../adapter.h"
#include "parallel.h"

namespace fastgist::cpu {

void adapter_fwd(const AdapterInputs& in, const AdapterOutputs& out, const Parallel& parallel);
void adapter_bwd(const AdapterInputs& in, const AdapterGradients& grads, const Parallel& parallel);

}  // namespace fastgist::cpu
