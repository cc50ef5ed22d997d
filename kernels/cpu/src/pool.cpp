#include "pool.h"

#include <algorithm>

#if defined(__linux__)
#include <sched.h>
#endif

namespace dpllm {
namespace {

constexpr int kSpins = 20000;      // about half a millisecond: longer than the pauses between the regions of a step
constexpr int kMaxChunks = 65535;  // per round: a stretch counts them in 16 bits

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// The cores that this process may use; empty where they cannot be chosen.
std::vector<int> usable_cores() {
  std::vector<int> cores;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int i = 0; i < CPU_SETSIZE; i++)
      if (CPU_ISSET(i, &set)) cores.push_back(i);
#endif
  return cores;
}

void stay_on(int core) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  sched_setaffinity(0, sizeof set, &set);
#else
  (void)core;
#endif
}

}  // namespace

void Pool::begin() {
  const std::vector<int> cores = pin_ ? usable_cores() : std::vector<int>();
  for (int i = 1; i < threads_; i++) {
    const int core = cores.empty() ? -1 : cores[size_t(i) % cores.size()];
    workers_.emplace_back([this, i, core] { serve(i, core); });
  }
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    quit_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::start(int chunks, Call call, const void* body) {
  if (workers_.empty()) begin();
  call_ = call;
  body_ = body;
  for (int first = 0; first < chunks; first += kMaxChunks) round(first, std::min(chunks - first, kMaxChunks));
}

void Pool::round(int first, int chunks) {
  const int n = threads();
  first_ = first;
  finished_.store(0, std::memory_order_relaxed);
  region_ = (region_ + 1) & 0xffffffffu;
  for (int i = n - 1; i >= 0; i--) {
    const uint64_t from = uint64_t(chunks) * i / n, to = uint64_t(chunks) * (i + 1) / n;
    stretches_[i].word.store(region_ << 32 | to << 16 | from);
  }
  if (sleepers_.load()) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  work(0, region_);
  for (int spins = 0; finished_.load(std::memory_order_acquire) < chunks; spins++) {
    pause();
    if (spins > 2000) std::this_thread::yield();  // another program may have the core that our worker needs
  }
}

// Claims chunks of this region until there are none, those of the thread's own stretch first.
void Pool::work(int self, uint64_t region) {
  const int n = threads();
  int done = 0;
  for (int i = 0; i < n; i++) {
    std::atomic<uint64_t>& word = stretches_[(self + i) % n].word;
    uint64_t seen = word.load(std::memory_order_acquire);
    while (seen >> 32 == region && (seen & 0xffff) < (seen >> 16 & 0xffff)) {
      if (!word.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
      call_(body_, first_ + int(seen & 0xffff));  // the job is not replaced before this chunk is reported as finished
      done++;
      seen = word.load(std::memory_order_acquire);
    }
  }
  if (done) finished_.fetch_add(done, std::memory_order_release);
}

void Pool::serve(int self, int core) {
  if (core >= 0) stay_on(core);
  const std::atomic<uint64_t>& word = stretches_[self].word;
  uint64_t seen = 0;
  for (int spins = 0;;) {
    const uint64_t region = word.load() >> 32;
    if (region != seen) {
      seen = region;
      spins = 0;
      work(self, region);
      continue;
    }
    if (quit_.load(std::memory_order_relaxed)) return;
    pause();
    if (++spins < kSpins) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return quit_ || word.load() >> 32 != seen; });
    sleepers_.fetch_sub(1);
    spins = 0;
  }
}

}  // namespace dpllm
