#include "total.h"

#include "total.cuh"

namespace fastgist::cuda {

cudaError_t total(bool in_double, const void* row_loss, int64_t rows, void* loss, cudaStream_t stream) {
  if (in_double) {
    _total_kernel<<<1, kTotalThreads, 0, stream>>>(static_cast<const double*>(row_loss), rows,
                                                   static_cast<double*>(loss));
  } else {
    _total_kernel<<<1, kTotalThreads, 0, stream>>>(static_cast<const float*>(row_loss), rows,
                                                   static_cast<float*>(loss));
  }
  return cudaGetLastError();
}

}  // namespace fastgist::cuda
