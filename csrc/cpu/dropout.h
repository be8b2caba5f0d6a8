// Inverted dropout of a matrix on CPU memory by the rule of philox.h: what is kept divided by 1 - p, else 0.
#pragma once

#include "../adapter.h"
#include "parallel.h"

namespace fastgist::cpu {

struct DropoutArguments {
  int64_t rows;
  int64_t columns;
  MatrixView from;
  void* to;  // contiguous, of from's dtype; may be from's memory where that is contiguous too
  int64_t seed;
  double p;
};

void dropout(const DropoutArguments& args, const Parallel& parallel);

}  // namespace fastgist::cpu
