// gist_loss at T = 3, where the exponentials at temperature 1 are cubes.
#include "gist_launch.cuh"

namespace fastgist::cuda {

cudaError_t gist_rows_at_t_3(const GistLossInputs& in, const GistCall& call, cudaStream_t stream) {
  switch (in.logits.dtype) {
    case DType::kFloat32:
      return gist_rows<float, kGistCubed>(in, call, stream);
    case DType::kBFloat16:
      return gist_rows<__nv_bfloat16, kGistCubed>(in, call, stream);
    case DType::kFloat16:
      return gist_rows<__half, kGistCubed>(in, call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fastgist::cuda
