// The product of a whole prompt for AVX-512 with VBMI, GFNI and VNNI: int8 times int8, where a decode step is limited by
// memory and this by multiplications. Weights are looked up once per four rows and a block of the prompt, then used
// from the cache.
//
// Order. Codes come as vectors (h, u) with groups spread over h (gemv_avx512.h). A 4x4 transpose of doublewords over h
// gives eight vectors whose lane g holds four columns of group g, so that a scale is applied once per eight products
// instead of every two.
#pragma once

#include "gemv_avx512.h"
#include "ops.h"

namespace dpllm {
namespace {

constexpr int kTileRows = 4;    // weight rows of a tile
constexpr int kTileTokens = 3;  // prompt rows of a tile: 12 integer and 12 float accumulators, four registers left
constexpr int64_t kPromptBytes = 512 << 10;  // of the prompt at a time: stays in the second-level cache

// Column 32 g + 16 q + 8 u + 4 e + c of a block goes to byte 64 (4 u + 2 q + e) + 4 g + c.
struct PromptLayout {
  static constexpr bool kUnsigned = true;
  static constexpr int kTwice = 0;

  static void place(int group, const int8_t* digits, int8_t* out) {
    int8_t* block = out + group / 16 * kColumns + group % 16 * 4;
    for (int u = 0; u < 2; u++)
      for (int q = 0; q < 2; q++)
        for (int e = 0; e < 2; e++)
          std::memcpy(block + 64 * (4 * u + 2 * q + e), digits + 16 * q + 8 * u + 4 * e, 4);
  }
  static void place_scale(int group, float scale, float* out) { out[group] = scale; }
};

// One row of weights as unsigned bytes (high digit + 128) in the same order.
template <int B>
void decode_row(const Matrix& w, int n, uint8_t* out) {
  Table<B> table;
  load_tables<B, 1>(w, n, &table);
  const Lines<B> lines{w.planes + n * w.row_bytes, w.plane_bytes};
  const int64_t whole = w.row_bytes / 64 * 64;
  const auto rest = __mmask16((1u << (w.row_bytes % 64 / 4)) - 1);
  Vec planes[B];
  for (int64_t at = 0; at < w.row_bytes; at += 64, out += kColumns) {
    if (at < whole) lines.load(at, planes);
    else lines.load_tail(at, rest, planes);
    const Codes<B> codes(planes);
    Vec value[4][2];
    for (int h = 0; h < 4; h++) {
      Vec code[2];
      codes(h, code);
      for (int u = 0; u < 2; u++) value[h][u] = table[code[u]];
    }
    for (int u = 0; u < 2; u++) {
      const Vec a0 = _mm512_unpacklo_epi32(value[0][u], value[1][u]), a1 = _mm512_unpackhi_epi32(value[0][u], value[1][u]);
      const Vec b0 = _mm512_unpacklo_epi32(value[2][u], value[3][u]), b1 = _mm512_unpackhi_epi32(value[2][u], value[3][u]);
      _mm512_store_si512(out + 256 * u, _mm512_unpacklo_epi64(a0, b0));
      _mm512_store_si512(out + 256 * u + 64, _mm512_unpackhi_epi64(a0, b0));
      _mm512_store_si512(out + 256 * u + 128, _mm512_unpacklo_epi64(a1, b1));
      _mm512_store_si512(out + 256 * u + 192, _mm512_unpackhi_epi64(a1, b1));
    }
  }
}

// y[token][n..n+3] for kTokens rows of the prompt against four decoded rows of weights.
template <int kTokens>
DPLLM_INLINE void tile(const uint8_t* rows, int width, const Prompt& x, int token, __m512 (*total)[kTileRows]) {
  for (int m = 0; m < kTokens; m++)
    for (int n = 0; n < kTileRows; n++) total[m][n] = _mm512_setzero_ps();
  for (int column = 0; column < width; column += kColumns) {
    Vec sum[kTokens][kTileRows];
    for (auto& m : sum)
      for (Vec& s : m) s = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++) {
      Vec xs[kTokens];
      for (int m = 0; m < kTokens; m++)
        xs[m] = _mm512_load_si512(x.digits + int64_t(token + m) * width + column + 64 * t);
      for (int n = 0; n < kTileRows; n++) {
        const Vec weights = _mm512_load_si512(rows + int64_t(n) * width + column + 64 * t);
        for (int m = 0; m < kTokens; m++) sum[m][n] = _mm512_dpbusd_epi32(sum[m][n], weights, xs[m]);
      }
    }
    for (int m = 0; m < kTokens; m++) {
      const __m512 scale = _mm512_load_ps(x.scale + int64_t(token + m) * (width / kGroup) + column / kGroup);
      for (int n = 0; n < kTileRows; n++)
        total[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][n]), scale, total[m][n]);
    }
  }
}

// The added lanes of four vectors.
DPLLM_INLINE __m128 reduce_four(const __m512* v) {
  __m128 quarter[4];
  for (int i = 0; i < 4; i++) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
    quarter[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  return _mm_hadd_ps(_mm_hadd_ps(quarter[0], quarter[1]), _mm_hadd_ps(quarter[2], quarter[3]));
}

// What turns added lanes of four rows of weights into elements of y.
struct FinishFour {
  __m128 scale, bias;
  __mmask8 rows;

  template <int B>
  static FinishFour of(const Matrix& w, int n, int count) {
    float scale[kTileRows] = {}, bias[kTileRows] = {};
    for (int j = 0; j < count; j++) {
      scale[j] = w.scales[B][(n + j) / w.rows_per_table] * kBase * (w.row_scale ? w.row_scale[n + j] : 1.f);
      bias[j] = w.bias ? w.bias[n + j] : 0.f;
    }
    return {_mm_loadu_ps(scale), _mm_loadu_ps(bias), __mmask8((1 << count) - 1)};
  }
  void operator()(const __m512* total, float correction, float* y) const {
    const __m128 sum = _mm_sub_ps(reduce_four(total), _mm_set1_ps(correction));
    _mm_mask_storeu_ps(y, rows, _mm_fmadd_ps(sum, scale, bias));
  }
};

// Four decoded rows of weights, from row n on, against prompt rows m0..m1.
DPLLM_INLINE void tiles(const Matrix& w, const uint8_t* rows, const Prompt& x, const FinishFour& finish, float* y, int m0,
                        int m1) {
  const auto run = [&](auto tokens, int m) {
    constexpr int kTokens = decltype(tokens)::value;
    __m512 total[kTokens][kTileRows];
    tile<kTokens>(rows, padded(w.columns), x, m, total);
    for (int i = 0; i < kTokens; i++) finish(total[i], x.correction[m + i], y + int64_t(m + i) * w.rows);
  };
  int m = m0;
  for (; m + kTileTokens <= m1; m += kTileTokens) run(Constant<kTileTokens>(), m);
  for (; m < m1; m++) run(Constant<1>(), m);
}

template <int B>
void matmul_rows(const Matrix& w, const Prompt& x, float* y, int n0, int n1) {
  const int width = padded(w.columns);
  const int block = std::max<int>(kTileTokens, int(kPromptBytes / width) / kTileTokens * kTileTokens);
  AlignedBytes rows(size_t(width) * kTileRows);
  for (int m0 = 0; m0 < x.rows; m0 += block)
    for (int n = n0; n < n1; n += kTileRows) {
      const int count = std::min(kTileRows, n1 - n);
      for (int j = 0; j < count; j++) decode_row<B>(w, n + j, rows.data() + int64_t(j) * width);
      tiles(w, rows.data(), x, FinishFour::of<B>(w, n, count), y + n, m0, std::min(x.rows, m0 + block));
    }
}

void matmul(const Matrix& w, int bits, const Prompt& x, float* y, int n0, int n1) {
  with_width(bits, [&](auto width) { matmul_rows<decltype(width)::value>(w, x, y, n0, n1); });
}

void quantize_prompt(const float* x, int columns, int row, Prompt* out) {
  const int width = padded(columns);
  Activation a{out->digits + int64_t(row) * width, nullptr, out->scale + int64_t(row) * (width / kGroup), 0, 1};
  quantize_as<PromptLayout>(x, columns, 1, &a);
  out->correction[row] = a.correction;
}

}  // namespace
}  // namespace dpllm
