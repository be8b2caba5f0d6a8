// What the checks of csrc/cpu without torch or Python share. Buffers have exactly the size they need, so an access past
// an end is seen.
#pragma once

#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "../bidirectional_kl.h"
#include "../cpu/parallel.h"
#include "../cpu/simd.h"

namespace fastgist::check {

using cpu::BFloat16;
using cpu::Half;
using Real = long double;

inline int failures = 0;

inline void expect(bool ok, const char* what, const char* type, int64_t classes, double got, double wanted) {
  if (ok) return;
  if (++failures <= 20) {
    std::printf("%s (%s, %lld classes): got %.9g, want %.9g\n", what, type, static_cast<long long>(classes), got,
                wanted);
  }
}

// Calls as a number of threads would make them, one after the other and the last one first.
inline cpu::Parallel threads(int64_t count) {
  return {count, [](int64_t tasks, int64_t, const cpu::Range& body) {
            for (int64_t end = tasks; end > 0; end = end * 2 / 3) body(end * 2 / 3, end);
          }};
}

// A (rows, classes) matrix in a buffer of its own that ends with its last element.
template <typename T>
struct Matrix {
  int64_t rows, classes, stride_m, stride_v;
  std::unique_ptr<T[]> buffer;

  Matrix(int64_t rows, int64_t classes, int64_t stride_m, int64_t stride_v)
      : rows(rows), classes(classes), stride_m(stride_m), stride_v(stride_v) {
    const int64_t size = (rows - 1) * stride_m + (classes - 1) * stride_v + 1;
    buffer.reset(new T[size]);
    for (int64_t i = 0; i < size; ++i)
      cpu::store(std::numeric_limits<typename cpu::Accumulate<T>::type>::quiet_NaN(), buffer[i]);
  }
  T& at(int64_t row, int64_t v) { return buffer[row * stride_m + v * stride_v]; }
};

// Every format, layout and length that a check is to see: check.template operator()<T>(name, dtype, what storing costs,
// classes, stride_m, stride_v).
template <typename Check>
void everywhere(const Check& check) {
  for (int64_t classes : {1, 2, 15, 16, 17, 127, 1000, 1023, 1024, 1025, 4097}) {
    const int64_t strides[][2] = {{classes, 1}, {classes + 3, 1}, {3 * classes, 3}, {1, 4}, {0, 1}};
    for (const auto& stride : strides) {
      check.template operator()<float>("float", DType::kFloat32, 0.0, classes, stride[0], stride[1]);
      check.template operator()<double>("double", DType::kFloat64, 0.0, classes, stride[0], stride[1]);
      check.template operator()<BFloat16>("bfloat16", DType::kBFloat16, 0x1p-8, classes, stride[0], stride[1]);
      check.template operator()<Half>("half", DType::kFloat16, 0x1p-11, classes, stride[0], stride[1]);
    }
  }
  // Several stretches, the last one short.
  check.template operator()<float>("float", DType::kFloat32, 0.0, 33001, 33001, 1);
  check.template operator()<Half>("half", DType::kFloat16, 0x1p-11, 33001, 33001, 1);
}

}  // namespace fastgist::check
