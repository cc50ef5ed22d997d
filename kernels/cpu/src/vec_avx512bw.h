// 64 bytes of plane at once, for AVX-512 with BW but without VBMI, GFNI and VNNI.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace dpllm {
namespace {

struct Vec {
  __m512i v;

  static constexpr int kBytes = 64;
  static constexpr bool kUnsigned = false;
  static constexpr bool kSingle = true;
  using Floats = __m512;

  static Vec load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  static Vec load_part(const uint8_t* p, int bytes) {  // a multiple of 4
    return {_mm512_maskz_loadu_epi32(__mmask16((1u << (bytes / 4)) - 1), p)};
  }
  static Vec repeat(int byte) { return {_mm512_set1_epi8(char(byte))}; }
  static Vec select(Vec mask, Vec a, Vec b) { return {_mm512_ternarylogic_epi64(mask.v, a.v, b.v, 0xCA)}; }
  template <int n>  // shifts across byte borders: callers mask the bits of the neighbour
  Vec up() const {
    return {_mm512_slli_epi16(v, n)};
  }
  template <int n>
  Vec down() const {
    return {_mm512_srli_epi16(v, n)};
  }
  Vec low_nibbles() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }

  template <int B>
  struct Table {
    static constexpr int kParts = B <= 4 ? 1 : 1 << (B - 4);
    __m512i part[kParts];

    DPLLM_INLINE void load(const int8_t* digits) {
      if constexpr (B <= 3) {
        int64_t eight = 0;
        __builtin_memcpy(&eight, digits, 1 << B);
        if constexpr (B == 2) eight |= eight << 32;
        part[0] = _mm512_set1_epi64(eight);
      } else {
        for (int i = 0; i < kParts; i++)
          part[i] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(digits + 16 * i)));
      }
    }

    // Entries of the codes at bit t: nibble from the low planes, bit t of `above` from the others.
    template <int t>
    DPLLM_INLINE Vec at(Vec nibble, const Vec* above) const {
      __m512i value[kParts];
      for (int i = 0; i < kParts; i++) value[i] = _mm512_shuffle_epi8(part[i], nibble.v);
      for (int plane = B - 5, pairs = kParts / 2; pairs >= 1; plane--, pairs /= 2) {
        const __mmask64 bit = _mm512_test_epi8_mask(above[plane].v, _mm512_set1_epi8(char(1 << t)));
        for (int i = 0; i < pairs; i++) value[i] = _mm512_mask_mov_epi8(value[2 * i], bit, value[2 * i + 1]);
      }
      return {value[0]};
    }
  };

  struct Sum {
    __m512i s = _mm512_setzero_si512();

    DPLLM_INLINE void add(Vec table, Vec x) {  // |x| * (table with the sign of x): pairs stay within 16 bits
      const __mmask64 negative = _mm512_movepi8_mask(x.v);
      const __m512i value = _mm512_mask_sub_epi8(table.v, negative, _mm512_setzero_si512(), table.v);
      const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(x.v), value);
      s = _mm512_add_epi32(s, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
  };

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static Floats multiply_add(Sum a, Floats b, Floats c) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(a.s), b, c); }
  static float reduce(Floats f) { return _mm512_reduce_add_ps(f); }
};

}  // namespace
}  // namespace dpllm
