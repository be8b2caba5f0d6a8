// Which way a launch takes, from what is known of the rows and of the device. Pure host code: csrc/tests/check_plan.cpp
// runs it for every length and architecture.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../bidirectional_kl.h"

namespace fastgist::cuda {

// What the choice needs of a device. 0 shared memory: rows cannot be kept.
struct Device {
  int processors;
  int shared_a_block;      // bytes a block may ask for
  int shared_a_processor;  // bytes that its blocks divide
  int largest_cluster;     // blocks, a power of 2 up to 16; 1 where there are none (before sm_90)
};

constexpr int kSharedReserved = 1024;  // bytes of shared memory that the system takes a block

struct Rows {
  DType dtype;
  int64_t rows;
  int64_t classes;
  bool alike;    // unit stride, and every matrix begins its rows at the same offset from 16 bytes
  bool aligned;  // and that offset is 0 in every row
};

// kWarp, kKept: a warp, or a block or cluster, keeps the row in shared memory. kAgain: a block reads it twice, in
// chunks of 16 bytes. kStrided: element by element.
enum class Path { kWarp, kKept, kAgain, kStrided };

struct Plan {
  Path path;
  int cluster;  // blocks a row
  int threads;  // a row and block
  int rows;     // a block
  int slice;    // chunks of a row that a block keeps, or 0
  int bytes;    // shared memory a block
  int64_t blocks;
};

constexpr int64_t kWarpClasses = 1024;  // rows up to this long belong to one warp
constexpr int kWarpRows = 4;            // of which a block has so many
constexpr int kBlockWarps = 16;         // of a block that keeps a row
constexpr int kAgainWarps = 8;          // of a block that reads a row twice
constexpr int kPartialBytes = 48;       // of a warp's sums, in two sets a warp and two a block
constexpr int64_t kMaxGridX = 2147483647;

inline int element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

inline int shared_bytes(Path path, int slice) {
  if (path == Path::kWarp) return kWarpRows * 2 * slice * 16;
  return 2 * slice * 16 + 2 * (kBlockWarps + 1) * kPartialBytes;
}

// Blocks that a processor runs at once: by the registers, which suffice for so many threads, and by shared memory.
inline int blocks_a_processor(const Device& device, const Plan& plan) {
  const int by_registers = plan.path == Path::kWarp ? 640 / (32 * kWarpRows) : 1024 / (32 * kBlockWarps);
  return std::max(1, std::min(by_registers, device.shared_a_processor / (plan.bytes + kSharedReserved)));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One block or warp a row, or as many as may run at once, each then taking row after row with the copies of the next
// behind the arithmetic of the last.
inline Plan kept_plan(const Rows& in, const Device& device, Path path, int cluster, int slice) {
  const bool warp = path == Path::kWarp;
  Plan plan = {path, cluster, warp ? 32 : kBlockWarps * 32, warp ? kWarpRows : 1, slice, shared_bytes(path, slice), 0};
  const int64_t at_once = static_cast<int64_t>(device.processors) * blocks_a_processor(device, plan);
  plan.blocks = std::min(ceil_div(in.rows, plan.rows), std::max<int64_t>(1, at_once / cluster)) * cluster;
  return plan;
}

// `finish`: a forward that finishes the gradients. A forward or backward alone reads rows as they come.
inline Plan choose(const Rows& in, const Device& device, bool finish) {
  const int64_t lanes = 16 / element_bytes(in.dtype);
  // Chunks of a row, wherever it begins.
  const int64_t chunks = ceil_div(in.classes + (in.aligned ? 0 : lanes - 1), lanes);
  const bool in_chunks = in.alike && in.dtype != DType::kFloat64;
  const bool kept = finish && in_chunks && device.shared_a_block > 0;
  if (kept && in.classes <= kWarpClasses) return kept_plan(in, device, Path::kWarp, 1, static_cast<int>(chunks));
  if (kept) {
    // The fewest blocks that keep the row and leave a processor room for two, that one may read while another waits; or
    // else the fewest that keep it at all. Past 8 a cluster is not portable: only then is 16 asked for.
    for (int at_once = 2; at_once >= 1; --at_once) {
      const int room = std::min(device.shared_a_block, device.shared_a_processor / at_once - kSharedReserved);
      for (int cluster = 1; cluster <= std::min(device.largest_cluster, at_once == 2 ? 8 : 16); cluster *= 2) {
        const int64_t slice = ceil_div(chunks, cluster);
        if (slice <= (room - shared_bytes(Path::kKept, 0)) / (2 * 16)) {
          return kept_plan(in, device, Path::kKept, cluster, static_cast<int>(slice));
        }
      }
    }
  }
  const bool warp = in_chunks && !finish && in.classes <= kWarpClasses;
  const int rows = warp ? kWarpRows : 1;
  return {in_chunks ? Path::kAgain : Path::kStrided,
          1,
          warp ? 32 : kAgainWarps * 32,
          rows,
          0,
          0,
          std::min(ceil_div(std::max<int64_t>(in.rows, 1), rows), kMaxGridX)};
}

}  // namespace fastgist::cuda
