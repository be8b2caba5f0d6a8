// Registers the compiled ops in torch.ops.fastgist_native: their schemas, and what runs on CPU tensors. (CUDA tensors:
// bindings_cuda.cpp.)
// Stable ABI only (libtorch >= 2.11): one binary serves every later libtorch, and no Python symbol is used.
// These ops write into tensors that fastgist/ops allocates; they check what would be read or written out of bounds.
#include "bindings.h"

#include <torch/csrc/stable/library.h>

#include "cpu/bidirectional_kl.h"
#include "cpu/gist_loss.h"

namespace fastgist {
namespace {

void bidirectional_kl_fwd_cpu(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                              double temperature, const Tensor& row_loss, const Tensor& stats) {
  const LogitPair in = check_logits(kFwd, logits, "other_logits", other_logits, mask, temperature);
  cpu::bidirectional_kl_fwd(in, check_outputs(kFwd, logits, row_loss, stats), threads());
}

void bidirectional_kl_bwd_cpu(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                              const Tensor& stats, const Tensor& row_grad, double temperature,
                              const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_other) {
  const LogitPair in = check_logits(kBwd, logits, "other_logits", other_logits, mask, temperature);
  const BackwardArguments args = check_backward(kBwd, logits, stats, row_grad, grad_logits, "grad_other", grad_other);
  cpu::bidirectional_kl_bwd(in, args, threads());
}

void bidirectional_kl_fwd_bwd_cpu(const Tensor& logits, const Tensor& other_logits, const std::optional<Tensor>& mask,
                                  const std::optional<Tensor>& divisor, double temperature, double scale,
                                  const Tensor& row_loss, const Tensor& loss, const std::optional<Tensor>& grad_logits,
                                  const std::optional<Tensor>& grad_other) {
  const LogitPair in = check_logits(kFwdBwd, logits, "other_logits", other_logits, mask, temperature);
  const FinishedOutputs out =
      check_finished(kFwdBwd, logits, divisor, scale, row_loss, loss, grad_logits, "grad_other", grad_other);
  cpu::bidirectional_kl_fwd_bwd(in, out, threads());
}

void gist_loss_fwd_cpu(const Tensor& logits, const Tensor& gist_logits, const Tensor& target, double alpha, double beta,
                       double beta_logits, double beta_gist, double temperature, double label_smoothing,
                       int64_t ignore_index, const Tensor& row_loss, const Tensor& stats) {
  const GistLossInputs in = check_gist(kGistFwd, logits, gist_logits, target, alpha, beta, beta_logits, beta_gist,
                                       temperature, label_smoothing, ignore_index);
  cpu::gist_loss_fwd(in, check_outputs(kGistFwd, logits, row_loss, stats, kGistStats), threads());
}

void gist_loss_bwd_cpu(const Tensor& logits, const Tensor& gist_logits, const Tensor& target, const Tensor& stats,
                       const Tensor& row_grad, double alpha, double beta, double beta_logits, double beta_gist,
                       double temperature, double label_smoothing, int64_t ignore_index,
                       const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_gist) {
  const GistLossInputs in = check_gist(kGistBwd, logits, gist_logits, target, alpha, beta, beta_logits, beta_gist,
                                       temperature, label_smoothing, ignore_index);
  const BackwardArguments args =
      check_backward(kGistBwd, logits, stats, row_grad, grad_logits, "grad_gist", grad_gist, kGistStats);
  cpu::gist_loss_bwd(in, args, threads());
}

void gist_loss_bwd_classes_cpu(const Tensor& logits, const Tensor& gist_logits, const Tensor& target,
                               const Tensor& stats, const Tensor& row_grad, double alpha, double beta,
                               double beta_logits, double beta_gist, double temperature, double label_smoothing,
                               int64_t ignore_index, int64_t first_class, int64_t every_class,
                               const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_gist) {
  GistLossInputs in = check_gist(kGistBwdClasses, logits, gist_logits, target, alpha, beta, beta_logits, beta_gist,
                                 temperature, label_smoothing, ignore_index);
  STD_TORCH_CHECK(first_class >= 0 && first_class <= every_class - in.logits.classes, kGistBwdClasses, ": classes ",
                  first_class, " to ", first_class + in.logits.classes, " are not within ", every_class);
  in.first_class = first_class;
  in.every_class = every_class;
  const BackwardArguments args =
      check_backward(kGistBwdClasses, logits, stats, row_grad, grad_logits, "grad_gist", grad_gist, kGistStats);
  cpu::gist_loss_bwd(in, args, threads());
}

void gist_loss_fwd_bwd_cpu(const Tensor& logits, const Tensor& gist_logits, const Tensor& target,
                           const std::optional<Tensor>& divisor, double alpha, double beta, double beta_logits,
                           double beta_gist, double temperature, double label_smoothing, int64_t ignore_index,
                           double scale, const Tensor& row_loss, const Tensor& loss,
                           const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_gist) {
  const GistLossInputs in = check_gist(kGistFwdBwd, logits, gist_logits, target, alpha, beta, beta_logits, beta_gist,
                                       temperature, label_smoothing, ignore_index);
  const FinishedOutputs out =
      check_finished(kGistFwdBwd, logits, divisor, scale, row_loss, loss, grad_logits, "grad_gist", grad_gist);
  cpu::gist_loss_fwd_bwd(in, out, threads());
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
  // Of a block of the classes, those from first_class on of every_class, with the statistics of whole rows. CPU alone.
  m.def(
      "gist_loss_bwd_classes(Tensor logits, Tensor gist_logits, Tensor target, Tensor stats, Tensor row_grad, "
      "float alpha, float beta, float beta_logits, float beta_gist, float temperature, float label_smoothing, "
      "int ignore_index, int first_class, int every_class, Tensor(c!)? grad_logits, Tensor(d!)? grad_gist) -> ()");
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
  m.impl("bidirectional_kl_fwd_bwd", TORCH_BOX(&fastgist::bidirectional_kl_fwd_bwd_cpu));
  m.impl("gist_loss_fwd", TORCH_BOX(&fastgist::gist_loss_fwd_cpu));
  m.impl("gist_loss_bwd", TORCH_BOX(&fastgist::gist_loss_bwd_cpu));
  m.impl("gist_loss_bwd_classes", TORCH_BOX(&fastgist::gist_loss_bwd_classes_cpu));
  m.impl("gist_loss_fwd_bwd", TORCH_BOX(&fastgist::gist_loss_fwd_bwd_cpu));
}
