// Philox4x32-10 (Salmon et al., SC 2011) and the rule of dropout's masks, as fastgist/reference/philox.py states it:
// columns 4q .. 4q + 3 of row m take the words of counter m ceil(R / 4) + q.
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastgist::cpu {

// Counters that are taken together: vectors of the widest instruction set hold sixteen words.
constexpr int64_t kPhiloxLanes = 16;

// The four words of counters first .. first + kPhiloxLanes - 1, counter by counter.
FASTGIST_INLINE void philox_block(uint64_t seed, uint64_t first, uint32_t* words) {
  uint32_t a[kPhiloxLanes], b[kPhiloxLanes], c[kPhiloxLanes], d[kPhiloxLanes];
#pragma omp simd
  for (int64_t i = 0; i < kPhiloxLanes; ++i) {
    const uint64_t counter = first + static_cast<uint64_t>(i);
    a[i] = static_cast<uint32_t>(counter);
    b[i] = static_cast<uint32_t>(counter >> 32);
    c[i] = d[i] = 0;
  }
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int64_t i = 0; i < kPhiloxLanes; ++i) {
      const uint64_t wide_0 = static_cast<uint64_t>(a[i]) * 0xD2511F53u;
      const uint64_t wide_1 = static_cast<uint64_t>(c[i]) * 0xCD9E8D57u;
      a[i] = static_cast<uint32_t>(wide_1 >> 32) ^ b[i] ^ key_0;
      b[i] = static_cast<uint32_t>(wide_1);
      c[i] = static_cast<uint32_t>(wide_0 >> 32) ^ d[i] ^ key_1;
      d[i] = static_cast<uint32_t>(wide_0);
    }
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
#pragma omp simd
  for (int64_t i = 0; i < kPhiloxLanes; ++i) {
    words[4 * i] = a[i];
    words[4 * i + 1] = b[i];
    words[4 * i + 2] = c[i];
    words[4 * i + 3] = d[i];
  }
}

struct Dropout {
  uint64_t seed;
  uint32_t least;  // of the upper 31 bits of a word whose element is kept: floor(p 2^31), at most 2^31 - 1
  double keep;     // 1 - p, by which what is kept is divided
  int64_t quads;   // counters a row

  Dropout(int64_t seed, double p, int64_t columns)
      : seed(static_cast<uint64_t>(seed)),
        least(static_cast<uint32_t>(std::min(std::floor(p * 0x1p31), 0x1p31 - 1))),
        keep(1.0 - p),
        quads((columns + 3) / 4) {}

  // Whether the word's element stays.
  FASTGIST_INLINE bool keeps(uint32_t word) const { return (word >> 1) >= least; }

  // Words that words() may write: those of `rows` rows, and the rest of the last block.
  int64_t room(int64_t rows) const { return 4 * (rows * quads + kPhiloxLanes); }

  // The words of `rows` rows from `row` on, 4 quads each; into room(rows) of them.
  FASTGIST_INLINE void words(int64_t row, int64_t rows, uint32_t* out) const {
    const int64_t counters = rows * quads;
    const uint64_t first = static_cast<uint64_t>(row) * static_cast<uint64_t>(quads);
    for (int64_t i = 0; i < counters; i += kPhiloxLanes) {
      philox_block(seed, first + static_cast<uint64_t>(i), out + 4 * i);
    }
  }
};

}  // namespace fastgist::cpu
