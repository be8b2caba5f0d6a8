// The caller's threads, as the CPU ops see them. The ops themselves know neither torch nor a thread library.
#pragma once

#include <cstdint>
#include <functional>

namespace fastgist::cpu {

using Range = std::function<void(int64_t begin, int64_t end)>;

struct Parallel {
  int64_t threads;
  // Calls `body` for ranges that together are [0, tasks), none but the last shorter than `grain`, and waits for them.
  void (*each)(int64_t tasks, int64_t grain, const Range& body);
};

}  // namespace fastgist::cpu
