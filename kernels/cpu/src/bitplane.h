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

// The low four planes of one block as nibbles, and the higher planes.
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

// The tables of a row, and the addresses of its planes.
template <class V, int B, int T>
struct Row {
  typename V::template Table<B> tables[T];
  const uint8_t* planes;
  int64_t plane_bytes;

  DPLLM_INLINE Row(const Matrix& w, int n) : planes(w.planes + n * w.row_bytes), plane_bytes(w.plane_bytes) {
    const int8_t* digits = w.tables[B] + (int64_t(n / w.rows_per_table) * 2 << B);
    for (int t = 0; t < T; t++) tables[t].load(digits + (t << B));
  }

  // Bytes of each plane from `at` on; bytes from `end` on count as zero.
  DPLLM_INLINE Block<V, B> block(int64_t at, int64_t end) const {
    constexpr int kPrefetch = 2048;
    const bool part = end - at < V::kBytes, line = V::kBytes >= 64 || at % 64 == 0;
    V plane[B];
    for (int p = 0; p < B; p++) {
      const uint8_t* from = planes + p * plane_bytes + at;
      plane[p] = part ? V::load_part(from, int(end - at)) : V::load(from);
      if (line) __builtin_prefetch(from + kPrefetch);
    }
    return Block<V, B>(plane);
  }

  // The entries that bit t of every byte selects.
  template <int t>
  DPLLM_INLINE void look_up(const Block<V, B>& block, V* entries) const {
    const V nibble = (t < 4 ? block.word[t % 4] : block.word[t % 4].template down<4>()).low_nibbles();
    for (int i = 0; i < T; i++) entries[i] = tables[i].template at<t>(nibble, block.above);
  }
};

// Sums of products with one activation, kept apart by digit weight: 255^2, 255, 1.
template <class V, int T, int X>
struct Sums {
  static constexpr int kOrders = T + X - 1;
  typename V::Floats total[kOrders];

  DPLLM_INLINE Sums() {
    for (auto& order : total) order = V::zero();
  }

  // The entries of bit t times their activations.
  DPLLM_INLINE static void multiply(const V* entries, const Activation& x, int64_t column, int t, typename V::Sum* sum) {
    const int8_t* digits[2] = {x.high, x.low};
    for (int d = 0; d < X; d++) {
      const V xs = V::load(reinterpret_cast<const uint8_t*>(digits[d]) + column + t * V::kBytes);
      for (int i = 0; i < T; i++) sum[i + d].add(entries[i], xs);
    }
  }

  // The products of a block, at their scales.
  DPLLM_INLINE void add(const typename V::Sum* sum, const Activation& x, int64_t column) {
    const auto scale = V::load_floats(x.scale + column / kGroup);
    for (int o = 0; o < kOrders; o++) total[o] = V::multiply_add(sum[o], scale, total[o]);
  }

  // The element of y. Products are exact in double precision, so the result does not depend on which of them the
  // compiler fuses with an addition, and is the same in every function that inlines this one.
  template <int B>
  DPLLM_INLINE float finish(const Matrix& w, int n, const Activation& x) const {
    float y = V::reduce(total[0]);  // in units of the lowest order
    for (int o = 1; o < kOrders; o++) y = float(double(y) * kBase + V::reduce(total[o]));
    float scale = w.scales[B][n / w.rows_per_table] * (T == 1 ? kBase : 1);
    if (w.row_scale) scale *= w.row_scale[n];
    if (V::kUnsigned) y -= unsigned_correction<T>(x);
    return float(double(y) * scale + (w.bias ? w.bias[n] : 0.f));
  }
};

// One activation: looked up and multiplied bit by bit.
template <class V, int B, int T, int X>
struct Single {
  template <int t = 0>
  DPLLM_INLINE static void step(const Row<V, B, T>& row, const Block<V, B>& block, const Activation& x, int64_t column,
                                typename V::Sum* sum) {
    if constexpr (t < 8) {
      V entries[T];
      row.template look_up<t>(block, entries);
      Sums<V, T, X>::multiply(entries, x, column, t, sum);
      step<t + 1>(row, block, x, column, sum);
    }
  }

  static void run(const Matrix& w, const Activation& x, float* y, int n0, int n1) {
    for (int n = n0; n < n1; n++) {
      const Row<V, B, T> row(w, n);
      Sums<V, T, X> sums;
      for (int64_t at = 0; at < w.row_bytes; at += V::kBytes) {
        typename V::Sum sum[sums.kOrders];
        step(row, row.block(at, w.row_bytes), x, at * 8, sum);
        sums.add(sum, x, at * 8);
      }
      y[n] = sums.template finish<B>(w, n, x);
    }
  }
};

// Several activations: the entries of a stretch of a row are looked up once, and multiplied by each activation while
// they are in the first-level cache. There are few functions for few combinations, so that the library builds quickly.
template <class V, int T>
struct Stretch {
  static constexpr int kBytes = 256;  // of each plane
  V entries[kBytes / V::kBytes][8][T];

  template <int B, int t = 0>
  DPLLM_INLINE static void step(const Row<V, B, T>& row, const Block<V, B>& block, V (*out)[T]) {
    if constexpr (t < 8) {
      row.template look_up<t>(block, out[t]);
      step<B, t + 1>(row, block, out);
    }
  }

  template <int B>
  __attribute__((noinline)) void look_up(const Matrix& w, int n, int64_t from, int64_t to) {
    const Row<V, B, T> row(w, n);
    V(*out)[8][T] = entries;
    for (int64_t at = from; at < to; at += V::kBytes) step(row, row.block(at, to), *out++);
  }

  template <int X>
  __attribute__((noinline)) void multiply(const Activation& x, int64_t column, int blocks, Sums<V, T, X>& sums) const {
    Sums<V, T, X> local = sums;
    for (int b = 0; b < blocks; b++, column += 8 * V::kBytes) {
      typename V::Sum sum[local.kOrders];
#pragma GCC unroll 8
      for (int t = 0; t < 8; t++) local.multiply(entries[b][t], x, column, t, sum);
      local.add(sum, x, column);
    }
    sums = local;
  }
};

template <class V, int B, int T, int X>
struct Several {
  static constexpr int kTogether = 16;

  static void run(const Matrix& w, const Activation* const* x, int count, float* const* y, int n0, int n1) {
    for (int i = 0; i < count; i += kTogether)
      some(w, x + i, count - i < kTogether ? count - i : kTogether, y + i, n0, n1);
  }

  static void some(const Matrix& w, const Activation* const* x, int count, float* const* y, int n0, int n1) {
    Stretch<V, T> stretch;
    Sums<V, T, X> sums[kTogether];
    for (int n = n0; n < n1; n++) {
      for (int m = 0; m < count; m++) sums[m] = Sums<V, T, X>();
      for (int64_t at = 0; at < w.row_bytes; at += stretch.kBytes) {
        const int bytes = int(w.row_bytes - at < stretch.kBytes ? w.row_bytes - at : stretch.kBytes);
        stretch.template look_up<B>(w, n, at, at + bytes);
        for (int m = 0; m < count; m++) stretch.multiply(*x[m], at * 8, (bytes + V::kBytes - 1) / V::kBytes, sums[m]);
      }
      for (int m = 0; m < count; m++) y[m][n] = sums[m].template finish<B>(w, n, *x[m]);
    }
  }
};

template <class V>
struct Bitplane {
  template <int B, int T, int X>
  struct Rows {
    static void run(const Matrix& w, const Activation* const* x, int count, float* const* y, int n0, int n1) {
      if constexpr (V::kSingle)
        if (count == 1) return Single<V, B, T, X>::run(w, *x[0], y[0], n0, n1);
      Several<V, B, T, X>::run(w, x, count, y, n0, n1);
    }
  };

  // The place of a group's digits and scale (see "Order" above).
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
