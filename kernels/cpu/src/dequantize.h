// Dequantisation for the instruction sets of bitplane.h.
//
// Entries are looked up as for a product, one stretch of a row at a time. Bit t of byte p is column 8 p + t, so columns
// are brought into order by an 8 x 8 transposition of bytes within every 8 bytes of the planes: three rounds of exchanges.
#pragma once

#include "bitplane.h"
#include "ops.h"

namespace dpllm {
namespace {

// Eight vectors of n bytes.
template <int n>
struct Square {
  typedef uint64_t Words __attribute__((vector_size(n)));
  Words a[8];

  // a[t] byte r <-> a[r] byte t, in every lane of 64 bits: the bits of t and r change places one by one.
  template <int s = 4>
  DPLLM_INLINE void transpose() {
    constexpr uint64_t low = s == 4 ? 0x00000000ffffffff : s == 2 ? 0x0000ffff0000ffff : 0x00ff00ff00ff00ff;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      if (i & s) continue;
      const Words differ = (a[i] >> 8 * s ^ a[i + s]) & low;
      a[i] ^= differ << 8 * s;
      a[i + s] ^= differ;
    }
    if constexpr (s > 1) transpose<s / 2>();
  }
};

template <class V>
struct Dequantize {
  static constexpr int kColumns = V::kBytes * 8;

  // One digit of a block's entries, in the order of the columns.
  DPLLM_INLINE static void in_order(const V (&entries)[8][2], int digit, int8_t* out) {
    Square<V::kBytes> bytes;
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++) std::memcpy(&bytes.a[t], &entries[t][digit], V::kBytes);
    bytes.transpose();
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
      for (int lane = 0; lane < V::kBytes / 8; lane++) {
        const uint64_t eight = bytes.a[r][lane] ^ (V::kUnsigned ? 0x8080808080808080 : 0);
        std::memcpy(out + 64 * lane + 8 * r, &eight, 8);
      }
  }

  // Values of whole blocks, float32.
  __attribute__((noinline)) static void values(const Stretch<V, 2>& stretch, int blocks, float scale, float* out) {
    int8_t high[kColumns], low[kColumns];
    for (int b = 0; b < blocks; b++, out += kColumns) {
      in_order(stretch.entries[b], 0, high);
      in_order(stretch.entries[b], 1, low);
      for (int k = 0; k < kColumns; k += Simd::kLanes) {
        const auto value = (Simd::widen(high + k) * float(kBase) + Simd::widen(low + k)) * scale;
        std::memcpy(out + k, &value, sizeof value);
      }
    }
  }

  template <int B>
  static void rows(const Matrix& w, bool bf16, void* to, int n0, int n1) {
    Stretch<V, 2> stretch;
    float buffer[Stretch<V, 2>::kBytes * 8];
    const int64_t bytes = (w.columns + kGroup - 1) / kGroup * (kGroup / 8);
    for (int n = n0; n < n1; n++) {
      const float scale = w.scales[B][n / w.rows_per_table] * (w.row_scale ? w.row_scale[n] : 1.f);
      for (int64_t at = 0; at < bytes; at += stretch.kBytes) {
        const int64_t end = bytes - at < stretch.kBytes ? bytes : at + stretch.kBytes;
        const int64_t first = int64_t(n - n0) * w.columns + at * 8, left = w.columns - at * 8;
        const int columns = int(left < (end - at) * 8 ? left : (end - at) * 8);
        stretch.template look_up<B>(w, n, at, end);
        values(stretch, int((end - at + V::kBytes - 1) / V::kBytes), scale, buffer);
        if (!bf16) std::memcpy(static_cast<float*>(to) + first, buffer, size_t(columns) * sizeof(float));
        else
          for (int k = 0; k < columns; k++) static_cast<uint16_t*>(to)[first + k] = to_bf16(buffer[k]);
      }
    }
  }

  static void run(const Matrix& w, int bits, bool bf16, void* out, int n0, int n1) {
    with_width(bits, [&](auto width) { rows<decltype(width)::value>(w, bf16, out, n0, n1); });
  }
};

}  // namespace
}  // namespace dpllm
