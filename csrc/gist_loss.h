// gist_loss on raw pointers: CE(z, t) + alpha CE(o, t) + beta [KL(p || q) + KL(q || p)] for each row, the
// cross-entropies at temperature 1. With t the class weights, W their sum, and in the notation of bidirectional_kl.h
//     CE(z, t) = W log(sum exp(zc)) - sum t zc        its gradient is  W exp(zc) / sum exp(zc) - t
// A class of weight 0 contributes 0 also where its logit is -inf, and a term whose factor is 0 is absent.
#pragma once

#include "bidirectional_kl.h"

namespace fastgist {

// One class a row, or a weight for each class (soft targets), any strides. Class weights are label_smoothing / classes
// plus (1 - label_smoothing) times the one-hot or soft target.
struct ClassTarget {
  const int64_t* classes;  // (rows,), or null: soft targets
  const void* weights;     // (rows, classes) of dtype
  DType dtype;
  int64_t stride_m;
  int64_t stride_v;
};

struct GistLossInputs {
  LogitPair logits;
  ClassTarget target;
  double alpha;
  double beta;  // any T^2 included
  // The divergence's weight in each side's gradient: beta, or 0 where that side is detached from the divergence (its
  // gradient is then the cross-entropy's alone, whatever the other side holds).
  double beta_z;
  double beta_o;
  double label_smoothing;
  int64_t ignore_index;  // a row with this class counts nowhere and its logits are not read
  // A backward on a CPU may be given a block of the classes, with the statistics of whole rows: logits and soft targets
  // are those from first_class on, of every_class in all; what is a class as a target does not change.
  int64_t first_class;
  int64_t every_class;
};

// Further rows of the (kGistStats, rows) tensor of statistics: the sums of exp(zc) and exp(oc), and W. A row whose
// target is no class has NaN as its loss and in its gradients.
enum GistStat { kUnitZ = kStats, kUnitO, kWeight, kGistStats };

}  // namespace fastgist
