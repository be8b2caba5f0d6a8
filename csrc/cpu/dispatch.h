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

// The same for kernels that hold sums in vector registers and so ask how many bytes one has: a static member
//     template <bool kFma, int kBytes> static FASTGIST_INLINE void tiles(arguments)
template <typename Kernel, typename... Args>
void tiles_portable(Args&... args) {
  Kernel::template tiles<kPortableFma, 16>(args...);
}
template <typename Kernel, typename... Args>
FASTGIST_TARGET_AVX2 void tiles_avx2(Args&... args) {
  Kernel::template tiles<true, 32>(args...);
}
template <typename Kernel, typename... Args>
FASTGIST_TARGET_AVX512 void tiles_avx512(Args&... args) {
  Kernel::template tiles<true, 64>(args...);
}

template <typename Kernel, typename... Args>
void run_tiles(Args&&... args) {
  switch (isa()) {
    case Isa::kAvx512:
      return tiles_avx512<Kernel>(args...);
    case Isa::kAvx2:
      return tiles_avx2<Kernel>(args...);
    case Isa::kPortable:
      return tiles_portable<Kernel>(args...);
  }
}

// The bytes of a vector that run_tiles will name.
inline int64_t vector_bytes() { return isa() == Isa::kAvx512 ? 64 : isa() == Isa::kAvx2 ? 32 : 16; }

}  // namespace fastgist::cpu
