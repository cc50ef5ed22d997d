// The passes over a vocabulary with which a token is drawn (draw.cpp), written over vectors of floats. Included by ops.h.
#pragma once

#include "draw.h"

namespace dpllm {
namespace {

typedef uint32_t Words __attribute__((vector_size(sizeof(Floats))));

// The last values of an array whose length is not a whole number of vectors, filled up.
inline Floats load_rest(const float* x, int n, float fill) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; i++) lanes[i] = i < n ? x[i] : fill;
  return load<Floats>(lanes);
}

void block_largest(const float* x, int n, float* out) {
  for (int i = 0; i < n; i += kDrawBlock) *out++ = largest(x + i, std::min(kDrawBlock, n - i));
}

// Sums up part(i) over whole vectors, and last(i, n) of the last n < kLanes values, in double precision from time to time.
template <class Part, class Last>
inline double sum_in_parts(int n, Part part, Last last) {
  constexpr int kTogether = 1024;  // values that are summed up in float32
  double total = 0;
  int i = 0;
  while (i + kLanes <= n) {
    Floats sums{};
    for (const int end = std::min(n, i + kTogether); i + kLanes <= end; i += kLanes) sums += part(i);
    total += sum(sums);
  }
  return i < n ? total + sum(last(i, n - i)) : total;
}

double exponentials(const float* x, int n, float top, float inverse, float* out) {
  const auto weights = [&](Floats v) {
    v = (v - top) * inverse;
    return v > kLeastScore ? exp(v) : all(0.f);  // NaN is not larger than anything
  };
  return sum_in_parts(
      n,
      [&](int i) {
        const Floats w = weights(load<Floats>(x + i));
        store(out + i, w);
        return w;
      },
      [&](int i, int rest) {
        const Floats w = weights(load_rest(x + i, rest, -INFINITY));
        for (int lane = 0; lane < rest; lane++) out[i + lane] = w[lane];
        return w;
      });
}

double sum_above(const float* x, const float* weights, int n, float least) {
  return sum_in_parts(
      n, [&](int i) { return load<Floats>(x + i) >= least ? load<Floats>(weights + i) : all(0.f); },
      [&](int i, int rest) {
        return load_rest(x + i, rest, -INFINITY) >= least ? load_rest(weights + i, rest, 0.f) : all(0.f);
      });
}

// Threefry-2x32 with 13 rounds: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". It turns
// two counters into 64 random bits. W: uint32_t, or a vector of these.
template <class W>
DPLLM_INLINE void threefry(W& a, W& b, uint32_t key0, uint32_t key1) {
  constexpr int kRotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  const uint32_t keys[3] = {key0, key1, 0x1BD11BDAu ^ key0 ^ key1};
  a += keys[0], b += keys[1];
#pragma GCC unroll 13
  for (int round = 0; round < 13; round++) {
    const int r = kRotations[round % 8];
    a += b;
    b = (b << r | b >> (32 - r)) ^ a;
    if (round % 4 == 3) {
      const int turn = round / 4 + 1;
      a += keys[turn % 3], b += keys[(turn + 1) % 3] + uint32_t(turn);
    }
  }
}

int race(const int32_t* ids, const float* weights, int n, uint64_t seed, uint32_t number) {
  const uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  Words count{};
  for (int lane = 0; lane < kLanes; lane++) count[lane] = uint32_t(lane);
  double best = 0;  // the largest quotient so far
  float bar = 0;    // a little less, so that rounding never excludes a winner
  int winner = -1;
  for (int i = 0; i < n; i += kLanes) {
    const bool whole = i + kLanes <= n;
    Words a = count + uint32_t(i), b = Words{} + number;
    if (ids) {
      if (whole) a = load<Words>(ids + i);
      else
        for (int lane = 0; i + lane < n; lane++) a[lane] = uint32_t(ids[i + lane]);
    }
    threefry(a, b, key0, key1);
    const Floats weight = whole ? load<Floats>(weights + i) : load_rest(weights + i, n - i, 0.f);
    // -log(1 - u) is at least u, and u is at least its upper 24 bits: most tokens cannot win, and need no logarithm.
    const Floats least = __builtin_convertvector(reinterpret_cast<Ints>(a >> 8), Floats) * 0x1p-24f;
    const Ints hits = least * bar < weight;
    uint64_t words[sizeof hits / 8], any = 0;
    std::memcpy(words, &hits, sizeof hits);
    for (uint64_t word : words) any |= word;
    if (!any) continue;
    for (int lane = 0; lane < kLanes; lane++) {
      if (!hits[lane]) continue;
      const double u = (double(uint64_t(a[lane]) << 32 | b[lane]) + 0.5) * 0x1p-64;
      const double quotient = double(weight[lane]) / -std::log1p(-u);
      if (quotient > best) best = quotient, bar = float(best) * 0.999999f, winner = i + lane;
    }
  }
  return winner;
}

}  // namespace
}  // namespace dpllm
