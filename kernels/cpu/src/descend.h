// Coordinate descent on nested codes (quant/refine.py), for one block of columns.
//
// Included at the end of ops.h, whose vectors it uses. A column's best code depends on the columns before it,
// so the columns of a row form a chain of dependent operations. Two rows are processed together, because their chains do not
// depend on each other.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace dpllm {
namespace {

constexpr int kDescendRows = 2;

// One row: error and weight are those of the block's columns.
template <int B, int V>
struct DescendRow {
  Floats leaf[B][V];                        // each width's value per parent code, times the width's root
  alignas(64) float value[B][V * kLanes];   // the values themselves
  alignas(64) float pull[B][Descent::kBlock];
  const float* weight;
  uint8_t* codes;
  float* error;   // width b at error + b * columns
  float* change;  // width b at change + b * (last - first)

  void begin(const Descent& d, int n) {
    const int leaves = 1 << d.parent_bits, count = d.last - d.first;
    for (int b = 0; b < B; b++) {
      const float* from = d.leaf + (int64_t(n / d.rows_per_table) * B + b) * leaves;
      // More lanes than leaves: infinitely bad values, which are never chosen.
      for (int c = 0; c < V * kLanes; c++) value[b][c] = c < leaves ? from[c] : INFINITY;
      for (int v = 0; v < V; v++) leaf[b][v] = load<Floats>(value[b] + v * kLanes) * d.root[b];
      std::memcpy(pull[b], d.pull + (int64_t(n) * B + b) * d.columns + d.first, sizeof(float) * size_t(count));
      std::memset(pull[b] + count, 0, sizeof(float) * size_t(Descent::kBlock - count));
    }
    weight = d.weight + int64_t(n) * d.columns + d.first;
    codes = d.codes + int64_t(n) * d.columns + d.first;
    error = d.error + int64_t(n) * B * d.columns + d.first;
    change = d.change + int64_t(n) * B * count;
  }

  // The parent code whose prefixes lie nearest to each width's optimum. Costs are not negative, so they are ordered as
  // their bits are. The code replaces the lowest bits: costs that differ by less than 2^-17 of themselves count as equal.
  DPLLM_INLINE int best_code(const float (&optimum)[B]) const {
    Floats cost[V];
    for (int v = 0; v < V; v++) {
      const Floats far = leaf[0][v] - optimum[0];
      cost[v] = far * far;
    }
    for (int b = 1; b < B; b++)
      for (int v = 0; v < V; v++) {
        const Floats far = leaf[b][v] - optimum[b];
        cost[v] += far * far;
      }
    Ints lane;
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    Ints best = (reinterpret_cast<Ints>(cost[0]) & ~(V * kLanes - 1)) | lane;
    for (int v = 1; v < V; v++) {
      const Ints key = (reinterpret_cast<Ints>(cost[v]) & ~(V * kLanes - 1)) | (lane + v * kLanes);
      best = key < best ? key : best;
    }
    typedef int32_t Four __attribute__((vector_size(16)));
    int32_t lanes[kLanes];
    store(lanes, best);
    Four least = load<Four>(lanes);
    for (int i = 4; i < kLanes; i += 4) {
      const Four other = load<Four>(lanes + i);
      least = other < least ? other : least;
    }
    return std::min(std::min(least[0], least[1]), std::min(least[2], least[3])) & (V * kLanes - 1);
  }

  DPLLM_INLINE void choose(const Descent& d, int i, float inverse, float (&moved)[B]) {
    float optimum[B];
    for (int b = 0; b < B; b++) optimum[b] = (error[int64_t(b) * d.columns + i] + weight[i] - pull[b][i] * inverse) * d.root[b];
    const int code = best_code(optimum);
    codes[i] = uint8_t(code);
    for (int b = 0; b < B; b++) {
      float* e = error + int64_t(b) * d.columns + i;
      const float found = value[b][code] - weight[i];
      moved[b] = found - *e;
      *e = found;
      change[b * (d.last - d.first) + i] = moved[b];
    }
  }
};

// hessian: the block's own columns, [kBlock, kBlock], zero after them.
template <int B, int V, int R>
void descend_together(const Descent& d, const float* hessian, int n) {
  DescendRow<B, V> rows[R];
  for (int r = 0; r < R; r++) rows[r].begin(d, n + r);
  const int count = d.last - d.first;
  for (int i = 0; i < count; i++) {
    const float* across = hessian + i * Descent::kBlock;
    float moved[R][B];
    for (int r = 0; r < R; r++) rows[r].choose(d, i, 1.f / across[i], moved[r]);
    for (int k = i / kLanes * kLanes; k < count; k += kLanes) {
      const Floats h = load<Floats>(across + k);
      for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) store(rows[r].pull[b] + k, load<Floats>(rows[r].pull[b] + k) + h * moved[r][b]);
    }
  }
}

template <int B, int P>
void descend_rows(const Descent& d, int n0, int n1) {
  constexpr int V = (1 << P) > kLanes ? (1 << P) / kLanes : 1;
  alignas(64) float hessian[Descent::kBlock * Descent::kBlock] = {};
  const int count = d.last - d.first;
  for (int i = 0; i < count; i++)
    std::memcpy(hessian + i * Descent::kBlock, d.hessian + int64_t(d.first + i) * d.columns + d.first,
                sizeof(float) * size_t(count));
  int n = n0;
  for (; n + kDescendRows <= n1; n += kDescendRows) descend_together<B, V, kDescendRows>(d, hessian, n);
  for (; n < n1; n++) descend_together<B, V, 1>(d, hessian, n);
}

template <int P, int B = P - 1>
void descend_widths(const Descent& d, int n0, int n1) {
  if (d.widths == B) return descend_rows<B, P>(d, n0, n1);
  if constexpr (B > 1) descend_widths<P, B - 1>(d, n0, n1);
}

void descend(const Descent& d, int n0, int n1) {
  switch (d.parent_bits) {
    case 2: return descend_widths<2>(d, n0, n1);
    case 3: return descend_widths<3>(d, n0, n1);
    case 4: return descend_widths<4>(d, n0, n1);
    case 5: return descend_widths<5>(d, n0, n1);
    case 6: return descend_widths<6>(d, n0, n1);
  }
}

}  // namespace
}  // namespace dpllm
