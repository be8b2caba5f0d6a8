#include "total.cuh"

#include "launch.cuh"

namespace fastgist::cuda {

const char* total(bool in_double, const void* row_loss, int64_t rows, void* loss, cudaStream_t stream) {
  if (in_double) {
    _total_kernel<<<1, kTotalThreads, 0, stream>>>(static_cast<const double*>(row_loss), rows,
                                                   static_cast<double*>(loss));
  } else {
    _total_kernel<<<1, kTotalThreads, 0, stream>>>(static_cast<const float*>(row_loss), rows,
                                                   static_cast<float*>(loss));
  }
  return error_text(cudaGetLastError());
}

}  // namespace fastgist::cuda
