// The bitplane product for AVX-512 with VBMI, GFNI and VNNI: one 64-byte line of each plane is 512 weights.
//
// Index. Planes are interleaved byte by byte until a quadword holds the bytes of all planes for one position (two
// positions for up to 4 bits). vgf2p8affineqb with the identity as its first operand transposes each quadword as an
// 8x8 bit matrix: eight codes an instruction. Look-up: vpermb (up to 64 entries), vpermi2b (128), two of
// them and a blend (256). vpermb ignores the top two bits of an index, so for narrow widths the
// table is repeated and the bits above the code may be anything.
//
// Order. For h = 0..3 and u = 0..1, the vector of codes (h, u) holds, in 128-bit lane L and quadword q, the eight
// columns 128 L + 32 h + 16 q + 8 u + 0..7. So for a given h all lanes of L belong to the 32-column group 4 L + h:
// one scale per accumulator lane, applied every two dot products.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "dispatch.h"
#include "kernels.h"

namespace dpllm {
namespace {

using Vec = __m512i;
constexpr int kColumns = 512;
constexpr int kPrefetch = 3072;  // bytes ahead in each plane: about the latency of memory at its bandwidth

// Digits of one table, ready for look-ups. `entries` is unsigned: digit + 128.
template <int B>
struct Table {
  static constexpr int kVectors = B <= 6 ? 1 : 1 << (B - 6);
  Vec entries[kVectors];

  DPLLM_INLINE void load(const int8_t* digits) {
    if constexpr (B == 2) {
      int32_t four;
      __builtin_memcpy(&four, digits, 4);
      entries[0] = _mm512_set1_epi32(four);
    } else if constexpr (B == 3) {
      entries[0] = _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(digits)));
    } else if constexpr (B == 4) {
      entries[0] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(digits)));
    } else if constexpr (B == 5) {
      entries[0] = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(digits)));
    } else {
      for (int i = 0; i < kVectors; i++) entries[i] = _mm512_loadu_si512(digits + 64 * i);
    }
    for (Vec& e : entries) e = _mm512_xor_si512(e, _mm512_set1_epi8(char(0x80)));
  }

  DPLLM_INLINE Vec operator[](Vec code) const {
    if constexpr (B <= 6) {
      return _mm512_permutexvar_epi8(code, entries[0]);
    } else if constexpr (B == 7) {
      return _mm512_permutex2var_epi8(entries[0], code, entries[1]);
    } else {
      const Vec low = _mm512_permutex2var_epi8(entries[0], code, entries[1]);
      const Vec high = _mm512_permutex2var_epi8(entries[2], code, entries[3]);
      return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(code), high);
    }
  }
};

DPLLM_INLINE Vec low8(Vec a, Vec b) { return _mm512_unpacklo_epi8(a, b); }
DPLLM_INLINE Vec high8(Vec a, Vec b) { return _mm512_unpackhi_epi8(a, b); }
DPLLM_INLINE Vec low16(Vec a, Vec b) { return _mm512_unpacklo_epi16(a, b); }
DPLLM_INLINE Vec high16(Vec a, Vec b) { return _mm512_unpackhi_epi16(a, b); }

// Four planes, most significant first, as doublewords: out[h] lane L holds byte positions 4 h + 0..3 of the lane.
DPLLM_INLINE void interleave(Vec p0, Vec p1, Vec p2, Vec p3, Vec* out) {
  const Vec a0 = low8(p0, p1), a1 = high8(p0, p1), b0 = low8(p2, p3), b1 = high8(p2, p3);
  out[0] = low16(a0, b0);
  out[1] = high16(a0, b0);
  out[2] = low16(a1, b1);
  out[3] = high16(a1, b1);
}

// Codes of one line: the vectors (h, 0) and (h, 1) on demand, so that few registers are live.
template <int B>
struct Codes {
  Vec words[4], top[4];

  DPLLM_INLINE explicit Codes(const Vec* line) {
    if constexpr (B == 2) interleave(line[0], line[0], line[0], line[1], words);
    if constexpr (B == 3) interleave(line[0], line[0], line[1], line[2], words);
    if constexpr (B >= 4) interleave(line[B - 4], line[B - 3], line[B - 2], line[B - 1], words);
    if constexpr (B == 5) {  // the bits above the fifth are ignored, so one plane can stand for all four
      const Vec lo = low8(line[0], line[0]), hi = high8(line[0], line[0]);
      top[0] = low16(lo, lo), top[1] = high16(lo, lo), top[2] = low16(hi, hi), top[3] = high16(hi, hi);
    }
    if constexpr (B == 6) {
      const Vec lo = low8(line[0], line[1]), hi = high8(line[0], line[1]);
      top[0] = low16(lo, lo), top[1] = high16(lo, lo), top[2] = low16(hi, hi), top[3] = high16(hi, hi);
    }
    if constexpr (B == 7) interleave(line[0], line[0], line[1], line[2], top);
    if constexpr (B == 8) interleave(line[0], line[1], line[2], line[3], top);
  }

  DPLLM_INLINE void operator()(int h, Vec* pair) const {
    const Vec identity = _mm512_set1_epi64(0x8040201008040201);
    if constexpr (B <= 4) {  // a quadword holds two byte positions: high and low nibbles of the transpose
      const Vec t = _mm512_gf2p8affine_epi64_epi8(identity, words[h], 0);
      pair[0] = _mm512_srli_epi16(t, 4);
      pair[1] = t;
    } else {
      const Vec even = _mm512_mask_shuffle_epi32(top[h], 0xAAAA, words[h], _MM_PERM_ENUM(0xA0));
      const Vec odd = _mm512_mask_shuffle_epi32(words[h], 0x5555, top[h], _MM_PERM_ENUM(0xF5));
      pair[0] = _mm512_gf2p8affine_epi64_epi8(identity, even, 0);
      pair[1] = _mm512_gf2p8affine_epi64_epi8(identity, odd, 0);
    }
  }
};

// The lines of one row: whole ones, and a masked one at its end.
template <int B>
struct Lines {
  const uint8_t* start;
  int64_t plane_bytes;

  DPLLM_INLINE void load(int64_t offset, Vec* out) const {
    for (int p = 0; p < B; p++) {
      const uint8_t* at = start + p * plane_bytes + offset;
      _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetch), _MM_HINT_T0);
      out[p] = _mm512_loadu_si512(at);
    }
  }
  DPLLM_INLINE void load_tail(int64_t offset, __mmask16 words, Vec* out) const {
    for (int p = 0; p < B; p++) out[p] = _mm512_maskz_loadu_epi32(words, start + p * plane_bytes + offset);
  }
};

// Sums of one row against M activations, kept apart by digit weight: 255^2, 255, 1.
template <int B, int T, int X, int M>
struct Sums {
  static constexpr int kOrders = T + X - 1;
  __m512 total[M][kOrders];

  DPLLM_INLINE Sums() {
    for (auto& m : total)
      for (auto& order : m) order = _mm512_setzero_ps();
  }

  // One line: 512 columns from `column` on.
  DPLLM_INLINE void add(const Vec* line, const Table<B>* tables, const Activation* const* x, int64_t column) {
    const Codes<B> codes(line);
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++) {
      Vec code[2], value[T][2];
      codes(h, code);
      for (int t = 0; t < T; t++)
        for (int u = 0; u < 2; u++) value[t][u] = tables[t][code[u]];
      for (int m = 0; m < M; m++) add_pair(value, *x[m], column, h, total[m]);
    }
  }

  DPLLM_INLINE static void add_pair(const Vec (*value)[2], const Activation& x, int64_t column, int h, __m512* total) {
    const int8_t* digits[2] = {x.high, x.low};
    Vec sum[kOrders];
    for (Vec& s : sum) s = _mm512_setzero_si512();
    for (int t = 0; t < T; t++)
      for (int d = 0; d < X; d++)
        for (int u = 0; u < 2; u++) {
          const Vec xs = _mm512_load_si512(digits[d] + column + (2 * h + u) * 64);
          sum[t + d] = _mm512_dpbusd_epi32(sum[t + d], value[t][u], xs);
        }
    const __m512 scale = _mm512_load_ps(x.scale + column / 512 * 64 + 16 * h);
    for (int o = 0; o < kOrders; o++) total[o] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[o]), scale, total[o]);
  }

  // All orders in units of the lowest one. The lanes have not been added yet.
  DPLLM_INLINE __m512 lanes(int m) const {
    __m512 y = total[m][0];
    for (int o = 1; o < kOrders; o++) y = _mm512_fmadd_ps(y, _mm512_set1_ps(kBase), total[m][o]);
    return y;
  }
};

// Turns added lanes into an element of y. Products are exact in double precision, so the result does not depend on which
// of them the compiler fuses with an addition, nor on the number of activations.
template <int B, int T>
struct Finish {
  const Matrix& w;

  DPLLM_INLINE float operator()(float sum, const Activation& x, int n) const {
    float scale = w.scales[B][n / w.rows_per_table] * (T == 1 ? kBase : 1);
    if (w.row_scale) scale *= w.row_scale[n];
    const float y = sum - unsigned_correction<T>(x);  // the correction is a power of two times a float: exact
    return float(double(y) * scale + (w.bias ? w.bias[n] : 0.f));
  }
};

template <int B, int T>
DPLLM_INLINE void load_tables(const Matrix& w, int n, Table<B>* tables) {
  for (int t = 0; t < T; t++) tables[t].load(w.tables[B] + ((int64_t(n / w.rows_per_table) * 2 + t) << B));
}

template <int B, int T, int X, int M>
struct RowsAtOnce {
  static void run(const Matrix& w, const Activation* const* x, float* const* y, int n0, int n1) {
    if (w.row_bytes == 32) return pairs(w, x, y, n0, n1);
    const Finish<B, T> finish{w};
    const int64_t whole = w.row_bytes / 64 * 64;
    const auto rest = __mmask16((1u << (w.row_bytes % 64 / 4)) - 1);
    Vec line[B];
    for (int n = n0; n < n1; n++) {
      Table<B> tables[T];
      load_tables<B, T>(w, n, tables);
      const Lines<B> lines{w.planes + n * w.row_bytes, w.plane_bytes};
      Sums<B, T, X, M> sums;
      for (int64_t at = 0; at < whole; at += 64) {
        lines.load(at, line);
        sums.add(line, tables, x, at * 8);
      }
      if (rest) {
        lines.load_tail(whole, rest, line);
        sums.add(line, tables, x, whole * 8);
      }
      for (int m = 0; m < M; m++) y[m][n] = finish(_mm512_reduce_add_ps(sums.lanes(m)), *x[m], n);
    }
  }

  // Rows of 256 columns: two to a line where they share a table, with activations that are stored twice.
  static void pairs(const Matrix& w, const Activation* const* x, float* const* y, int n0, int n1) {
    const Finish<B, T> finish{w};
    Vec line[B];
    for (int n = n0, step; n < n1; n += step) {
      step = n + 1 < n1 && n / w.rows_per_table == (n + 1) / w.rows_per_table ? 2 : 1;
      Table<B> tables[T];
      load_tables<B, T>(w, n, tables);
      const Lines<B> lines{w.planes + n * w.row_bytes, w.plane_bytes};
      Sums<B, T, X, M> sums;
      lines.load_tail(0, step == 2 ? 0xffff : 0xff, line);
      sums.add(line, tables, x, 0);
      for (int m = 0; m < M; m++) {
        const __m512 lanes = sums.lanes(m);
        y[m][n] = finish(_mm512_mask_reduce_add_ps(0x00ff, lanes), *x[m], n);
        if (step == 2) y[m][n + 1] = finish(_mm512_mask_reduce_add_ps(0xff00, lanes), *x[m], n + 1);
      }
    }
  }
};

template <int B, int T, int X>
struct Rows {
  static void run(const Matrix& w, const Activation* const* x, int count, float* const* y, int n0, int n1) {
    int i = 0;
    for (; i + 4 <= count; i += 4) RowsAtOnce<B, T, X, 4>::run(w, x + i, y + i, n0, n1);
    for (; i < count; i++) RowsAtOnce<B, T, X, 1>::run(w, x + i, y + i, n0, n1);
  }
};

// The place of a group's digits and scale (see "Order" above).
struct Layout {
  static constexpr bool kUnsigned = true;
  static constexpr int kTwice = 256;  // rows of this many columns are stored twice, see RowsAtOnce::pairs

  static void place(int group, const int8_t* digits, int8_t* out) {
    int8_t* block = out + group / 16 * kColumns + group % 4 * 128 + group % 16 / 4 * 16;
    for (int q = 0; q < 2; q++)
      for (int u = 0; u < 2; u++) std::memcpy(block + u * 64 + q * 8, digits + 16 * q + 8 * u, 8);
  }
  static void place_scale(int group, float scale, float* out) {
    float* lanes = out + group / 16 * 64 + group % 4 * 16 + group % 16 / 4 * 4;
    for (int i = 0; i < 4; i++) lanes[i] = scale;
  }
};

// -- dequantisation ------------------------------------------------------------------------------------------------

// The bfloat16 values of one row's codes, as their upper and lower bytes.
template <int B>
struct Bf16Table {
  Table<B> upper, lower;

  Bf16Table(const int8_t* digits, float scale) {
    alignas(64) int8_t up[1 << B], low[1 << B];
    for (int i = 0; i < 1 << B; i++) {
      const float value = float(kBase * digits[i] + digits[i + (1 << B)]) * scale;
      uint32_t u;
      std::memcpy(&u, &value, 4);
      u += 0x7fffu + (u >> 16 & 1);                         // the value is finite, so rounding to even is enough
      up[i] = int8_t(u >> 24 ^ 0x80), low[i] = int8_t(u >> 16 ^ 0x80);  // the table flips the top bit back
    }
    upper.load(up);
    lower.load(low);
  }

  // 512 values to out, in the order of the columns.
  DPLLM_INLINE void line(const Vec* planes, uint16_t* out) const {
    const Codes<B> codes(planes);
    for (int h = 0; h < 4; h++) {
      Vec code[2];
      codes(h, code);
      for (int u = 0; u < 2; u++) {
        const Vec a = lower[code[u]], b = upper[code[u]];
        alignas(64) uint16_t even[32], odd[32];  // quadwords 0 and 1 of each lane
        _mm512_store_si512(even, low8(a, b));
        _mm512_store_si512(odd, high8(a, b));
        for (int lane = 0; lane < 4; lane++) {
          std::memcpy(out + 128 * lane + 32 * h + 8 * u, even + 8 * lane, 16);
          std::memcpy(out + 128 * lane + 32 * h + 16 + 8 * u, odd + 8 * lane, 16);
        }
      }
    }
  }
};

template <int B>
void dequantize_bf16(const Matrix& w, uint16_t* out, int n0, int n1) {
  const int64_t whole = w.columns / kColumns * 64;
  const int rest = w.columns % kColumns;
  const auto words = __mmask16((1u << ((w.row_bytes - whole) / 4)) - 1);
  Vec planes[B];
  for (int n = n0; n < n1; n++, out += w.columns) {
    const int table = n / w.rows_per_table;
    const float scale = w.scales[B][table] * (w.row_scale ? w.row_scale[n] : 1.f);
    const Bf16Table<B> values(w.tables[B] + (int64_t(table) * 2 << B), scale);
    const Lines<B> lines{w.planes + n * w.row_bytes, w.plane_bytes};
    for (int64_t at = 0; at < whole; at += 64) {
      lines.load(at, planes);
      values.line(planes, out + at * 8);
    }
    if (rest) {
      uint16_t last[kColumns];
      lines.load_tail(whole, words, planes);
      values.line(planes, last);
      std::memcpy(out + whole * 8, last, size_t(rest) * 2);
    }
  }
}

}  // namespace
}  // namespace dpllm
