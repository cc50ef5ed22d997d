// A small pool of threads for regions of a few hundred microseconds.
//
// Each thread gets a contiguous stretch of the chunks, so that it reads memory in one sweep. A thread that is done takes
// chunks of other stretches, so that a core that another program occupies does not delay the region. A stretch is one
// atomic word that also carries the region's number, so a late thread can neither claim a chunk of another region nor read
// a job that is being replaced. A result does not depend on which thread runs a chunk.
//
// The threads start with the first region that needs them, so that a pool which is never used costs nothing.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dpllm {

class Pool {
 public:
  // threads includes the caller's. pin: thread i stays on the i-th core that this process may use (Linux).
  Pool(int threads, bool pin) : threads_(threads), pin_(pin), stretches_(new Stretch[size_t(threads)]) {}
  ~Pool();
  Pool(const Pool&) = delete;

  int threads() const { return threads_; }
  bool pinned() const { return pin_; }

  // Held by whoever uses the pool, from the first region of a call to the last. Recursive, because a callback from
  // between two regions may make another call.
  std::recursive_mutex turn;

  // Calls body(chunk) for every chunk in 0..chunks-1, on all threads; returns when all are done. The caller holds `turn`
  // where other threads may use the pool. Calls must not be nested.
  template <class Body>
  void run(int chunks, const Body& body) {
    if (chunks <= 1 || threads_ == 1) {
      for (int i = 0; i < chunks; i++) body(i);
      return;
    }
    start(chunks, [](const void* b, int i) { (*static_cast<const Body*>(b))(i); }, &body);
  }

 private:
  using Call = void (*)(const void*, int);
  struct alignas(64) Stretch {
    std::atomic<uint64_t> word{0};  // region << 32 | end << 16 | next, in chunks
  };

  void begin();
  void start(int chunks, Call call, const void* body);
  void round(int first, int chunks);
  void work(int self, uint64_t region);
  void serve(int self, int core);

  const int threads_;
  const bool pin_;
  std::vector<std::thread> workers_;
  std::unique_ptr<Stretch[]> stretches_;
  uint64_t region_ = 0;
  std::atomic<int> finished_{0};
  Call call_ = nullptr;
  const void* body_ = nullptr;
  int first_ = 0;
  std::atomic<int> sleepers_{0};
  std::atomic<bool> quit_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace dpllm
