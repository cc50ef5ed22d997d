// The bitplane product for processors with a 16-entry byte shuffle: AVX2, AVX-512 without VBMI, NEON, plain C++.
//
// Written once over a vector type V (vec_*.h). V::kBytes bytes of each plane hold 8 * kBytes weights of a row.
//
// Index. Bit t of byte p is column 8 p + t. Four planes are brought together by two rounds of bit selects, as in a
// butterfly: word[t % 4] holds, in its low nibbles, the 4-bit codes of bit t, and those of bit t + 4 in its high nibbles.
// Look-up: one shuffle for up to 4 bits; more planes choose between several shuffles (V::Table).
//
// Order. The codes of bit t take activations x[8 p + t], p = 0..kBytes-1. A 32-bit accumulator lane covers four bytes of
// the plane, so over t = 0..7 just one 32-column group: one scale a lane, applied once per block.
#pragma once

#include <cstring>

#include "dispatch.h"
#include "kernels.h"

namespace dpllm {
namespace {

template <class V>
DPLLM_INLINE void butterfly(V p0, V p1, V p2, V p3, V* word) {
  const V odd = V::repeat(0x55), pair = V::repeat(0x33);
  const V a0 = V::select(odd, p1, p0.template up<1>()), a1 = V::select(odd, p1.template down<1>(), p0);
  const V b0 = V::select(odd, p3, p2.template up<1>()), b1 = V::select(odd, p3.template down<1>(), p2);
  word[0] = V::select(pair, b0, a0.template up<2>());
  word[1] = V::select(pair, b1, a1.template up<2>());
  word[2] = V::select(pair, b0.template down<2>(), a0);
  word[3] = V::select(pair, b1.template down<2>(), a1);
}

// The low four planes of one block as nibbles, and the planes above them.
template <class V, int B>
struct Block {
  static constexpr int kAbove = B > 4 ? B - 4 : 0;
  V word[4];
  V above[kAbove ? kAbove : 1];

  DPLLM_INLINE explicit Block(const V* plane) {
    constexpr int first = B - 4;  // planes that do not exist repeat the first one: tables repeat to match
    const auto at = [&](int i) { return plane[i < 0 ? 0 : i]; };
    butterfly(at(first), at(first + 1), plane[B - 2], plane[B - 1], word);
    for (int i = 0; i < kAbove; i++) above[i] = plane[i];
  }
};

template <class V, int B, int T, int X, int M>
struct BlockSums {
  static constexpr int kOrders = T + X - 1;
  typename V::Floats total[M][kOrders];

  DPLLM_INLINE BlockSums() {
    for (auto& m : total)
      for (auto& order : m) order = V::zero();
  }

  DPLLM_INLINE void add(const Block<V, B>& block, const typename V::template Table<B>* tables, const Activation* const* x,
           int64_t column) {
    typename V::Sum sum[M][kOrders];
    for (auto& m : sum)
      for (auto& order : m) order = typename V::Sum();
    step<0>(block, tables, x, column, sum);
    for (int m = 0; m < M; m++) {
      const auto scale = V::load_floats(x[m]->scale + column / kGroup);
      for (int o = 0; o < kOrders; o++) total[m][o] = V::multiply_add(sum[m][o], scale, total[m][o]);
    }
  }

  // Bit t of every byte: codes, look-ups, products; then bit t + 1.
  template <int t>
  DPLLM_INLINE static void step(const Block<V, B>& block, const typename V::template Table<B>* tables,
                   const Activation* const* x, int64_t column, typename V::Sum (*sum)[kOrders]) {
    if constexpr (t < 8) {
      const V nibble = (t < 4 ? block.word[t % 4] : block.word[t % 4].template down<4>()).low_nibbles();
      V value[T];
      for (int i = 0; i < T; i++) value[i] = tables[i].template at<t>(nibble, block.above);
      for (int m = 0; m < M; m++) {
        const int8_t* digits[2] = {x[m]->high, x[m]->low};
        for (int d = 0; d < X; d++) {
          const V xs = V::load(reinterpret_cast<const uint8_t*>(digits[d]) + column + t * V::kBytes);
          for (int i = 0; i < T; i++) sum[m][i + d].add(value[i], xs);
        }
      }
      step<t + 1>(block, tables, x, column, sum);
    }
  }

  // The dot product, in units of the lowest order.
  DPLLM_INLINE float value(int m) const {
    float y = V::reduce(total[m][0]);
    for (int o = 1; o < kOrders; o++) y = y * kBase + V::reduce(total[m][o]);
    return y;
  }
};

template <class V>
struct Bitplane {
  template <int B, int T, int X, int M>
  struct Rows {
    static void run(const Matrix& w, const Activation* const* x, float* const* y, int n0, int n1) {
      constexpr int kPrefetch = 2048;
      const int64_t whole = w.row_bytes / V::kBytes * V::kBytes, rest = w.row_bytes - whole;
      for (int n = n0; n < n1; n++) {
        const int table = n / w.rows_per_table;
        typename V::template Table<B> tables[T];
        for (int t = 0; t < T; t++) tables[t].load(w.tables[B] + ((int64_t(table) * 2 + t) << B));
        const uint8_t* row = w.planes + n * w.row_bytes;
        BlockSums<V, B, T, X, M> sums;
        V plane[B];
        for (int64_t at = 0; at < whole; at += V::kBytes) {
          for (int p = 0; p < B; p++) {
            plane[p] = V::load(row + p * w.plane_bytes + at);
            if (at % 64 == 0) __builtin_prefetch(row + p * w.plane_bytes + at + kPrefetch);
          }
          sums.add(Block<V, B>(plane), tables, x, at * 8);
        }
        if (rest) {
          for (int p = 0; p < B; p++) plane[p] = V::load_part(row + p * w.plane_bytes + whole, int(rest));
          sums.add(Block<V, B>(plane), tables, x, whole * 8);
        }
        float scale = w.scales[B][table] * (T == 1 ? kBase : 1);
        if (w.row_scale) scale *= w.row_scale[n];
        for (int m = 0; m < M; m++) {
          const float offset = V::kUnsigned ? unsigned_correction<T>(*x[m]) : 0.f;
          y[m][n] = (sums.value(m) - offset) * scale + (w.bias ? w.bias[n] : 0.f);
        }
      }
    }
  };

  // Where a group's digits and scale go (see "Order" above).
  struct Layout {
    static constexpr bool kUnsigned = V::kUnsigned;
    static constexpr int kTwice = 0;

    static void place(int group, const int8_t* digits, int8_t* out) {
      constexpr int kGroups = V::kBytes / 4;
      int8_t* block = out + group / kGroups * V::kBytes * 8 + group % kGroups * 4;
      for (int t = 0; t < 8; t++)
        for (int j = 0; j < 4; j++) block[t * V::kBytes + j] = digits[8 * j + t];
    }
    static void place_scale(int group, float scale, float* out) { out[group] = scale; }
  };
};

}  // namespace
}  // namespace dpllm
