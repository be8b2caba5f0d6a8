// adapter on raw pointers: y = residual_scale (residual + branch) + scale (U hidden + b_u) for each row, with
//     a = x, or norm(x) = (x - mean) rstd w + b           z = D a + b_d           hidden = drop(act(z) * gate)
// The formula in full: fastgist/reference/adapter.py; the rule of the dropout's mask: fastgist/reference/philox.py.
#pragma once

#include "bidirectional_kl.h"

namespace fastgist {

enum class Activation { kGelu, kGeluTanh, kRelu, kSilu, kIdentity };

// A matrix with any strides (in elements, 0 included), or a vector as its one row; data is null where there is none.
struct MatrixView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride_m = 0;
  int64_t stride_n = 0;
};

struct AdapterInputs {
  int64_t rows;
  int64_t inner;      // columns of x
  int64_t hidden;     // H
  int64_t out;        // columns of y
  int64_t experts;    // columns of the gate, which divide H; 0 without a gate
  int64_t biases;     // rows of up_bias: `experts` of them, or 1, or 0 where there is no up_bias
  bool gated_biases;  // whether the gate multiplies them
  DType dtype;        // of x, what is added to it, the gate, y and the gradients of all of them
  DType weight_dtype;
  MatrixView x;            // (rows, inner)
  MatrixView down_weight;  // (H, inner); weights wider than `dtype` are rounded to it
  MatrixView down_bias;    // (1, H)
  MatrixView up_weight;    // (out, H)
  MatrixView up_bias;      // (biases, out)
  MatrixView residual;     // (rows, out); in a backward: null
  MatrixView branch;       // (rows, out), beside a residual alone
  MatrixView gate;         // (rows, experts)
  bool norm;
  double norm_eps;
  MatrixView norm_weight;  // (1, inner)
  MatrixView norm_bias;    // (1, inner)
  const int64_t* seed;     // null: no dropout
  double dropout_p;
  Activation activation;
  double scale;
  double residual_scale;
};

// Contiguous. The accumulation type A is double for kFloat64 and float for everything else.
struct AdapterOutputs {
  void* y;  // dtype (rows, out)
  void* z;  // z_dtype (rows, H), or null
  DType z_dtype;
  void* stats;  // A (2, rows): mean and rstd; or null
};

// What the backward reads beside the inputs, and the gradients that it writes: contiguous, null where not wanted. Of
// x and the gate they have `dtype`, of weights and biases `weight_dtype`. Inputs that no wanted gradient needs may be
// null.
struct AdapterGradients {
  MatrixView grad;  // of y: (rows, out)
  MatrixView z;
  const void* stats;
  bool residual_is_x;
  void* x;
  void* down_weight;
  void* down_bias;
  void* up_weight;
  void* up_bias;
  void* gate;
  void* norm_weight;
  void* norm_bias;
};

}  // namespace fastgist
