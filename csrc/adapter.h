// adapter with a few hidden units on raw pointers: what the launchers (csrc/cuda/adapter.cu) are told.
//
//     z = D x + b_d    h = act(z)    y = residual_scale * (residual + branch) + scale * (U h + b_u)
//     dz = scale * (U^T dy) act'(z)    dx = D^T dz (+ residual_scale * dy)
//     dD = dz x^T    db_d = dz    dU = scale * dy h^T    db_u = scale * dy    (all summed over the rows)
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastgist {

enum class Activation { kGelu, kGeluTanh, kRelu, kSilu, kIdentity };

constexpr int kMostUnits = 8;

// Rows in half precision, columns side by side, every row aligned to 16 bytes; weights of that dtype or float32 (then they
// are rounded to it), any strides (in elements). columns is a multiple of 8.
struct AdapterArguments {
  DType dtype;
  bool float_weights;
  int64_t rows;
  int64_t columns;
  int units;
  Activation activation;
  float scale;
  float residual_scale;
  const void* x;
  int64_t x_stride;
  const void* down;  // (units, columns)
  int64_t down_stride_h;
  int64_t down_stride_d;
  const void* down_bias;  // (units,) or null
  int64_t down_bias_stride;
  const void* up;  // (columns, units)
  int64_t up_stride_n;
  int64_t up_stride_h;
};

struct AdapterForward : AdapterArguments {
  const void* up_bias;  // (columns,) or null
  int64_t up_bias_stride;
  const void* residual;  // (rows, columns) or null; x itself where it is x
  int64_t residual_stride;
  const void* branch;  // (rows, columns) or null, added to the residual
  int64_t branch_stride;
  void* y;  // (rows, columns) contiguous
};

struct AdapterBackward : AdapterArguments {
  const void* grad;  // (rows, columns)
  int64_t grad_stride;
  bool add_grad;  // x is the residual
  void* grad_x;   // (rows, columns) contiguous, or null
  // (programs, (2 units + 1) columns + units) float32: a row of sums over a program's rows, dD (units, columns), dU^T (units,
  // columns), db_u (columns), db_d (units).
  float* part;
  int64_t programs;
};

// The rows of part added in a fixed order, into contiguous gradients in the weights' dtype; those that are null are not
// wanted.
struct AdapterReduce {
  DType dtype;
  const float* part;
  int64_t programs;
  int64_t columns;
  int units;
  void* grad_down;
  void* grad_down_bias;
  void* grad_up;
  void* grad_up_bias;
};

}  // namespace fastgist
