// Decode attention, split over heads and fixed stretches of positions.
#pragma once

#include <cmath>

#include "context.h"

namespace dpllm {

struct Attention {
  const float* q;        // [heads, dim]
  const char *k, *v;     // flat [slots, dim]
  const int64_t* start;  // [kv_heads]
  const int32_t* length;
  int heads, kv_heads, dim;
  float scale;
  Storage storage;
  float* out;  // [heads, dim]
};

// Memory of the partial results, reused from call to call.
class AttentionBuffer {
 public:
  void run(Context& c, const Attention& a);

 private:
  struct Part {
    int head;
    int64_t first;
    int length;
  };
  void split(const Attention& a);
  void merge(const Attention& a, int head, size_t& part) const;

  std::vector<Part> parts_;
  std::vector<int> order_;  // the order in which parts are computed
  std::vector<float> scratch_, out_, top_, sum_;
};

}  // namespace dpllm
