// Drawing a token from logits.
//
// A token is the winner of a race: the clock of token i rings after an exponential time of mean 1 / p[i], and the first to
// ring is drawn, which is token i with probability p[i]. The clocks depend on the seed, the number of the draw and the
// token alone, so that two similar distributions that share them mostly agree (drafts rely on that).
#pragma once

#include <cstdint>

namespace dpllm {

constexpr int kDrawBlock = 16;         // logits whose largest is remembered
constexpr float kLeastScore = -87.f;   // of the likeliest token's score; anything less has no weight in float32

// How a token is drawn. The order is penalty, temperature, top-k, top-p, min-p.
struct Draw {
  double temperature;   // 0: the token of the largest logit
  double top_p;         // 1: all
  double min_p;         // 0: all
  double penalty;       // 1: none
  const int64_t* seen;  // [seen_count] different tokens to be made less likely
  int64_t seen_count;
  uint64_t seed;
  uint32_t number;  // of the draw
  int32_t top_k;    // 0: all
};

}  // namespace dpllm
