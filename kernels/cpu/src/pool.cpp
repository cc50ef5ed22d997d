#include "pool.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace dpllm {
namespace {

constexpr int kSpins = 20000;     // about half a millisecond: longer than any pause between regions of a step
constexpr int kMaxChunks = 65535;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
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

Pool::Pool(int threads, bool pin) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i, pin] { serve(pin ? i : -1); });
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
  const uint64_t region = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  for (int first = 0; first < chunks; first += kMaxChunks) {  // one round, unless there are very many chunks
    const auto shifted = [&, first](int i) { call(body, first + i); };
    using Shifted = decltype(shifted);
    const int count = chunks - first < kMaxChunks ? chunks - first : kMaxChunks;
    call_ = [](const void* b, int i) { (*static_cast<const Shifted*>(b))(i); };
    body_ = &shifted;
    finished_.store(0, std::memory_order_relaxed);
    const uint64_t number = (region + uint64_t(first / kMaxChunks)) & 0xffffffffu;
    ticket_.store(number << 32 | uint64_t(count) << 16);
    if (sleepers_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work(number);
    for (int spins = 0; finished_.load(std::memory_order_acquire) < count; spins++) {
      pause();
      if (spins > 2000) std::this_thread::yield();  // somebody else has the core our worker needs
    }
  }
}

void Pool::work(uint64_t region) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t chunks = ticket >> 16 & 0xffff, next = ticket & 0xffff;
    if (ticket >> 32 != region || next >= chunks) return;
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
    call_(body_, int(next));  // unchanged until this chunk, too, is finished
    finished_.fetch_add(1, std::memory_order_release);
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void Pool::serve(int core) {
  if (core >= 0) stay_on(core);
  uint64_t seen = 0;
  for (int spins = 0;;) {
    const uint64_t region = ticket_.load() >> 32;
    if (region != seen) {
      seen = region;
      spins = 0;
      work(region);
      continue;
    }
    if (quit_.load(std::memory_order_relaxed)) return;
    pause();
    if (++spins < kSpins) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return quit_ || ticket_.load() >> 32 != seen; });
    sleepers_.fetch_sub(1);
    spins = 0;
  }
}

}  // namespace dpllm
