// The thread pool: every chunk exactly once, whatever the sizes, with and without pauses between the regions.
#include <chrono>
#include <thread>

#include "check.h"

namespace test {
namespace {

// Plain counters: that threads do not collide on them is for the thread sanitizer to see.
void check_region(dpllm::Pool& pool, int chunks) {
  std::vector<int> runs(size_t(chunks), 0);
  pool.run(chunks, [&](int i) { runs[size_t(i)]++; });
  for (int i = 0; i < chunks; i++)
    CHECK(runs[size_t(i)] == 1, text("chunk %d of %d ran %d times", i, chunks, runs[size_t(i)]));
}

void check_sums(dpllm::Pool& pool, int regions, Random& random) {
  std::vector<int64_t> values(64, 1);  // each region reads what the last one wrote
  int64_t right = 1;
  for (int i = 0; i < regions; i++) {
    const int64_t step = random.below(5);
    pool.run(64, [&](int j) { values[size_t(j)] += values[size_t(j)] % 3 + step; });
    right += right % 3 + step;
  }
  for (const int64_t value : values) CHECK(value == right, "a region started before the last one was over");
}

}  // namespace

void test_pool(const Options& o) {
  Random random(4);
  for (int threads : kThreads)
    for (bool pin : {false, true}) {
      where = text("%d threads%s", threads, pin ? ", pinned" : "");
      dpllm::Pool pool(threads, pin);
      CHECK(pool.threads() == threads, text("there are %d", pool.threads()));
      for (int i = 0; i < (o.quick ? 20 : 400); i++) check_region(pool, random.below(1000) + 1);
      for (int chunks = 0; chunks < 20; chunks++) check_region(pool, chunks);
      check_region(pool, 70000);  // more than one round
      check_sums(pool, o.quick ? 100 : 3000, random);
      for (int pause : {1, 5, 30}) {  // milliseconds: the workers sleep, or are about to
        std::this_thread::sleep_for(std::chrono::milliseconds(pause));
        check_region(pool, 50);
      }
    }
}

}  // namespace test
