// The sum of `rows` row losses, double or float, into one number of the same type.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastgist::cuda {

cudaError_t total(bool in_double, const void* row_loss, int64_t rows, void* loss, cudaStream_t stream);

}  // namespace fastgist::cuda
