// The product of a prompt in float32, used where there are no int8 instructions for it, and for accuracy 'exact'.
//
// A few rows of the matrix are dequantised for all tokens of a pass (api.cpp). The tokens were transposed before, one token
// in each lane, so the product is the one of prompt_attention.h. A token's result does not depend on other tokens.
#pragma once

#include "dequantize.h"

namespace dpllm {
namespace {

template <class V>
void float_matmul(const Matrix& w, int bits, const float* blocks, int tokens, float* scratch, float* y, int n0, int n1) {
  constexpr int kStretch = 128;  // columns of a block, so that 16 of its lanes stay in the first-level cache
  float *rows = scratch, *sums = rows + int64_t(n1 - n0) * w.columns;
  Dequantize<V>::run(w, bits, false, rows, n0, n1);
  for (int t = 0; t < tokens; t += kQueries, blocks += int64_t(w.columns) * kQueries) {
    const int count = tokens - t < kQueries ? tokens - t : kQueries;
    const int lanes = (count + kTileLanes - 1) / kTileLanes * kTileLanes;
    for (int k = 0; k < w.columns; k += kStretch) {
      const int inner = w.columns - k < kStretch ? w.columns - k : kStretch;
      product(rows + k, w.columns, 1, n1 - n0, inner, blocks + int64_t(k) * kQueries, sums, lanes, k > 0);
    }
    for (int i = 0; i < count; i++) {
      float* out = y + int64_t(t + i) * w.rows;
      for (int n = n0; n < n1; n++) out[n] = sums[(n - n0) * kQueries + i] + (w.bias ? w.bias[n] : 0.f);
    }
  }
}

// The table of functions of an instruction set whose products are those of bitplane.h.
template <class V>
constexpr Isa bitplane_isa(const char* name, const char* needs, bool (*supported)()) {
  Isa isa = make_isa<typename Bitplane<V>::Layout, Bitplane<V>::template Rows>(name, needs, supported);
  isa.dequantize = Dequantize<V>::run;
  isa.float_matmul = float_matmul<V>;
  return isa;
}

}  // namespace
}  // namespace dpllm
