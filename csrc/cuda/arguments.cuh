// What a launch is told: a kernel's arguments from those of a call, and how its rows lie. Host code.
#pragma once

#include <algorithm>

#include "loss_rows.cuh"
#include "plan.h"

namespace fastgist::cuda {

// Offset from 16 bytes at which rows begin, and by how much it moves a row.
struct Beginning {
  int64_t offset, step;

  Beginning(const void* data, int64_t stride, int bytes, int64_t rows)
      : offset(static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % kVectorBytes)),
        step(rows > 1 ? (stride * bytes % kVectorBytes + kVectorBytes) % kVectorBytes : 0) {}
  bool operator==(const Beginning& other) const { return offset == other.offset && step == other.step; }
};

template <typename A>
Rows rows_of(const Arguments<A>& args) {
  const LogitPair& in = args.in;
  const int bytes = element_bytes(in.dtype);
  const bool unit = in.classes <= 1 || (in.z_stride_v == 1 && in.o_stride_v == 1);
  const Beginning begins(in.z, in.z_stride_m, bytes, in.rows);
  bool alike = unit && begins == Beginning(in.o, in.o_stride_m, bytes, in.rows);
  const void* const grads[] = {args.grad_z, args.grad_o};
  for (const void* grad : grads) {
    alike = alike && (grad == nullptr || begins == Beginning(grad, in.classes, bytes, in.rows));
  }
  return {in.dtype, in.rows, in.classes, alike, alike && begins.offset == 0 && begins.step == 0};
}

template <typename A>
Arguments<A> arguments_of(const LogitPair& in) {
  Arguments<A> args = {};
  args.in = in;
  args.inv_t = static_cast<A>(1.0 / in.temperature);
  args.to_exp2 = static_cast<A>(kLog2E / in.temperature);
  args.scale = A(1);
  args.kl_z = args.kl_o = true;
  return args;
}

template <typename A>
Arguments<A> arguments_of(const GistLossInputs& in) {
  Arguments<A> args = arguments_of<A>(in.logits);
  const bool soft = in.target.classes == nullptr;
  args.target = in.target;
  args.target_bytes = element_bytes(in.target.dtype);
  args.ignore_index = in.ignore_index;
  args.alpha = static_cast<A>(in.alpha);
  args.beta = static_cast<A>(in.beta);
  args.keep = static_cast<A>(1 - in.label_smoothing);
  args.even = static_cast<A>(in.label_smoothing / static_cast<double>(std::max<int64_t>(1, in.logits.classes)));
  for (int power = 1; power <= 4; ++power) {
    if (in.logits.temperature == power) args.power = power;
  }
  args.beta_in_gradients = static_cast<A>(in.beta_z != 0 ? in.beta_z : in.beta_o);
  args.kl_z = in.beta_z != 0;
  args.kl_o = in.beta_o != 0;
  args.dense = soft || in.label_smoothing != 0;
  const int bytes = element_bytes(in.logits.dtype);
  args.soft_chunks = soft && in.target.dtype == in.logits.dtype &&
                     (in.target.stride_v == 1 || in.logits.classes <= 1) &&
                     Beginning(in.target.weights, in.target.stride_m, bytes, in.logits.rows) ==
                         Beginning(in.logits.z, in.logits.z_stride_m, bytes, in.logits.rows);
  return args;
}

template <typename A>
void finish_into(Arguments<A>& args, const FinishedOutputs& out) {
  args.scale = static_cast<A>(out.scale);
  args.divisor = static_cast<const A*>(out.divisor);
  args.row_loss = static_cast<A*>(out.row_loss);
  args.grad_z = out.grad_z;
  args.grad_o = out.grad_o;
}

}  // namespace fastgist::cuda
