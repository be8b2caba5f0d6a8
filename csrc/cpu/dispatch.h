// Choosing a row kernel's instruction set at run time. A kernel is a class with a static member
//     template <bool kFma> static FASTGIST_INLINE void rows(arguments)
// whose body is inlined into the functions below and compiled once for each instruction set.
#pragma once

#include "simd.h"

namespace fastgist::cpu {

template <typename Kernel, typename... Args>
void rows_portable(Args&... args) {
  Kernel::template rows<kPortableFma>(args...);
}
template <typename Kernel, typename... Args>
FASTGIST_TARGET_AVX2 void rows_avx2(Args&... args) {
  Kernel::template rows<true>(args...);
}
template <typename Kernel, typename... Args>
FASTGIST_TARGET_AVX512 void rows_avx512(Args&... args) {
  Kernel::template rows<true>(args...);
}

template <typename Kernel, typename... Args>
void run_rows(Args&&... args) {
  switch (isa()) {
    case Isa::kAvx512:
      return rows_avx512<Kernel>(args...);
    case Isa::kAvx2:
      return rows_avx2<Kernel>(args...);
    case Isa::kPortable:
      return rows_portable<Kernel>(args...);
  }
}

}  // namespace fastgist::cpu
