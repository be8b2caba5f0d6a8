// gist_loss's launches at any T or at T = 3, each in a file of its own that two compilers may take at once.
#pragma once

#include "launch.cuh"

namespace fastgist::cuda {

// What a call wants; the others are null.
struct GistCall {
  const ForwardOutputs* forward;
  const BackwardArguments* backward;
  const FinishedOutputs* finish;
};

cudaError_t gist_rows_at_any_t(const GistLossInputs& in, const GistCall& call, cudaStream_t stream);
cudaError_t gist_rows_at_t_3(const GistLossInputs& in, const GistCall& call, cudaStream_t stream);  // not float64

template <typename T, int kLoss>
cudaError_t gist_rows(const GistLossInputs& in, const GistCall& call, cudaStream_t stream) {
  using A = typename Accumulate<T>::type;
  Arguments<A> args = arguments_of<A>(in);
  if (call.forward != nullptr) {
    args.row_loss = static_cast<A*>(call.forward->row_loss);
    args.stats = static_cast<A*>(call.forward->stats);
    return pass_rows<T, kLoss>(args, Pass::kForward, stream);
  }
  if (call.backward != nullptr) {
    args.stats = const_cast<A*>(static_cast<const A*>(call.backward->stats));
    args.row_grad = static_cast<const A*>(call.backward->row_grad);
    args.row_grad_stride = call.backward->row_grad_stride;
    args.grad_z = call.backward->grad_z;
    args.grad_o = call.backward->grad_o;
    return pass_rows<T, kLoss>(args, Pass::kBackward, stream);
  }
  finish_into(args, *call.finish);
  return finish_rows<T, kLoss>(args, stream);
}

}  // namespace fastgist::cuda
