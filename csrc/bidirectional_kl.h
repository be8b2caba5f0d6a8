// bidirectional_kl on raw pointers: the arguments that the CPU op (csrc/cpu) and the CUDA kernels (csrc/cuda) share.
//
// For each row, with z and o the two logits, T the temperature and m the row maxima:
//     zc = z - m_z    oc = o - m_o    d = zc - oc    p^ = exp(zc / T)    q^ = exp(oc / T)
//     S_p = sum p^    S_q = sum q^    e_p = sum p^ d / S_p    e_q = sum q^ d / S_q
//     loss   = (e_p - e_q) / T                                 ( = KL(p || q) + KL(q || p) )
//     grad_z = g / T * ( p / T (d - e_p) + p - q)              with p = p^ / S_p, q = q^ / S_q, g = row_grad
//     grad_o = g / T * (-q / T (d - e_q) + q - p)
// Subtracting the maxima inside d changes nothing (an offset of d cancels in e_p - e_q) and keeps an offset between the
// two heads out of the arithmetic.
//
// A class at -inf on both sides contributes 0 and gets gradient 0. A class at -inf on one side makes the row's loss
// +inf and its gradients NaN (e_p and e_q are stored as NaN to say so). NaN, +inf, or a side that is all -inf: NaN, in
// that row.
#pragma once

#include <cstdint>

namespace fastgist {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Two (rows, classes) matrices of one dtype, any strides (in elements, 0 included).
struct LogitPair {
  DType dtype;
  int64_t rows;
  int64_t classes;
  double temperature;
  const void* z;
  int64_t z_stride_m;
  int64_t z_stride_v;
  const void* o;
  int64_t o_stride_m;
  int64_t o_stride_v;
  const bool* mask;  // (rows,) or null; false: the row counts nowhere and its logits are not read
  int64_t mask_stride;
};

// The accumulation type A below is double for kFloat64 and float for everything else.

// Rows of the (kStats, rows) tensor that the forward leaves for the backward; 0 where the mask is false.
enum Stat { kMaxZ, kMaxO, kSumP, kSumQ, kMeanP, kMeanQ, kStats };

struct ForwardOutputs {
  void* row_loss;  // A (rows,)
  void* stats;     // A (kStats, rows)
};

struct BackwardArguments {
  const void* stats;     // A (kStats, rows)
  const void* row_grad;  // A (rows,)
  int64_t row_grad_stride;
  void* grad_z;  // dtype (rows, classes) contiguous, or null: not wanted
  void* grad_o;  // the same
};

// The forward that finishes the gradients too, of loss = scale / divisor * (sum of the row losses): each logit is read
// from memory once where the pair of rows fits on chip, and no statistics are left.
struct FinishedOutputs {
  double scale;
  const void* divisor;  // A, one number (on the logits' device), or null: 1
  void* row_loss;       // A (rows,): the row losses times scale / divisor
  void* loss;           // A, one number: their sum, added up in an order that depends on the shape alone
  void* grad_z;         // dtype (rows, classes) contiguous, or null: not wanted
  void* grad_o;         // the same
};

}  // namespace fastgist
