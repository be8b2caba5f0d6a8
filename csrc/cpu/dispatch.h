// Choosing a row kernel's instruction set at run time. A kernel is a class with a static member
//     template <bool kFma, int kBytes> static FASTGIST_INLINE void rows(arguments)
// whose body is inlined into the functions below and compiled once for each instruction set. kBytes: how many a vector
// has, for loops that hold sums in vector registers.
#pragma once

#include "simd.h"

namespace fastgist::cpu {

template <typename Kernel, typename... Args>
void rows_portable(Args&... args) {
  Kernel::template rows<kPortableFma, 16>(args...);
}
template <typename Kernel, typename... Args>
FASTGIST_TARGET_AVX2 void rows_avx2(Args&... args) {
  Kernel::template rows<true, 32>(args...);
}
template <typename Kernel, typename... Args>
FASTGIST_TARGET_AVX512 void rows_avx512(Args&... args) {
  Kernel::template rows<true, 64>(args...);
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

// The bytes of a vector that run_rows will name.
inline int64_t vector_bytes() { return isa() == Isa::kAvx512 ? 64 : isa() == Isa::kAvx2 ? 32 : 16; }

}  // namespace fastgist::cpu
