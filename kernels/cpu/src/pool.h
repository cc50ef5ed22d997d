// A small pool of threads for regions of a few hundred microseconds.
//
// Work is cut into more chunks than threads, claimed one at a time: when another program takes a core, its chunks go to
// the others instead of stretching every region to the slowest thread. One atomic word holds the region's number,
// its chunk count and the next chunk, so a thread that comes late can neither claim a chunk of another region nor
// read a job that is being replaced. Who runs a chunk never changes a result.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace dpllm {

class Pool {
 public:
  // threads counts the caller's. pin: thread i stays on core i (Linux).
  Pool(int threads, bool pin);
  ~Pool();
  Pool(const Pool&) = delete;

  int threads() const { return int(workers_.size()) + 1; }

  // body(chunk) for every chunk in 0..chunks-1, on all threads; returns when all are done. Not to be nested.
  template <class Body>
  void run(int chunks, const Body& body) {
    if (chunks <= 1 || workers_.empty()) {
      for (int i = 0; i < chunks; i++) body(i);
      return;
    }
    start(chunks, [](const void* b, int i) { (*static_cast<const Body*>(b))(i); }, &body);
  }

 private:
  using Call = void (*)(const void*, int);

  void start(int chunks, Call call, const void* body);
  void work(uint64_t region);
  void serve(int core);

  std::vector<std::thread> workers_;
  std::atomic<uint64_t> ticket_{0};  // region << 32 | chunks << 16 | next chunk
  std::atomic<int> finished_{0};
  Call call_ = nullptr;
  const void* body_ = nullptr;
  std::atomic<int> sleepers_{0};
  std::atomic<bool> quit_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace dpllm
