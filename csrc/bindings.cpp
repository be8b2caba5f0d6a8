// Registers the compiled ops in torch.ops.fastgist_native: their schemas, and what runs on CPU tensors. (CUDA tensors:
// bindings_cuda.cpp.)
// Stable ABI only (libtorch >= 2.11): one binary serves every later libtorch, and no Python symbol is used.
// These ops write into tensors that fastgist/ops allocates; they check what would be read or written out of bounds.
#include "bindings.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/bidirectional_kl.h"
#include "cpu/gist_loss.h"

namespace fastgist {
namespace {

// Elements that make it worth waking another thread: some 10 us of work.
constexpr int64_t kGrainElements = 16384;

// Rows a task, so that small problems stay on the calling thread.
int64_t grain_rows(const LogitPair& in) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, in.classes));
}

void bidirectional_kl_fwd_cpu(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                              double temperature, const Tensor& row_loss, const Tensor& stats) {
  const LogitPair in = check_logits(kFwd, logits, "other_logits", other_logits, mask, temperature);
  const ForwardOutputs out = check_outputs(kFwd, logits, row_loss, stats);
  // torch's own thread pool: it honours torch.set_num_threads and there is no second OpenMP runtime to compete with it.
  torch::stable::parallel_for(0, in.rows, grain_rows(in),
                              [&](int64_t begin, int64_t end) { cpu::bidirectional_kl_fwd(in, out, begin, end); });
}

void bidirectional_kl_bwd_cpu(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                              const Tensor& stats, const Tensor& row_grad, double temperature,
                              const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_other) {
  const LogitPair in = check_logits(kBwd, logits, "other_logits", other_logits, mask, temperature);
  const BackwardArguments args = check_backward(kBwd, logits, stats, row_grad, grad_logits, "grad_other", grad_other);
  torch::stable::parallel_for(0, in.rows, grain_rows(in),
                              [&](int64_t begin, int64_t end) { cpu::bidirectional_kl_bwd(in, args, begin, end); });
}

void gist_loss_fwd_cpu(const Tensor& logits, const Tensor& gist_logits, const Tensor& target, double alpha, double beta,
                       double beta_logits, double beta_gist, double temperature, double label_smoothing,
                       int64_t ignore_index, const Tensor& row_loss, const Tensor& stats) {
  const GistLossInputs in = check_gist(kGistFwd, logits, gist_logits, target, alpha, beta, beta_logits, beta_gist,
                                       temperature, label_smoothing, ignore_index);
  const ForwardOutputs out = check_outputs(kGistFwd, logits, row_loss, stats, kGistStats);
  torch::stable::parallel_for(0, in.logits.rows, grain_rows(in.logits),
                              [&](int64_t begin, int64_t end) { cpu::gist_loss_fwd(in, out, begin, end); });
}

void gist_loss_bwd_cpu(const Tensor& logits, const Tensor& gist_logits, const Tensor& target, const Tensor& stats,
                       const Tensor& row_grad, double alpha, double beta, double beta_logits, double beta_gist,
                       double temperature, double label_smoothing, int64_t ignore_index,
                       const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_gist) {
  const GistLossInputs in = check_gist(kGistBwd, logits, gist_logits, target, alpha, beta, beta_logits, beta_gist,
                                       temperature, label_smoothing, ignore_index);
  const BackwardArguments args =
      check_backward(kGistBwd, logits, stats, row_grad, grad_logits, "grad_gist", grad_gist, kGistStats);
  torch::stable::parallel_for(0, in.logits.rows, grain_rows(in.logits),
                              [&](int64_t begin, int64_t end) { cpu::gist_loss_bwd(in, args, begin, end); });
}

}  // namespace
}  // namespace fastgist

STABLE_TORCH_LIBRARY(fastgist_native, m) {
  m.def(
      "bidirectional_kl_fwd(Tensor logits, Tensor other_logits, Tensor? mask, float temperature, Tensor(a!) row_loss, "
      "Tensor(b!) stats) -> ()");
  m.def(
      "bidirectional_kl_bwd(Tensor logits, Tensor other_logits, Tensor? mask, Tensor stats, Tensor row_grad, "
      "float temperature, Tensor(c!)? grad_logits, Tensor(d!)? grad_other) -> ()");
  m.def(
      "gist_loss_fwd(Tensor logits, Tensor gist_logits, Tensor target, float alpha, float beta, float beta_logits, "
      "float beta_gist, float temperature, float label_smoothing, int ignore_index, Tensor(a!) row_loss, "
      "Tensor(b!) stats) -> ()");
  m.def(
      "gist_loss_bwd(Tensor logits, Tensor gist_logits, Tensor target, Tensor stats, Tensor row_grad, float alpha, "
      "float beta, float beta_logits, float beta_gist, float temperature, float label_smoothing, int ignore_index, "
      "Tensor(c!)? grad_logits, Tensor(d!)? grad_gist) -> ()");
  m.def(
      "bidirectional_kl_fwd_bwd(Tensor logits, Tensor other_logits, Tensor? mask, Tensor? divisor, float temperature, "
      "float scale, Tensor(a!) row_loss, Tensor(b!) loss, Tensor(c!)? grad_logits, Tensor(d!)? grad_other) -> ()");
  m.def(
      "gist_loss_fwd_bwd(Tensor logits, Tensor gist_logits, Tensor target, Tensor? divisor, float alpha, float beta, "
      "float beta_logits, float beta_gist, float temperature, float label_smoothing, int ignore_index, float scale, "
      "Tensor(a!) row_loss, Tensor(b!) loss, Tensor(c!)? grad_logits, Tensor(d!)? grad_gist) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgist_native, CPU, m) {
  m.impl("bidirectional_kl_fwd", TORCH_BOX(&fastgist::bidirectional_kl_fwd_cpu));
  m.impl("bidirectional_kl_bwd", TORCH_BOX(&fastgist::bidirectional_kl_bwd_cpu));
  m.impl("gist_loss_fwd", TORCH_BOX(&fastgist::gist_loss_fwd_cpu));
  m.impl("gist_loss_bwd", TORCH_BOX(&fastgist::gist_loss_bwd_cpu));
}
