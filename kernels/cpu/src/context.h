// The context of every entry point: a chosen instruction set, a thread pool, and the accuracy.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace dpllm {

// The number of digits at each width: 1 (int8) or 2 (16 bits).
struct Accuracy {
  int32_t table_digits[kMaxBits + 1];
  int32_t x_digits[kMaxBits + 1];

  int digits_for(const Matrix& w, int bits) const { return std::max(x_digits[bits], w.x_digits); }
};

struct Context {
  const Isa& isa;
  std::unique_ptr<Pool> pool;
  Accuracy accuracy;
};

// Every entry point that uses the pool holds one of these: calls from several threads are served in turn.
using Turn = std::lock_guard<std::recursive_mutex>;

// Scratch of the calling thread, on a 64-byte boundary, overwritten by the next call. It is not defined in the instruction
// sets' units, because templates of the standard library that they instantiate could be linked into other units.
uint8_t* thread_scratch(size_t bytes);

// A quantised activation row with its memory, reused from call to call.
class ActivationBuffer {
 public:
  Activation* reserve(int columns) {
    const size_t n = size_t(padded(columns));
    if (n > size_) {
      size_ = n;
      digits_ = AlignedBytes(2 * n);
      scales_ = AlignedBytes(n / kGroup * 4 * sizeof(float));
      activation_.high = reinterpret_cast<int8_t*>(digits_.data());
      activation_.low = activation_.high + n;
      activation_.scale = reinterpret_cast<float*>(scales_.data());
    }
    return &activation_;
  }

 private:
  size_t size_ = 0;
  AlignedBytes digits_, scales_;
  Activation activation_{};
};

// Rows per chunk: at least four chunks for each thread, of 8 to 48 KB of weights. Chunks are whole vectors of any
// instruction set: the rest of a vector loop may round differently, and must not depend on the number of threads.
inline int chunk_rows(const Context& c, int rows, int64_t bytes_per_row) {
  constexpr int64_t kVector = 16;
  const int64_t bytes = std::max<int64_t>(bytes_per_row, 1);
  const int64_t fair = rows / (4 * c.pool->threads()) + 1;
  const int64_t size = std::max<int64_t>(std::min<int64_t>(fair, (48 << 10) / bytes + 1), (8 << 10) / bytes + 1);
  return int((size + kVector - 1) / kVector * kVector);
}

// Calls body(first row, last row) for all rows, in parallel.
template <class Body>
void parallel_rows(Context& c, int rows, int64_t bytes_per_row, const Body& body) {
  const int step = chunk_rows(c, rows, bytes_per_row);
  c.pool->run((rows + step - 1) / step, [&](int i) { body(i * step, std::min(rows, (i + 1) * step)); });
}

}  // namespace dpllm
