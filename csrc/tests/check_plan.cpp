// The way that csrc/cuda/plan.h chooses for rows of every length on every architecture, without a GPU.
// tests/aot/test_csrc.py runs it.
#include <cstdio>
#include <initializer_list>

#include "../cuda/plan.h"

namespace {

using namespace fastgist;
using namespace fastgist::cuda;

int failures = 0;

void expect(bool ok, const char* what, const Rows& in, const Device& device, const Plan& plan) {
  if (ok) return;
  if (++failures <= 30) {
    std::printf("%s: %d bytes, %lld x %lld, %s, clusters of %d: path %d, cluster %d, slice %d, %d bytes, %lld blocks\n",
                what, element_bytes(in.dtype), static_cast<long long>(in.rows), static_cast<long long>(in.classes),
                in.aligned ? "aligned"
                : in.alike ? "alike"
                           : "unlike",
                device.largest_cluster, static_cast<int>(plan.path), plan.cluster, plan.slice, plan.bytes,
                static_cast<long long>(plan.blocks));
  }
}

constexpr int kKiB = 1024;
constexpr Device kA100 = {108, 163 * kKiB, 164 * kKiB, 1};
constexpr Device kH100 = {132, 227 * kKiB, 228 * kKiB, 16};
constexpr Device kB200 = {148, 227 * kKiB, 228 * kKiB, 16};
constexpr Device kSmallest = {20, 99 * kKiB, 100 * kKiB, 1};  // sm_86, sm_89 and sm_120 give a block no more

// What must hold of every plan.
void check(const Rows& in, const Device& device, bool finish) {
  const Plan plan = choose(in, device, finish);
  const auto ok = [&](bool truth, const char* what) { expect(truth, what, in, device, plan); };
  const int64_t lanes = 16 / element_bytes(in.dtype);
  const bool kept = plan.path == Path::kWarp || plan.path == Path::kKept;
  ok(plan.blocks >= 1 && plan.blocks <= kMaxGridX && plan.blocks % plan.cluster == 0, "blocks");
  ok(plan.cluster <= std::max(1, device.largest_cluster), "a cluster that the device does not run");
  ok(plan.threads * plan.rows <= 1024, "threads");
  ok(plan.bytes <= device.shared_a_block || !kept, "shared memory");
  ok(plan.bytes <= 48 * kKiB || plan.path == Path::kKept, "shared memory that nobody asked for");
  ok(plan.path != Path::kStrided || !in.alike || in.dtype == DType::kFloat64, "element by element for no reason");
  ok(in.alike || plan.path == Path::kStrided, "chunks of rows that do not begin alike");
  ok(in.dtype != DType::kFloat64 || plan.path == Path::kStrided, "float64 in chunks");
  ok(finish || !kept, "a pass alone keeps nothing");
  if (!kept) return;
  // The worst head and the row fit the slices, and their sums the bytes.
  const int64_t head = in.aligned ? 0 : lanes - 1;
  ok(static_cast<int64_t>(plan.slice) * plan.cluster * lanes >= head + in.classes, "chunks without a place");
  const int partial = plan.path == Path::kWarp ? 0 : 2 * (kBlockWarps + 1) * kPartialBytes;
  ok(plan.bytes >= plan.rows * 2 * plan.slice * 16 + partial, "bytes");
  ok(plan.path != Path::kWarp || in.classes <= kWarpClasses, "a long row on a warp");
  // No fewer blocks would do: half the cluster would leave no room for two at once, or for one.
  if (plan.path == Path::kKept && plan.cluster > 1) {
    const int wider = shared_bytes(Path::kKept, 2 * plan.slice - 1);
    const bool two_at_once = 2 * (plan.bytes + kSharedReserved) <= device.shared_a_processor;
    const int room = two_at_once ? device.shared_a_processor / 2 - kSharedReserved : device.shared_a_block;
    ok(wider > room - 32, "more blocks than needed");
  }
}

void expect_plan(DType dtype, int64_t classes, const Device& device, Path path, int cluster) {
  const Rows in = {dtype, 8192, classes, true, classes % 8 == 0};
  const Plan plan = choose(in, device, true);
  expect(plan.path == path && plan.cluster == cluster, "another way than meant", in, device, plan);
}

}  // namespace

int main() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t classes :
         {0, 1, 2, 127, 1000, 1024, 1025, 28000, 32000, 50257, 128256, 131073, 151936, 262144, 1000000}) {
      for (int64_t rows : {1, 2, 7, 132, 8192, 3000000}) {
        for (const Device& device : {kA100, kH100, kB200, kSmallest, Device{}}) {
          for (const bool finish : {true, false}) {
            check({dtype, rows, classes, true, true}, device, finish);
            check({dtype, rows, classes, true, false}, device, finish);
            check({dtype, rows, classes, false, false}, device, finish);
          }
        }
      }
    }
  }
  const DType half = DType::kBFloat16, single = DType::kFloat32;
  for (const Device& device : {kA100, kH100, kB200}) {
    for (int64_t classes : {1, 2, 127, 1000}) expect_plan(half, classes, device, Path::kWarp, 1);
    expect_plan(single, 1000, device, Path::kWarp, 1);
    expect_plan(half, 1000000, device, Path::kAgain, 1);  // 4 MB a pair
  }
  expect_plan(half, 32000, kA100, Path::kKept, 1);
  expect_plan(half, 50257, kA100, Path::kAgain, 1);
  expect_plan(half, 128256, kA100, Path::kAgain, 1);
  expect_plan(half, 28000, kH100, Path::kKept, 1);
  expect_plan(half, 32000, kH100, Path::kKept, 2);
  expect_plan(half, 50257, kH100, Path::kKept, 2);
  expect_plan(half, 128256, kH100, Path::kKept, 8);
  expect_plan(half, 131073, kH100, Path::kKept, 8);
  expect_plan(single, 32000, kH100, Path::kKept, 4);
  expect_plan(single, 128256, kH100, Path::kKept, 8);
  expect_plan(single, 262144, kB200, Path::kKept, 16);
  expect_plan(half, 32000, kSmallest, Path::kAgain, 1);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
