// The product of a whole prompt for AVX-512 with VBMI, GFNI and VNNI, int8 times int8. Multiplications limit its speed,
// while memory limits a decode step. A panel of 32 rows of weights is looked up once for the whole prompt.
//
// Order. A lane is a row. Vector s of a panel holds four columns of sixteen rows, and the activations of these columns are
// broadcast, so no lanes need to be added. Twelve accumulators take eight products each (32 columns, one scale) before
// they are converted and added to the totals, which have registers of their own. With 24 accumulators the totals would go
// through memory, which takes 15% more time.
#pragma once

#include <algorithm>

#include "gemv_avx512.h"
#include "ops.h"

namespace dpllm {
namespace {

constexpr int kPanelRows = Prompt::kPanelRows;     // two vectors of kLanes
constexpr int kTileTokens = Prompt::kTileTokens;   // rows of the prompt at once
constexpr int kSteps = kGroup / 4;                 // of four columns, in a group

// Columns 16 q + 8 u + 4 e + 0..3 of a group are its step 4 u + 2 q + e: the order in which codes come out (gemv_avx512.h).
// Steps of the rows of a tile are interleaved, as are their scales.
struct PromptLayout {
  static constexpr bool kUnsigned = true;
  static constexpr int kTwice = 0;

  static void place(int group, const int8_t* digits, int8_t* out) {
    for (int u = 0; u < 2; u++)
      for (int q = 0; q < 2; q++)
        for (int e = 0; e < 2; e++) {
          const int64_t step = int64_t(group) * kSteps + 4 * u + 2 * q + e;
          std::memcpy(out + step * kTileTokens * 4, digits + 16 * q + 8 * u + 4 * e, 4);
        }
  }
  static void place_scale(int group, float scale, float* out) { out[int64_t(group) * kTileTokens] = scale; }
};

void quantize_prompt(const float* x, int columns, int row, Prompt* out) {
  const int64_t width = padded(columns);
  const int64_t tile = row / kTileTokens * kTileTokens, place = row % kTileTokens;
  Activation a{out->digits + tile * width + place * 4, nullptr, out->scale + tile * (width / kGroup) + place, 0, 1};
  quantize_as<PromptLayout>(x, columns, 1, &a);
  out->correction[row] = a.correction;
}

// -- weights -------------------------------------------------------------------------------------------------------

// 16 vectors of 16 doublewords, transposed.
DPLLM_INLINE void transpose(const Vec* in, Vec* out) {
  Vec a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + c]: doubleword c of every lane, of rows i..i+3
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int c = 0; c < 4; c++) {
    const Vec lo0 = _mm512_shuffle_i64x2(b[c], b[4 + c], 0x44), hi0 = _mm512_shuffle_i64x2(b[c], b[4 + c], 0xee);
    const Vec lo1 = _mm512_shuffle_i64x2(b[8 + c], b[12 + c], 0x44), hi1 = _mm512_shuffle_i64x2(b[8 + c], b[12 + c], 0xee);
    out[c] = _mm512_shuffle_i64x2(lo0, lo1, 0x88);
    out[4 + c] = _mm512_shuffle_i64x2(lo0, lo1, 0xdd);
    out[8 + c] = _mm512_shuffle_i64x2(hi0, hi1, 0x88);
    out[12 + c] = _mm512_shuffle_i64x2(hi0, hi1, 0xdd);
  }
}

// The digits of one line of a row: vector (h, u) to out[(2 h + u) * kLanes].
template <int B>
DPLLM_INLINE void decode_line(const Matrix& w, int n, int64_t at, Vec* out) {
  Table<B> table;
  load_tables<B, 1>(w, n, &table);
  const Lines<B> lines{w.planes + n * w.row_bytes, w.plane_bytes};
  Vec planes[B];
  if (at + 64 <= w.row_bytes) lines.load(at, planes);
  else lines.load_tail(at, __mmask16((1u << ((w.row_bytes - at) / 4)) - 1), planes);
  const Codes<B> codes(planes);
  for (int h = 0; h < 4; h++) {
    Vec code[2];
    codes(h, code);
    for (int u = 0; u < 2; u++) out[(2 * h + u) * kLanes] = table[code[u]];
  }
}

// Rows n..n+count as unsigned bytes (high digit + 128): panel [groups][steps][32 rows][4 columns]. Lanes beyond `count`
// repeat old values, whose sums are not read.
template <int B>
void decode_panel(const Matrix& w, int n, int count, uint8_t* panel) {
  alignas(64) Vec lines[8 * kLanes] = {}, columns[kLanes];
  for (int half = 0; half < kPanelRows; half += kLanes)
    for (int64_t at = 0; at < w.row_bytes; at += 64) {
      for (int r = 0; r < std::min(kLanes, count - half); r++) decode_line<B>(w, n + half + r, at, lines + r);
      for (int hu = 0; hu < 8; hu++) {
        transpose(lines + hu * kLanes, columns);
        for (int i = 0; i < kLanes; i++) {  // lane i / 4 of the line, step 4 u + i % 4
          const int64_t group = at / 4 + i / 4 * 4 + hu / 2, step = group * kSteps + hu % 2 * 4 + i % 4;
          _mm512_store_si512(panel + step * kPanelRows * 4 + half * 4, columns[i]);
        }
      }
    }
}

// -- products ------------------------------------------------------------------------------------------------------

// total[m][j], lane r: rows 16 j + r of the panel with row m of the tile.
template <int kTokens>
DPLLM_INLINE void tile(const uint8_t* panel, const int8_t* x, const float* scale, int groups, __m512 (*total)[2]) {
  for (int m = 0; m < kTokens; m++) total[m][0] = total[m][1] = _mm512_setzero_ps();
  for (int g = 0; g < groups; g++, scale += kTileTokens) {
    Vec sum[kTokens][2];
    for (auto& s : sum) s[0] = s[1] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; s++, panel += kPanelRows * 4, x += kTileTokens * 4) {
      const Vec w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 64);
      for (int m = 0; m < kTokens; m++) {
        int32_t four;
        std::memcpy(&four, x + 4 * m, 4);
        const Vec xs = _mm512_set1_epi32(four);
        sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], w0, xs);
        sum[m][1] = _mm512_dpbusd_epi32(sum[m][1], w1, xs);
      }
    }
    for (int m = 0; m < kTokens; m++)
      for (int j = 0; j < 2; j++)
        total[m][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][j]), _mm512_set1_ps(scale[m]), total[m][j]);
  }
}

// Turns the totals of a panel's rows into elements of y.
struct FinishPanel {
  alignas(64) float scale[kPanelRows] = {}, bias[kPanelRows] = {};
  int count;

  FinishPanel(const Matrix& w, int bits, int n, int count) : count(count) {
    for (int r = 0; r < count; r++) {
      scale[r] = w.scales[bits][(n + r) / w.rows_per_table] * kBase * (w.row_scale ? w.row_scale[n + r] : 1.f);
      bias[r] = w.bias ? w.bias[n + r] : 0.f;
    }
  }
  DPLLM_INLINE void operator()(const __m512* total, float correction, float* y) const {
    for (int j = 0; j < 2; j++) {
      const auto rows = __mmask16((uint64_t(1) << std::clamp(count - j * kLanes, 0, kLanes)) - 1);
      const __m512 sum = _mm512_sub_ps(total[j], _mm512_set1_ps(correction));
      const __m512 value = _mm512_fmadd_ps(sum, _mm512_load_ps(scale + j * kLanes), _mm512_load_ps(bias + j * kLanes));
      _mm512_mask_storeu_ps(y + j * kLanes, rows, value);
    }
  }
};

// The first kTokens rows of a tile of the prompt (fewer at its end) with a decoded panel.
template <int kTokens>
void tile_rows(const uint8_t* panel, const Prompt& x, int columns, const FinishPanel& finish, int token, int64_t stride,
               float* y) {
  const int64_t width = padded(columns);
  __m512 total[kTokens][2];
  tile<kTokens>(panel, x.digits + token * width, x.scale + token * (width / kGroup), (columns + kGroup - 1) / kGroup, total);
  for (int m = 0; m < std::min(kTokens, x.rows - token); m++) finish(total[m], x.correction[token + m], y + m * stride);
}

// Rows n0..n1, at most a panel of them.
template <int B>
void matmul_rows(const Matrix& w, const Prompt& x, uint8_t* panel, float* y, int n0, int n1) {
  decode_panel<B>(w, n0, n1 - n0, panel);
  const FinishPanel finish(w, B, n0, n1 - n0);
  for (int token = 0; token < x.rows; token += kTileTokens) {
    const int left = x.rows - token;
    const auto run = left > kTileTokens / 2 ? tile_rows<kTileTokens> : tile_rows<kTileTokens / 2>;
    run(panel, x, w.columns, finish, token, w.rows, y + int64_t(token) * w.rows + n0);
  }
}

void matmul(const Matrix& w, int bits, const Prompt& x, uint8_t* panel, float* y, int n0, int n1) {
  with_width(bits, [&](auto width) { matmul_rows<decltype(width)::value>(w, x, panel, y, n0, n1); });
}

}  // namespace
}  // namespace dpllm
